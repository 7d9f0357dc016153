"""Shards bring their tokenizer along; another batch size goes on where the data were."""

from pathlib import Path

import jax
import numpy as np
import pytest

from support import runs
from support.text_data import settings
from tpipe_jax.commands.prompts import tokenizer_of
from tpipe_jax.config.config_files import load_config
from tpipe_jax.config.settings import Config, DataConfig, ModelConfig
from tpipe_jax.data.batches import Batches, open_data
from tpipe_jax.data.carried import with_carried
from tpipe_jax.data.documents import HowToRead
from tpipe_jax.data.sources import open_source
from tpipe_jax.data.token_shards import make_shards
from tpipe_jax.data.tokenizer import train_bpe
from tpipe_jax.errors import UserError
from tpipe_jax.training import loop
from tpipe_jax.training.loop import put_batch
from tpipe_jax.training.prepare import Run


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("some text, and more text\n" * 200)
    train_bpe(["some text, and more text"], 270).save(str(tmp_path / "t.json"))
    files = [tmp_path / "text.txt"]
    make_shards(files, tmp_path / "shards", str(tmp_path / "t.json"), HowToRead(), 1)
    return tmp_path / "shards"


def test_shards_bring_along_tokenizer_and_vocabulary(shards: Path):
    config, line = with_carried(Config(data=DataConfig(train=str(shards))))
    size = config.model.vocab_size
    assert 257 < size <= 270
    assert config.data.tokenizer == str(shards / "tokenizer.json")
    assert line == (
        f"config.data.train={shards} brings along config.data.tokenizer={shards}/tokenizer.json "
        f"and config.model.vocab_size={size}"
    )
    assert with_carried(config) == (config, "")  # what is set is kept
    own = Config(model=ModelConfig(vocab_size=300), data=DataConfig(train=str(shards)))
    assert with_carried(own)[0].model.vocab_size == 300
    assert with_carried(Config()) == (Config(), "")


@pytest.mark.slow
def test_a_run_on_shards_needs_no_other_setting(shards: Path, tmp_path: Path):
    config = runs.changed(
        runs.small_config(tmp_path), data={"train": str(shards)}, train={"num_steps": 1}
    )
    said = runs.run(config, tmp_path / "run")
    assert any("brings along config.data.tokenizer=" in line for line in said)
    assert said[-1].startswith("Trained 1 step")


@pytest.mark.parametrize(("before", "after"), [(8, 16), (4, 2), (3, 5)])
def test_batches_of_another_size_go_on_with_the_next_sequence(
    before: int, after: int, tmp_path: Path
):
    np.save(tmp_path / "a.npy", np.arange(8000) % 250)

    def batches(size: int):
        config = settings(tmp_path / "a.npy")
        return open_data(runs.changed(config, train={"batch_size": size}))[0]

    one, first, then = batches(1), batches(before), batches(after)
    assert first.sequences_before(3) == 3 * before
    then.begin(3, first.sequences_before(3))
    rows = [first.batch(i) for i in range(3)] + [then.batch(i) for i in (3, 4)]
    expected = [one.batch(i) for i in range(3 * before + 2 * after)]
    np.testing.assert_array_equal(np.concatenate(rows), np.concatenate(expected))
    assert then.sequences_before(5) == 3 * before + 2 * after


