"""What a file holds, by its content: text, records, tokens, or something else.

The name of a file decides only where the content leaves it open: a file of JSON objects is records
whatever its name, and bytes that are no text are refused. Links may point to names without an
ending, so the name that the user gave counts.
"""

import codecs
import gzip
import io
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from tpipe_jax.errors import UserError
from tpipe_jax.json_files import parse_json

Kind = Literal["text", "JSON lines", "Parquet", "ArrayRecord", "token file", "nothing"]

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")  # each file is a document
RECORD_SUFFIXES = (".jsonl", ".parquet", ".array_record")  # each record is a document
LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
TOKEN_SUFFIXES = (".bin", ".npy")
PACKED_SUFFIXES = (".gz", ".zst")
SOURCE_SUFFIXES = (".py", ".md", ".rst")  # text, even if it begins with a JSON object
TABLE_SUFFIXES = (".csv", ".tsv")
HEAD_BYTES = 2**16
FRAME_BYTES = 2**10  # of a compressed file, which may become 32 MB when they are unpacked
PROMPT, COMPLETION, MESSAGES = "prompt", "completion", "messages"  # fields of a record

_GZIP, _ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_KINDS: dict[bytes, Kind] = {
    b"PAR1": "Parquet",
    # The first bytes of the header of a Riegeli file, which ArrayRecord is built on.
    b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f": "ArrayRecord",
    b"\x93NUMPY": "token file",
}
_OTHERS = {
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"GIF8": "a picture (GIF)",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "an archive (zip, as .npz, .docx and .pt files are)",
    b"PK\x05\x06": "an archive (zip)",
    b"BZh": "compressed by bzip2; gzip and Zstandard are read",
    b"\xfd7zXZ": "compressed by xz; gzip and Zstandard are read",
    b"7z\xbc\xaf": "an archive (7z)",
    b"\x89HDF": "a file of HDF5",
    b"SQLite format 3": "a database (SQLite)",
    b"MMIDIDX\0\0": "an index of Megatron-LM; name the .bin beside it",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\xff\xfe": "text in UTF-16 or UTF-32; UTF-8 is read",
    b"\xfe\xff": "text in UTF-16; UTF-8 is read",
}
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_TAR, _TAR_AT = b"ustar", 257


class Content(NamedTuple):
    """What a file holds."""

    kind: Kind
    packing: Literal["gzip", "Zstandard"] | None = None
    """How it is compressed."""

    @property
    def is_records(self) -> bool:
        return self.kind in ("JSON lines", "Parquet", "ArrayRecord")


def content_of(path: Path, field: str = "text") -> Content:
    """Returns what a file holds. Raises `UserError` if that is neither text, records nor tokens,
    and OSError if the file cannot be read.
    """
    check_is_file(path)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    packing = _packing(head)
    if packing:
        head = _unpacked_head(path)
    suffix = _suffix(path)
    if not head:
        return Content("nothing", packing)
    kind = next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), None)
    if kind is None and suffix in TOKEN_SUFFIXES and not packing:
        kind = "token file"
        has_index = path.with_suffix(".idx").exists()  # Megatron-LM's tokens may be bytes of text
        if suffix == ".bin" and _is_surely_text(head) and not has_index:
            raise _refused(path, "text, not tokens; a name that ends in .txt says so")
    if kind is None:
        kind = _kind_of_text(path, head, suffix, field)
    if packing and kind not in ("text", "JSON lines"):
        raise _refused(path, f"{kind} that is compressed by {packing}; unpack it first")
    return Content(kind, packing)


def has_text_records(path: Path, field: str) -> bool:
    """Whether the first record of a file of JSON lines has text, by the names of its fields."""
    head = _unpacked_head(path)
    return _has_text(_record(_first_line(head)), field)


def is_candidate(path: Path) -> bool:
    """Whether a file in a folder may hold text or records, by its name."""
    return _suffix(path) in (*TEXT_SUFFIXES, *LINES_SUFFIXES, ".parquet", ".array_record")


def unpacked(path: Path, packing: str | None) -> BinaryIO:
    """Opens a file to read what it holds, without its compression."""
    if packing == "gzip":
        return gzip.open(path, "rb")  # pyrefly: ignore[bad-return]
    if packing == "Zstandard":
        return io.BufferedReader(_Zstandard(path), HEAD_BYTES)
    return path.open("rb")


class _Zstandard(io.RawIOBase):
    """Reads what a file holds without its compression. Several frames in a row are one file. The
    library's own reader takes a file that is cut short for a whole one.
    """

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file, self._rest = path.open("rb"), b""
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            content = self._frame.unused_data if self._frame.eof else b""
            content = content or self._file.read(FRAME_BYTES)
            if not content:
                if not self._frame.eof:
                    raise EOFError("its last frame does not end")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            self._rest = self._frame.decompress(content)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def texts_of(path: Path, packing: str | None, start: int, stop: int | None) -> Iterator[str]:
    """Yields the text in bytes `[start, stop)` of a file, in pieces. Raises `UserError` where it is
    no text.
    """
    decoder, at = codecs.getincrementaldecoder("utf-8")(), start
    with unpacked(path, packing) as file, reading(path):
        if start:
            file.seek(start)
        while stop is None or at < stop:
            content = file.read(HEAD_BYTES if stop is None else min(HEAD_BYTES, stop - at))
            if not content:
                break
            check_text(content, f"{path}", at)
            yield _decoded(decoder, content, path, at)
            at += len(content)
        yield _decoded(decoder, b"", path, at, is_last=True)


