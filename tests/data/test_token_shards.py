"""Tokenizers, and text turned into token shards."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from support import runs
from support.marks import slow
from tpipe_jax.config.settings import Config, DataConfig, ModelConfig, TrainConfig
from tpipe_jax.data import token_shards
from tpipe_jax.data.batches import open_data, open_held_out
from tpipe_jax.data.carried import with_carried
from tpipe_jax.data.documents import HowToRead
from tpipe_jax.data.sources import open_source
from tpipe_jax.data.token_shards import cut, find_files, make_shards, texts
from tpipe_jax.data.tokenizer import END_OF_TEXT, open_tokenizer, train_bpe
from tpipe_jax.errors import UserError

TEXTS = [f"Document {i}: schöne Grüße, 世界 🌍, {i * i} times." for i in range(40)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(TEXTS, 400).save(str(path))
    return path


def test_a_trained_tokenizer_is_without_loss(bpe: Path):
    tokenizer = open_tokenizer("--tokenizer", str(bpe))
    assert 300 < tokenizer.vocab_size <= 400
    for text in (*TEXTS, "never seen: \x00\t\nžluťoučký kůň"):
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32
        assert tokenizer.decode(tokens.tolist()) == text
        assert "".join(tokenizer.stream(tokens.tolist())) == text
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 1.5
    assert tokenizer.decode([tokenizer.end]) == END_OF_TEXT


def test_bytes_of_tokens_are_those_of_the_text(bpe: Path, tmp_path: Path):
    """Also of parts of a letter; what separates documents has none."""
    tokenizer = open_tokenizer("--tokenizer", str(bpe))
    assert tokenizer.num_bytes
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokenizer.num_bytes(tokens) == len(text.encode())
        assert sum(tokenizer.num_bytes([token]) for token in tokens) == len(text.encode())
    assert tokenizer.num_bytes([tokenizer.end]) == 0
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.save(str(tmp_path / "words.json"))
    assert open_tokenizer("--tokenizer", str(tmp_path / "words.json")).num_bytes is None


def test_bytes_are_their_own_tokens():
    tokenizer = open_tokenizer("--tokenizer", "bytes")
    text = TEXTS[0]
    assert tokenizer.encode(text).tolist() == list(text.encode())
    pieces = list(tokenizer.stream(list(text.encode())))
    assert "".join(pieces) == text
    assert len(pieces) == len(text.encode())  # one for each token, so that none waits
    assert "".join(tokenizer.stream(text.encode()[:-1] + b"\xf0\x9f")) == text[:-1] + "\ufffd"


def write_inputs(folder: Path) -> list[list[str]]:
    """Two text files, a file of JSON lines, and one that is none of these; by file, in order."""
    (folder / "in" / "deep").mkdir(parents=True)
    (folder / "in" / "a.txt").write_text(TEXTS[0])
    (folder / "in" / "deep" / "b.md").write_text(TEXTS[1])
    lines = [json.dumps({"n": i, "text": text}) for i, text in enumerate(TEXTS[2:])]
    (folder / "in" / "c.jsonl").write_text("\n".join([*lines[:5], "", *lines[5:]]))
    (folder / "in" / "d.png").write_bytes(b"\x89PNG")
    return [[TEXTS[0]], TEXTS[2:], [TEXTS[1]]]


def run_tokenize(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/tokenize.py", *args]
    return subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("part_bytes", [2**20, 300, 1])
def test_parts_have_every_document_once(
    tmp_path: Path, part_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(token_shards, "PART_BYTES", part_bytes)
    expected = [text for own in write_inputs(tmp_path) for text in own]
    parts = cut(find_files([tmp_path / "in"])[0], HowToRead())
    assert len(parts) >= {2**20: 3, 300: 8, 1: 40}[part_bytes]
    assert [
        piece.text for part in parts for piece in texts(part, HowToRead(), Counter())
    ] == expected


def test_shards_hold_each_document_by_itself(tmp_path: Path, bpe: Path):
    """In the command's own processes; read as a run reads them, and as Megatron-LM has them."""
    documents = [text for own in write_inputs(tmp_path) for text in own]
    out = tmp_path / "out"
    args = [f"--out={out}", f"--tokenizer={bpe}", "--num-workers=2", str(tmp_path / "in")]
    done = run_tokenize(*args)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    tokenizer = open_tokenizer("--tokenizer", str(bpe))
    expected = [[*tokenizer.encode(text), tokenizer.end] for text in documents]
    num_tokens = sum(map(len, expected))
    assert f"has {num_tokens:,} tokens of 40 documents in 3 shards" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"0000{i}.{kind}" for i in range(3) for kind in ("bin", "idx")),
        "index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    source = open_source("--data", str(out), 400, DataConfig())
    np.testing.assert_array_equal(source.read(0, len(source)), np.concatenate(expected))
    index = (out / "00001.idx").read_bytes()
    lengths = np.frombuffer(index[34:], "<i4", count=38)
    np.testing.assert_array_equal(lengths, [len(tokens) for tokens in expected[1:39]])
    with pytest.raises(UserError, match=r"a tokenizer of \d+ tokens, more than .*vocab_size=256"):
        open_source("--data", str(out), 256, DataConfig())
    again = run_tokenize(*args)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith(f"error: --out={out} is there already")


