"""Documents of records and of text with separators, and their tokens in pieces."""

import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tpipe_jax.config.settings import Config, DataConfig, ModelConfig, TrainConfig
from tpipe_jax.data import contents, encode
from tpipe_jax.data.batches import Batches, open_data
from tpipe_jax.data.documents import HowToRead, Piece, read_pieces
from tpipe_jax.data.encode import encoded
from tpipe_jax.data.sources import open_source
from tpipe_jax.data.token_shards import cut, make_shards, texts
from tpipe_jax.data.tokenizer import open_tokenizer, train_bpe
from tpipe_jax.errors import UserError

WORDS = ["the", "quick", "fox", "jumps", "over", "dogs,", "schöne", "Grüße:", "42", "times"]


def prose(seed: int, num_words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice("   \n") for _ in range(num_words))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe([prose(0, 2000)], 300).save(str(path))
    return path


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With words of SentencePiece, whose texts begin with a space, and an end as Llama 2 has it."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    made.train_from_iterator([prose(0, 500)], trainer)
    path = tmp_path_factory.mktemp("metaspace") / "tokenizer.json"
    made.save(str(path))
    return path


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def by_document(pieces: list[Piece]) -> list[str]:
    found, text = [], ""
    for piece in pieces:
        text += piece.text
        if piece.ends:
            found.append(text)
            text = ""
    assert not text
    return found


