"""Batches of training and held-out sequences from text or token files, `token_files`.

Several sources are mixed by weights. Only the windows that are asked for are read.
"""

import bisect
import itertools
import math
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from tpipe_jax.config import BYTES_NAME, Config, UserError
from tpipe_jax.token_files import PYDOCS, TEXT, TEXT_SUFFIXES, TokenFile, open_files
from tpipe_jax.tokenizer import open_tokenizer

_WEIGHTED = re.compile(r":(\d*\.?\d+(?:[eE][+-]?\d+)?)$")  # how a source of several ends


class TokenSource:
    """The tokens of a source, one sequence made of parts, and the files, paths, and formats that
    they are read from.
    """

    def __init__(
        self,
        setting: str,
        vocab_size: int,
        parts: Sequence[TokenFile | np.ndarray],
        files: Set[str] = frozenset(),
        formats: Sequence[str] = (),
    ) -> None:
        self.setting, self.files, self.formats = setting, files, formats
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


class Share(NamedTuple):
    """A part of a source, and how often it is drawn from among others."""

    source: TokenSource
    positions: range
    weight: float = 1.0


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

    def __init__(
        self,
        windows: Sequence[Windows],
        weights: Sequence[float],
        batch_size: int,
        shuffle_seed: int | None,
    ) -> None:
        self.num_tokens = sum(len(own.positions) for own in windows)
        self.formats = sorted({name for own in windows for name in own.source.formats})
        self._batch_size = batch_size

        def endless(own: Windows) -> grain.MapDataset:
            sequences = grain.MapDataset.source(own)
            if shuffle_seed is not None:
                # Not shuffle(seed=...), with which epoch 1 of seed 0 would be epoch 0 of seed 1.
                sequences = sequences.seed(shuffle_seed).shuffle()
            return sequences.repeat()

        mixed = list(map(endless, windows))
        self._sequences = grain.MapDataset.mix(mixed, weights) if len(mixed) > 1 else mixed[0]

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
    train, held_out = _shares(config)
    uses = "to train on", "held out"
    if train[0].source is held_out[0].source:
        by = f"by config.data.held_out={config.data.held_out}"
        uses = f"left to train on {by}", f"held out {by}"
    return (
        _batches(config, train, uses[0], config.train.seed),
        _batches(config, held_out, uses[1], None),
    )


def open_held_out(config: Config) -> list[Share]:
    """The held-out tokens of `open_data`. Raises `UserError` likewise."""
    return _shares(config)[1]


def open_shares(name: str, value: str, vocab_size: int, tokenizer: str = BYTES_NAME) -> list[Share]:
    """The sources that a setting names, as a.bin or a.bin:0.7,b.bin:0.3, whole.

    Raises `UserError` if one cannot be used.
    """
    if not _WEIGHTED.search(value) or Path(value).exists():
        source = open_tokens(name, value, vocab_size, tokenizer)
        return [Share(source, range(len(source)))]
    shares = []
    for part in value.split(","):
        found = _WEIGHTED.search(part)
        if not found or not 0 < (weight := float(found[1])) < math.inf:
            raise UserError(
                f"{name}={value} has a source {part} without a weight: give each a positive one, "
                "as a.bin:0.7,b.bin:0.3."
            )
        source = open_tokens(name, part[: found.start()], vocab_size, tokenizer)
        shares.append(Share(source, range(len(source)), weight))
    return shares


def open_tokens(name: str, value: str, vocab_size: int, tokenizer: str = BYTES_NAME) -> TokenSource:
    """The tokens that a setting names. Raises `UserError` if they cannot be used."""
    setting = f"{name}={value}"
    try:
        found = [_pydocs(setting)] if value == PYDOCS else open_files(setting, value, vocab_size)
        parts = [part for part in found if len(part)]
        files = {str(part.path.resolve()) for part in parts if isinstance(part, TokenFile)}
        formats = {part.format if isinstance(part, TokenFile) else TEXT for part in parts}
        if tokenizer != BYTES_NAME:
            parts = _tokenized(parts, tokenizer, vocab_size)
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
    return TokenSource(setting, vocab_size, parts, files or {PYDOCS}, sorted(formats))


def _tokenized(
    parts: Sequence[TokenFile | np.ndarray], value: str, vocab_size: int
) -> list[TokenFile | np.ndarray]:
    """Text as tokens, in memory; what are tokens already stays."""
    tokenizer = open_tokenizer("config.data.tokenizer", value)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"config.data.tokenizer={value} has {tokenizer.vocab_size} tokens, more than "
            f"config.model.vocab_size={vocab_size}: set that to at least as many."
        )

    def tokens_of(part: TokenFile | np.ndarray) -> TokenFile | np.ndarray:
        if isinstance(part, TokenFile) and part.format != TEXT:
            return part
        content = part[:] if isinstance(part, TokenFile) else part
        return tokenizer.encode(content.tobytes().decode(errors="replace"))

    return [tokens_of(part) for part in parts]


def _shares(config: Config) -> tuple[list[Share], list[Share]]:
    """What to train on and what is held out."""
    data, vocab_size = config.data, config.model.vocab_size
    train = held_out = open_shares("config.data.train", data.train, vocab_size, data.tokenizer)
    if data.eval is not None:
        held_out = open_shares("config.data.eval", data.eval, vocab_size, data.tokenizer)
    files, others = (
        {name for share in shares for name in share.source.files} for shares in (train, held_out)
    )
    if files == others:
        splits = [len(own) - int(data.held_out * len(own)) for own, _, _ in train]
        pairs = list(zip(splits, train, strict=True))
        return (
            [Share(own, range(n), weight) for n, (own, _, weight) in pairs],
            [Share(own, range(n, len(own)), weight) for n, (own, _, weight) in pairs],
        )
    if shared := files & others:
        raise UserError(
            f"config.data.eval={data.eval} holds {min(shared)}, and so does "
            f"config.data.train={data.train}: keep their files apart, or leave out "
            "config.data.eval to hold out the end of config.data.train."
        )
    return train, held_out


def _batches(
    config: Config, shares: Sequence[Share], use: str, shuffle_seed: int | None
) -> Batches:
    seq_len = config.model.seq_len
    for source, positions, _ in shares:
        if len(positions) < seq_len + 1:
            raise UserError(
                f"{source.setting} has {len(source)} tokens, {len(positions)} of them {use}, but "
                f"one sequence of config.model.seq_len={seq_len} takes {seq_len + 1}: "
                "give longer data or lower config.model.seq_len."
            )
    windows = [Windows(source, positions, seq_len) for source, positions, _ in shares]
    weights = [share.weight for share in shares]
    return Batches(windows, weights, config.train.batch_size, shuffle_seed)


def _pydocs(setting: str) -> np.ndarray:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            f"{setting} needs the module pydoc_data, which this Python lacks: give a text file."
        ) from None
    return np.frombuffer("".join(topics.values()).encode(), np.uint8)
