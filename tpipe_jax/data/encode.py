"""Turns documents into tokens, in pieces of bounded size.

A tokenizer takes some hundred bytes of memory for each token of a text. So a long text is encoded
in pieces. It is cut only where that changes nothing: the tokens of the text around a cut are those
of its two halves. Tokenizers look at words, so what is far from a cut does not matter.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from tpipe_jax.data.documents import Piece
from tpipe_jax.data.tokenizer import Tokenizer
from tpipe_jax.errors import UserError

PIECE = 2**18  # bytes of UTF-8 that are encoded together
MOST = 2**22  # bytes in which a place to cut must be found: they take some 600 MB
AROUND = 64  # characters on either side of a cut that are tried
TRIES = 200


class Encoded(NamedTuple):
    """Tokens of a part of a document."""

    tokens: np.ndarray
    is_learnt: bool
    ends: bool


def encoded(pieces: Iterable[Piece], tokenizer: Tokenizer, where: str) -> Iterator[Encoded]:
    """Yields the tokens of documents. Raises `UserError` for a long document that cannot be cut."""
    text, is_learnt, size = "", True, PIECE
    for piece in _short(pieces):
        if text and piece.is_learnt != is_learnt:
            yield Encoded(tokenizer.encode(text), is_learnt, ends=False)
            text, size = "", PIECE
        text, is_learnt = text + piece.text, piece.is_learnt
        while len(text.encode()) > size:
            at = _cut(tokenizer, text)
            if at is not None:
                yield Encoded(tokenizer.encode(text[:at]), is_learnt, ends=False)
                text, size = text[at:], PIECE
            elif size < MOST:
                size *= 2  # look again once there is more
            else:
                raise UserError(
                    f"{where} has a document of more than {MOST:,} bytes, which this "
                    "tokenizer cannot encode in parts: split it, or name what separates documents "
                    "with config.data.text_separator or --text-separator."
                )
        if piece.ends:
            yield Encoded(tokenizer.encode(text), is_learnt, ends=True)
            text, size = "", PIECE
    if text:
        yield Encoded(tokenizer.encode(text), is_learnt, ends=True)


def _short(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yields pieces of at most `PIECE` characters."""
    for piece in pieces:
        starts = range(0, max(len(piece.text), 1), PIECE)
        for start in starts:
            ends = piece.ends and start == starts[-1]
            yield Piece(piece.text[start : start + PIECE], piece.is_learnt, ends)


def _cut(tokenizer: Tokenizer, text: str) -> int | None:
    """Returns the last place but one piece where the text may be cut, at the end of a line or else
    at a space; None if none was found.
    """
    if tokenizer.cuts_anywhere:
        return len(text)
    for mark in "\n ":
        stop = len(text) - AROUND
        for _ in range(TRIES):
            stop = text.rfind(mark, AROUND, stop)
            if stop < 0:
                break
            for at in (stop + 1, stop):
                left, right = text[at - AROUND : at], text[at : at + AROUND]
                parts = [*tokenizer.encode(left), *tokenizer.encode(right)]
                if parts == tokenizer.encode(left + right).tolist():
                    return at
    return None
