"""Sources of tokens: text, documents or token files as one sequence, which is read in parts."""

import bisect
import itertools
import math
import os
import re
from collections.abc import Iterable, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tpipe_jax.config.paths import expanded
from tpipe_jax.config.settings import BYTES_NAME, DataConfig
from tpipe_jax.data.contents import check_is_file, shortened
from tpipe_jax.data.reader import Documents, Reader, Segment
from tpipe_jax.data.token_files import (
    LLM_C_FORMAT,
    PYDOCS,
    TEXT,
    TokenFile,
    about_shards,
    open_files,
    tokenizer_of_shards,
)
from tpipe_jax.data.tokenizer import hugging_face, open_tokenizer
from tpipe_jax.errors import UserError

_WEIGHTED = re.compile(r":(\d*\.?\d+(?:[eE][+-]?\d+)?)$")  # how each of several sources ends


class TokenSource:
    """A source's tokens as one sequence made of parts, and the paths and formats of its files."""

    def __init__(
        self,
        setting: str,
        vocab_size: int,
        parts: Sequence[Segment],
        files: Set[str] = frozenset(),
        formats: Sequence[str] = (),
        separator: int | None = None,
        notes: Iterable[str] = (),
        held_out: "TokenSource | None" = None,
    ) -> None:
        self.notes = list(notes)
        """Lines on what was skipped or left out."""
        self.held_out = held_out
        """The tokens that the names of the files keep apart, if there are any."""
        self.setting, self.files, self.formats = setting, files, formats
        self._vocab_size, self._separator = vocab_size, separator
        self._parts = parts
        self._bounds = [0, *itertools.accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._bounds[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)`, int32. Raises `UserError` for an id outside the vocabulary, and
        for a file that cannot be read any more.
        """
        try:
            tokens = np.concatenate([part[own] for part, own in self._within(start, stop)])
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

    @property
    def has_prompts(self) -> bool:
        """Whether some tokens are of prompts, which are not learnt."""
        return any(
            isinstance(part, Documents) and part.is_learnt is not None for part in self._parts
        )

    def is_learnt(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens `[start, stop)` are learnt, bool: all but those of prompts."""
        return np.concatenate(
            [
                np.ones(own.stop - own.start, bool)
                if isinstance(part, TokenFile) or part.is_learnt is None
                else part.is_learnt[own]
                for part, own in self._within(start, stop)
            ]
        )

    def check_documents(self) -> None:
        """Raises `UserError` if a part does not say where documents begin and there is no
        separator.
        """
        for part in self._parts:
            if part.starts is None and self._separator is None:
                raise UserError(
                    f"{self.setting} ({part.format}) does not say where documents begin: set "
                    "config.data.separator to the token between them, as 50256 for GPT-2's "
                    "tokenizer."
                )

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Where each document begins, ascending.

        Raises `UserError` if a part has no index of its documents.
        """
        starts: list[np.ndarray] = []
        for part, at in zip(self._parts, self._bounds, strict=False):
            if part.starts is None:
                raise UserError(
                    f"{self.setting} ({part.format}) has no index of its documents, which "
                    "config.data.packing=whole needs: set it to cut, or make a folder of the text "
                    "with tpipe tokenize."
                )
            starts.append(part.starts + at)
        return np.concatenate(starts)

    def begins(self, start: int, tokens: np.ndarray) -> np.ndarray:
        """Returns which of the tokens are the first of a document, bool. `tokens` are those that
        `read` returns from `start` on. A document that begins at the first of them may go
        unnoticed, since the separator before it is not among them.
        """
        result = np.zeros(len(tokens), bool)
        at = 0
        for part, own in self._within(start, start + len(tokens)):
            stop = at + own.stop - own.start
            if part.starts is not None:
                low, high = np.searchsorted(part.starts, (own.start, own.stop))
                result[at + part.starts[low:high] - own.start] = True
            elif part.format.startswith(LLM_C_FORMAT):  # its separator begins a document
                result[at:stop] = tokens[at:stop] == self._separator
            else:
                result[at + 1 : stop] = tokens[at : stop - 1] == self._separator
                result[at] |= own.start == 0
            at = stop
        return result

    def _within(self, start: int, stop: int) -> list[tuple[Segment, slice]]:
        """Returns the parts that tokens `[start, stop)` lie in, and the slice of each part."""
        first = bisect.bisect_right(self._bounds, start) - 1
        end = bisect.bisect_left(self._bounds, stop)
        return [
            (part, slice(max(start - at, 0), min(stop - at, len(part))))
            for part, at in zip(self._parts[first:end], self._bounds[first:end], strict=True)
        ]


class Share(NamedTuple):
    """A part of a source, and its weight: how often it is drawn from among other shares."""

    source: TokenSource
    positions: range
    weight: float = 1.0


def open_shares(
    name: str, value: str, vocab_size: int, data: DataConfig, *, is_held_out: bool = False
) -> list[Share]:
    """Opens the sources that a setting names, as a.bin or a.bin:0.7,b.bin:0.3, or those in the
    lines of a file, as @mixture.txt. Each share is a whole source. Where the files of a source are
    named as train and val, these are val if `is_held_out`.

    Raises `UserError` if a source cannot be used.
    """
    shares = []
    for source_value, weight in _weighted(name, value):
        source = open_source(name, source_value, vocab_size, data)
        source = (is_held_out and source.held_out) or source
        shares.append(Share(source, range(len(source)), weight))
    return shares


def _weighted(name: str, value: str) -> list[tuple[str, float]]:
    """Returns the sources that a setting names, and their weights."""
    if value.startswith("@"):
        parts = _listed(name, value)
    elif not _WEIGHTED.search(value) or os.path.exists(expanded(name, value)):
        return [(value, 1.0)]
    else:
        parts = value.split(",")
    weighted = []
    for part in parts:
        found = _WEIGHTED.search(part)
        if not found or not 0 < (weight := float(found[1])) < math.inf:
            raise UserError(
                f"{name}={shortened(value)} has a source {part} without a weight: give each a "
                "positive one, as a.bin:0.7,b.bin:0.3."
            )
        weighted.append((part[: found.start()], weight))
    return weighted


def _listed(name: str, value: str) -> list[str]:
    """Returns the sources in the lines of a file. Their paths start from its folder."""
    path = expanded(name, value[1:])
    try:
        check_is_file(path)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}={value} cannot be read ({error}): name a file with a source and its weight in "
            "each line, as a.bin:0.7."
        ) from None
    lines = [line.strip() for line in lines]
    sources = [line for line in lines if line and not line.startswith("#")]
    if not sources:
        raise UserError(f"{name}={value} lists no sources: write a line for each, as a.bin:0.7.")
    return [own if own.startswith("~") else str(path.parent / own) for own in sources]


def open_source(name: str, value: str, vocab_size: int, data: DataConfig) -> TokenSource:
    """Opens the source that a setting names. Raises `UserError` if it cannot be used."""
    setting = f"{name}={value}"
    tokenizer = open_tokenizer("config.data.tokenizer", data.tokenizer, data.end_token)
    reader = Reader(setting, tokenizer, vocab_size, data)
    try:
        if value == PYDOCS:
            files, held_out, notes = [_pydocs(setting)], [], []
        else:
            _check_tokenizer(setting, expanded(name, value), data)
            files, held_out, notes = open_files(setting, value, vocab_size, data.field)
        parts, held_out_parts = (
            [part for file in own for part in reader.in_tokens(file)] for own in (files, held_out)
        )
    except OSError as error:
        raise UserError(
            f"{setting} cannot be read ({error.strerror}: {error.filename}): "
            "name data that you have permission to read."
        ) from None
    if not parts:
        raise UserError(
            f"{setting} is empty{_in_brackets([*notes, *reader.notes], setting)}: give text, "
            "records or tokens, or a folder of them."
        )
    notes += reader.notes
    if held_out_parts:
        names = ", ".join(file.path.name for file in held_out[:3] if isinstance(file, TokenFile))
        notes.append(f"{setting}: {names} not trained on, as the name says")
        said = [f"{setting}: the held-out part is {names}, as the name says"]
        apart = _source(f"{setting} (held out)", vocab_size, held_out_parts, said, data)
        return _source(setting, vocab_size, parts, notes, data, apart)
    return _source(setting, vocab_size, parts, notes, data)


def _check_tokenizer(setting: str, folder: Path, data: DataConfig) -> None:
    """Raises `UserError` if shards were made with another tokenizer than that of the settings."""
    about = about_shards(folder)
    own = tokenizer_of_shards(folder, about) if about else None
    if own is None or data.tokenizer == BYTES_NAME or not own.is_file():
        return
    one, other = (
        hugging_face(name, str(path)).get_vocab()
        for name, path in (("config.data.tokenizer", data.tokenizer), (setting, own))
    )
    if one != other:
        raise UserError(
            f"{setting} was made with another tokenizer than config.data.tokenizer="
            f"{data.tokenizer}: name {own}, or leave it out."
        )


def _in_brackets(notes: Sequence[str], setting: str) -> str:
    own = [note.removeprefix(f"{setting}: ") for note in notes]
    return f" ({', '.join(own)})" if own else ""


def _source(
    setting: str,
    vocab_size: int,
    parts: list[Segment],
    notes: list[str],
    data: DataConfig,
    held_out: TokenSource | None = None,
) -> TokenSource:
    files = {str(part.path.resolve()) for part in parts if part.path} or {PYDOCS}
    formats = sorted({part.format for part in parts})
    return TokenSource(setting, vocab_size, parts, files, formats, data.separator, notes, held_out)


def _pydocs(setting: str) -> Documents:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            f"{setting} needs the module pydoc_data, which this Python lacks: give a text file."
        ) from None
    pieces = [np.frombuffer(text.encode(), np.uint8) for text in topics.values()]
    starts = np.cumsum([0, *map(len, pieces)])[:-1]
    return Documents(np.concatenate(pieces), starts, TEXT)
