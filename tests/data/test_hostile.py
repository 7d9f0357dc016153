"""Data files of a stranger: each attack ends with one sentence, in little memory."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from support.runs import ROOT
from support.token_files import TOKENS, megatron
from tpipe_jax.config.settings import DataConfig
from tpipe_jax.data import documents, parquet, reader, token_shards
from tpipe_jax.data.array_record import array_records
from tpipe_jax.data.documents import HowToRead, read_pieces
from tpipe_jax.data.sources import TokenSource, open_shares, open_source
from tpipe_jax.data.token_shards import make_shards
from tpipe_jax.data.tokenizer import open_tokenizer
from tpipe_jax.errors import UserError

GIB = 2**30


def refused(path: Path, sentence: str, vocab_size: int = 700, **data: Any) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        opened(path, vocab_size, **data)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def opened(path: Path, vocab_size: int = 700, **data: Any) -> TokenSource:
    source = open_source("--data", str(path), vocab_size, DataConfig(**data))
    source.read(0, min(len(source), 1000))
    return source


# Files of tokens.


def npy(path: Path, shape: str, descr: str = "'<u2'", order: str = "False") -> Path:
    """With a header as given, and 1000 tokens of two bytes."""
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    size = len(header).to_bytes(2, "little")
    path.write_bytes(b"\x93NUMPY\x01\x00" + size + header + TOKENS.astype("<u2").tobytes())
    return path


NPY = {
    "a large shape": ("(10**23,)", "cannot be read|is not a whole .npy array"),
    "a larger shape": ("(100000000000000000000000,)", r"its header says 1000*0 tokens"),
    "true": ("(True,)", r"its header says True tokens"),
    "negative": ("(-5,)", r"its header says -5 tokens"),
    "one too many": ("(1001,)", r"its header says 1001 tokens"),
    "no shape": ("()", r"has shape \(\) and type uint16"),
    "two dimensions": ("(10, 100)", r"has shape \(10, 100\)"),
    "many dimensions": (f"({'1,' * 3000})", r"has shape \(1, 1.*\.\.\..*and type uint16"),
    "no tuple": ("1000", r"is not a whole .npy array"),
    "text": ("('x',)", r"is not a whole .npy array"),
    "brackets": ("(" * 5000, r"is not a whole .npy array"),
    "signs": (f"({'-' * 5000}1,)", r"is not a whole .npy array"),
    "digits": (f"({'9' * 5000},)", r"is not a whole .npy array"),
}


@pytest.mark.parametrize(("shape", "sentence"), NPY.values(), ids=NPY)
def test_shapes_of_npy(shape: str, sentence: str, tmp_path: Path):
    refused(npy(tmp_path / "a.npy", shape), sentence)


@pytest.mark.parametrize(
    ("descr", "sentence"),
    [
        ("'|O'", "and type object"),
        ("'<f2'", "and type float16"),
        ("'|b1'", "and type bool"),
        ("'<m8[s]'", r"and type timedelta64\[s\]"),
        ("[('a', '<u2')]", "and type "),
        ("('<u2', (2,))", "and type "),
        ("'<i3'", "is not a whole .npy array"),
        ("'i2,i2'", "and type |is not a whole"),
        ("7", "is not a whole .npy array"),
        ("None", "is not a whole .npy array"),
        ("'<u8'", "its header says 1000 tokens"),
    ],
)
def test_types_of_npy(descr: str, sentence: str, tmp_path: Path):
    refused(npy(tmp_path / "a.npy", "(1000,)", descr), sentence)


def test_npy_of_other_orders_is_read(tmp_path: Path):
    path = npy(tmp_path / "a.npy", "(1000,)", order="True")
    np.testing.assert_array_equal(opened(path).read(0, 1000), TOKENS)
    np.save(path, TOKENS.astype(">u2"))
    np.testing.assert_array_equal(opened(path).read(0, 1000), TOKENS)


@pytest.mark.parametrize("num_tokens", [-500, -512, 1001, 2**31 - 1, -(2**31)])
def test_llm_c_counts_its_tokens(num_tokens: int, tmp_path: Path):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, num_tokens
    content = header.tobytes() + TOKENS.astype("<u2").tobytes()
    path = tmp_path / "a.bin"
    for size in {len(content), max(1024 + 2 * num_tokens, 12)}:
        path.write_bytes(content[:size])
        refused(path, f"is a file of llm.c for {num_tokens} tokens")


def changed(path: Path, values: dict[int, int], size: int = 4) -> Path:
    """A pair of Megatron-LM with other numbers at some places of its index."""
    megatron(path, "<u2", 8)
    index = bytearray(path.with_suffix(".idx").read_bytes())
    for at, value in values.items():
        index[at : at + size] = value.to_bytes(size, "little", signed=value < 0)
    path.with_suffix(".idx").write_bytes(index)
    return path


# Three sequences of 300, 1 and 699 tokens; after a header of 34 bytes come their lengths, where
# they begin, and the first sequence of each document.
LENGTHS, STARTS, DOCUMENTS = 34, 34 + 12, 34 + 36
MEGATRON = {
    "a negative length": ({LENGTHS: 1300, LENGTHS + 4: -999, LENGTHS + 8: 699}, 4),
    "lengths that wrap": ({LENGTHS: 2**31 - 1, LENGTHS + 4: 2**31 - 1}, 4),
    "a pointer outside": ({STARTS + 8: 10**12}, 8),
    "a negative pointer": ({STARTS: -2}, 8),
    "a count that overflows": ({18: 2**63}, 8),
    "a count of documents that overflows": ({26: 2**61}, 8),
    "documents out of order": ({DOCUMENTS + 8: 3, DOCUMENTS + 16: 1}, 8),
    "a negative document": ({DOCUMENTS + 8: -1}, 8),
    "a document too far": ({DOCUMENTS + 8: 4}, 8),
}


@pytest.mark.parametrize(("values", "size"), MEGATRON.values(), ids=MEGATRON)
def test_indexes_of_megatron(values: dict[int, int], size: int, tmp_path: Path):
    refused(
        changed(tmp_path / "a.bin", values, size),
        "its index a.idx do not belong together, or one is cut short: write both again",
    )


def test_a_length_that_is_made_up_for_is_not_trained_on(tmp_path: Path):
    """The sum of the lengths is right, and so are the pointers."""
    path = changed(tmp_path / "a.bin", {LENGTHS: 1300, LENGTHS + 4: -999})
    changed_starts = np.array([0, 2600, 602], "<i8").tobytes()
    index = bytearray(path.with_suffix(".idx").read_bytes())
    index[STARTS:DOCUMENTS] = changed_starts
    path.with_suffix(".idx").write_bytes(index)
    refused(path, "do not belong together")


# Token shards.


@pytest.fixture(scope="module")
def made_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "text.txt").write_text("some text " * 10)
    make_shards([folder / "text.txt"], folder / "out", "bytes", HowToRead(), 1)
    return folder / "out"


@pytest.fixture
def shards(made_shards: Path, tmp_path: Path) -> Path:
    shutil.copytree(made_shards, tmp_path / "out")
    for suffix in (".bin", ".idx"):
        for name in ("secret", "chain"):
            shutil.copy(made_shards / f"00000{suffix}", tmp_path / f"{name}{suffix}")
        (tmp_path / "out" / f"linked{suffix}").symlink_to(f"chained{suffix}")
        (tmp_path / "out" / f"chained{suffix}").symlink_to(f"../chain{suffix}")
        (tmp_path / "out" / f"circle{suffix}").symlink_to(f"circle{suffix}")
        os.mkfifo(tmp_path / "out" / f"pipe{suffix}")
        (tmp_path / "out" / f"folder{suffix}").mkdir()
    return tmp_path / "out"


def with_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    about = json.loads((folder / "index.json").read_text())
    change(about)
    (folder / "index.json").write_text(json.dumps(about))
    return folder


NOT_INSIDE = r"index.json names '.*', which is not in that folder"
NAMES = {
    "../secret": NOT_INSIDE,
    "a/../../secret": NOT_INSIDE,
    "linked": NOT_INSIDE,
    "circle": NOT_INSIDE + "|cannot be read",
    "nul\0": NOT_INSIDE,
    "n" * 5000: "cannot be read|" + NOT_INSIDE,
    "": "cannot be read",
    ".": "cannot be read",
    "..": "cannot be read",
    "none": "cannot be read",
    "/dev/stdin": NOT_INSIDE,
    "\ud800": "cannot be read|" + NOT_INSIDE,
    "pipe": r"pipe.idx is no file but a pipe",
    "folder": r"folder.idx is no file but a pipe, a device or a folder",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_in_an_index(name: str, shards: Path):
    sentence = NAMES[name]
    refused(with_index(shards, lambda about: about["shards"][0].update(name=name)), sentence)


VALUES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "its vocab_size is inf": lambda a: a.update(vocab_size=float("inf")),
    "its vocab_size is True": lambda a: a.update(vocab_size=True),
    "its vocab_size is 'x'": lambda a: a.update(vocab_size="x"),
    "its vocab_size is -1": lambda a: a.update(vocab_size=-1),
    "its vocab_size is None": lambda a: a.pop("vocab_size"),
    "its vocab_size is 300.5": lambda a: a.update(vocab_size=300.5),
    "its shards are no list": lambda a: a.update(shards={"name": "00000"}),
    "its shards are no list of objects": lambda a: a.update(shards=[7]),
    "a shard has the name 7": lambda a: a["shards"][0].update(name=7),
    "a shard has -1 as its num_tokens": lambda a: a["shards"][0].update(num_tokens=-1),
    "a shard has None as its num_tokens": lambda a: a["shards"][0].pop("num_tokens"),
    "has 100 tokens of 1 documents, but index.json says 99 of 1": lambda a: a["shards"][0].update(
        num_tokens=99
    ),
    "but index.json says 100 of 2": lambda a: a["shards"][0].update(num_documents=2),
    "it names a shard twice": lambda a: a["shards"].append(a["shards"][0]),
    "is empty": lambda a: a.update(shards=[]),
    "index.json names 7, which": lambda a: a.update(tokenizer=7),
    "index.json names None, which": lambda a: a.update(tokenizer=None),
    r"index.json names \[\], which": lambda a: a.update(tokenizer=[]),
}


@pytest.mark.parametrize("sentence", VALUES)
def test_values_in_an_index(sentence: str, shards: Path):
    refused(with_index(shards, VALUES[sentence]), sentence)


def test_an_index_is_no_link_out_of_its_folder(shards: Path):
    (shards / "index.json").rename(shards.parent / "index.json")
    (shards / "index.json").symlink_to("../index.json")
    refused(shards, "index.json names 'index.json', which is not in that folder")


def test_what_is_published_is_checked_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An earlier call may have left damaged shards behind."""
    write_tokenizer(tmp_path / "t.json")
    (tmp_path / "text.txt").write_text("abc" * 10)
    args: Any = (
        [tmp_path / "text.txt"],
        tmp_path / "out",
        str(tmp_path / "t.json"),
        HowToRead(),
        1,
    )
    publish = token_shards._publish

    def publish_damaged(partial: Path, *rest: Any) -> None:
        path = partial / "00000.bin"
        whole = path.read_bytes()
        for content, sentence in (
            (b"\x03\x00" + whole[2:], "has tokens that its tokenizer does not have: remove"),
            (whole[2:], "do not belong together"),
        ):
            path.write_bytes(content)
            with pytest.raises(UserError, match=sentence):
                publish(partial, *rest)
        path.write_bytes(whole)
        tokenizer = (partial / "tokenizer.json").read_bytes()
        (partial / "tokenizer.json").write_bytes(tokenizer.replace(b'"c"', b'"d"'))
        publish(partial, *rest)

    monkeypatch.setattr(token_shards, "_publish", publish_damaged)
    with pytest.raises(UserError, match=r"tokenizer.json has changed meanwhile: run the command"):
        make_shards(*args)
    assert not (tmp_path / "out").exists()


