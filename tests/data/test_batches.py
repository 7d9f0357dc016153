"""Batches of training and held-out sequences."""

from pathlib import Path

import numpy as np
import pytest

from support.text_data import TEXT, B, T, settings
from tpipe_jax.data.batches import Batches, open_data
from tpipe_jax.errors import UserError


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """Tokens that are their own positions: 936 to train on, in 116 windows, and 104 held out.

    Both are multiples of T: the last T tokens lack a next token, and so make no window.
    """
    path = tmp_path / "counting.npy"
    np.save(path, np.arange(1040))
    return path


def open_counting(path: Path, seed: int = 0) -> tuple[Batches, Batches]:
    return open_data(settings(path, vocab_size=1040, seed=seed))


def stream(batches: Batches, num_sequences: int) -> np.ndarray:
    """The first sequences of the stream that batches are cut from."""
    num_batches = -(-num_sequences // B)
    return np.concatenate([batches.batch(i) for i in range(num_batches)])[:num_sequences]


def test_batch_is_a_pure_function_of_seed_and_step(counting: Path) -> None:
    upwards, _ = open_counting(counting)
    batches = [upwards.batch(step) for step in range(60)]
    downwards, _ = open_counting(counting)
    for step in reversed(range(60)):
        np.testing.assert_array_equal(downwards.batch(step), batches[step])


def test_order_depends_on_the_seed(counting: Path) -> None:
    orders = {stream(open_counting(counting, seed)[0], 116)[:, 0].tobytes() for seed in range(5)}
    assert len(orders) == 5


def test_rows_of_the_shards_make_the_batch(counting: Path) -> None:
    for batches in open_counting(counting):
        shards = [batches.batch(3, slice(0, 1)), batches.batch(3, slice(1, 4))]
        np.testing.assert_array_equal(np.concatenate(shards), batches.batch(3))


def test_each_epoch_has_every_window_once_in_another_order(counting: Path) -> None:
    epochs = stream(open_counting(counting)[0], 3 * 116)[:, 0].reshape(3, 116)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(116) * T)
    assert len({epoch.tobytes() for epoch in [np.arange(116) * T, *epochs]}) == 4


def test_an_epoch_is_not_that_of_another_seed(counting: Path) -> None:
    second = stream(open_counting(counting, 0)[0], 2 * 116)[116:]
    assert (second != stream(open_counting(counting, 1)[0], 116)).any()


def test_targets_are_the_next_tokens(counting: Path) -> None:
    for batches in open_counting(counting):
        batch = batches.batch(0)
        assert batch.shape == (B, T + 1)
        assert batch.dtype == np.int32
        np.testing.assert_array_equal(batch[:, 1:], batch[:, :-1] + 1)


def test_held_out_tokens_are_the_last_ones_and_not_trained_on(counting: Path) -> None:
    train, held_out = open_counting(counting)
    assert (train.num_tokens, held_out.num_tokens) == (936, 104)
    assert stream(train, 116).max() < 936
    np.testing.assert_array_equal(stream(held_out, 12)[:, 0], 936 + T * np.arange(12))


def test_held_out_batches_start_again_at_the_end(counting: Path) -> None:
    _, held_out = open_counting(counting)
    np.testing.assert_array_equal(held_out.batch(3), held_out.batch(0))
    np.testing.assert_array_equal(held_out.batch(4), held_out.batch(1))


def test_eval_of_its_own_leaves_all_of_train_to_train_on(tmp_path: Path, counting: Path) -> None:
    np.save(tmp_path / "eval.npy", np.arange(500, 600))
    train, held_out = open_data(settings(counting, tmp_path / "eval.npy", vocab_size=1040))
    assert (train.num_tokens, held_out.num_tokens) == (1040, 100)
    np.testing.assert_array_equal(stream(held_out, 12)[:, 0], 500 + T * np.arange(12))


def test_eval_that_names_the_files_of_train_is_split(counting: Path) -> None:
    same = counting.parent / ".." / counting.parent.name / counting.name
    train, held_out = open_data(settings(counting, same, vocab_size=1040))
    assert (train.num_tokens, held_out.num_tokens) == (936, 104)


def write_text(path: Path) -> Path:
    path.with_suffix(".txt").write_bytes(TEXT)
    return path.with_suffix(".txt")


@pytest.fixture
def two_sources(tmp_path: Path) -> str:
    """Tokens below 1000 that count up, and others from 1000 on, with weights 3 and 1."""
    np.save(tmp_path / "a.npy", np.arange(400))
    np.save(tmp_path / "b.npy", np.arange(1000, 1200))
    return f"{tmp_path / 'a.npy'}:0.75,{tmp_path / 'b.npy'}:0.25"


def test_sources_are_mixed_by_weight(two_sources: str) -> None:
    train, held_out = open_data(settings(two_sources, vocab_size=1200))
    assert (train.num_tokens, held_out.num_tokens) == (360 + 180, 40 + 20)
    for batches in (train, held_out):
        rows = stream(batches, 400)
        is_second = rows[:, 0] >= 1000
        assert is_second.sum() == 100
        assert (np.diff(rows) == 1).all()  # no window has tokens of both
    rows = stream(train, 400)
    assert rows[rows < 1000].max() < 360
    assert rows.max() < 1180
    assert len(set(rows[is_second, 0])) == 22  # several epochs of the small one
    again = open_data(settings(two_sources, vocab_size=1200))[0]
    np.testing.assert_array_equal(again.batch(37), train.batch(37))


def test_weights_need_not_sum_to_one(two_sources: str) -> None:
    train, _ = open_data(settings(two_sources, vocab_size=1200))
    other, _ = open_data(
        settings(two_sources.replace("0.75", "3").replace("0.25", "1"), vocab_size=1200)
    )
    np.testing.assert_array_equal(stream(other, 100), stream(train, 100))


def test_eval_may_be_mixed_too(tmp_path: Path, two_sources: str) -> None:
    np.save(tmp_path / "c.npy", np.arange(500, 600))
    _, held_out = open_data(settings(tmp_path / "c.npy", two_sources, vocab_size=1200))
    assert held_out.num_tokens == 600


def test_what_is_trained_on_is_not_held_out(two_sources: str, tmp_path: Path) -> None:
    """Also where it has no file."""
    text = write_text(tmp_path / "text")
    for train, held_out in ((f"pydocs:1,{text}:1", "pydocs"), (str(text), f"pydocs:1,{text}:1")):
        with pytest.raises(UserError, match=r"config.data.eval=.* holds .*, and so does"):
            open_data(settings(train, held_out))
