"""Turns the files of a source into tokens, on the disk or encoded into memory."""

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tpipe_jax.config.settings import BYTES, BYTES_NAME, DataConfig
from tpipe_jax.data.contents import Content
from tpipe_jax.data.documents import EMPTY_FILES, HowToRead, Piece, read_pieces, skipped_text
from tpipe_jax.data.encode import encoded
from tpipe_jax.data.token_files import TEXT, TokenFile
from tpipe_jax.data.tokenizer import Tokenizer
from tpipe_jax.errors import UserError

MOST_TOKENS = 2**30  # of a file whose tokens are kept in memory: 4 GB
# A small file may unpack to any number of tokens and documents. It has at most as many as these.
SMALL_TOKENS, SMALL_DOCUMENTS = 2**25, 2**21
TOKENS_PER_BYTE = 50  # of a larger file; it has at most one document for each byte
BY_TOKENIZER = "text by its tokenizer"  # a format


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


def _bounds(path: Path | None) -> tuple[int, int]:
    """Returns how many tokens and documents of a file are kept in memory at most."""
    size = path.stat().st_size if path else MOST_TOKENS
    return (
        min(max(SMALL_TOKENS, TOKENS_PER_BYTE * size), MOST_TOKENS),
        max(SMALL_DOCUMENTS, size),
    )


class Reader:
    """Turns the files of a source into tokens, and notes what is worth a line."""

    def __init__(
        self, setting: str, tokenizer: Tokenizer, vocab_size: int, data: DataConfig
    ) -> None:
        self._setting, self._tokenizer, self._data = setting, tokenizer, data
        self._vocab_size, self._skipped = vocab_size, Counter[str]()
        self._how = HowToRead(
            data.field, data.text_separator, data.on_empty, int(data.max_record_mib * 2**20)
        )
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
            return []
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
        # These grow in place, without an object for each document.
        tokens, starts, is_learnt = array("i"), array("q"), bytearray()
        is_new, most, most_documents = True, *_bounds(path)
        is_file = format in (TEXT, BY_TOKENIZER) and self._how.separator is None
        end = np.array([] if is_file or self._tokenizer.end is None else [self._tokenizer.end])
        for part in encoded(pieces, self._tokenizer, where):
            if is_new:
                starts.append(len(tokens))
            for own in (part.tokens, end) if part.ends else (part.tokens,):
                tokens.frombytes(own.astype(np.int32).tobytes())
                is_learnt.extend(bytes([part.is_learnt]) * len(own))
            is_new = part.ends
            if len(tokens) > most or len(starts) > most_documents:
                what = f"{most:,} tokens" if len(tokens) > most else f"{most_documents:,} documents"
                raise UserError(
                    f"{where} has more than {what}, which a run does not keep in memory: make "
                    "shards of it with tpipe tokenize."
                )
        self._has_documents |= not is_file and len(starts) > 1
        if not tokens:
            return None
        mask = np.frombuffer(is_learnt, bool)
        return Documents(
            np.frombuffer(tokens, np.int32),
            np.frombuffer(starts, np.int64),
            format,
            path,
            None if mask.all() else mask,
        )
