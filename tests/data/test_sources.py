"""Files and folders as one sequence of tokens, and mixtures of them."""

import os
import tracemalloc
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.text_data import TEXT, B, T, settings, write_folder
from tpipe_jax.data.batches import Batches, open_data
from tpipe_jax.data.reader import Documents
from tpipe_jax.data.sources import TokenSource
from tpipe_jax.errors import UserError


def open_counting(path: Path, seed: int = 0) -> tuple[Batches, Batches]:
    return open_data(settings(path, vocab_size=1040, seed=seed))


def stream(batches: Batches, num_sequences: int) -> np.ndarray:
    """The first sequences of the stream that batches are cut from."""
    num_batches = -(-num_sequences // B)
    return np.concatenate([batches.batch(i) for i in range(num_batches)])[:num_sequences]


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
    np.save(tmp_path / "train.npy", np.arange(100))
    config = settings(tmp_path / "train.npy", write(tmp_path / "data"), vocab_size=vocab_size)
    _, held_out = open_data(config)
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
    path = tmp_path / "big.bin"
    size = 6 * 2**30  # of which only the last page takes space; its positions exceed int32
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size - 32)
        file.write(np.frombuffer(b"0123456789abcdef", np.uint8).astype("<u2").tobytes())
    tracemalloc.start()
    train, held_out = open_data(settings(path))
    train.batch(0)
    last_window = (held_out.num_tokens - 1) // T - 1
    last = held_out.batch(last_window // B)[last_window % B]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**20
    with path.open("rb") as file:
        file.seek(2 * (train.num_tokens + last_window * T))
        expected = np.frombuffer(file.read(2 * (T + 1)), "<u2")
    np.testing.assert_array_equal(last, expected)
    assert expected.any()


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
    path.write_bytes(b"x" * 1000)
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
