"""Reads records of text from ArrayRecord files, within a bound of memory.

ArrayRecord is built on Riegeli: blocks of 64 KiB with a header each, and in them chunks of records,
which may be compressed. The headers of the chunks say how large they become.
"""

import errno
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain

from tpipe_jax.data.contents import too_large
from tpipe_jax.errors import UserError

BLOCK, BLOCK_HEADER = 2**16, 24
# Hashes of the header and of the data, and the size of the data, in another order; the type of the
# chunk in the lowest byte of the number of its records; the size of the records, unpacked.
CHUNK_HEADER = struct.Struct("<8xQ8xQQ")
MOST_RECORDS = 2**22  # of a chunk
BATCH_BYTES, BATCH_RECORDS = 2**26, 1024
AT_ONCE = 8  # times the largest record: the size of a chunk


def array_records(path: Path, max_bytes: int) -> Iterator[bytes]:
    """Yields the records of a file. Raises `UserError` if it is none of ArrayRecord, has records of
    something else than text, or takes more memory than records of `max_bytes` may.
    """
    # A chunk is unpacked for each call, whatever is asked for.
    together = min(max(BATCH_BYTES // _largest_chunk(path, max_bytes), 1), BATCH_RECORDS)
    try:
        source = grain.sources.ArrayRecordDataSource([str(path)])
        num_records = len(source)
    except Exception as error:  # the library raises plain ones
        raise UserError(
            f"{path} is no ArrayRecord file ({_line(error)}): write it again."
        ) from None
    try:
        for i, record in _numbered(source, num_records, together):
            if len(record) > max_bytes:
                raise too_large(f"{path} record {i}", max_bytes)
            if _is_example(record):
                raise UserError(
                    f"{path} has records of tf.train.Example, as TensorFlow Datasets writes them, "
                    "not of text: write the text itself, or JSON lines."
                )
            yield record
    except (RuntimeError, ValueError, IndexError) as error:
        raise OSError(errno.EIO, _line(error), str(path)) from None


def _numbered(source: Any, num_records: int, together: int) -> Iterator[tuple[int, bytes]]:
    for start in range(0, num_records, together):
        numbers = range(start, min(start + together, num_records))
        yield from zip(numbers, source.__getitems__(list(numbers)), strict=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _largest_chunk(path: Path, max_bytes: int) -> int:
    """Returns the bytes of the largest chunk, unpacked. Raises `UserError` if it is too large. What
    is damaged is left to the library.
    """
    largest = 1
    with path.open("rb") as file:
        at = 0
        while True:
            end = _end(at, CHUNK_HEADER.size)
            file.seek(at)
            content = file.read(end - at)
            boundary = -at % BLOCK
            if boundary < len(content):
                content = content[:boundary] + content[boundary + BLOCK_HEADER :]
            if len(content) < CHUNK_HEADER.size:
                return largest
            size, kind, unpacked = CHUNK_HEADER.unpack(content)
            num_records, largest = kind >> 8, max(largest, unpacked)
            if unpacked > AT_ONCE * max_bytes or num_records > MOST_RECORDS:
                raise UserError(
                    f"{path} has {num_records:,} records of {unpacked:,} bytes in a chunk at byte "
                    f"{at}, more than {MOST_RECORDS:,} or than {AT_ONCE} records may have "
                    "(config.data.max_record_mib or --max-record-mib): write smaller groups, or "
                    "raise that."
                )
            # A chunk has at least a byte of the file for each record.
            at = max(_end(at, CHUNK_HEADER.size + size), _boundary(at + num_records))


def _end(start: int, size: int) -> int:
    """Returns where `size` bytes end that begin at `start`, with the headers of blocks in them."""
    blocks, rest = divmod(start, BLOCK)
    last = blocks * (BLOCK - BLOCK_HEADER) + max(rest - BLOCK_HEADER, 0) + size - 1
    blocks, rest = divmod(last, BLOCK - BLOCK_HEADER)
    return blocks * BLOCK + BLOCK_HEADER + rest + 1


def _boundary(at: int) -> int:
    """Returns the first place from `at` on that is not in the header of a block."""
    rest = at % BLOCK
    return at - rest + BLOCK_HEADER if 0 < rest < BLOCK_HEADER else at


def _is_example(record: bytes) -> bool:
    """Whether a record is a protocol buffer `tf.train.Example`: a message of its whole length in
    field 1, in which each entry of the map of features is field 1 again.
    """
    inner = _field_1(record)
    return inner is not None and (not inner or _field_1(inner, is_whole=False) is not None)


def _field_1(message: bytes, is_whole: bool = True) -> bytes | None:
    """Returns the content of field 1 at the beginning of a message; None if there is none."""
    if message[:1] != b"\x0a":
        return None
    size = 0
    for n, byte in enumerate(message[1:6]):
        size |= (byte & 127) << 7 * n
        if byte < 128:
            content = message[2 + n : 2 + n + size]
            is_all = len(message) == 2 + n + size if is_whole else len(content) == size
            return content if is_all else None
    return None
