"""Sources of tokens: text, documents or token files as one sequence, which is read in parts."""

import bisect
import itertools
import math
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tpipe_jax.config.settings import BYTES_NAME, DataConfig
from tpipe_jax.data.documents import RECORD_SUFFIXES, TEXT_SUFFIXES, read_documents
from tpipe_jax.data.token_files import LLM_C_FORMAT, PYDOCS, TEXT, TokenFile, open_files
from tpipe_jax.data.tokenizer import Tokenizer, open_tokenizer
from tpipe_jax.errors import UserError

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
    ) -> None:
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


def open_shares(name: str, value: str, vocab_size: int, data: DataConfig) -> list[Share]:
    """Opens the sources that a setting names, as a.bin or a.bin:0.7,b.bin:0.3. Each share is a
    whole source.

    Raises `UserError` if a source cannot be used.
    """
    if not _WEIGHTED.search(value) or Path(value).exists():
        source = open_source(name, value, vocab_size, data)
        return [Share(source, range(len(source)))]
    shares = []
    for part in value.split(","):
        found = _WEIGHTED.search(part)
        if not found or not 0 < (weight := float(found[1])) < math.inf:
            raise UserError(
                f"{name}={value} has a source {part} without a weight: give each a positive one, "
                "as a.bin:0.7,b.bin:0.3."
            )
        source = open_source(name, part[: found.start()], vocab_size, data)
        shares.append(Share(source, range(len(source)), weight))
    return shares


def open_source(name: str, value: str, vocab_size: int, data: DataConfig) -> TokenSource:
    """Opens the source that a setting names. Raises `UserError` if it cannot be used."""
    setting = f"{name}={value}"
    tokenizer = open_tokenizer("config.data.tokenizer", data.tokenizer)
    try:
        found = [_pydocs(setting)] if value == PYDOCS else open_files(setting, value, vocab_size)
        parts = [_in_tokens(part, tokenizer, vocab_size, data) for part in found if len(part)]
    except OSError as error:
        raise UserError(
            f"{setting} cannot be read ({error.strerror}: {error.filename}): "
            "name data that you have permission to read."
        ) from None
    if not parts:
        raise UserError(
            f"{setting} is empty: give a file that is not, or a folder with such files "
            f"that end in {', '.join((*TEXT_SUFFIXES, *RECORD_SUFFIXES))}."
        )
    files = {str(part.path.resolve()) for part in parts if part.path} or {PYDOCS}
    formats = sorted({part.format for part in parts})
    return TokenSource(setting, vocab_size, parts, files, formats, data.separator)


def _in_tokens(part: Segment, tokenizer: Tokenizer, vocab_size: int, data: DataConfig) -> Segment:
    """Returns a part as tokens in memory if it has records, or has text and tokens are not bytes.
    Returns any other part as it is. Raises `UserError` if the tokenizer exceeds `vocab_size`.
    """
    is_record = part.path is not None and part.path.suffix.lower() in RECORD_SUFFIXES
    if not is_record and (part.format != TEXT or data.tokenizer == BYTES_NAME):
        return part
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"config.data.tokenizer={data.tokenizer} has {tokenizer.vocab_size} tokens, more than "
            f"config.model.vocab_size={vocab_size}: set that to at least as many."
        )
    if not is_record:
        assert part.starts is not None  # known for text
        texts = np.split(part[:], part.starts[1:])
        encoded = [tokenizer.encode(t.tobytes().decode(errors="replace")) for t in texts]
        starts = np.cumsum([0, *map(len, encoded)])[:-1]
        return Documents(np.concatenate(encoded), starts, "text by its tokenizer", part.path)
    assert part.path is not None
    return _encoded(part.path, part.format, tokenizer, data.field)


def _encoded(path: Path, format: str, tokenizer: Tokenizer, field: str) -> Documents:
    """Returns the tokens of a file's documents, each with the tokenizer's end, if it has one."""
    pieces: list[np.ndarray] = []
    is_learnt: list[np.ndarray] = []
    starts = [0]
    end = np.array([] if tokenizer.end is None else [tokenizer.end], np.int32)
    for document in read_documents(path, field):
        prompt, text = tokenizer.encode(document.prompt), tokenizer.encode(document.text)
        pieces += [prompt, text, end]
        is_learnt += [np.zeros(len(prompt), bool), np.ones(len(text) + len(end), bool)]
        starts.append(starts[-1] + len(prompt) + len(text) + len(end))
    if not pieces:
        raise UserError(f"{path} has no documents: give one that has.")
    mask = np.concatenate(is_learnt)
    return Documents(
        np.concatenate(pieces),
        np.array(starts[:-1], np.int64),
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
