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

PIECE = 2**18  # characters that are encoded together
MOST = 2**24  # characters in which a place to cut must be found
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
    for piece in pieces:
        if text and piece.is_learnt != is_learnt:
            yield Encoded(tokenizer.encode(text), is_learnt, ends=False)
            text, size = "", PIECE
        text, is_learnt = text + piece.text, piece.is_learnt
        while len(text) > size:
            at = _cut(tokenizer, text)
            if at is not None:
                yield Encoded(tokenizer.encode(text[:at]), is_learnt, ends=False)
                text, size = text[at:], PIECE
            elif size < MOST:
                size *= 2  # look again once there is more
            else:
                raise UserError(
                    f"{where} has a document of more than {MOST:,} characters, which this "
                    "tokenizer cannot encode in parts: split it, or name what separates documents "
                    "with config.data.text_separator or --text-separator."
                )
        if piece.ends:
            yield Encoded(tokenizer.encode(text), is_learnt, ends=True)
            text, size = "", PIECE
    if text:
        yield Encoded(tokenizer.encode(text), is_learnt, ends=True)


def _cut(tokenizer: Tokenizer, text: str) -> int | None:
    """Returns the last place but one piece where the text may be cut; None if none was found."""
    stop = len(text) - AROUND
    for _ in range(TRIES):
        stop = text.rfind("\n", AROUND, stop)
        if stop < 0:
            return None
        for at in (stop + 1, stop):
            left, right = text[at - AROUND : at], text[at : at + AROUND]
            parts = [*tokenizer.encode(left), *tokenizer.encode(right)]
            if parts == tokenizer.encode(left + right).tolist():
                return at
    return None
