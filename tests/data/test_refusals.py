"""Data that is missing, broken or too short: one sentence, and which."""

import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from support.text_data import TEXT, B, settings, write_folder
from tpipe_jax.config.settings import Config
from tpipe_jax.data.batches import open_data
from tpipe_jax.errors import UserError


def assert_refused(config: Config, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        open_data(config)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_missing_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / "missing.txt"
    config = settings(path) if name == "train" else settings("pydocs", path)
    assert_refused(
        config,
        f"config.data.{name}={path} does not exist: give pydocs, a file of text, of "
        "records (JSON lines, Parquet, ArrayRecord) or of tokens (.bin or .npy), a folder of such "
        "files, or a pattern.",
    )


def test_an_empty_name_is_not_the_current_folder() -> None:
    with pytest.raises(UserError, match=r"^config\.data\.train= does not exist"):
        open_data(settings(""))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("file.txt", " (skipped 1 empty file)"),
        ("tokens.bin", ""),
        ("tokens.npy", ""),
        ("folder", " (1 file passed over (picture.png), skipped 1 empty file)"),
    ],
)
def test_empty_data(tmp_path: Path, name: str, found: str) -> None:
    path = tmp_path / name
    if path.suffix == ".npy":
        np.save(path, np.zeros(0, np.int32))
    elif path.suffix:
        path.touch()
    else:
        path.mkdir()
        (path / "empty.txt").touch()
        (path / "picture.png").write_bytes(b"\x89PNG")
    assert_refused(
        settings(path),
        f"config.data.train={path} is empty{found}: give text, records or tokens, or a folder of "
        "them.",
    )


def test_uint32_is_recognised_in_a_small_vocabulary(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 60, 500)
    for dtype in ("<u2", "<u4"):
        path = tmp_path / f"{dtype[1:]}.bin"
        tokens.astype(dtype).tofile(path)
        train, _ = open_data(settings(path, vocab_size=60))
        assert train.num_tokens == 450


@pytest.mark.parametrize(
    ("vocab_size", "item_bytes", "dtype"), [(256, 2, "uint16"), (2**17, 4, "uint32")]
)
def test_bin_of_a_broken_size(tmp_path: Path, vocab_size: int, item_bytes: int, dtype: str) -> None:
    path = tmp_path / "tokens.bin"
    path.write_bytes(bytes(101))
    assert_refused(
        settings(path, vocab_size=vocab_size),
        f"config.data.train={path} has 101 bytes, not a multiple of the {item_bytes} of a token: "
        f"write {dtype}, which config.model.vocab_size={vocab_size} asks for.",
    )


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (np.zeros((10, 10), np.int32), "shape (10, 10) and type int32"),
        (np.zeros(100), "shape (100,) and type float64"),
        (np.zeros(100, bool), "shape (100,) and type bool"),
        (np.zeros(100, "m8[s]"), "shape (100,) and type timedelta64[s]"),
        (np.int32(5), "shape () and type int32"),
    ],
)
def test_npy_of_other_things_than_tokens(tmp_path: Path, tokens: Any, found: str) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, tokens)
    assert_refused(
        settings(path),
        f"config.data.train={path} has {found}: save tokens as a one-dimensional array of "
        "integers.",
    )


def test_broken_npy(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(1000))
    whole = path.read_bytes()
    cut_header = b"\x93NUMPY\x01\x00\x04\x00{{{{"
    for content in [b"", b"some text", whole[:50], whole[:-1], cut_header]:
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            open_data(settings(path))
        assert str(error.value).startswith(f"config.data.train={path} is not a whole .npy array (")
        assert str(error.value).endswith("): write it with numpy.save.")


@pytest.mark.parametrize("name", ["file.txt", "tokens.bin", "folder"])
def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / name
    file = path if path.suffix else path / "file.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(TEXT)

    def refuse(self: Path, mode: str) -> NoReturn:  # a file mode would not stop root
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert_refused(
        settings(path),
        f"config.data.train={path} cannot be read (Permission denied: {file}): "
        "name data that you have permission to read.",
    )


@pytest.mark.parametrize(
    ("num_train", "num_eval", "problem"),
    [
        (8, None, "train={train} has 8 tokens, 8 of them left to train on by {held_out}"),
        (89, None, "train={train} has 89 tokens, 8 of them held out by {held_out}"),
        (8, 9, "train={train} has 8 tokens, 8 of them to train on"),
        (9, 8, "eval={eval} has 8 tokens, 8 of them held out"),
    ],
)
def test_data_shorter_than_a_sequence(
    tmp_path: Path, num_train: int, num_eval: int | None, problem: str
) -> None:
    train, held_out = tmp_path / "train.txt", None
    train.write_bytes(b"x" * num_train)
    if num_eval is not None:
        held_out = tmp_path / "eval.txt"
        held_out.write_bytes(b"x" * num_eval)
    names = {"train": train, "eval": held_out, "held_out": "config.data.held_out=0.1"}
    assert_refused(
        settings(train, held_out),
        f"config.data.{problem.format(**names)}, but one sequence of config.model.seq_len=8 takes "
        "9: give longer data or lower config.model.seq_len.",
    )


@pytest.mark.parametrize(("num_train", "num_eval"), [(90, None), (9, 9)])
def test_data_as_long_as_one_sequence(tmp_path: Path, num_train: int, num_eval: int | None) -> None:
    train, held_out = tmp_path / "train.txt", None
    train.write_bytes(bytes(range(1, num_train + 1)))
    if num_eval is not None:
        held_out = tmp_path / "eval.txt"
        held_out.write_bytes(bytes(range(82, 82 + num_eval)))
    _, batches = open_data(settings(train, held_out))
    np.testing.assert_array_equal(batches.batch(0), [np.arange(82, 91)] * B)


def test_python_without_its_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert_refused(
        settings("pydocs"),
        "config.data.train=pydocs needs the module pydoc_data, which this Python lacks: "
        "give a text file.",
    )


def test_eval_must_not_share_files_with_train(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    assert_refused(
        settings(folder, folder / "c.py"),
        f"config.data.eval={folder}/c.py holds {folder}/c.py, and so does config.data.train="
        f"{folder}: keep their files apart, or leave out config.data.eval to hold out the end "
        "of config.data.train.",
    )
