import os
import tracemalloc
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.texts import TEXT, B, T, settings, write_folder
from tpipe_jax.data.batches import Batches, open_data
from tpipe_jax.data.sources import Documents, TokenSource
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


def write_bin(path: Path) -> Path:
    np.frombuffer(TEXT, np.uint8).astype("<u2").tofile(path.with_suffix(".bin"))
    return path.with_suffix(".bin")


def write_wide_bin(path: Path) -> Path:
    np.frombuffer(TEXT, np.uint8).astype("<u4").tofile(path.with_suffix(".bin"))
    return path.with_suffix(".bin")


def write_npy(path: Path) -> Path:
    np.save(path.with_suffix(".npy"), np.frombuffer(TEXT, np.uint8).astype(">i8"))
    return path.with_suffix(".npy")


@pytest.mark.parametrize(
    ("write", "vocab_size"),
    [
        (write_text, 256),
        (write_bin, 256),
        (write_bin, 2**16),
        (write_wide_bin, 2**16 + 1),
        (write_npy, 256),
        (write_folder, 256),
    ],
)
def test_formats_give_the_same_tokens(tmp_path: Path, write: Any, vocab_size: int) -> None:
    _, held_out = open_data(settings("pydocs", write(tmp_path / "data"), vocab_size=vocab_size))
    assert held_out.num_tokens == len(TEXT)
    num_windows = (len(TEXT) - 1) // T
    inputs = stream(held_out, num_windows)[:, :-1].reshape(-1)
    np.testing.assert_array_equal(inputs, list(TEXT[: num_windows * T]))


def test_pydocs_are_the_documentation_inside_python() -> None:
    text = "".join(topics.values()).encode()
    train, held_out = open_data(settings("pydocs"))
    assert train.num_tokens + held_out.num_tokens == len(text)
    start = train.num_tokens
    assert bytes(held_out.batch(0)[1].tolist()) == text[start + T : start + 2 * T + 1]


@given(st.lists(st.integers(0, 5), min_size=1), st.data())
def test_read_joins_the_parts(lengths: list[int], data: st.DataObject) -> None:
    tokens = np.arange(sum(lengths) + 1)
    pieces = np.split(tokens, np.cumsum(lengths))
    parts = [Documents(piece, np.zeros(1, np.int64), "test") for piece in pieces]
    start = data.draw(st.integers(0, len(tokens) - 1))
    stop = data.draw(st.integers(start + 1, len(tokens)))
    read = TokenSource("tokens", len(tokens), parts).read(start, stop)
    np.testing.assert_array_equal(read, tokens[start:stop])


def test_a_big_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    size = 3 * 2**30  # of which only the last page takes space; its positions exceed int32
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size - 16)
        file.write(b"0123456789abcdef")
    tracemalloc.start()
    train, held_out = open_data(settings(path))
    train.batch(0)
    last_window = (held_out.num_tokens - 1) // T - 1
    last = held_out.batch(last_window // B)[last_window % B]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**20
    with path.open("rb") as file:
        file.seek(train.num_tokens + last_window * T)
        expected = file.read(T + 1)
    assert bytes(last.tolist()) == expected
    assert set(expected) - {0}


def test_a_folder_of_many_files_keeps_none_open(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text("some text")
    before = len(os.listdir("/dev/fd"))
    train, held_out = open_data(settings(tmp_path))
    stream(train, 50)
    stream(held_out, 50)
    assert len(os.listdir("/dev/fd")) == before


def test_a_file_that_has_become_shorter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(bytes(1000))
    train, held_out = open_data(settings(path))
    os.truncate(path, 950)
    train.batch(0)
    with pytest.raises(UserError, match=rf"={path} cannot be read any more \(shorter than at the"):
        [held_out.batch(i) for i in range(10)]


@pytest.mark.parametrize("bad_id", [1040, -1, 2**40])
def test_ids_outside_the_vocabulary_are_refused_where_read(tmp_path: Path, bad_id: int) -> None:
    tokens = np.arange(1040)
    tokens[953] = bad_id
    path = tmp_path / "tokens.npy"
    np.save(path, tokens)
    _, held_out = open_counting(path)
    held_out.batch(0, slice(0, 2))
    with pytest.raises(UserError) as error:
        held_out.batch(0, slice(2, 4))
    assert str(error.value) == (
        f"config.data.train={path} has token id {bad_id} at position 953, but ids are at least 0 "
        "and below config.model.vocab_size=1040: set that to the size of the data's vocabulary."
    )


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


def test_a_folder_with_another_index_is_text(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"name": "something"}')
    write_text(tmp_path / "text")
    train, held_out = open_data(settings(tmp_path))
    assert train.num_tokens + held_out.num_tokens == len(TEXT)


def test_a_colon_in_a_name_is_no_weight(tmp_path: Path) -> None:
    path = tmp_path / "part:2"
    path.write_text("0123456789" * 40)
    assert open_data(settings(path))[0].num_tokens == 360


@pytest.mark.parametrize("ending", [":0.5,B", ":0.5,B:0", ":0.5,B:-1", ":0.5,B:1e999", ":0.5,B:x"])
def test_sources_without_weights_are_refused(tmp_path: Path, ending: str) -> None:
    np.save(tmp_path / "a.npy", np.arange(400))
    value = f"{tmp_path / 'a.npy'}{ending.replace('B', str(tmp_path / 'a.npy'))}"
    with pytest.raises(UserError, match=r"without a weight: give each a positive one|not exist"):
        open_data(settings(value, vocab_size=1200))