class reading:
    """Turns what a library says of damaged compressed data into a `UserError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        names = {"BadGzipFile", "EOFError", "ZstdError"}
        if isinstance(error, zlib.error) or type(error).__name__ in names:
            raise UserError(
                f"{self._path} is damaged, or cut short ({error}): fetch it again."
            ) from None


def check_text(content: bytes, where: str, at: int = 0) -> None:
    """Raises `UserError` if bytes have a NUL in them, as no text has. `at` is the place of the
    first of them.
    """
    if (found := content.find(b"\0")) >= 0:
        raise UserError(
            f"{where} has a NUL at byte {at + found}, so it is no text: name a file of text, of "
            "records or of tokens."
        )


def check_is_file(path: Path) -> None:
    """Raises `UserError` if there is something else than a file, as a pipe, which may never end.
    Raises OSError if there is nothing.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path} is no file but a pipe, a device or a folder: name a file of data.")


def shortened(text: str) -> str:
    """Returns a text that is not too long for a sentence."""
    return text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}"


def too_large(where: str, limit: int) -> UserError:
    """Returns the error for a record that is too large."""
    return UserError(
        f"{where} has a record of more than {limit:,} bytes: split it, or raise "
        "config.data.max_record_mib or --max-record-mib."
    )


def _decoded(
    decoder: codecs.IncrementalDecoder, content: bytes, path: Path, at: int, is_last: bool = False
) -> str:
    try:
        return decoder.decode(content, is_last)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} cannot be read as UTF-8 ({error.reason} at about byte {at + error.start}): "
            "mend it."
        ) from None


def _packing(head: bytes) -> Literal["gzip", "Zstandard"] | None:
    if head.startswith(_GZIP):
        return "gzip"
    return "Zstandard" if head.startswith(_ZSTANDARD) else None


def _unpacked_head(path: Path) -> bytes:
    with path.open("rb") as file:
        packing = _packing(file.read(4))
    with reading(path), unpacked(path, packing) as file:
        return file.read(HEAD_BYTES)


def _suffix(path: Path) -> str:
    """Returns the ending of a name, without that of its compression, and without the number of a
    part, as in x.array_record-00003-of-00004.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1].partition("-")[0] if suffixes else ""


def _kind_of_text(path: Path, head: bytes, suffix: str, field: str) -> Kind:
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            raise _refused(path, what)
    if head[_TAR_AT:].startswith(_TAR):
        raise _refused(path, "an archive (tar); unpack it")
    if fault := _fault(head):
        raise _refused(path, f"no text, since it has {fault}")
    if suffix in RECORD_SUFFIXES and suffix not in LINES_SUFFIXES:
        raise _refused(path, f"text, though its name ends in {suffix}")
    record = _record(_first_line(head))
    if suffix in LINES_SUFFIXES:
        if suffix == ".json" and record is None:
            raise _refused(path, "JSON, but not a JSON object in each line")
        return "JSON lines"
    if _has_text(record, field) and suffix not in SOURCE_SUFFIXES:
        return "JSON lines"
    if suffix in TABLE_SUFFIXES:
        raise _refused(path, "a table; a JSON object in each line (.jsonl), or Parquet, is read")
    return "text"


def _first_line(head: bytes) -> bytes:
    head = head.removeprefix(codecs.BOM_UTF8)
    return next((line for line in head.splitlines() if line.strip()), b"").strip()


def _has_text(record: dict[str, object] | None, field: str) -> bool:
    return record is not None and (
        field in record or {PROMPT, COMPLETION} <= record.keys() or MESSAGES in record
    )


def _record(line: bytes) -> dict[str, object] | None:
    """Returns a JSON object; None if the line is none, or is cut off."""
    if not line.startswith(b"{"):
        return None
    try:
        record = parse_json(line)
    except ValueError:
        # A line that is longer than the head begins with the name of a field.
        return {} if len(line) >= HEAD_BYTES // 2 and line[1:].lstrip()[:1] == b'"' else None
    return record if isinstance(record, dict) else None


def _is_surely_text(head: bytes) -> bool:
    """Whether bytes are text and not tokens: there are many, and none is a control character."""
    return len(head) >= 256 and _fault(head) is None and not _CONTROL.search(head)


def _fault(head: bytes) -> str | None:
    """Returns what keeps bytes from being the beginning of a text."""
    if (at := head.find(b"\0")) >= 0:
        return f"a NUL at byte {at}"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        return f"bytes that are not UTF-8 at {error.start}"
    return None


def _refused(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} holds {what}: give text in UTF-8, records (JSON lines, Parquet, ArrayRecord) or "
        "tokens."
    )
