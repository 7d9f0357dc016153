"""Files of tokens as others write them."""

from pathlib import Path

import numpy as np
import pytest

from support.token_files import TOKENS, megatron
from tpipe_jax.config.settings import DataConfig
from tpipe_jax.data.sources import open_source
from tpipe_jax.errors import UserError


def llm_c(path: Path, magic: int, dtype: str, tokens: np.ndarray = TOKENS) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(dtype).tobytes())
    return path


def raw(path: Path, dtype: str) -> Path:
    TOKENS.astype(dtype).tofile(path)
    return path


def npy(path: Path, dtype: str) -> Path:
    np.save(path.with_suffix(".npy"), TOKENS.astype(dtype))
    return path.with_suffix(".npy")


FORMATS = {
    "llm.c, uint16": lambda path: llm_c(path, 20240520, "<u2"),
    "llm.c, uint32": lambda path: llm_c(path, 20240801, "<u4"),
    "Megatron-LM, uint16": lambda path: megatron(path, "<u2", 8),
    "Megatron-LM, int32": lambda path: megatron(path, "<i4", 4),
    "raw uint16": lambda path: raw(path, "<u2"),
    "raw uint32": lambda path: raw(path, "<u4"),
    "npy, int64": lambda path: npy(path, "<i8"),
}


@pytest.mark.parametrize(("name", "write"), FORMATS.items(), ids=FORMATS)
def test_formats_are_told_apart_and_read(tmp_path: Path, name: str, write) -> None:
    source = open_source("--data", str(write(tmp_path / "tokens.bin")), 700, DataConfig())
    assert source.formats == [name]
    assert len(source) == 1000
    np.testing.assert_array_equal(source.read(0, 1000), TOKENS)
    np.testing.assert_array_equal(source.read(298, 303), TOKENS[298:303])


def cut(path: Path, num_bytes: int) -> Path:
    path.write_bytes(path.read_bytes()[:-num_bytes])
    return path


def changed_index(path: Path, at: int, byte: int) -> Path:
    megatron(path, "<u2", 8)
    index = path.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    content[at] = byte
    index.write_bytes(content)
    return path


def cut_index(path: Path) -> Path:
    megatron(path, "<u2", 8)
    cut(path.with_suffix(".idx"), 40)
    return path


BROKEN = {
    "llm.c cut short": (
        lambda path: cut(llm_c(path, 20240520, "<u2"), 2),
        "is a file of llm.c for 1000 tokens, 3024 bytes, but has 3022: write it again",
    ),
    "another index": (
        lambda path: changed_index(path, 0, 0),
        "has a file tokens.idx beside it that is not an index of Megatron-LM",
    ),
    "another version": (
        lambda path: changed_index(path, 9, 2),
        "has an index tokens.idx of version 2 with numbers of type 8",
    ),
    "floating-point numbers": (
        lambda path: changed_index(path, 17, 7),
        "has an index tokens.idx of version 1 with numbers of type 7",
    ),
    "another length": (
        lambda path: changed_index(path, 34, 1),
        "its index tokens.idx do not belong together",
    ),
    "another start": (
        lambda path: changed_index(path, 34 + 3 * 4 + 8, 1),
        "its index tokens.idx do not belong together",
    ),
    "tokens cut short": (
        lambda path: cut(megatron(path, "<u2", 8), 2),
        "its index tokens.idx do not belong together",
    ),
    "index cut short": (cut_index, "its index tokens.idx do not belong together"),
}


@pytest.mark.parametrize(("write", "sentence"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_named(tmp_path: Path, write, sentence: str) -> None:
    with pytest.raises(UserError, match=rf"--data=.*/tokens.bin .*{sentence}"):
        open_source("--data", str(write(tmp_path / "tokens.bin")), 700, DataConfig())
