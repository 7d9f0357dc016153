"""Files are what their content is, whatever their names say."""

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from support.text_data import settings
from support.token_files import megatron
from tpipe_jax.config.settings import DataConfig
from tpipe_jax.data import contents, reader
from tpipe_jax.data.batches import open_data
from tpipe_jax.data.contents import content_of
from tpipe_jax.data.sources import TokenSource, open_source
from tpipe_jax.errors import UserError

LINES = b'{"text": "hello"}\n{"text": "world"}\n'
TEXT = "a line of text, schöne Grüße\n".encode() * 20


def opened(path: Path, vocab_size: int = 256, **data: Any) -> TokenSource:
    return open_source("--data", str(path), vocab_size, DataConfig(**data))


def tokens(source: TokenSource) -> list[int]:
    return source.read(0, len(source)).tolist()


def zst(content: bytes) -> bytes:
    return zstandard.compress(content)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.txt", "a", "a.data"])
def test_json_lines_are_known_by_their_content(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(LINES)
    source = opened(tmp_path / name)
    assert bytes(tokens(source)) == b"helloworld"
    assert source.document_starts.tolist() == [0, 5]


def test_a_link_may_lead_to_a_name_without_an_ending(tmp_path: Path):
    """As caches of downloads have it."""
    (tmp_path / "blob").write_bytes(b'{"body": "hello"}\n')
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "blob")
    assert bytes(tokens(opened(tmp_path / "a.jsonl", field="body"))) == b"hello"
    with pytest.raises(UserError, match=r"has no text \(its fields are body\)"):
        opened(tmp_path / "a.jsonl")


@pytest.mark.parametrize("pack", [gzip.compress, zst])
@pytest.mark.parametrize(("name", "content"), [("a.jsonl", LINES), ("a.txt", TEXT)])
def test_compressed_files_are_read(
    pack: Callable[[bytes], bytes], name: str, content: bytes, tmp_path: Path
):
    """Whatever ending they have; several streams in a row are one file."""
    expected = b"helloworld" if content == LINES else content
    for ending in (".gz", ".zst", ""):
        path = tmp_path / f"{name}{ending}"
        path.write_bytes(pack(content[:20]) + pack(content[20:]))
        assert bytes(tokens(opened(path))) == expected


