"""The bytes of the text of tokens: as many as the text has, or none are told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tpipe_jax.data.tokenizer import bytes_to_letters, open_tokenizer, train_bpe

TEXTS = [
    "the quick  brown fox",
    " begins with a space, 42 times",
    "Grüße!\n\n\t\u2603 and e\u0301 <x> at  <x>  the end  ",
]


def changed(**parts: Any) -> Callable[[], Tokenizer]:
    """A trained tokenizer of which some parts are others."""

    def make() -> Tokenizer:
        made = train_bpe(TEXTS, 300)
        for name, value in parts.items():
            setattr(made, name, value)
        return made

    return make


def split(behavior: Any) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(r"\s+"), behavior)
    return pre_tokenizers.Sequence([split, pre_tokenizers.Digits(True), byte_level])


def with_token(**options: bool) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        made = train_bpe(TEXTS, 300)
        made.add_tokens([AddedToken("<x>", **options)])
        return made

    return make


def few_letters() -> Tokenizer:
    """Bytes that it has not seen are unknown."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(["the quick"], trainers.BpeTrainer(special_tokens=["<unk>"]))
    return made


def with_ends_of_words() -> Tokenizer:
    vocab = {letter: n for n, letter in enumerate(bytes_to_letters())}
    vocab |= {f"{letter}</w>": 256 + n for letter, n in vocab.items()}
    made = Tokenizer(models.BPE(vocab, [], end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


COUNTED = {
    "plain": changed(),
    "split": changed(pre_tokenizer=split("isolated")),
    "merged": changed(pre_tokenizer=split("merged_with_next")),
    "empty normalizer": changed(normalizer=normalizers.Sequence([])),
    "added": with_token(),
}
UNCOUNTED = {
    "prefix space": changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "removed": changed(pre_tokenizer=split("removed")),
    "no bytes": changed(pre_tokenizer=pre_tokenizers.Punctuation()),
    "none": changed(pre_tokenizer=None),
    "normalizer": changed(normalizer=normalizers.Strip()),
    "sequence": changed(normalizer=normalizers.Sequence([normalizers.NFC()])),
    "few letters": few_letters,
    "ends of words": with_ends_of_words,
}


@pytest.mark.parametrize("name", COUNTED)
def test_they_are_those_of_the_text(name: str, tmp_path: Path):
    COUNTED[name]().save(str(tmp_path / "t.json"))
    tokenizer = open_tokenizer("--tokenizer", str(tmp_path / "t.json"))
    assert tokenizer.num_bytes
    for text in TEXTS:
        assert tokenizer.num_bytes(tokenizer.encode(text)) == len(text.encode())


@pytest.mark.parametrize("name", UNCOUNTED)
def test_none_are_told_where_tokens_do_not_say(name: str, tmp_path: Path):
    UNCOUNTED[name]().save(str(tmp_path / "t.json"))
    tokenizer = open_tokenizer("--tokenizer", str(tmp_path / "t.json"))
    assert tokenizer.num_bytes is None


@pytest.mark.parametrize("option", ["lstrip", "rstrip"])
def test_a_token_that_swallows_spaces_is_not_counted(option: str, tmp_path: Path):
    """Texts without it are."""
    with_token(**{option: True})().save(str(tmp_path / "t.json"))
    tokenizer = open_tokenizer("--tokenizer", str(tmp_path / "t.json"))
    counts = [tokenizer.num_bytes and tokenizer.num_bytes(tokenizer.encode(t)) for t in TEXTS]
    assert counts == [len(TEXTS[0].encode()), len(TEXTS[1].encode()), None]


def test_a_number_in_a_gap_of_the_vocabulary_is_no_token(tmp_path: Path):
    vocab = {letter: 2 * n for n, letter in enumerate(bytes_to_letters())}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(tmp_path / "t.json"))
    tokenizer = open_tokenizer("--tokenizer", str(tmp_path / "t.json"))
    assert tokenizer.num_bytes
    assert tokenizer.num_bytes(np.array([0, 2, 510])) == 3
    assert tokenizer.num_bytes(np.array([0, 1])) is None


def metaspace(scheme: str) -> Tokenizer:
    """As SentencePiece writes and reads spaces: a decoder takes the first one away."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"])
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 50, trainer)
    return made


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_continuation_begins_with_its_space(scheme: str, tmp_path: Path):
    metaspace(scheme).save(str(tmp_path / "t.json"))
    tokenizer = open_tokenizer("--tokenizer", str(tmp_path / "t.json"))
    before, after = tokenizer.encode("the quick").tolist(), tokenizer.encode("the quick brown fox")
    after = after.tolist()
    assert after[: len(before)] == before
    for text in ("the quick", "the quick brown"):
        before = tokenizer.encode(text).tolist()
        pieces = list(tokenizer.stream(after[len(before) :], before))
        assert text + "".join(pieces) == "the quick brown fox"
        assert pieces[0].startswith(" ")
    assert "".join(tokenizer.stream(after)) == "the quick brown fox"
    assert list(tokenizer.stream([], before)) == []
