"""Reads documents from files: text, JSON lines, Parquet and ArrayRecord."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain

from tpipe_jax.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")  # each file is a document
JSON_LINES, PARQUET, ARRAY_RECORD = ".jsonl", ".parquet", ".array_record"
RECORD_SUFFIXES = (JSON_LINES, PARQUET, ARRAY_RECORD)  # each record is a document
PROMPT, COMPLETION = "prompt", "completion"  # fields of a record that has a prompt


class Document(NamedTuple):
    """The text that a model learns, and the prompt before it."""

    text: str
    prompt: str = ""
    """Text that comes first and is not learnt."""


def read_documents(
    path: Path, field: str, start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """Yields the documents of a file; of JSON lines, those that begin in bytes `[start, stop)`.

    A record has its text in the field `field`, or else in the fields `prompt` and `completion`. A
    record of ArrayRecord is the text itself. Raises `UserError` for a document that is empty or
    cannot be read.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == JSON_LINES:
            for where, line in _lines(path, start, stop):
                yield _of_record(where, _parsed(where, line, field), field)
        elif suffix == PARQUET:
            for i, record in enumerate(_parquet(path)):
                yield _of_record(f"{path} row {i}", record, field)
        elif suffix == ARRAY_RECORD:
            for i, content in enumerate(_array_record(path)):
                yield Document(_decoded(f"{path} record {i}", content))
        else:
            yield Document(_decoded(str(path), path.read_bytes()))
    except OSError as error:
        raise _unreadable(path, error) from None


def file_stat(path: Path) -> os.stat_result:
    """Returns the status of a file. Raises `UserError` if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno())
    except OSError as error:
        raise _unreadable(path, error) from None


def _lines(path: Path, start: int, stop: int | None) -> Iterator[tuple[str, bytes]]:
    """Yields the lines that are not empty, each with a text that says where it is."""
    with path.open("rb") as file:
        file.seek(start)
        while stop is None or file.tell() < stop:
            where = f"{path} at byte {file.tell()}"
            line = file.readline()
            if line.strip():
                yield where, line.strip()
            elif not line:
                return


def _parsed(where: str, line: bytes, field: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise _no_text(where, field, error) from None
    if not isinstance(record, dict):
        raise _no_text(where, field, TypeError(f"{type(record).__name__}, no object"))
    return record


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        yield from grain.experimental.ParquetIterDataset(str(path))
    except ImportError:
        raise UserError(
            f"{path} needs pyarrow to be read: install it with pip install tpipe_jax[parquet]."
        ) from None
    except Exception as error:  # pyarrow's own types; it may not be installed
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} is no Parquet file ({error}): write it again.") from None


def _array_record(path: Path) -> Iterator[bytes]:
    file_stat(path)  # its errors are clearer than the reader's
    try:
        source = grain.sources.ArrayRecordDataSource([str(path)])
        num_records = len(source)
    except Exception as error:  # the library raises plain ones
        raise UserError(f"{path} is no ArrayRecord file ({error}): write it again.") from None
    try:
        yield from (source[i] for i in range(num_records))
    except (RuntimeError, ValueError) as error:
        raise OSError(errno.EIO, str(error), str(path)) from None


def _of_record(where: str, record: Mapping[str, Any], field: str) -> Document:
    if field not in record and PROMPT in record and COMPLETION in record:
        prompt = _checked(where, record[PROMPT], PROMPT, may_be_empty=True)
        return Document(_checked(where, record[COMPLETION], COMPLETION), prompt)
    if field not in record:
        raise _no_text(where, field, KeyError(field))
    return Document(_checked(where, record[field], field))


def _checked(where: str, text: Any, field: str, may_be_empty: bool = False) -> str:
    if not isinstance(text, str) or not (text or may_be_empty):
        raise UserError(
            f"{where} has {json.dumps(text, default=str)[:40]} as its {field}: a document is text "
            "and not empty."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has a {field} that is no UTF-8 ({error}): mend it.") from None
    return text


def _decoded(where: str, content: bytes) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} cannot be read as UTF-8 ({error}): mend it.") from None
    if not text:
        raise UserError(f"{where} is an empty document: remove it, or write something.")
    return text


def _no_text(where: str, field: str, error: Exception) -> UserError:
    return UserError(
        f"{where} has no text ({type(error).__name__}: {error}): each record must be an object "
        f"with the field {field}, or with {PROMPT} and {COMPLETION}, or name another with --field, "
        "or config.data.field."
    )


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read ({error.strerror}): see that you may, or leave it out."
    )