# Files that never end, and links.


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.txt")
    refused(tmp_path / "a.txt", "a.txt is no file but a pipe", 256)
    refused(Path("/dev/zero"), "/dev/zero is no file but a pipe, a device", 256)
    with pytest.raises(UserError, match=r"a.txt is no file but a pipe"):
        make_shards([tmp_path / "a.txt"], tmp_path / "out", "bytes", HowToRead(), 1)
    with pytest.raises(UserError, match=r"a.txt is no file but a pipe"):
        open_tokenizer("--tokenizer", str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"a.txt is no file but a pipe"):
        open_shares("--data", f"@{tmp_path / 'a.txt'}", 256, DataConfig())
    TOKENS.astype("<u2").tofile(tmp_path / "b.bin")
    os.mkfifo(tmp_path / "b.idx")
    refused(tmp_path / "b.bin", "b.idx is no file but a pipe")


def test_settings_of_a_tokenizer_are_no_link_to_elsewhere(tmp_path: Path):
    (tmp_path / "own").mkdir()
    write_tokenizer(tmp_path / "own" / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    (tmp_path / "own" / "tokenizer_config.json").symlink_to("../tokenizer_config.json")
    os.mkfifo(tmp_path / "own" / "special_tokens_map.json")
    path = str(tmp_path / "own" / "tokenizer.json")
    assert open_tokenizer("x", path).end is None
    # In Hugging Face's cache all files are links into one folder.
    (tmp_path / "own" / "tokenizer.json").rename(tmp_path / "blob")
    (tmp_path / "own" / "tokenizer.json").symlink_to("../blob")
    assert open_tokenizer("x", path).end == 1


@pytest.mark.parametrize(
    "eos", ['"\\ud800"', "7", "[]", '{"content": 7}', '{"content": "\\ud800"}', "null", "[" * 9999]
)
def test_odd_settings_of_a_tokenizer_name_no_end(eos: str, tmp_path: Path):
    write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": {eos}}}')
    assert open_tokenizer("x", str(tmp_path / "tokenizer.json")).end is None


# Tokenizers.


def write_tokenizer(path: Path, **parts: Any) -> Path:
    """With the tokens a, b and c."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model} | parts))
    return path


def replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


TOKENIZERS: dict[str, dict[str, Any]] = {
    r"cannot be read \(.*\): give bytes": {"model": {"type": "BPE", "vocab": {"a": -1}}},
    r"has a token of number 4000000000, but numbers are below": {
        "model": {"type": "BPE", "vocab": {"a": 4_000_000_000}, "merges": []}
    },
    r"it makes texts 1,099,511,627,776 times as long": {
        "normalizer": {"type": "Sequence", "normalizers": [replace("a", "aa")] * 40}
    },
    r"it makes texts 1,267,650,600,228,229,[\d,]+ times as long": {
        "decoder": {"type": "Sequence", "decoders": [replace("a", "aa")] * 100}
    },
    r"it makes texts 10,000 times as long": {
        "normalizer": {"type": "Prepend", "prepend": "a" * 10_000}
    },
}


@pytest.mark.parametrize("sentence", TOKENIZERS)
def test_tokenizers_of_a_stranger(sentence: str, tmp_path: Path):
    path = write_tokenizer(tmp_path / "tokenizer.json", **TOKENIZERS[sentence])
    with pytest.raises(UserError, match=sentence):
        open_tokenizer("--tokenizer", str(path))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "\xff", "", "null"])
def test_what_is_no_tokenizer(content: str, tmp_path: Path):
    (tmp_path / "t.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"--tokenizer=.*t.json cannot be read \(.*\): give bytes"):
        open_tokenizer("--tokenizer", str(tmp_path / "t.json"))


def test_a_large_tokenizer_is_refused_before_it_is_parsed(tmp_path: Path):
    with (tmp_path / "t.json").open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(UserError, match=r"cannot be read \(it has more than 64 MiB\)"):
        open_tokenizer("--tokenizer", str(tmp_path / "t.json"))


def test_a_panic_of_the_library_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import tokenizers

    class PanicException(BaseException):
        pass

    def panic(*_: Any, **__: Any) -> Any:
        raise PanicException("called `Option::unwrap()`\non a `None` value")

    path = str(write_tokenizer(tmp_path / "t.json"))
    made = open_tokenizer("--tokenizer", path)
    monkeypatch.setattr(tokenizers.Tokenizer, "encode_batch_fast", panic, raising=False)
    with pytest.raises(UserError, match=r"t.json cannot read a text \(called .* value\): name"):
        made.encode("a")
    monkeypatch.setattr(tokenizers.Tokenizer, "from_str", panic)
    with pytest.raises(UserError, match=r"t.json cannot be read \(called .* value\): give bytes"):
        open_tokenizer("--tokenizer", path)


# Records.


def test_many_small_values_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They take a hundred times the memory of their text; commas in a text take none."""
    monkeypatch.setattr(documents, "MOST_VALUES", 1000)
    path = tmp_path / "a.jsonl"
    for many in ("[], " * 4000, "{}," * 4000, '"",' * 4000, "[[" * 2000 + "]]" * 2000 + ","):
        path.write_text(f'{{"text": "x", "other": [{many} 1]}}')
        refused(path, "at byte 0 has more than 1,000 values in a record: split it", 256)
    for text in ("a," * 4000, '",[{\\' * 4000):
        path.write_text(json.dumps({"text": text}))
        assert opened(path, 256).read(0, len(text)).tobytes()[::4].decode() == text


def test_deep_json_is_refused(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused(path, "nested more than", 256)


# What is small and unpacks to much; each in a process of its own, which tells its memory.

PROGRAM = """
import sys
from pathlib import Path
from tpipe_jax.config.settings import DataConfig
from tpipe_jax.data import reader
from tpipe_jax.data.sources import open_source
from tpipe_jax.errors import UserError
reader.SMALL_TOKENS = 2**22
tokenizer, *paths = sys.argv[1:]
for path in paths:
    try:
        source = open_source("--data", path, 256, DataConfig(tokenizer=tokenizer, max_record_mib=8))
        print(len(source))
    except UserError as error:
        print(error)
# Not ru_maxrss, which begins with that of the parent.
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def said(*paths: Path, tokenizer: str = "bytes") -> str:
    """What opening files says, in less than 1 GiB."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, tokenizer, *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    *lines, kib = found.stdout.splitlines()
    assert int(kib) * 1024 < GIB, found.stdout
    return "\n".join(lines)


def zst(path: Path, *parts: tuple[bytes, int]) -> Path:
    packer = zstandard.ZstdCompressor().compressobj()
    with path.open("wb") as file:
        for part, times in parts:
            for _ in range(times):
                file.write(packer.compress(part))
        file.write(packer.flush())
    return path


def table(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pyarrow.table(columns), path, compression="zstd", **options)
    return path


def repeated(value: str, times: int) -> Any:
    """A column of equal values, which are stored once."""
    pyarrow = pytest.importorskip("pyarrow")
    numbers = pyarrow.array(np.zeros(times, np.int32))
    return pyarrow.DictionaryArray.from_arrays(numbers, pyarrow.array([value]))


def test_parquet_of_many_equal_values(tmp_path: Path):
    many = table(tmp_path / "many.parquet", {"text": repeated("x" * 10_000, 100_000)})
    assert many.stat().st_size < 20_000
    large = table(
        tmp_path / "large.parquet",
        {"text": repeated("x" * 7 * 2**20, 10_000)},
        dictionary_pagesize_limit=2**30,
    )
    assert large.stat().st_size < 10_000
    # Each value but the first is the one before it.
    alike = table(
        tmp_path / "alike.parquet",
        {"text": ["x" * 7 * 2**20] * 20},
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
    )
    assert alike.stat().st_size < 10_000
    assert said(many, large, alike).count("has more than 4,194,304 tokens") == 3


def test_parquet_of_a_page_that_unpacks_to_much(tmp_path: Path):
    path = table(tmp_path / "a.parquet", {"text": ["x" * 100 * 2**20]}, use_dictionary=False)
    assert path.stat().st_size < 20_000
    assert "has pages that unpack to 100.0 MiB together, more than 8 records may" in said(path)


def test_parquet_of_a_text_that_is_too_large(tmp_path: Path):
    path = table(tmp_path / "a.parquet", {"text": ["x", "y" * 2000]})
    refused(path, "row 1 has a record of more than 1,048 bytes", 256, max_record_mib=0.001)
    assert len(opened(path, 256)) == 2001


def test_parquet_of_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They are read; many equal or empty messages in a row take no memory."""
    pyarrow = pytest.importorskip("pyarrow")

    def conversation(content: str, times: int) -> Any:
        columns = [repeated("assistant", times), repeated(content, times)]
        messages = pyarrow.StructArray.from_arrays(columns, ["role", "content"])
        return pyarrow.ListArray.from_arrays(pyarrow.array([0, times], pyarrow.int32()), messages)

    path = table(tmp_path / "a.parquet", {"messages": conversation("hello", 3)})
    found = "".join(piece.text for piece in read_pieces(path))
    assert found == "assistant: hello\n" * 3
    table(path, {"messages": conversation("x" * 2**20, 1000)}, dictionary_pagesize_limit=2**30)
    assert "row 0 has a record of more than 8,388,608 bytes" in said(path)
    monkeypatch.setattr(parquet, "MOST_VALUES", 1000)
    none = pyarrow.nulls(2000, pyarrow.struct([("role", "string"), ("content", "string")]))
    table(
        path,
        {"messages": pyarrow.ListArray.from_arrays(pyarrow.array([0, 2000], "int32"), none)},
    )
    refused(path, r"is no Parquet file \(the page at byte \d+ has 2,000 values\)", 256)


def test_a_description_of_parquet_that_lies(tmp_path: Path):
    """The numbers of the description are not those of the pages."""
    path = table(tmp_path / "a.parquet", {"text": ["hello"] * 1000}, use_dictionary=False)
    whole = path.read_bytes()
    # 1000 as Thrift has it; rows of the group and of the file, and values of the column
    number, other = b"\xd0\x0f", b"\xd2\x0f"
    at = [found.start() for found in re.finditer(re.escape(number), whole)]
    assert len(at) >= 3
    for place in at:
        path.write_bytes(whole[:place] + other + whole[place + 2 :])
        try:
            assert len(opened(path, 256)) == 5000
        except UserError as error:
            assert "is no Parquet file (" in str(error)  # noqa: PT017


def test_a_large_description_of_parquet_is_refused(tmp_path: Path):
    size = parquet.FOOTER_BYTES + 1
    (tmp_path / "a.parquet").write_bytes(
        b"PAR1" + bytes(size) + size.to_bytes(4, "little") + b"PAR1"
    )
    refused(tmp_path / "a.parquet", r"its description has 1,048,577 of its 1,048,589 bytes", 256)


def test_array_record_of_a_chunk_that_unpacks_to_much(tmp_path: Path):
    module = pytest.importorskip("array_record.python.array_record_module")
    path = tmp_path / "a.array_record"
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    writer.write(b"hello")
    writer.write(b"x" * 2**20)
    writer.close()
    assert len(list(array_records(path, 2**20))) == 2
    with pytest.raises(UserError, match=r"record 1 has a record of more than 1,048,575 bytes"):
        list(array_records(path, 2**20 - 1))
    with pytest.raises(UserError, match=r"has 1 records of 1,048,5\d\d bytes in a chunk at byte 1"):
        list(array_records(path, 2**16))


def test_array_record_of_large_groups_is_read_once(tmp_path: Path):
    """A chunk is not unpacked again for each of its records."""
    module = pytest.importorskip("array_record.python.array_record_module")
    path = tmp_path / "a.array_record"
    writer = module.ArrayRecordWriter(str(path), "group_size:65536")
    for number in range(20_000):
        writer.write(b"%d" % number)
    writer.close()
    assert list(array_records(path, 2**20)) == [b"%d" % number for number in range(20_000)]


def test_a_line_that_unpacks_to_much(tmp_path: Path):
    million = b"x" * 10**6
    path = zst(tmp_path / "a.jsonl.zst", (b'{"text": "', 1), (million, 300))
    assert path.stat().st_size < 2**19
    assert "at byte 0 has a record of more than 8,388,608 bytes: split it" in said(path)
    packed = gzip.compress(b"\n" * 10**6, 9)
    (tmp_path / "b.jsonl.gz").write_bytes(packed * 2)
    assert "is empty" in said(tmp_path / "b.jsonl.gz")


def test_a_text_that_unpacks_to_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = zst(tmp_path / "a.txt.zst", (b"x" * 10**6, 1000))
    assert path.stat().st_size < 2**19
    assert "has more than 4,194,304 tokens" in said(path)
    monkeypatch.setattr(reader, "SMALL_DOCUMENTS", 1000)
    zst(tmp_path / "b.jsonl.zst", (b'{"text": "a"}\n' * 1001, 1))
    refused(tmp_path / "b.jsonl.zst", "has more than 1,000 documents", 256)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n' * 1001)
    assert len(opened(tmp_path / "b.jsonl", 256)) == 1001


@pytest.mark.slow
def test_a_word_that_does_not_end(tmp_path: Path):
    write_tokenizer(tmp_path / "t.json")
    path = zst(tmp_path / "a.jsonl.zst", (b'{"text": "', 1), (b"abc" * 2**20, 2), (b'"}', 1))
    assert "which this tokenizer cannot encode in parts" in said(
        path, tokenizer=str(tmp_path / "t.json")
    )
    path = zst(tmp_path / "b.jsonl.zst", (b'{"text": "', 1), (b"abc" * 2**20, 1), (b'"}', 1))
    assert said(path, tokenizer=str(tmp_path / "t.json")) == str(3 * 2**20)
