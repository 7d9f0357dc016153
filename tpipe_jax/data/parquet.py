"""Reads records from Parquet files, which may be a stranger's: memory does not grow with what a
file says that it holds.

A few bytes of Parquet stand for any number of equal values, and a small page may unpack to a large
one. So the headers of all pages are read before the library sees the pages, and the rows come in
small batches. The footer is not trusted: it may say anything about sizes.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tpipe_jax.data.contents import COMPLETION, MESSAGES, PROMPT, too_large
from tpipe_jax.errors import UserError

FOOTER_BYTES = 2**20  # of a small file; the library takes 300 times as much memory for it
FOOTER_PART = 64  # of a large file, this part of its bytes
MOST_VALUES = 2**24  # in a page, and in the lists of a row group
AT_ONCE = 8  # times the largest record: the bytes of the pages that are open together
BATCH_BYTES, BATCH_ROWS = 2**27, 1024
MESSAGE_BYTES = 256  # that a message takes, beside its text

_INT32, _BINARY, _STRUCT = 5, 8, 12  # types of the Thrift compact protocol
_TRUE_FALSE, _BYTE, _INTS, _DOUBLE = (1, 2), 3, (4, 5, 6), 7
# Encodings that do not repeat text: plain, those of dictionaries, and plain with lengths apart.
_IN_LISTS = {0, 2, 3, 6, 8}


class ParquetError(Exception):
    """What is wrong with a file, as a part of a sentence."""


@dataclass
class _Pages:
    """What the headers of the pages of a column say."""

    dictionary: int = 0
    """Bytes of the largest dictionary, unpacked."""
    largest: int = 0
    """Bytes of the largest other page."""
    total: int = 0
    values: int = 0
    encodings: set[int] = field(default_factory=set)


def parquet_records(
    path: Path, name: str, max_bytes: int
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the records of a file, each with a text that says where it is. A record has the field
    `name`, or prompt and completion, or messages, or else all names without values.

    Raises `UserError` if the file is damaged or takes more memory than records of `max_bytes` may,
    OSError if it cannot be read.
    """
    try:
        yield from _records(path, name, max_bytes)
    except ImportError:
        raise UserError(
            f"{path} needs pyarrow to be read: install it with pip install tpipe_jax[parquet]."
        ) from None
    except (UserError, GeneratorExit):
        raise
    except MemoryError:
        raise UserError(f"{path} does not fit into memory: write smaller row groups.") from None
    except Exception as error:  # pyarrow's own types; it may not be installed
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is no Parquet file ({reason}): write it again.") from None


