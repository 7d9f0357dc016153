"""Sources of tokens: text, documents or token files as one sequence, which is read in parts."""

import bisect
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tpipe_jax.config.paths import expanded
from tpipe_jax.config.settings import BYTES, BYTES_NAME, DataConfig
from tpipe_jax.data.contents import Content
from tpipe_jax.data.documents import EMPTY_FILES, HowToRead, Piece, read_pieces, skipped_text
from tpipe_jax.data.encode import encoded
from tpipe_jax.data.token_files import LLM_C_FORMAT, PYDOCS, TEXT, TokenFile, open_files
from tpipe_jax.data.tokenizer import Tokenizer, open_tokenizer
from tpipe_jax.errors import UserError

BY_TOKENIZER = "text by its tokenizer"  # a format
_WEIGHTED = re.compile(r":(\d*\.?\d+(?:[eE][+-]?\d+)?)$")  # how each of several sources ends


@dataclass(frozen=True, eq=False)
class Documents:
    """Tokens of documents in memory."""

    tokens: np.ndarray
    starts: np.ndarray
    """Where each document begins."""
    format: str
    """The file format, in a few words."""
    path: Path | None = None
    is_learnt: np.ndarray | None = None
    """False for tokens of prompts; None if there are no prompts."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, where: slice) -> np.ndarray:
        return self.tokens[where]


Segment = TokenFile | Documents


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
                f"{name}={_short(value)} has a source {part} without a weight: give each a "
                "positive one, as a.bin:0.7,b.bin:0.3."
            )
        weighted.append((part[: found.start()], weight))
    return weighted


def _listed(name: str, value: str) -> list[str]:
    """Returns the sources in the lines of a file. Their paths start from its folder."""
    path = expanded(name, value[1:])
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}={value} cannot be read ({error}): name a file with a source and its weight in "
            "each line, as a.bin:0.7."
        ) from None
    sources = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not sources:
        raise UserError(f"{name}={value} lists no sources: write a line for each, as a.bin:0.7.")
    return [own if own.startswith("~") else str(path.parent / own) for own in sources]


def _short(value: str) -> str:
    return value if len(value) <= 100 else f"{value[:60]}...{value[-20:]}"


def open_source(name: str, value: str, vocab_size: int, data: DataConfig) -> TokenSource:
    """Opens the source that a setting names. Raises `UserError` if it cannot be used."""
    setting = f"{name}={value}"
    tokenizer = open_tokenizer("config.data.tokenizer", data.tokenizer, data.end_token)
    reader = _Reader(setting, tokenizer, vocab_size, data)
    try:
        if value == PYDOCS:
            files, held_out, notes = [_pydocs(setting)], [], []
        else:
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
        notes.append(f"{setting}: {names} held out, as the name says")
        apart = _source(f"{setting} (held out)", vocab_size, held_out_parts, [], data)
        return _source(setting, vocab_size, parts, notes, data, apart)
    return _source(setting, vocab_size, parts, notes, data)


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


class _Reader:
    """Turns the files of a source into tokens, and notes what is worth a line."""

    def __init__(
        self, setting: str, tokenizer: Tokenizer, vocab_size: int, data: DataConfig
    ) -> None:
        self._setting, self._tokenizer, self._data = setting, tokenizer, data
        self._vocab_size, self._skipped = vocab_size, Counter[str]()
        self._how = HowToRead(data.field, data.text_separator, data.on_empty)
        self._has_documents = False

    @property
    def notes(self) -> list[str]:
        notes = []
        if text := skipped_text(self._skipped):
            notes.append(f"{self._setting}: {text}")
        if self._has_documents and self._tokenizer.end is None:
            notes.append(
                f"{self._setting}: nothing separates its documents, since "
                f"config.data.tokenizer={self._data.tokenizer} has no token for that"
            )
        return notes

    def in_tokens(self, part: Segment) -> list[Segment]:
        """Returns a part as tokens in memory if it has records, is compressed, or has text that a
        tokenizer reads. Returns any other part as it is, and nothing of an empty one.

        Raises `UserError` if the tokens do not fit the vocabulary.
        """
        if isinstance(part, TokenFile) and part.content.kind == "nothing":
            if self._data.on_empty == "refuse":
                raise UserError(
                    f"{part.path} is empty: remove it, or set config.data.on_empty to skip."
                )
            self._skipped[EMPTY_FILES] += 1
        if not len(part):
            return []
        if isinstance(part, TokenFile) and part.content.kind == "token file":
            return [part]
        self._check_vocabulary()
        if isinstance(part, Documents):
            return [part if self._data.tokenizer == BYTES_NAME else self._of_texts(part)]
        is_plain = part.content == Content("text") and self._how.separator is None
        if is_plain and self._data.tokenizer == BYTES_NAME:
            return [part]
        found = self._of_file(part.path, part.format)
        return [found] if found else []

    def _check_vocabulary(self) -> None:
        size, data, vocab_size = self._tokenizer.vocab_size, self._data, self._vocab_size
        if size > vocab_size:
            raise UserError(
                f"config.data.tokenizer={data.tokenizer} has {size} tokens, more than "
                f"config.model.vocab_size={vocab_size}: set that to at least as many."
            )
        if data.tokenizer == BYTES_NAME and vocab_size != BYTES:
            raise UserError(
                f"{self._setting} is text, which config.data.tokenizer=bytes reads as {BYTES} "
                f"tokens, but config.model.vocab_size={vocab_size} is another vocabulary: name its "
                "tokenizer.json as config.data.tokenizer."
            )

    def _of_texts(self, part: Documents) -> Documents:
        texts = np.split(part.tokens, part.starts[1:])
        pieces = (Piece(text.tobytes().decode(errors="replace")) for text in texts)
        found = self._joined(pieces, self._setting, BY_TOKENIZER, part.path)
        assert found
        return found

    def _of_file(self, path: Path, format: str) -> Documents | None:
        pieces = read_pieces(path, self._how, self._skipped)
        is_text = format == TEXT and self._data.tokenizer != BYTES_NAME
        return self._joined(pieces, str(path), BY_TOKENIZER if is_text else format, path)

    def _joined(
        self, pieces: Iterable[Piece], where: str, format: str, path: Path | None
    ) -> Documents | None:
        """Returns the tokens of documents, each with the tokenizer's end, if it has one, unless
        they are whole text files. Returns None if there are none.
        """
        tokens: list[np.ndarray] = []
        is_learnt: list[np.ndarray] = []
        starts, at, is_new = [], 0, True
        is_file = format in (TEXT, BY_TOKENIZER) and self._how.separator is None
        end = np.array([] if is_file or self._tokenizer.end is None else [self._tokenizer.end])
        for part in encoded(pieces, self._tokenizer, where):
            if is_new:
                starts.append(at)
            own = [part.tokens, end.astype(np.int32)] if part.ends else [part.tokens]
            size = sum(map(len, own))
            tokens += own
            is_learnt.append(np.full(size, part.is_learnt))
            at, is_new = at + size, part.ends
        self._has_documents |= not is_file and len(starts) > 1
        if not at:
            return None
        mask = np.concatenate(is_learnt)
        return Documents(
            np.concatenate(tokens),
            np.array(starts, np.int64),
            format,
            path,
            None if mask.all() else mask,
        )


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