def test_a_compressed_file_that_is_cut_is_refused(tmp_path: Path):
    content = random.Random(0).randbytes(200_000).hex().encode()
    for pack in (gzip.compress, zst):
        packed = pack(content)
        for size in (30, len(packed) // 2, len(packed) - 1):
            (tmp_path / "a.txt.gz").write_bytes(packed[:size])
            with pytest.raises(UserError, match=r"is damaged, or cut short"):
                tokens(opened(tmp_path / "a.txt.gz"))


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, tokens=np.arange(100))
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(TEXT)
        archive.addfile(info, io.BytesIO(TEXT))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.npz", npz(), "an archive"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(50), "a picture"),
        ("a.txt", "text in sixteen bits".encode("utf-16"), "UTF-16"),
        ("a.txt", b"a\0b, and more", "a NUL at byte 1"),
        ("a.txt", b"gr\xfc\xdfe in Latin-1", "not UTF-8 at 2"),
        ("a.csv", b"id,text\n1,hello\n", "a table"),
        ("a.json", b'[{"text": "hello"}]', "JSON, but not a JSON object in each line"),
        ("a.json", b'{\n "text": "hello"\n}\n', "JSON, but not a JSON object in each line"),
        ("a.idx", b"MMIDIDX\0\0" + bytes(50), "name the .bin beside it"),
        ("a.txt", b"BZh91AY", "bzip2"),
        ("a.tar", tar(), "an archive (tar)"),
        ("a.parquet", TEXT, "text, though its name ends in .parquet"),
        ("a.bin", TEXT, "text, not tokens"),
        ("a.npy.gz", gzip.compress(b"\x93NUMPY" + bytes(50)), "compressed by gzip; unpack"),
    ],
)
def test_what_is_neither_text_nor_tokens_is_refused(
    name: str, content: bytes, what: str, tmp_path: Path
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        open_data(settings(tmp_path / name))
    assert what in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_what_grows_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A small compressed file may hold one endless record or text."""
    monkeypatch.setattr(reader, "MOST_TOKENS", 5000)
    (tmp_path / "a.jsonl").write_bytes(zst(b'{"text": "' + b"x" * 2000 + b'"}\n'))
    with pytest.raises(UserError, match=r"at byte 0 has a record of more than 1,048 bytes"):
        opened(tmp_path / "a.jsonl", max_record_mib=0.001)
    (tmp_path / "a.txt").write_bytes(zst(b"x" * 10_000))
    with pytest.raises(UserError, match=r"has more than 5,000 tokens, which a run does not keep"):
        opened(tmp_path / "a.txt")
    packed, sizes = zst(b"x" * 2**27), []
    (tmp_path / "b.txt").write_bytes(packed)
    assert len(packed) < 2**15
    with contents.unpacked(tmp_path / "b.txt", "Zstandard") as file:
        raw: Any = file
        while content := raw.read1(2**26):
            sizes.append(max(len(content), len(raw.raw._rest)))
    assert max(sizes) <= 2**25


def test_an_empty_compressed_file_counts_once(tmp_path: Path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "b.txt").write_text("some text")
    assert opened(tmp_path).notes == [f"--data={tmp_path}: skipped 1 empty file"]


def test_a_mark_of_the_byte_order_hides_no_records(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + LINES)
    assert bytes(tokens(opened(tmp_path / "a.txt"))) == b"helloworld"


def test_a_nul_far_inside_of_a_text_is_found_when_it_is_read(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"x" * 100_000 + b"\0" + b"x" * 1000)
    source = opened(tmp_path / "a.txt")
    source.read(0, 100_000)
    with pytest.raises(UserError, match=r"has a NUL at byte 100000"):
        source.read(99_000, 101_000)


def test_bytes_are_no_tokens_of_another_vocabulary(tmp_path: Path):
    """A model of 300 tokens would read text as nonsense."""
    (tmp_path / "a.txt").write_bytes(TEXT)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    for name in ("a.txt", "a.jsonl"):
        with pytest.raises(UserError, match=r"is text, .*=bytes reads as 256 tokens, but .*=300"):
            opened(tmp_path / name, vocab_size=300)
    np.save(tmp_path / "a.npy", np.arange(100))
    assert len(opened(tmp_path / "a.npy", vocab_size=300)) == 100


def parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pyarrow.table({"text": ["hello", "world"]}), path)


def array_record(path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in (b"hello", b"world"):
        writer.write(text)
    writer.close()


def example(path: Path) -> None:
    """An ArrayRecord of `tf.train.Example`: {"text": b"hello"}, as protocol buffers write it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    def field_1(content: bytes) -> bytes:
        return b"\x0a" + bytes([len(content)]) + content

    value = field_1(field_1(b"hello"))
    entry = field_1(b"text") + b"\x12" + bytes([len(value)]) + value
    writer = ArrayRecordWriter(str(path), "group_size:1")
    writer.write(field_1(field_1(entry)))
    writer.close()


def test_array_record_has_names_with_numbers(tmp_path: Path):
    """As TensorFlow Datasets names them; its records are no text."""
    name = "wiki-train.array_record-00003-of-00004"
    array_record(tmp_path / name)
    assert bytes(tokens(opened(tmp_path / name))) == b"helloworld"
    assert bytes(tokens(opened(tmp_path))) == b"helloworld"
    example(tmp_path / name)
    with pytest.raises(UserError, match=r"has records of tf.train.Example"):
        opened(tmp_path / name)


WRITERS: dict[str, Callable[[Path], object]] = {
    ".txt": lambda p: p.write_bytes(TEXT),
    ".jsonl": lambda p: p.write_bytes(LINES * 9),
    ".parquet": parquet,
    ".array_record": array_record,
    ".npy": lambda p: np.save(p, np.arange(200) % 256),
    ".bin": lambda p: (np.arange(200) % 256).astype("<u2").tofile(p),
    ".json": lambda p: p.write_text(json.dumps({"a": [1] * 100})),
    ".zip": lambda p: p.write_bytes(npz()),
}


def read_or_refused(path: Path) -> list[int] | None:
    try:
        source = opened(path)
        return tokens(source)
    except UserError:
        return None


@pytest.mark.parametrize("seed", range(10))
def test_no_kind_of_file_is_taken_for_another(seed: int, tmp_path: Path):
    """100 files each time: of one kind, under the name of another, compressed or cut. What is read
    is what was written, or a part of it.
    """
    random_ = random.Random(seed)
    whole = {}
    for suffix, write in WRITERS.items():
        write(tmp_path / f"a{suffix}")
        whole[suffix] = read_or_refused(tmp_path / f"a{suffix}")
    assert sum(found is not None for found in whole.values()) == 6
    for _ in range(100):
        true, named = random_.choices(list(WRITERS), k=2)
        content = (tmp_path / f"a{true}").read_bytes()
        if is_cut := random_.random() < 0.5:
            content = content[: random_.randrange(len(content))]
        pack = random_.choice([bytes, bytes, gzip.compress, zst])
        path = tmp_path / f"b{named}"
        path.write_bytes(pack(content))
        found, expected = read_or_refused(path), whole[true]
        if found is None:
            continue
        if true == ".bin" and named == ".bin":
            assert found == (expected or [])[: len(found)]
        elif true == ".jsonl":  # the beginning of a record may be text, as its name may say
            own = [found == (expected or [])[: len(found)], bytes(found) == content]
            assert any(own) or bytes(found) == content
            assert own[0] or len(content) < 18 or named in (".txt", ".json"), (true, named, content)
        elif expected is None or is_cut:
            text = bytes(n % 256 for n in found)
            assert text == content or found == (expected or [])[: len(found)], (true, named)
        else:
            assert found == expected, (true, named)


def test_kinds_are_told_from_the_first_bytes(tmp_path: Path):
    for suffix, write in WRITERS.items():
        write(tmp_path / f"a{suffix}")
    names = {".txt": "text", ".jsonl": "JSON lines", ".parquet": "Parquet"}
    names |= {".array_record": "ArrayRecord", ".npy": "token file", ".bin": "token file"}
    for suffix, kind in names.items():
        assert content_of(tmp_path / f"a{suffix}").kind == kind
    megatron(tmp_path / "m.bin", "<u2", 8)
    assert len(opened(tmp_path / "m", vocab_size=700)) == 1000  # the prefix of the two