@pytest.mark.parametrize("size", [3, 20, 2**16])
def test_a_separator_parts_a_text_file(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Wherever the file is read; documents without text are counted."""
    monkeypatch.setattr(contents, "HEAD_BYTES", size)
    documents = ["eins\n", "", prose(1, 50), " \n", "zwei ü"]
    path = tmp_path / "a.txt"
    path.write_text("<|end|>".join(documents))
    skipped: Counter[str] = Counter()
    pieces = list(read_pieces(path, HowToRead(separator="<|end|>"), skipped))
    assert by_document(pieces) == [documents[0], documents[2], documents[4]]
    assert skipped == {"empty document": 1}
    with pytest.raises(UserError, match=r"a.txt has an empty document: remove it, or set"):
        list(read_pieces(path, HowToRead(separator="<|end|>", on_empty="refuse")))
    assert by_document(list(read_pieces(path))) == ["<|end|>".join(documents)]


def test_parts_of_a_file_with_separators_have_every_document_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tpipe_jax.data.token_shards.PART_BYTES", 300)
    documents = [prose(seed, 20) for seed in range(30)]
    path = tmp_path / "a.txt"
    path.write_text("<|end|>".join(documents))
    how = HowToRead(separator="<|end|>")
    parts = cut([path], how)
    assert len(parts) > 8
    found = [piece for part in parts for piece in texts(part, how, Counter())]
    assert by_document(found) == documents


def test_what_looks_like_an_end_is_text_unless_it_separates(bpe: Path, tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("one<|endoftext|>two")
    tokenizer = open_tokenizer("x", str(bpe))
    source = open_source("x", str(path), 300, DataConfig(tokenizer=str(bpe)))
    assert tokenizer.decode(source.read(0, len(source)).tolist()) == "one<|endoftext|>two"
    assert tokenizer.end not in source.read(0, len(source))
    data = DataConfig(tokenizer=str(bpe), text_separator="<|endoftext|>")
    source = open_source("x", str(path), 300, data)
    one, two = (tokenizer.encode(text).tolist() for text in ("one", "two"))
    assert source.read(0, len(source)).tolist() == [*one, tokenizer.end, *two, tokenizer.end]
    assert source.document_starts.tolist() == [0, len(one) + 1]


def test_the_end_is_the_tokenizer_s_own(metaspace: Path, tmp_path: Path):
    """Or the one that its settings name, or that the user names."""
    path = jsonl(tmp_path / "a.jsonl", {"text": "the quick fox"}, {"text": "the lazy dog"})
    made = tokenizers.Tokenizer.from_file(str(metaspace))

    def ends(**data: str) -> list[int]:
        source = open_source("x", str(path), 120, DataConfig(**data))
        tokens = source.read(0, len(source))
        return tokens[[*(source.document_starts[1:] - 1), -1]].tolist()

    assert ends(tokenizer=str(metaspace)) == [made.token_to_id("</s>")] * 2
    beside = tmp_path / "tokenizer.json"
    beside.write_bytes(metaspace.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<s>"}}')
    assert ends(tokenizer=str(beside)) == [made.token_to_id("<s>")] * 2
    assert ends(tokenizer=str(beside), end_token="<unk>") == [made.token_to_id("<unk>")] * 2
    with pytest.raises(UserError, match=r"end_token=<eos> is no token of"):
        ends(tokenizer=str(beside), end_token="<eos>")


def test_a_line_says_that_nothing_separates_documents(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    source = open_source("x", str(path), 256, DataConfig())
    assert source.notes == [
        f"x={path}: nothing separates its documents, since config.data.tokenizer=bytes has no "
        "token for that"
    ]


def test_of_conversations_the_answers_are_learnt(tmp_path: Path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    path = jsonl(tmp_path / "a.jsonl", {"messages": messages}, {"messages": messages[:2]})
    source = open_source("x", str(path), 256, DataConfig())
    text = bytes(source.read(0, len(source)).tolist()).decode()
    assert text == ("system: Be brief.\nuser: 1 + 1?\nassistant: 2\nuser: Sure?\nassistant: Yes.\n")
    learnt = source.is_learnt(0, len(source))
    assert "".join(np.array(list(text))[learnt]) == "2\nYes.\n"
    assert source.notes == [f"x={path}: skipped 1 empty document"]
    for wrong in ("text", [1], [{"role": "user"}]):
        jsonl(path, {"messages": wrong})
        with pytest.raises(UserError, match=r"has messages that are not a list of objects"):
            open_source("x", str(path), 256, DataConfig())


def test_fields_of_a_record_without_text_are_listed(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", {"id": 1, "content": "hello"})
    with pytest.raises(UserError, match=r"at byte 0 has no text \(its fields are id, content\)"):
        open_source("x", str(path), 256, DataConfig())


@pytest.mark.parametrize(
    ("long_prompts", "expected", "said"),
    [
        ("skip", ["a short one"], "1 with a prompt skipped, longer than"),
        ("truncate", ["a short one", "p" * 12 + "c" * 5], "1 with a prompt truncated"),
    ],
)
def test_prompts_that_are_too_long(
    long_prompts: str, expected: list[str], said: str, tmp_path: Path
):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "a ", "completion": "short one"},
        {"prompt": "p" * 12, "completion": "c" * 30},
    )
    held_out = jsonl(tmp_path / "eval.jsonl", {"text": "something else"})

    def batches(long_prompts: Any) -> Batches:
        data = DataConfig(str(path), str(held_out), long_prompts=long_prompts, packing="whole")
        model = ModelConfig(seq_len=16)
        return open_data(Config(model=model, train=TrainConfig(batch_size=2), data=data))[0]

    found = batches(long_prompts)
    assert [note for note in found.notes if said in note]
    rows = found.batch(0)[:, 0]  # the inputs: all but the last token
    inputs = {bytes(row.tolist()).decode().rstrip("\0") for row in rows}
    assert inputs == {text[:16] for text in expected}
    with pytest.raises(UserError, match=r"or set config.data.long_prompts to skip or truncate"):
        batches("refuse")


@pytest.mark.parametrize("seed", range(4))
def test_a_long_text_has_the_same_tokens_in_pieces(
    seed: int, bpe: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encode, "PIECE", 500)
    tokenizer, text = open_tokenizer("x", str(bpe)), prose(seed, 3000) + "\n\n\n" + prose(9, 500)
    sizes = []

    def counted(own: str) -> np.ndarray:
        sizes.append(len(own))
        return tokenizer.encode(own)

    watched = tokenizer.__class__(**vars(tokenizer) | {"encode": counted})
    step = 97
    pieces = [Piece(text[i : i + step], ends=False) for i in range(0, len(text), step)]
    pieces[-1] = pieces[-1]._replace(ends=True)
    found = list(encoded(pieces, watched, "x"))
    np.testing.assert_array_equal(
        np.concatenate([own.tokens for own in found]), tokenizer.encode(text)
    )
    assert [own.ends for own in found] == [False] * (len(found) - 1) + [True]
    assert max(sizes) < 1000


def test_what_cannot_be_cut_is_refused_where_it_is_too_long(
    metaspace: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch
):
    """A long word has no place to cut."""
    monkeypatch.setattr(encode, "PIECE", 500)
    monkeypatch.setattr(encode, "MOST", 4000)
    for path, text in ((metaspace, "fox" * 3000), (bpe, "x" * 9000)):
        tokenizer = open_tokenizer("x", str(path))
        with pytest.raises(UserError, match=r"a.txt has a document of more than 4,000 bytes"):
            list(encoded([Piece(text)], tokenizer, "a.txt"))
        assert len(list(encoded([Piece(text[:3000])], tokenizer, "a.txt"))) == 1


def test_a_text_without_lines_is_cut_at_spaces(
    metaspace: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch
):
    """SentencePiece begins each text with a space, so there the space is that of the next part."""
    monkeypatch.setattr(encode, "PIECE", 500)
    for path in (metaspace, bpe):
        tokenizer, text = open_tokenizer("x", str(path)), prose(5, 3000).replace("\n", " ")
        found = list(encoded([Piece(text)], tokenizer, "a.txt"))
        assert len(found) > 10
        np.testing.assert_array_equal(
            np.concatenate([own.tokens for own in found]), tokenizer.encode(text)
        )


def test_a_corpus_in_one_file_takes_little_memory(bpe: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text(prose(3, 400_000))
    how, tokenizer = HowToRead(), open_tokenizer("x", str(bpe))
    tracemalloc.start()
    num_tokens = sum(
        len(own.tokens) for own in encoded(read_pieces(tmp_path / "a.txt", how), tokenizer, "x")
    )
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_tokens > 500_000
    assert peak_bytes < 8 * 2**20


def test_shards_know_what_was_skipped_and_what_ends_documents(metaspace: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in" / "a.jsonl", {"text": ""}, {"text": "the fox"}, {"text": "the dog"})
    (tmp_path / "in" / "empty.txt").touch()
    results = make_shards(
        [tmp_path / "in"], tmp_path / "out", str(metaspace), HowToRead(), 1, end_token="<s>"
    )
    assert sum((Counter(result.skipped) for result in results), Counter()) == {
        "empty document": 1,
        "empty file": 1,
    }
    about = json.loads((tmp_path / "out" / "index.json").read_text())
    end = tokenizers.Tokenizer.from_file(str(metaspace)).token_to_id("<s>")
    assert about["end"] == end
    source = open_source("x", str(tmp_path / "out"), 120, DataConfig())
    assert (source.read(0, len(source)) == end).sum() == 2


def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    with pytest.raises(UserError, match=r"text_separator or --text-separator is empty"):
        open_source("x", str(path), 256, DataConfig(text_separator=""))
    with pytest.raises(UserError, match=r"end_token=</s> is no token of config.data.tokenizer="):
        open_source("x", str(path), 256, DataConfig(end_token="</s>"))
