"""Files of data that are whole but lie: read as what they hold, or refused with one sentence.

Each example makes a file of some format with other structure, numbers, names, types and links, and
with digests and checksums that are right. It is opened as by a run, in little memory; nothing else
is opened, and nothing of it is executed. Where it is still meaningful, its tokens are those of a
simple reading.
"""

import gzip
import io
import json
import os
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from support.forged import (
    bounded_memory,
    forged_bytes,
    forged_json,
    link_to,
    outside_of,
    paths_to,
    watched,
)
from support.marks import slow
from support.token_files import TOKENS, megatron
from tpipe_jax.config.settings import Config
from tpipe_jax.data.batches import open_data
from tpipe_jax.data.documents import HowToRead
from tpipe_jax.data.sources import open_shares
from tpipe_jax.data.token_files import about_shards
from tpipe_jax.data.token_shards import make_shards
from tpipe_jax.errors import UserError

VOCAB, SECONDS = 700, 120
MOST_READ = 10**6  # tokens that are compared
Draw = Callable[..., Any]
Tokens = list[int]
SIZES = [0, 1, 2, 7, 300, 999, 1000, 1001, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 10**23]


class Forged:
    """What an example asks for, and what comes of it."""

    def __init__(self, train: Path | str, vocab_size: int = VOCAB, **data: Any) -> None:
        self.train, self.vocab_size, self.data = str(train), vocab_size, data
        self.expected: Tokens | None = None
        """What the file holds, if that can be told; else any tokens of the vocabulary will do."""
        self.is_refused = False
        """Whether it has to be refused."""
        self.may_link = False
        """Whether links are followed, as in a folder of text that the user names."""


def mostly(good: list[Any], bad: list[Any]) -> st.SearchStrategy[Any]:
    """One of the good values, or in some examples one of the bad ones."""
    drawn = st.tuples(st.integers(0, 9), st.sampled_from(good), st.sampled_from(bad))
    return drawn.map(lambda own: own[2] if own[0] == 3 else own[1])


# --------------------------------------------------------------------------------- token files


def forged_npy(draw: Draw, folder: Path) -> Forged:
    types = ["'>u2'", "'|u1'", "'<i8'", "'|O'", "'<f4'", "'|b1'", "[('a', '<u2')]", "'<i3'", "7"]
    types += ["None", "'<u2,<u2'", "('<u2', 2)", "'<M8[s]'", "{}"]
    descr = draw(mostly(["'<u2'", "'<i4'"], types))
    size = draw(mostly([1000, 500], [*SIZES, -1, -5, 123]))
    shapes = [f"({size}, 1)", "()", "(True,)", f"{size}", f"[{size}]", f"('{size}',)", "(1.5,)"]
    shape = draw(mostly([f"({size},)"], [*shapes, f"({'(' * 90}", f"({size}L,)"]))
    order = draw(mostly(["False", "True"], ["None", "0", "'C'"]))
    keys = draw(
        mostly(
            ["'descr': {0}, 'fortran_order': {1}, 'shape': {2}"],
            [
                "'shape': {2}",
                "'descr': {0}, 'fortran_order': {1}, 'shape': {2}, 'x': 1",
                "'descr': {0}, 'fortran_order': {1}, 'shape': __import__('os').getcwd()",
            ],
        )
    )
    header = ("{" + keys.format(descr, order, shape) + ", }").encode()
    header += b" " * draw(mostly([0, 5], [20_000])) + b"\n"
    version = draw(mostly([1, 2, 3], [0, 4, 255]))
    length = len(header) + draw(mostly([0], [-1, 1, 5000]))
    packed = max(length, 0).to_bytes(2 if version == 1 else 4, "little")
    content = TOKENS.astype("<u2").tobytes()[: draw(mostly([2000], [1999, 0]))]
    (folder / "a.npy").write_bytes(b"\x93NUMPY" + bytes([version, 0]) + packed + header + content)
    made = Forged(folder / "a.npy", draw(st.sampled_from([VOCAB, 2**31 - 1])))
    try:
        tokens = np.load(folder / "a.npy", allow_pickle=False)
    except Exception:
        made.is_refused = "L" not in shape
        return made
    is_plain = descr.startswith("'") and "," not in descr
    if is_plain and tokens.ndim == 1 and tokens.dtype.kind in "iu":
        made.expected = tokens.tolist()
    else:
        made.is_refused = True
    return made