@pytest.mark.slow
def test_a_run_with_another_batch_size_reads_each_sequence_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also over two changes, since each checkpoint knows how many were read."""
    numbers: list[range] = []

    def read(run: Run, batches: Batches, index: int) -> jax.Array:
        if batches is run.train_data:
            numbers.append(
                range(batches.sequences_before(index), batches.sequences_before(index + 1))
            )
        return put_batch(run, batches, index)

    monkeypatch.setattr(loop, "put_batch", read)
    for size, num_steps in ((4, 2), (8, 4), (4, 6)):
        config = runs.changed(
            runs.small_config(tmp_path), train={"batch_size": size, "num_steps": num_steps}
        )
        said = runs.run(config, tmp_path / "run")
    assert [n for own in numbers for n in own] == list(range(2 * 4 + 2 * 8 + 2 * 4))
    expected = "going on with training sequence 24, since batches or sequences had another size"
    assert f"{expected} before" in said


@pytest.mark.slow
def test_a_llama_with_longer_sequences_begins_the_data_anew(tmp_path: Path):
    """And says so; the next start goes on from there."""
    own = {"family": "llama"}
    config = runs.changed(
        runs.small_config(tmp_path),
        model=own,
        train={"num_steps": 2},
        plan={"token_slices": "uniform:2"},
    )
    runs.run(config, tmp_path / "run")
    size, short = config.train.batch_size, config.model.seq_len
    longer = runs.changed(config, model={"seq_len": 2 * short}, train={"num_steps": 3})
    said = runs.run(longer, tmp_path / "run")
    begin = f"beginning with the first training sequence of {2 * short} tokens: those of {short} "
    assert [line for line in said if line.startswith(begin)]
    said = runs.run(runs.changed(longer, train={"num_steps": 4}), tmp_path / "run")
    assert [line for line in said if f"going on with training sequence {size}," in line]


@pytest.mark.slow
def test_data_that_have_changed_are_named(tmp_path: Path):
    config = runs.changed(runs.small_config(tmp_path), train={"num_steps": 1})
    runs.run(config, tmp_path / "run")
    config = runs.changed(config, train={"num_steps": 2})
    assert not [line for line in runs.run(config, tmp_path / "run") if "not those" in line]
    (tmp_path / "text.txt").write_text("another text\n" * 200)
    said = runs.run(runs.changed(config, train={"num_steps": 3}), tmp_path / "run")
    assert [line for line in said if line.startswith("the training data are not those of the last")]


def test_a_run_keeps_its_tokenizer(shards: Path, tmp_path: Path):
    """So that it can be read from anywhere, and goes on where the shards have moved."""
    config = runs.changed(
        runs.small_config(tmp_path), data={"train": str(shards)}, train={"num_steps": 1}
    )
    runs.run(config, tmp_path / "run")
    kept = tmp_path / "run" / "tokenizer.json"
    assert kept.read_bytes() == (shards / "tokenizer.json").read_bytes()
    one = tokenizer_of(tmp_path / "run")
    shards.rename(tmp_path / "moved")
    other = tokenizer_of(tmp_path / "run")
    assert (other.vocab_size, other.end) == (one.vocab_size, one.end)
    assert other.encode("some text").tolist() == one.encode("some text").tolist()
    own = load_config(tmp_path / "run" / "config.json")
    own = runs.changed(own, data={"train": str(tmp_path / "moved")}, train={"num_steps": 2})
    assert runs.run(own, tmp_path / "run")[-1].startswith("Trained 2 steps")
    train_bpe(["quite another text"], 260).save(str(tmp_path / "other.json"))
    (tmp_path / "own.txt").write_text("quite another text " * 200)  # not of any tokenizer
    others = {"tokenizer": str(tmp_path / "other.json"), "train": str(tmp_path / "own.txt")}
    own = runs.changed(own, data=others)
    with pytest.raises(UserError, match=r"other.json is not the tokenizer that this run began"):
        runs.run(own, tmp_path / "run")


def test_shards_of_another_tokenizer_are_refused(shards: Path, tmp_path: Path):
    """A copy of their own serves."""
    (tmp_path / "copy.json").write_bytes((shards / "tokenizer.json").read_bytes())
    train_bpe(["quite another text, other words"], 262).save(str(tmp_path / "other.json"))
    for name, is_own in (("copy.json", True), ("other.json", False)):
        data = DataConfig(train=str(shards), tokenizer=str(tmp_path / name))
        if is_own:
            assert len(open_source("x", str(shards), 300, data))
        else:
            with pytest.raises(UserError, match=r"was made with another tokenizer than .*other"):
                open_source("x", str(shards), 300, data)
