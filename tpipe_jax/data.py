"""Batches of training and held-out sequences from text or token files.

Text is read as bytes, one token each. A folder is the text files below it, sorted by path, with
nothing between them. Only the windows that are asked for are read.
"""

import bisect
import errno
import itertools
import os
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from tpipe_jax.config import Config, UserError

PYDOCS = "pydocs"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")


@dataclass(frozen=True)
class TokenFile:
    """The tokens in a file, after `offset` bytes of header."""

    path: Path
    dtype: np.dtype
    offset: int
    num_tokens: int

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, where: slice) -> np.ndarray:
        """Raises OSError if the file does not have them any more."""
        start, stop, _ = where.indices(self.num_tokens)
        size = self.dtype.itemsize
        # Not mapped, since a file that is cut short while it is ends the process; and opened each
        # time, which takes 20 us, since a big folder has more files than may be open.
        with self.path.open("rb") as file:
            file.seek(self.offset + start * size)
            content = file.read((stop - start) * size)
        if len(content) < (stop - start) * size:
            raise OSError(errno.EIO, "shorter than at the start", str(self.path))
        return np.frombuffer(content, self.dtype)


class TokenSource:
    """The tokens of a source, one sequence made of parts; `files` (paths) is empty for pydocs."""

    def __init__(
        self, setting: str, vocab_size: int, parts: Sequence[TokenFile | np.ndarray]
    ) -> None:
        self.setting = setting
        self.files = {str(part.path.resolve()) for part in parts if isinstance(part, TokenFile)}
        self._vocab_size = vocab_size
        self._parts = parts
        self._bounds = [0, *itertools.accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._bounds[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)`, int32. Raises `UserError` for an id outside the vocabulary, and
        for a file that cannot be read any more.
        """
        first = bisect.bisect_right(self._bounds, start) - 1
        end = bisect.bisect_left(self._bounds, stop)
        pairs = zip(self._parts[first:end], self._bounds[first:end], strict=True)
        try:
            tokens = np.concatenate([part[max(start - at, 0) : stop - at] for part, at in pairs])
        except OSError as error:
            raise UserError(
                f"{self.setting} cannot be read any more ({error.strerror}: {error.filename}): "
                "bring it back as it was, and the same command continues."
            ) from error
        outside = np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))
        if outside.size:
            raise UserError(
                f"{self.setting} has token id {tokens[outside[0]]} at position "
                f"{start + outside[0]}, but ids are at least 0 and below config.model.vocab_size="
                f"{self._vocab_size}: set that to the size of the data's vocabulary."
            )
        return tokens.astype(np.int32)


@dataclass(frozen=True)
class Windows:
    """A data source for grain: sequence i is tokens `[i*T, i*T + T + 1)` of these positions."""

    source: TokenSource
    positions: range
    seq_len: int

    def __len__(self) -> int:
        return (len(self.positions) - 1) // self.seq_len

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.positions.start + index * self.seq_len
        return self.source.read(start, start + self.seq_len + 1)


class Batches:
    """Batches of sequences, shuffled anew in each epoch or, without a seed, in the data's order.

    Batch i is sequences i * batch_size ... of an endless stream, a pure function of seed and i: the
    same in every process, and all that a resumed run has to know is its step.
    """

    def __init__(self, windows: Windows, batch_size: int, shuffle_seed: int | None) -> None:
        self.num_tokens = len(windows.positions)
        self._batch_size = batch_size
        sequences = grain.MapDataset.source(windows)
        if shuffle_seed is not None:
            # Not shuffle(seed=...), with which epoch 1 of seed 0 would be epoch 0 of seed 1.
            sequences = sequences.seed(shuffle_seed).shuffle()
        self._sequences = sequences.repeat()

    def batch(self, index: int, rows: slice = slice(None)) -> np.ndarray:
        """Rows of batch `index`, int32 `[rows, T + 1]`: inputs are `[:, :-1]`, targets `[:, 1:]`.

        Reads these rows only. Raises `UserError` if a token id lies outside the vocabulary.
        """
        first = index * self._batch_size
        numbers = range(first, first + self._batch_size)[rows]
        sequences: list[Any] = [self._sequences[number] for number in numbers]  # none filtered out
        return np.stack(sequences)


def open_data(config: Config) -> tuple[Batches, Batches]:
    """Batches to train on, shuffled by config.train.seed, and held-out ones, in the data's order.

    Held-out tokens are those of config.data.eval or, if that is none or names the same files, the
    last part of config.data.train; none is trained on. Raises `UserError` for data it cannot use.
    """
    data, seed = config.data, config.train.seed
    train = _open("config.data.train", data.train, config.model.vocab_size)
    held_out = train
    if data.eval is not None:
        held_out = _open("config.data.eval", data.eval, config.model.vocab_size)

    if held_out.files == train.files:
        split = len(train) - int(data.held_out * len(train))
        by = f"by config.data.held_out={data.held_out}"
        return (
            _batches(config, train, range(split), f"left to train on {by}", seed),
            _batches(config, train, range(split, len(train)), f"held out {by}", None),
        )
    if shared := train.files & held_out.files:
        raise UserError(
            f"{held_out.setting} holds {min(shared)}, and so does {train.setting}: keep their "
            "files apart, or leave out config.data.eval to hold out the end of config.data.train."
        )
    return (
        _batches(config, train, range(len(train)), "to train on", seed),
        _batches(config, held_out, range(len(held_out)), "held out", None),
    )


def _batches(
    config: Config, source: TokenSource, positions: range, use: str, shuffle_seed: int | None
) -> Batches:
    seq_len = config.model.seq_len
    if len(positions) < seq_len + 1:
        raise UserError(
            f"{source.setting} has {len(source)} tokens, {len(positions)} of them {use}, but one "
            f"sequence of config.model.seq_len={seq_len} takes {seq_len + 1}: "
            "give longer data or lower config.model.seq_len."
        )
    return Batches(Windows(source, positions, seq_len), config.train.batch_size, shuffle_seed)


def _open(name: str, value: str, vocab_size: int) -> TokenSource:
    setting = f"{name}={value}"
    if value == PYDOCS:
        return TokenSource(setting, vocab_size, [_pydocs(setting)])
    try:
        parts = [part for part in _open_path(setting, value, vocab_size) if len(part)]
    except OSError as error:
        raise UserError(
            f"{setting} cannot be read ({error.strerror}: {error.filename}): "
            "name data that you have permission to read."
        ) from None
    if not parts:
        raise UserError(
            f"{setting} is empty: give a file that is not, or a folder with such files "
            f"that end in {', '.join(TEXT_SUFFIXES)}."
        )
    return TokenSource(setting, vocab_size, parts)


def _pydocs(setting: str) -> np.ndarray:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            f"{setting} needs the module pydoc_data, which this Python lacks: give a text file."
        ) from None
    return np.frombuffer("".join(topics.values()).encode(), np.uint8)


def _open_path(setting: str, value: str, vocab_size: int) -> list[TokenFile]:
    path = Path(os.path.expanduser(value))
    if value and path.is_dir():  # Path("") is the current folder
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [_open_text(file) for file in files if file.suffix.lower() in TEXT_SUFFIXES]
    if not path.is_file():
        raise UserError(
            f"{setting} does not exist: give {PYDOCS}, a text file, a folder of text files, "
            "or a token file (.bin or .npy)."
        )
    if path.suffix == ".npy":
        return [_open_npy(setting, path)]
    if path.suffix == ".bin":
        return [_open_bin(setting, path, vocab_size)]
    return [_open_text(path)]


def _open_text(path: Path) -> TokenFile:
    return TokenFile(path, np.dtype(np.uint8), 0, _num_bytes(path))


def _open_bin(setting: str, path: Path, vocab_size: int) -> TokenFile:
    is_long = vocab_size > 2**16 or _looks_like_uint32(path)
    dtype = np.dtype("<u4" if is_long else "<u2")
    num_tokens, rest = divmod(_num_bytes(path), dtype.itemsize)
    if rest:
        raise UserError(
            f"{setting} has {_num_bytes(path)} bytes, not a multiple of the {dtype.itemsize} of a "
            f"token: write {dtype.name}, which config.model.vocab_size={vocab_size} asks for."
        )
    return TokenFile(path, dtype, 0, num_tokens)


def _looks_like_uint32(path: Path) -> bool:
    """Whether the upper halves of what would be uint32 are zero and the lower ones are not."""
    with path.open("rb") as file:
        head = np.frombuffer(file.read(2**16), np.uint8)
    pairs = head[: len(head) // 4 * 4].view("<u2").reshape(-1, 2)
    return bool(pairs[:, 0].any() and not pairs[:, 1].any())


def _open_npy(setting: str, path: Path) -> TokenFile:
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, tokenize.TokenError) as error:  # TokenError: a damaged header
        raise UserError(
            f"{setting} is not a whole .npy array ({error}): write it with numpy.save."
        ) from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(
            f"{setting} has shape {tokens.shape} and type {tokens.dtype}: "
            "save tokens as a one-dimensional array of integers."
        )
    return TokenFile(path, tokens.dtype, tokens.offset, len(tokens))


def _num_bytes(path: Path) -> int:
    # Opened rather than only looked up, since a file's size does not show that it may be read.
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size