def forged_llm_c(draw: Draw, folder: Path) -> Forged:
    magic, size = draw(st.sampled_from([(20240520, 2), (20240801, 4)]))
    wrong = st.integers(-(2**31), 2**31 - 1)
    number = draw(mostly([1000], [999, -500, -512, 2**31 - 1, -(2**31), draw(wrong)]))
    header = np.zeros(256, "<i4")
    header[:3] = magic, draw(st.sampled_from([1, 0, -1, 2**31 - 1])), number
    content = header.tobytes() + TOKENS.astype(f"<u{size}").tobytes()
    content = content[: draw(mostly([len(content)], [12, 24, 1024, len(content) - 1]))]
    (folder / "a.bin").write_bytes(content)
    made = Forged(folder / "a.bin")
    if len(content) - 1024 == number * size and number >= 0:
        made.expected = TOKENS[:number].tolist()
    else:
        made.is_refused = True
    return made


def forged_megatron(draw: Draw, folder: Path) -> Forged:
    path = folder / "a.bin"
    megatron(path, "<u2", 8)
    lengths, starts, documents = [300, 1, 699], [0, 600, 602], [0, 1, 2, 3]
    others = st.one_of(st.integers(-5, 1100), st.sampled_from([2**31 - 1, -(2**31), 300, 700, 2]))
    for numbers in (lengths, starts, documents):
        if draw(st.integers(0, 2)) == 0:
            at = draw(st.integers(0, len(numbers) - 1))
            numbers[at] = draw(others)
            if numbers is lengths and draw(st.booleans()):  # so that the sum is right
                numbers[at - 1] = 1000 - sum(numbers) + numbers[at - 1]
                numbers[at - 1] = max(min(numbers[at - 1], 2**31 - 1), -(2**31))
                starts[:] = [0, 2 * numbers[0], 2 * (numbers[0] + numbers[1])]
        if draw(st.integers(0, 9)) == 0:
            numbers[:] = draw(st.permutations(numbers))
        if draw(st.integers(0, 9)) == 0:
            numbers.append(draw(others))
    counts = [len(lengths), len(documents)]
    version = draw(mostly([1], [0, 2, 2**63]))
    code = draw(st.sampled_from([8] * 6 + [1, 2, 3, 4, 5, 6, 7, 0, 255]))
    if draw(st.integers(0, 5)) == 0:
        counts[draw(st.integers(0, 1))] = draw(st.sampled_from([0, 1, 4, 2**31, 2**61, 2**64 - 1]))
    content = b"MMIDIDX\0\0" + struct.pack("<QBQQ", version, code, *counts)
    content += np.array(lengths, "<i4").tobytes() + np.array(starts, "<i8").tobytes()
    content += np.array(documents, "<i8").tobytes()
    path.with_suffix(".idx").write_bytes(content)
    made = Forged(draw(st.sampled_from([path, folder, folder / "a"])))
    tokens = TOKENS.tolist()
    if (version, code) == (1, 8) and counts == [3, 4] and len(lengths) == 3 and len(starts) == 3:
        is_plain = [2 * sum(lengths[:i]) for i in range(3)] == starts and sum(lengths) == 1000
        if (
            is_plain
            and min(lengths) >= 0
            and documents == sorted(documents)
            and (documents[0], documents[-1]) == (0, 3)
        ):
            made.expected = tokens
    return made


# -------------------------------------------------------------------------------- token shards