def text_of(path: Path) -> str:
    """Of tokens that are bytes, in 16 bits."""
    return np.fromfile(path, "<u2").astype(np.uint8).tobytes().decode()


def test_it_goes_on_where_it_stopped(tmp_path: Path):
    """A part that was done is not done again, unless its file has changed."""
    write_inputs(tmp_path)
    (tmp_path / "in" / "e.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(UserError, match=r"e.jsonl at byte 0 has 1 as its text, which is no text"):
        make_shards([tmp_path / "in"], tmp_path / "out", "bytes", HowToRead(), 1)
    partial = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists()
    done = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.bin")}
    assert text_of(partial / "00000.bin") == TEXTS[0]
    (tmp_path / "in" / "deep" / "b.md").write_text("changed")
    (tmp_path / "in" / "e.jsonl").write_text('{"text": "mended"}\n')
    steps: list[tuple[int, int]] = []
    make_shards(
        [tmp_path / "in"],
        tmp_path / "out",
        "bytes",
        HowToRead(),
        2,
        lambda done, total: steps.append((done, total)),
    )
    assert steps[0][0] >= 1  # taken over
    assert steps[-1] == (4, 4)
    out = tmp_path / "out"
    assert (out / "00000.bin").stat().st_mtime_ns == done["00000.bin"]
    assert [text_of(path) for path in sorted(out.glob("*.bin"))] == [
        TEXTS[0],
        "".join(TEXTS[2:]),
        "changed",
        "mended",
    ]
    assert not list(out.glob("0*.json"))
    assert not partial.exists()


def test_what_was_made_otherwise_is_made_again(tmp_path: Path, bpe: Path):
    """By another tokenizer, which was stopped."""
    write_inputs(tmp_path)
    (tmp_path / "in" / "e.jsonl").write_text("{}")
    for tokenizer in (str(bpe), "bytes"):
        with pytest.raises(UserError, match=r"e.jsonl at byte 0 has no text"):
            make_shards([tmp_path / "in"], tmp_path / "out", tokenizer, HowToRead(), 1)
    (tmp_path / "in" / "e.jsonl").write_text('{"text": "mended"}')
    make_shards([tmp_path / "in"], tmp_path / "out", "bytes", HowToRead(), 1)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.bin"))
    assert [text_of(tmp_path / "out" / name) for name in names] == [
        TEXTS[0],
        "".join(TEXTS[2:]),
        TEXTS[1],
        "mended",
    ]
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_two_commands_do_not_share_a_folder(tmp_path: Path):
    write_inputs(tmp_path)
    partial = tmp_path / "out.partial"
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match=r"another command is at work on --out=.*/out: wait"):
            make_shards([tmp_path / "in"], tmp_path / "out", "bytes", HowToRead(), 1)
    finally:
        os.close(descriptor)


