"""Reads documents from files: text, JSON lines, Parquet and ArrayRecord.

A document comes as one or several pieces of text, so that a file of any size takes little memory.
"""

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tpipe_jax.data.array_record import array_records
from tpipe_jax.data.contents import (
    COMPLETION,
    MESSAGES,
    PROMPT,
    Content,
    check_is_file,
    content_of,
    reading,
    texts_of,
    too_large,
    unpacked,
)
from tpipe_jax.data.parquet import parquet_records
from tpipe_jax.errors import UserError
from tpipe_jax.json_files import parse_json

EMPTY_FILES, EMPTY_RECORDS = "empty file", "empty document"  # what is skipped
LEARNT_ROLE = "assistant"
MOST_VALUES = 2**20  # of a record
# A string, or what comes before a value. Without backtracking, which would take memory.
_JSON_PART = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[,\[{]', re.DOTALL)


class Piece(NamedTuple):
    """A part of a document."""

    text: str
    is_learnt: bool = True
    """False for a prompt."""
    ends: bool = True
    """Whether the document ends with it."""


class HowToRead(NamedTuple):
    """What becomes a document."""

    field: str = "text"
    """The field of a record that holds its text."""
    separator: str | None = None
    """Text between the documents of a text file; None if each file is one document."""
    on_empty: Literal["skip", "refuse"] = "skip"
    """What happens to files and documents without any text."""
    max_bytes: int = 2**25
    """Of a record, so that no file takes memory without bound."""


def read_pieces(
    path: Path,
    how: HowToRead = HowToRead(),  # noqa: B008 - it is immutable
    skipped: Counter[str] | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Piece]:
    """Yields the documents of a file in pieces; of text and of JSON lines, those that begin in
    bytes `[start, stop)`. Counts in `skipped` what has no text.

    A record has its text in the field `how.field`, or else in the fields `prompt` and `completion`,
    or in `messages`, of which the answers are learnt. A record of ArrayRecord is the text itself.
    Raises `UserError` for a document that cannot be read.
    """
    skipped = Counter() if skipped is None else skipped
    if how.separator == "":
        raise UserError(
            "config.data.text_separator or --text-separator is empty: give the text between "
            "documents, or leave it out."
        )
    try:
        content = content_of(path, how.field)
        if content.kind == "nothing":
            if how.on_empty == "refuse":
                raise _empty(f"{path} is empty")
            skipped[EMPTY_FILES] += 1
        elif content.is_records:
            yield from _of_records(path, content, how, skipped, start, stop)
        elif content.kind == "text":
            texts = texts_of(path, content.packing, start, stop)
            if how.separator is not None:
                yield from _separated(texts, how, f"{path}", skipped)
            else:
                yield from _as_pieces(texts)
        else:
            raise UserError(f"{path} holds tokens already: train on it, or name text.")
    except OSError as error:
        raise _unreadable(path, error) from None


def file_stat(path: Path) -> os.stat_result:
    """Returns the status of a file. Raises `UserError` if the file cannot be read."""
    try:
        check_is_file(path)
        with path.open("rb") as file:
            return os.fstat(file.fileno())
    except OSError as error:
        raise _unreadable(path, error) from None


def skipped_text(skipped: Mapping[str, int]) -> str:
    """Returns what was skipped as a text; an empty one if that is nothing."""
    parts = [f"{n:,} {what}{'s' * (n > 1)}" for what, n in sorted(skipped.items()) if n]
    return f"skipped {' and '.join(parts)}" if parts else ""


def _as_pieces(texts: Iterable[str]) -> Iterator[Piece]:
    """Yields the pieces of a single document."""
    last = ""
    for text in filter(None, texts):
        if last:
            yield Piece(last, ends=False)
        last = text
    if last:
        yield Piece(last)


def _separated(
    texts: Iterable[str], how: HowToRead, where: str, skipped: Counter[str]
) -> Iterator[Piece]:
    """Yields the documents between separators."""
    separator, rest, has_begun = how.separator or "", "", False

    def ended(text: str) -> Iterator[Piece]:
        if text.strip() or has_begun:
            yield Piece(text)
        elif how.on_empty == "refuse" and text:
            raise _empty(f"{where} has an empty document")
        elif text:
            skipped[EMPTY_RECORDS] += 1

    for text in texts:
        *whole, rest = (rest + text).split(separator)
        for own in whole:
            yield from ended(own)
            has_begun = False
        keep = len(separator) - 1  # it may be the beginning of a separator
        if len(rest) > 2 * len(text) + keep:
            yield Piece(rest[: len(rest) - keep], ends=False)
            rest, has_begun = rest[len(rest) - keep :], True
    if rest.strip() or has_begun:
        yield Piece(rest)


def _of_records(
    path: Path,
    content: Content,
    how: HowToRead,
    skipped: Counter[str],
    start: int,
    stop: int | None,
) -> Iterator[Piece]:
    if content.kind == "ArrayRecord":
        for i, record in enumerate(array_records(path, how.max_bytes)):
            where = f"{path} record {i}"
            text = _checked(where, _decoded(where, record), "text")
            yield from _with_text([Piece(text)], where, how, skipped)
        return
    records = (
        parquet_records(path, how.field, how.max_bytes)
        if content.kind == "Parquet"
        else (
            (where, _parsed(where, line, how.field))
            for where, line in _lines(path, content.packing, start, stop, how.max_bytes)
        )
    )
    for where, record in records:
        yield from _with_text(_of_record(where, record, how.field), where, how, skipped)


def _with_text(
    pieces: list[Piece], where: str, how: HowToRead, skipped: Counter[str]
) -> Iterator[Piece]:
    """Yields the pieces of a document if some of its text is learnt."""
    if any(piece.text for piece in pieces if piece.is_learnt):
        yield from pieces
    elif how.on_empty == "refuse":
        raise _empty(f"{where} has an empty document")
    else:
        skipped[EMPTY_RECORDS] += 1


def _lines(
    path: Path, packing: str | None, start: int, stop: int | None, max_bytes: int
) -> Iterator[tuple[str, bytes]]:
    """Yields the lines that are not empty, each with a text that says where it is."""
    with unpacked(path, packing) as file, reading(path):
        if start:
            file.seek(start)
        at = start
        while stop is None or at < stop:
            line = file.readline(max_bytes + 1)
            if len(line) > max_bytes:
                raise too_large(f"{path} at byte {at}", max_bytes)
            if line.strip():
                yield f"{path} at byte {at}", line.strip()
            elif not line:
                return
            at += len(line)


def _has_many_values(line: bytes) -> bool:
    """Whether a JSON text may have more than `MOST_VALUES`. Commas in texts don't count."""
    if sum(map(line.count, (b",", b"[", b"{"))) < MOST_VALUES:
        return False
    most = 3 * MOST_VALUES  # with a value come a comma and a key
    return next(itertools.islice(_JSON_PART.finditer(line), most, None), None) is not None


def _parsed(where: str, line: bytes, field: str) -> Mapping[str, Any]:
    # Many small values take a hundred times the memory of their text.
    if _has_many_values(line):
        raise UserError(f"{where} has more than {MOST_VALUES:,} values in a record: split it.")
    try:
        record = parse_json(line)
    except ValueError as error:
        raise _no_text(where, field, f"it is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise _no_text(where, field, f"it is {type(record).__name__}, no object")
    return record


def _of_record(where: str, record: Mapping[str, Any], field: str) -> list[Piece]:
    if field in record:
        return [Piece(_checked(where, record[field], field))]
    if PROMPT in record and COMPLETION in record:
        prompt = _checked(where, record[PROMPT], PROMPT)
        completion = Piece(_checked(where, record[COMPLETION], COMPLETION))
        return [Piece(prompt, is_learnt=False, ends=False), completion] if prompt else [completion]
    if MESSAGES in record:
        return _of_messages(where, record[MESSAGES])
    fields = ", ".join(map(str, record)) or "none"
    raise _no_text(where, field, f"its fields are {fields[:200]}")


def _of_messages(where: str, messages: Any) -> list[Piece]:
    """Returns the pieces of a conversation: a line for each message, of which the answers and the
    ends of their lines are learnt.
    """
    pieces = []
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(
                f"{where} has {MESSAGES} that are not a list of objects with role and content: "
                "mend them, or write prompt and completion."
            )
        role = _checked(where, message["role"], "role")
        content = _checked(where, message["content"], "content")
        pieces.append(Piece(f"{role}: ", is_learnt=False, ends=False))
        pieces.append(Piece(f"{content}\n", role == LEARNT_ROLE, ends=False))
    if not any(piece.is_learnt for piece in pieces):
        return []
    return [*pieces[:-1], pieces[-1]._replace(ends=True)]


def _checked(where: str, text: Any, field: str) -> str:
    if not isinstance(text, str):
        raise UserError(
            f"{where} has {json.dumps(text, default=str)[:40]} as its {field}, which is no text: "
            "mend it."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has a {field} that is no UTF-8 ({error}): mend it.") from None
    return text


def _decoded(where: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} cannot be read as UTF-8 ({error}): mend it.") from None


def _no_text(where: str, field: str, reason: str) -> UserError:
    return UserError(
        f"{where} has no text ({reason}): each record must be an object with the field {field}, or "
        f"with {PROMPT} and {COMPLETION}, or with {MESSAGES}, or name another with --field, or "
        "config.data.field."
    )


def _empty(what: str) -> UserError:
    return UserError(f"{what}: remove it, or set config.data.on_empty or --on-empty to skip.")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read ({error.strerror or error}): see that you may, or leave it out."
    )