def forged_shards(draw: Draw, folder: Path, made_shards: Path) -> Forged:
    shutil.copytree(made_shards, folder / "shards")
    own = folder / "shards"
    content = json.loads((own / "index.json").read_bytes())
    outside = outside_of(folder)
    for suffix in (".bin", ".idx"):
        if not (outside / f"secret{suffix}").exists():
            shutil.copy(own / f"00000{suffix}", outside / f"secret{suffix}")
    names = [*paths_to(outside), str(outside / "secret"), "../../outside/secret", "00001", "link"]
    if draw(st.integers(0, 3)):
        (own / "index.json").write_bytes(draw(forged_json(content, names)))
    how = draw(st.sampled_from(["nothing", "nothing", "link", "pipe", "folder", "bytes", "none"]))
    path = own / draw(st.sampled_from(sorted(os.listdir(made_shards))))
    if how == "bytes":
        path.write_bytes(draw(forged_bytes(path.read_bytes())))
    elif how == "link":
        targets = [*sorted(outside.iterdir()), "/dev/zero", path.name, "00001.bin"]
        link_to(path, draw(st.sampled_from(targets)))
    elif how != "nothing":
        path.unlink()
        {"pipe": os.mkfifo, "folder": os.mkdir, "none": lambda _: None}[how](path)
    made = Forged(own, draw(st.sampled_from([256, VOCAB])))
    try:
        made.may_link = about_shards(own) is None  # then it is any folder
    except UserError:
        made.is_refused = True
    return made


# ------------------------------------------------------------------------------------- records

RECORDS = [
    {"text": "hello world, " * 20},
    {"text": "Grüße \U0001f600", "other": [1, {"a": None}]},
    {"text": "x" * 300, "messages": []},
]
TALK = {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "oh" * 200}]
}


def packed(draw: Draw, content: bytes, path: Path) -> tuple[Path, bool]:
    """Writes a file as it is, or compressed in one or several parts. Also tells if it is whole."""
    how = draw(st.sampled_from(["plain", "gzip", "zst"]))
    if how == "plain":
        path.write_bytes(content)
        return path, True
    cut = draw(st.integers(0, len(content)))
    parts = [content[:cut], content[cut:]] if draw(st.booleans()) else [content]
    pack: Any = gzip.compress if how == "gzip" else zstandard.ZstdCompressor().compress
    made = b"".join(map(pack, parts))
    is_whole = draw(st.integers(0, 5)) > 0
    if not is_whole:
        made = draw(forged_bytes(made))
    path = path.with_name(f"{path.name}{'.gz' if how == 'gzip' else '.zst'}")
    path.write_bytes(made)
    return path, is_whole


def forged_records(draw: Draw, folder: Path) -> Forged:
    lines = [
        json.dumps(record).encode() for record in draw(st.sampled_from([RECORDS, [TALK, TALK]]))
    ]
    at = draw(st.integers(0, len(lines) - 1))
    if draw(st.integers(0, 4)):
        lines[at] = draw(forged_json(json.loads(lines[at])))
    ends = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b"\r", b""]))
    name = draw(st.sampled_from(["a.jsonl", "a.json", "a.txt"]))
    limit = draw(st.sampled_from([32, 0.001]))
    path, is_whole = packed(draw, ends.join(lines), folder / name)
    made = Forged(path, 256, max_record_mib=limit)
    if is_whole and ends in (b"\n", b"\n\n", b"\r\n") and limit == 32:
        made.expected = expected_text(lines)
    return made


def expected_text(lines: list[bytes]) -> Tokens | None:
    """The bytes of all texts, where all records have one and nothing is odd."""
    text = ""
    for line in b"\n".join(lines).split(b"\n"):
        try:
            record = json.loads(line, object_pairs_hook=lambda pairs: pairs)
            text += dict(record)["text"]
            if len(dict(record)) < len(record):  # a name is given twice
                return None
            if len(line) > 10_000:  # which may have too many values
                return None
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
    try:
        return list(text.encode())
    except UnicodeEncodeError:
        return None