def test_truncation_and_padding_are_not_applied(tmp_path: Path, bpe: Path):
    made = tokenizers.Tokenizer.from_file(str(bpe))
    made.enable_truncation(5)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "t.json"))
    plain, other = (open_tokenizer("--tokenizer", str(p)) for p in (bpe, tmp_path / "t.json"))
    np.testing.assert_array_equal(other.encode(TEXTS[0]), plain.encode(TEXTS[0]))


def test_spaces_of_words_are_streamed(tmp_path: Path):
    """Where they belong to the word that follows, and are dropped at the start of a text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(["once upon a time"] * 9, trainers.BpeTrainer(show_progress=False))
    made.save(str(tmp_path / "t.json"))
    tokenizer = open_tokenizer("--tokenizer", str(tmp_path / "t.json"))
    tokens = tokenizer.encode("once upon a time").tolist()
    assert len(tokens) == 4
    assert list(tokenizer.stream(tokens)) == ["once", " upon", " a", " time"]


def test_a_tokenizer_is_made_and_trained_with(tmp_path: Path):
    write_inputs(tmp_path)
    out = tmp_path / "out"
    done = run_tokenize(f"--out={out}", "--train-bpe=320", str(tmp_path / "in"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert (tmp_path / "out.tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    config = Config(
        model=ModelConfig(vocab_size=320, seq_len=16),
        train=TrainConfig(batch_size=2),
        data=DataConfig(train=str(out)),
    )
    train, _ = open_data(config)
    tokenizer = open_tokenizer("--tokenizer", str(out / "tokenizer.json"))
    assert train.formats == ["Megatron-LM, uint16"]
    text = tokenizer.decode(train.batch(0).ravel().tolist())
    assert "Document" in text or "times" in text


def test_text_is_read_by_a_tokenizer(tmp_path: Path, bpe: Path):
    (tmp_path / "text.txt").write_text(TEXTS[3])
    source = open_source("--data", str(tmp_path / "text.txt"), 400, DataConfig(tokenizer=str(bpe)))
    tokenizer = open_tokenizer("--tokenizer", str(bpe))
    np.testing.assert_array_equal(source.read(0, len(source)), tokenizer.encode(TEXTS[3]))
    (tmp_path / "eval.txt").write_text(TEXTS[4])
    data = DataConfig(str(tmp_path / "text.txt"), str(tmp_path / "eval.txt"), str(bpe))
    config = Config(model=ModelConfig(vocab_size=400, seq_len=4), data=data)
    _, [(held_out, positions, _)] = open_held_out(config)
    np.testing.assert_array_equal(held_out.read(0, len(positions)), tokenizer.encode(TEXTS[4]))
    with pytest.raises(UserError, match=r"has \d+ tokens, more than config.model.vocab_size=299"):
        open_source("--data", str(tmp_path / "text.txt"), 299, DataConfig(tokenizer=str(bpe)))


def spoilt(folder: Path, name: str, content: bytes) -> list[str]:
    (folder / name).write_bytes(content)
    return [str(folder / name)]


MISTAKES = {
    "nothing": (lambda f: [], "there is nothing to tokenize: name files or folders."),
    "nowhere": (lambda f: [str(f / "x")], "x is neither a file nor a folder"),
    "no text": (lambda f: [str(f)], "has no file of text or records: name"),
    "empty": (lambda f: spoilt(f, "a.txt", b""), "a.txt has no text in it"),
    "not UTF-8": (
        lambda f: spoilt(f, "a.txt", b"\xff"),
        "a.txt holds no text, since it has bytes that",
    ),
    "not JSON": (lambda f: spoilt(f, "a.jsonl", b"{}\n{x"), "a.jsonl at byte 0 has no text"),
    "no field": (
        lambda f: [*spoilt(f, "a.jsonl", b'{"text": "x"}'), "--field=body"],
        "its fields are text): each record must be an object with the field body, or with prompt",
    ),
    "half a character": (
        lambda f: spoilt(f, "a.jsonl", b'{"text": "a\\ud800b"}'),
        "a.jsonl at byte 0 has a text that is no UTF-8",
    ),
    "a number": (lambda f: spoilt(f, "a.jsonl", b'{"text": 3}'), "has 3 as its text"),
    "no tokenizer": (
        lambda f: [*spoilt(f, "a.txt", b"x"), "--tokenizer=nowhere.json"],
        "--tokenizer=nowhere.json cannot be read",
    ),
    "both": (
        lambda f: [*spoilt(f, "a.txt", b"x"), "--tokenizer=x", "--train-bpe=300"],
        "--train-bpe=300 makes a tokenizer, and --tokenizer=x is one: give either",
    ),
    "too small": (
        lambda f: [*spoilt(f, "a.txt", b"x"), "--train-bpe=257"],
        "--train-bpe=257 is too small",
    ),
    "no workers": (
        lambda f: [*spoilt(f, "a.txt", b"x"), "--num-workers=0"],
        "--num-workers=0 must be at least 1",
    ),
}


@pytest.mark.parametrize(("make", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_answered(tmp_path: Path, make, sentence: str):
    args = make(tmp_path)
    done = run_tokenize(f"--out={tmp_path / 'out'}", *args)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write --out=.*: make room"):
        make_shards([tmp_path / "a.txt"], tmp_path / "file" / "out", "bytes", HowToRead(), 1)


@pytest.mark.parametrize("delay", [0, *map(slow, (0.1, 0.3, 0.5, 1))])
def test_of_two_commands_one_makes_the_folder(delay: float, tmp_path: Path):
    """With the tokenizer and the tokens of the same text."""
    contents = ["one text, over and over. " * 200, "zwei Texte, immer wieder. " * 200]
    commands = []
    for i, text in enumerate(contents):
        (tmp_path / f"{i}.txt").write_text(text)
        args = [f"--out={tmp_path / 'out'}", "--train-bpe=300", str(tmp_path / f"{i}.txt")]
        commands.append([sys.executable, "launch/tokenize.py", *args])
    children = []
    for own in commands:
        children.append(
            subprocess.Popen(own, cwd=runs.ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        )
        time.sleep(delay)
    said = [child.communicate()[1].decode() for child in children]
    assert sorted(child.returncode for child in children) == [0, 2], said
    assert "is at work on --out=" in "".join(said) or "is there already" in "".join(said)
    winner = [child.returncode for child in children].index(0)
    tokenizer = open_tokenizer("x", str(tmp_path / "out" / "tokenizer.json"))
    source = open_source("x", str(tmp_path / "out"), 300, DataConfig())
    tokens = [t for t in source.read(0, len(source)).tolist() if t != tokenizer.end]
    assert tokenizer.decode(tokens) == contents[winner]
    assert (tmp_path / "out.tokenizer.json").read_bytes() == (
        tmp_path / "out" / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("name", ["../secret", "/ABSOLUTE", "link"])
def test_an_index_does_not_lead_out_of_its_folder(name: str, tmp_path: Path):
    """Shards may be a stranger's."""
    (tmp_path / "a.txt").write_text("some text")
    for folder in ("out", "other"):
        make_shards([tmp_path / "a.txt"], tmp_path / folder, "bytes", HowToRead(), 1)
    for suffix in (".bin", ".idx"):
        (tmp_path / "other" / f"00000{suffix}").rename(tmp_path / f"secret{suffix}")
        (tmp_path / "out" / f"link{suffix}").symlink_to(tmp_path / f"secret{suffix}")
    index = tmp_path / "out" / "index.json"
    about = json.loads(index.read_text())
    about["shards"][0]["name"] = name.replace("ABSOLUTE", str(tmp_path / "secret").lstrip("/"))
    index.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"index.json names '.*', which is not in that folder"):
        open_source("x", str(tmp_path / "out"), 256, DataConfig())
    about |= {"tokenizer": "../secret.json", "vocab_size": 300}
    index.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"index.json names '../secret.json', which is not in"):
        with_carried(Config(data=DataConfig(train=str(tmp_path / "out"))))
