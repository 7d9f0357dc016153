"""Files of tokens and their formats: text, .npy, and the .bin files that other programs write.

A file's content tells its format. Text is read as bytes, one token each. So are records and what
is compressed, which `sources` then reads again as documents.
"""

import errno
import os
import struct
import tokenize
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpipe_jax.config.paths import expanded
from tpipe_jax.config.settings import BYTES_NAME
from tpipe_jax.data.contents import (
    TOKEN_SUFFIXES,
    Content,
    check_is_file,
    check_text,
    content_of,
    shortened,
)
from tpipe_jax.data.find import find
from tpipe_jax.errors import UserError
from tpipe_jax.json_files import read_json

PYDOCS = "pydocs"
INDEX = "index.json"  # in a folder of token shards, which `token_shards` writes
MOST_NAME = 255  # characters of a file's name
TEXT = "bytes of text"  # a format
LLM_C_FORMAT = "llm.c"
NPY = b"\x93NUMPY"
TOKENS = Content("token file")

# Files of karpathy's llm.c begin with a header of 256 int32. The first three are a magic number,
# which stands for the type of the tokens, the version, and the number of tokens that follow.
LLM_C = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
LLM_C_HEADER = 256 * 4
# Megatron-LM writes an .idx file beside its .bin. Its header is magic, version, type, number of
# sequences and number of documents. Then come the length of each sequence, where each sequence
# begins, and the first sequence of each document.
MEGATRON = b"MMIDIDX\0\0"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")
MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens in a file, after `offset` bytes of header."""

    path: Path
    dtype: np.dtype
    offset: int
    num_tokens: int
    format: str
    """The file format, in a few words."""
    starts: np.ndarray | None = None
    """Where each document begins, in tokens; None if the file does not say."""
    content: Content = TOKENS

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, where: slice) -> np.ndarray:
        """Returns tokens of the file. Raises OSError if the file does not have them any more."""
        start, stop, _ = where.indices(self.num_tokens)
        size = self.dtype.itemsize
        # Not mapped, since a mapped file that is cut short ends the process. Opened each time,
        # which takes 20 us, since a big folder has more files than may be open at once.
        with self.path.open("rb") as file:
            file.seek(self.offset + start * size)
            content = file.read((stop - start) * size)
        if len(content) < (stop - start) * size:
            raise OSError(errno.EIO, "shorter than at the start", str(self.path))
        if self.content == Content("text"):
            check_text(content, str(self.path), start)
        return np.frombuffer(content, self.dtype)


def open_files(
    setting: str, value: str, vocab_size: int, field: str
) -> tuple[list[TokenFile], list[TokenFile], list[str]]:
    """Opens the files of a path, which a setting such as `config.data.train=x` names. Returns them,
    those that are named as held-out ones, and lines on what is passed over.

    Raises `UserError` if they hold neither tokens nor text, OSError if one cannot be read.
    """
    name, path = setting.partition("=")[0], expanded(setting.partition("=")[0], value)
    if value and (about := about_shards(path)):
        return open_shards(setting, path, about, vocab_size), [], []
    found = find(name, value, field)
    if found is None:
        raise UserError(
            f"{setting} does not exist: give {PYDOCS}, a file of text, of records (JSON lines, "
            "Parquet, ArrayRecord) or of tokens (.bin or .npy), a folder of such files, or a "
            "pattern."
        )

    def opened(file: Path) -> TokenFile:
        content = content_of(file, field)
        is_empty = content.kind == "nothing" and file.suffix in TOKEN_SUFFIXES
        if content.kind == "token file" or is_empty:
            return _open_tokens(setting if file == path else f"{name}={file}", file, vocab_size)
        return _open_text(file, content)

    files, held_out = (list(map(opened, own)) for own in (found.files, found.held_out))
    return files, held_out, found.notes(setting)


def _open_tokens(setting: str, path: Path, vocab_size: int) -> TokenFile:
    with path.open("rb") as file:
        content = file.read(12)
    if path.suffix == ".npy" or content.startswith(NPY):
        return _open_npy(setting, path)
    if os.path.lexists(path.with_suffix(".idx")):  # a link to nothing is an error
        return _open_megatron(setting, path)
    header = np.frombuffer(content, "<i4") if len(content) == 12 else np.zeros(3, "<i4")
    if int(header[0]) in LLM_C:
        return _open_llm_c(setting, path, header)
    return _open_raw(setting, path, vocab_size)


def about_shards(folder: Path) -> dict[str, Any] | None:
    """Returns the index that `token_shards` has left in a folder; None if there is none. Raises
    `UserError` if it is a link out of the folder.
    """
    if not os.path.isfile(folder / INDEX):  # which is False for names that are too long
        return None
    _inside(folder, INDEX)
    try:
        about = read_json(folder / INDEX)
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) and "shards" in about else None


def tokenizer_of_shards(folder: Path, about: dict[str, Any]) -> Path | None:
    """Returns the tokenizer.json of token shards, from their index; None if tokens are bytes.

    Raises `UserError` if the index, which may be a stranger's, names one outside of its folder.
    """
    name = about.get("tokenizer", BYTES_NAME)
    return None if name == BYTES_NAME else _inside(folder, name)


def _inside(folder: Path, name: Any) -> Path:
    """Returns the path of a file in a folder. Raises `UserError` if it leads elsewhere."""
    try:
        path = folder / name
        is_plain = Path(name).name == name and len(name) <= MOST_NAME and name.isprintable()
        is_inside = is_plain and path.resolve().parent == folder.resolve()
    except (OSError, RuntimeError, TypeError, ValueError):  # links in a circle, no text, a NUL
        path, is_inside = folder, False
    if not is_inside:
        raise UserError(
            f"{folder / INDEX} names {shortened(repr(name))}, which is not in that folder: make "
            "the shards again, or name the file itself."
        )
    return path


def open_shards(
    setting: str, folder: Path, about: dict[str, Any], vocab_size: int
) -> list[TokenFile]:
    """Opens the token shards that an index describes. Raises `UserError` if it does not fit them,
    or the vocabulary is larger than `vocab_size`.
    """
    shards: Any = about["shards"]
    size: Any = about.get("vocab_size")
    if fault := _fault_of(shards, size):
        raise UserError(
            f"{setting} has an {INDEX} that is not of tpipe tokenize, since {fault}: make it again."
        )
    if size > vocab_size:
        raise UserError(
            f"{setting} was made with a tokenizer of {size} tokens, more than "
            f"config.model.vocab_size={vocab_size}: set that to at least as many."
        )
    files = []
    for shard in shards:
        name, expected = shard["name"], (shard["num_tokens"], shard["num_documents"])
        _inside(folder, f"{name}.idx")
        file = _open_megatron(setting, _inside(folder, f"{name}.bin"))
        found = len(file), 0 if file.starts is None else len(file.starts)
        if found != expected:
            raise UserError(
                f"{file.path} has {found[0]} tokens of {found[1]} documents, but {INDEX} says "
                f"{shortened(str(expected[0]))} of {shortened(str(expected[1]))}: make the shards "
                "again."
            )
        files.append(file)
    return files


def _fault_of(shards: Any, vocab_size: Any) -> str | None:
    """Returns what is wrong with the values of an index of shards."""
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
        return f"its vocab_size is {shortened(repr(vocab_size))}"
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        return "its shards are no list of objects"
    for shard in shards:
        if not isinstance(shard.get("name"), str):
            return f"a shard has the name {shortened(repr(shard.get('name')))}"
        for key in ("num_tokens", "num_documents"):
            value = shard.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                return f"a shard has {shortened(repr(value))} as its {key}"
    names = [shard["name"] for shard in shards]
    return "it names a shard twice" if len(set(names)) < len(names) else None


def _open_text(path: Path, content: Content) -> TokenFile:
    format, start = (content.kind if content.is_records else TEXT), np.zeros(1, np.int64)
    return TokenFile(path, np.dtype(np.uint8), 0, _num_bytes(path), format, start, content)


def _open_raw(setting: str, path: Path, vocab_size: int) -> TokenFile:
    is_long = vocab_size > 2**16 or _looks_like_uint32(path)
    dtype = np.dtype("<u4" if is_long else "<u2")
    num_tokens, rest = divmod(_num_bytes(path), dtype.itemsize)
    if rest:
        raise UserError(
            f"{setting} has {_num_bytes(path)} bytes, not a multiple of the {dtype.itemsize} of a "
            f"token: write {dtype.name}, which config.model.vocab_size={vocab_size} asks for."
        )
    return TokenFile(path, dtype, 0, num_tokens, f"raw {dtype.name}")


def _open_llm_c(setting: str, path: Path, header: np.ndarray) -> TokenFile:
    magic, _, num_tokens = map(int, header)
    dtype = LLM_C[magic]
    expected = LLM_C_HEADER + num_tokens * dtype.itemsize
    if num_tokens < 0 or _num_bytes(path) != expected:
        raise UserError(
            f"{setting} is a file of llm.c for {num_tokens} tokens, {expected} bytes, but has "
            f"{_num_bytes(path)}: write it again."
        )
    return TokenFile(path, dtype, LLM_C_HEADER, num_tokens, f"{LLM_C_FORMAT}, {dtype.name}")


def _open_megatron(setting: str, path: Path) -> TokenFile:
    """Opens a .bin with its .idx. Sequences must follow one another, as Megatron-LM's tools write
    them.
    """
    index = path.with_suffix(".idx")
    check_is_file(index)
    check_is_file(path)
    with index.open("rb") as file:
        content = file.read(MEGATRON_HEADER.size)
        if len(content) < MEGATRON_HEADER.size or not content.startswith(MEGATRON):
            raise UserError(
                f"{setting} has a file {index.name} beside it that is not an index of Megatron-LM: "
                "move it away, or write both again."
            )
        _, version, code, num_sequences, num_documents = MEGATRON_HEADER.unpack(content)
        if version != 1 or code not in MEGATRON_TYPES:
            raise UserError(
                f"{setting} has an index {index.name} of version {version} with numbers of type "
                f"{code}: only version 1 and integers can be read."
            )
        expected = MEGATRON_HEADER.size + 12 * num_sequences + 8 * num_documents
        is_whole = _num_bytes(index) >= expected  # more may follow, on how documents are mixed
        num_sequences *= is_whole
        lengths = np.frombuffer(file.read(4 * num_sequences), "<i4")
        starts = np.frombuffer(file.read(8 * num_sequences), "<i8")
        documents = np.frombuffer(file.read(8 * num_documents * is_whole), "<i8")
    dtype = np.dtype(MEGATRON_TYPES[code])
    sizes = lengths.astype(np.int64) * dtype.itemsize
    is_whole = is_whole and (lengths >= 0).all() and sizes.sum() == _num_bytes(path)
    # `documents` has the first sequence of each document, and last the number of all sequences.
    bounds = documents if num_documents else np.array([0, num_sequences])
    is_ordered = is_whole and not bounds[0] and bounds[-1] == num_sequences
    is_ordered = is_ordered and (np.diff(bounds) >= 0).all()
    if not is_ordered or (starts != np.cumsum(sizes) - sizes).any():
        raise UserError(
            f"{setting} and its index {index.name} do not belong together, or one is cut short: "
            "write both again."
        )
    is_first = bounds[bounds < num_sequences]
    return TokenFile(
        *(path, dtype, 0, int(lengths.sum()), f"Megatron-LM, {dtype.name}"),
        starts=starts[np.unique(is_first)] // dtype.itemsize,
    )


def _looks_like_uint32(path: Path) -> bool:
    """Whether the first 64 KiB, read as uint32, have upper halves that are all zero and lower
    halves that are not.
    """
    with path.open("rb") as file:
        head = np.frombuffer(file.read(2**16), np.uint8)
    pairs = head[: len(head) // 4 * 4].view("<u2").reshape(-1, 2)
    return bool(pairs[:, 0].any() and not pairs[:, 1].any())


def _open_npy(setting: str, path: Path) -> TokenFile:
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on headers of Python 2
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
                (3, 0): np.lib.format.read_array_header_2_0,  # names of fields in UTF-8
            }[version]
            shape, _, dtype = read_header(file)  # no longer than 10,000 bytes
            offset = file.tell()
    # What Python's own reader of literals and numpy's of types may raise.
    except (ValueError, LookupError, TypeError, ArithmeticError, tokenize.TokenError) as error:
        raise _no_npy(setting, str(error)) from None
    except (SyntaxError, RecursionError, MemoryError, AttributeError):
        raise _no_npy(setting, "its header cannot be read") from None
    if len(shape) != 1 or dtype.kind not in "iu":
        raise UserError(
            f"{setting} has shape {shortened(str(shape))} and type {shortened(str(dtype))}: "
            "save tokens as a one-dimensional array of integers."
        )
    [num_tokens] = shape
    size = _num_bytes(path)
    if isinstance(num_tokens, bool) or not 0 <= num_tokens <= (size - offset) // dtype.itemsize:
        raise _no_npy(setting, f"its header says {shortened(str(num_tokens))} tokens")
    return TokenFile(path, dtype, offset, num_tokens, f"npy, {dtype}")


def _no_npy(setting: str, reason: str) -> UserError:
    return UserError(
        f"{setting} is not a whole .npy array ({shortened(' '.join(reason.split()))}): write it "
        "with numpy.save."
    )


def _num_bytes(path: Path) -> int:
    # Opened, not only looked up: the size of a file can be known where it may not be read.
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size