def forged_parquet(draw: Draw, folder: Path) -> Forged:
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [record["text"] for record in RECORDS] * draw(st.sampled_from([1, 50]))
    columns: dict[str, Any] = draw(
        st.sampled_from(
            [
                {"text": texts},
                {"text": [None, *texts], "other": [[7]] * (len(texts) + 1)},
                {"text": [text.encode() for text in texts]},
                {"text": pyarrow.array(texts, pyarrow.large_string())},
                {"text": pyarrow.array(texts).dictionary_encode()},
                {"text": [[text] for text in texts]},
                {"text": [{"text": text} for text in texts]},
                {"text": list(range(9))},
                {"prompt": texts, "completion": texts},
                {"messages": [TALK["messages"]] * 9},
                {"messages": [*[TALK["messages"]] * 9, None, []]},
                {"messages": [[None]]},
                {"messages": TALK["messages"]},
                {"messages": texts},
                {"other.text": texts},
                {},
            ]
        )
    )
    encoding = draw(
        st.sampled_from([None, None, "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
    )
    is_text = set(columns) <= {"text", "prompt", "completion"} and all(
        isinstance(value[0], str) for value in columns.values() if isinstance(value, list)
    )
    options: dict[str, Any] = {}
    if encoding and is_text and columns and isinstance(next(iter(columns.values())), list):
        options = {"use_dictionary": False, "column_encoding": dict.fromkeys(columns, encoding)}
    file = io.BytesIO()
    pq.write_table(
        pyarrow.table(columns),
        file,
        compression=draw(st.sampled_from(["none", "snappy", "zstd", "gzip"])),
        data_page_version=draw(st.sampled_from(["1.0", "2.0"])),
        row_group_size=draw(st.sampled_from([1, 7, 1000])),
        **options,
    )
    content = file.getvalue()
    how = draw(st.sampled_from(["nothing", "bytes", "footer", "pages", "number"]))
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    changed = bytearray(content)
    if how == "bytes":
        changed = bytearray(draw(forged_bytes(content)))
    elif how == "number":  # a number of the description becomes a large one of as many bytes
        at = draw(st.integers(footer, len(content) - 10))
        changed[at : at + 2] = draw(
            st.sampled_from([b"\xff\x7f", b"\x80\x01", b"\x00\x00", b"\x01\x00"])
        )
    elif how != "nothing":
        low, high = (footer, len(content) - 9) if how == "footer" else (4, min(60, footer))
        for _ in range(draw(st.integers(1, 3))):
            changed[draw(st.integers(low, high))] = draw(st.integers(0, 255))
    (folder / "a.parquet").write_bytes(changed)
    made = Forged(folder / "a.parquet", 256, packing=draw(st.sampled_from(["auto", "whole"])))
    if how == "nothing" and columns.get("text") in (texts, *()):
        made.expected = list("".join(texts).encode())
    return made


def forged_array_record(draw: Draw, folder: Path) -> Forged:
    module = pytest.importorskip("array_record.python.array_record_module")
    path = folder / "a.array_record"
    writer = module.ArrayRecordWriter(
        str(path),
        draw(st.sampled_from(["group_size:1", "group_size:3,zstd", "group_size:2,brotli"])),
    )
    for record in RECORDS:
        writer.write(record["text"].encode())
    writer.close()
    content = bytearray(path.read_bytes())
    if draw(st.integers(0, 4)):
        head = [i for i, byte in enumerate(content) if byte]
        for _ in range(draw(st.integers(1, 3))):
            content[draw(st.sampled_from(head))] = draw(st.integers(0, 255))
    path.write_bytes(content)
    return Forged(path, 256)


def forged_text(draw: Draw, folder: Path) -> Forged:
    parts = [
        b"some text\n" * 50,
        b"\xff",
        b"\0",
        b"\xed\xa0\x80",
        "Grüße".encode(),
        b"{",
        b'{"text": "a"}',
    ]
    parts += [
        b"<|end|>" * 3,
        b"\r",
        b"PK\x03\x04",
        b"\x1f\x8b",
        b"\xef\xbb\xbf",
        b"a" * 5000,
        b"%PDF",
    ]
    content = b"".join(draw(st.lists(st.sampled_from(parts), max_size=5)))
    name = draw(st.sampled_from(["a.txt", "a.py", "a", "a.md", "a.csv"]))
    separator = draw(st.sampled_from([None, None, "<|end|>", "\n"]))
    path, _ = packed(draw, content, folder / name)
    return Forged(
        path, 256, text_separator=separator, on_empty=draw(st.sampled_from(["skip", "refuse"]))
    )


# ------------------------------------------------------------------------- tokenizers and lists

PARTS: dict[str, list[Any]] = {
    "normalizer": [
        None,
        {"type": "NFKC"},
        {"type": "Prepend", "prepend": "_"},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "aa"},
        {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "Strip",
         "strip_left": True, "strip_right": True}]},
        {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
         "strip_accents": None, "lowercase": True},
    ],
    "pre_tokenizer": [
        None,
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
        {"type": "Split", "pattern": {"Regex": "(o|e)"}, "behavior": "Isolated", "invert": False},
        {"type": "Whitespace"},
        {"type": "FixedLength", "length": 3},
    ],
    "decoder": [None, {"type": "ByteLevel"},
                {"type": "WordPiece", "prefix": "##", "cleanup": True}],
    "post_processor": [None, {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A",
                       "type_id": 0}}], "pair": [], "special_tokens": {}}],
    "truncation": [None, {"direction": "Right", "max_length": 5, "strategy": "LongestFirst",
                          "stride": 0}],
    "padding": [None, {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0,
                       "pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "a"}],
}  # fmt: skip
LETTERS = {letter: n for n, letter in enumerate("abcdehlorstwx ,.'")}
MODELS: list[dict[str, Any]] = [
    {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
     "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
     "vocab": {**LETTERS, "he": 17, "<0x41>": 18}, "merges": [["h", "e"]]},
    {"type": "WordPiece", "unk_token": "x", "continuing_subword_prefix": "##",
     "max_input_chars_per_word": 100, "vocab": {**LETTERS, "##e": 17}},
    {"type": "WordLevel", "unk_token": "x", "vocab": {**LETTERS, "hello": 17}},
    {"type": "Unigram", "unk_id": 0, "byte_fallback": False,
     "vocab": [[letter, -1.0] for letter in LETTERS]},
]  # fmt: skip
ADDED = {"id": 19, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}  # fmt: skip


def forged_tokenizer(draw: Draw, folder: Path) -> Forged:
    content: dict[str, Any] = {"version": "1.0", "model": draw(st.sampled_from(MODELS))}
    content |= {name: draw(st.sampled_from(parts)) for name, parts in PARTS.items()}
    content["added_tokens"] = draw(st.sampled_from([[], [ADDED]]))
    path = folder / "tokenizer.json"
    is_forged = draw(st.integers(0, 9)) > 0
    path.write_bytes(draw(forged_json(content)) if is_forged else json.dumps(content).encode())
    if draw(st.booleans()):
        own = {"eos_token": draw(st.sampled_from(["</s>", {"content": "</s>"}, "a"]))}
        (folder / "tokenizer_config.json").write_bytes(draw(forged_json(own)))
    elif draw(st.booleans()):
        link_to(folder / "tokenizer_config.json", outside_of(folder) / "secret.json")
    (folder / "a.txt").write_text("hello world, she saw the ox. " * 20)
    return Forged(folder / "a.txt", VOCAB, tokenizer=str(path))


def forged_list(draw: Draw, folder: Path) -> Forged:
    np.save(folder / "a.npy", TOKENS)
    TOKENS.astype("<u2").tofile(folder / "b.bin")
    wrong = ["a.npy:0", "b.bin:-1", "a.npy:nan", "b.bin:1e400", "a.npy", ":1", "list.txt:1", "\0:1"]
    wrong += ["@list.txt:1", ".:1", "pydocs:1", "none:1", "a" * 9000, "http://127.0.0.1:9/x:1"]
    wrong += ["a.npy:1:1", "\ud800:1", "/:x", "*:1"]
    lines = mostly(["a.npy:1", "b.bin:0.5", "*.npy:1", "a.npy:1e-300", "#"], wrong)
    text = "\n".join(draw(st.lists(lines, max_size=4)))
    (folder / "list.txt").write_bytes(text.encode(errors="surrogatepass"))
    return Forged(f"@{folder / 'list.txt'}")


# ---------------------------------------------------------------------------------------- tests

KINDS: dict[str, Callable[..., Forged]] = {
    "npy": forged_npy,
    "llm.c": forged_llm_c,
    "Megatron-LM": forged_megatron,
    "token shards": forged_shards,
    "JSON": forged_records,
    "Parquet": forged_parquet,
    "ArrayRecord": forged_array_record,
    "text": forged_text,
    "tokenizer": forged_tokenizer,
    "list": forged_list,
}


@contextmanager
def within_time() -> Iterator[None]:
    def hang(*_: Any) -> None:
        raise AssertionError(f"it hangs: {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def made_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for name in "ab":
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"some text of {name}, " * 50}))
    make_shards(sorted(folder.glob("*.jsonl")), folder / "out", "bytes", HowToRead(), 1)
    return folder / "out"