def _records(path: Path, name: str, max_bytes: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file, pyarrow.OSFile(str(path)) as opened:
        _check_footer(file)
        leaves = _leaves(pyarrow.parquet.read_metadata(opened).schema)
        wanted = _wanted(leaves, name)
        chosen = {i: leaf for i, leaf in enumerate(leaves) if leaf[0] in wanted and _is_read(leaf)}
        in_lists = {i: ".".join(leaf) for i, leaf in chosen.items() if len(leaf) > 1}
        table = pyarrow.parquet.ParquetFile(
            opened, pre_buffer=False, buffer_size=2**16, read_dictionary=list(in_lists.values())
        )
        row = 0
        for group in range(table.metadata.num_row_groups):
            meta = table.metadata.row_group(group)
            if not chosen:
                if meta.num_rows:
                    yield f"{path} row {row}", dict.fromkeys(wanted or _names(leaves))
                continue
            rows = _batch_rows(path, file, {i: meta.column(i) for i in chosen}, in_lists, max_bytes)
            before = row
            for batch in table.iter_batches(
                rows, [group], [".".join(leaf) for leaf in chosen.values()], use_threads=False
            ):
                columns = {own: batch.column(own) for own in batch.schema.names}
                for i in range(batch.num_rows):
                    where = f"{path} row {row}"
                    yield (
                        where,
                        {
                            own: _value(
                                where, columns[own][i] if own in columns else None, max_bytes
                            )
                            for own in wanted
                        },
                    )
                    row += 1
            if row - before != meta.num_rows:
                raise ParquetError(
                    f"row group {group} has {row - before} rows, not the {meta.num_rows} of its "
                    "description"
                )


def _check_footer(file: BinaryIO) -> None:
    """Raises `ParquetError` if the description of the file is large for its size."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 8, 0))
    footer = int.from_bytes(file.read(4), "little")
    if footer > max(FOOTER_BYTES, size // FOOTER_PART):
        raise ParquetError(f"its description has {footer:,} of its {size:,} bytes")


def _leaves(schema: Any) -> list[tuple[str, ...]]:
    """Returns the path of each column: its name, and for one inside of lists and objects the names
    below it. A dot in the name of a plain column is part of its name.
    """
    leaves = []
    for i in range(len(schema)):
        column = schema.column(i)
        is_plain = not column.max_repetition_level and column.path == column.name
        leaves.append((column.path,) if is_plain else tuple(column.path.split(".")))
    return leaves


def _names(leaves: list[tuple[str, ...]]) -> list[str]:
    return list(dict.fromkeys(leaf[0] for leaf in leaves))


def _wanted(leaves: list[tuple[str, ...]], name: str) -> list[str]:
    """Returns the fields that are read."""
    names = _names(leaves)
    for own in ([name], [PROMPT, COMPLETION], [MESSAGES]):
        if set(own) <= set(names):
            return own
    return []


def _is_read(leaf: tuple[str, ...]) -> bool:
    return len(leaf) == 1 or (leaf[0] == MESSAGES and leaf[-1] in ("role", "content"))


def _batch_rows(
    path: Path, file: BinaryIO, chunks: Mapping[int, Any], in_lists: Mapping[int, str], limit: int
) -> int:
    """Returns how many rows of a row group are read together. Raises `UserError` if they would take
    too much memory.
    """
    at_once, largest = 0, 1
    for i, chunk in chunks.items():
        pages = _read_headers(file, chunk)
        if i in in_lists:
            if unknown := pages.encodings - _IN_LISTS:
                raise ParquetError(f"encoding {min(unknown)} is not read in lists")
            if pages.values > MOST_VALUES:
                raise ParquetError(f"a row group has {pages.values:,} values in lists")
            at_once += pages.total
        else:
            copies = 3 if pages.encodings - _IN_LISTS else 1  # texts that begin like the one before
            at_once += 2 * pages.dictionary + copies * pages.largest
        largest = max(largest, pages.dictionary, pages.largest)
    if at_once > AT_ONCE * limit:
        raise UserError(
            f"{path} has pages that unpack to {at_once / 2**20:.1f} MiB together, more than "
            f"{AT_ONCE} records may have (config.data.max_record_mib or --max-record-mib="
            f"{limit / 2**20:g}): raise that, or write smaller row groups."
        )
    return min(max(BATCH_BYTES // largest, 1), BATCH_ROWS)


def _read_headers(file: BinaryIO, chunk: Any) -> _Pages:
    """Reads the headers of the pages of a column of a row group, but not the pages."""
    start, pages = chunk.data_page_offset, _Pages()
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    size = file.seek(0, os.SEEK_END)
    stop = min(start + chunk.total_compressed_size, size)
    if start < 0:
        raise ParquetError("a column begins before the file")
    file.seek(start)
    while (at := file.tell()) < stop:
        header = _struct(file)
        unpacked, packed = header.get(2), header.get(3)
        if not isinstance(unpacked, int) or not isinstance(packed, int):
            raise ParquetError(f"the page at byte {at} has no size")
        kinds = {
            number: header[number] for number in (5, 7, 8) if isinstance(header.get(number), dict)
        }
        for number, kind in kinds.items():
            values = kind.get(1, 0)
            if not 0 <= values <= MOST_VALUES:
                raise ParquetError(f"the page at byte {at} has {values:,} values")
            if number != 7:
                pages.values += values
                pages.encodings.add(kind.get(2 if number == 5 else 4, 0))
        if unpacked < 0 or packed < 0:
            raise ParquetError(f"the page at byte {at} has a negative size")
        pages.total += unpacked
        if 7 in kinds:
            pages.dictionary = max(pages.dictionary, unpacked)
        else:
            pages.largest = max(pages.largest, unpacked)
        file.seek(packed, os.SEEK_CUR)
    return pages


def _struct(file: BinaryIO, depth: int = 0) -> dict[int, Any]:
    """Reads a struct of Thrift's compact protocol: its int32 and structs, by their numbers. Other
    fields are passed over, as by the library.
    """
    found: dict[int, Any] = {}
    number = 0
    while head := _byte(file):
        kind, step = head & 15, head >> 4
        number = number + step if step else _zigzag(_varint(file))
        if kind in _TRUE_FALSE:
            continue
        if kind == _BYTE:
            _byte(file)
        elif kind in _INTS:
            value = _zigzag(_varint(file) & (2**32 - 1 if kind == _INT32 else 2**64 - 1))
            if kind == _INT32:
                found[number] = value
        elif kind == _DOUBLE:
            file.seek(8, os.SEEK_CUR)
        elif kind == _BINARY:
            file.seek(_varint(file) & (2**31 - 1), os.SEEK_CUR)
        elif kind == _STRUCT and depth < 8:
            found[number] = _struct(file, depth + 1)
        else:
            raise ParquetError(f"a page has a header with a field of type {kind}")
    return found


def _byte(file: BinaryIO) -> int:
    byte = file.read(1)
    if not byte:
        raise ParquetError("a page begins at the end of the file")
    return byte[0]


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ParquetError("a page has a header with a number of more than 10 bytes")


def _zigzag(value: int) -> int:
    return value >> 1 ^ -(value & 1)


def _value(where: str, scalar: Any, limit: int) -> Any:
    """Returns a value as Python has it. Of a list, that is a list of objects with role and content.
    Raises `UserError` if it has more than `limit` bytes, before they are copied.
    """
    import pyarrow

    if isinstance(scalar, pyarrow.ListScalar):
        if not scalar.is_valid or not pyarrow.types.is_struct(scalar.values.type):
            return None
        messages, size = [], 0
        for message in scalar.values:
            size += MESSAGE_BYTES + sum(_size(message[key]) for key in message)
            if size > limit:
                raise too_large(where, limit)
            messages.append({key: _value(where, message[key], limit) for key in message})
        return messages
    if scalar is None or isinstance(scalar, pyarrow.StructScalar):
        return None
    if _size(scalar) > limit:
        raise too_large(where, limit)
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} cannot be read as UTF-8 ({error}): mend it.") from None


def _size(scalar: Any) -> int:
    """Returns the bytes of a text, which may be in a dictionary."""
    import pyarrow

    if isinstance(scalar, pyarrow.DictionaryScalar):
        scalar = scalar.value
    is_text = isinstance(scalar, pyarrow.BinaryScalar) and scalar.is_valid
    return scalar.as_buffer().size if is_text else 0