def tokens_of(forged: Forged) -> Tokens:
    """The tokens of a source, read as training and as evaluation do. Raises `UserError`."""
    config = Config()
    model = replace(config.model, vocab_size=forged.vocab_size, seq_len=8)
    data = replace(config.data, train=forged.train, **forged.data)
    batches = open_data(replace(config, model=model, data=data))
    for own in batches:
        batch = own.batch(0)
        assert batch.dtype == np.int32
        assert batch.max() < forged.vocab_size
    shares = open_shares("config.data.train", forged.train, forged.vocab_size, data)
    tokens = [share.source.read(0, min(len(share.source), MOST_READ)) for share in shares]
    return np.concatenate(tokens).tolist()


def check_sentence(error: UserError) -> None:
    text = str(error)
    assert "\n" not in text, text
    assert text.endswith("."), text
    assert 20 < len(text) < 20_000, text


def check(forged: Forged, folder: Path, outside: Path) -> str:
    try:
        with watched(folder, outside) as seen, bounded_memory(), within_time():
            tokens = tokens_of(forged)
    except UserError as error:
        check_sentence(error)
        assert forged.may_link or not seen, seen
        is_short = "one sequence of config.model.seq_len" in str(error) or "is empty" in str(error)
        is_outside = "but ids are at least 0 and below" in str(error)
        numbers = forged.expected or []
        is_meant = is_outside and not all(0 <= n < forged.vocab_size for n in numbers)
        if not is_meant and not (is_short and len(numbers) < 200):
            assert forged.expected is None, f"{error} but it holds {numbers[:20]}"  # noqa: PT017
        return "refused"
    assert forged.may_link or not seen, seen
    assert not forged.is_refused, f"it is read as {tokens[:20]}"
    assert all(0 <= token < forged.vocab_size for token in tokens)
    if forged.expected is not None:
        assert tokens == forged.expected
    return "read"


# 5,000 of all kinds in the slow part.
@pytest.mark.parametrize("number", [10, slow(500)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Reading `.npy`", "ignore:Stored array in format")
def test_forged_data_is_read_or_refused(
    kind: str, number: int, made_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    seen: Counter[str] = Counter()
    own, outside = tmp_path / "own", outside_of(tmp_path / "own")

    @settings(
        max_examples=number,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.data())
    def try_out(data: st.DataObject) -> None:
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        make, rest = KINDS[kind], (made_shards,) if kind == "token shards" else ()
        seen[check(make(data.draw, own, *rest), own, outside)] += 1

    try_out()
    if number > 100:
        assert min(seen["read"], seen["refused"]) > number / 30, seen
        with capsys.disabled():
            print(kind, dict(seen), end=" ")
