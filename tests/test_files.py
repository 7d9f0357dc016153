"""Files that cannot be written, and folders that one process has to itself."""

import ast
import errno
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tpipe_jax import files
from tpipe_jax.errors import UserError
from tpipe_jax.files import as_user_error, locked, sync, writing_to


def lock(folder: Path) -> AbstractContextManager[None]:
    return locked(os.open(folder, os.O_RDONLY), folder, "somebody else is here.")


def failing(number: int) -> Callable[..., None]:
    def fail(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_noted", set())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_line_says_so_once(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    for _ in range(2):
        with lock(tmp_path):
            pass
    said = capsys.readouterr().err
    assert said.startswith(f"note: {tmp_path} cannot be locked ({os.strerror(number)}), so nothing")
    assert said.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_disk_does_not_answer_a_line_says_so_once(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(os, "fsync", failing(number))
    for what in ("files", "files", "names"):
        sync(0, what)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" are")[0] for line in said] == [
        f"note: this file system cannot say when {what}" for what in ("files", "names")
    ]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_what_the_disk_has_lost_is_an_error(number: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        sync(0, "files")


def test_a_folder_is_for_one_at_a_time(tmp_path: Path):
    with lock(tmp_path):
        second = lock(tmp_path)
        with pytest.raises(UserError, match=r"^somebody else is here\.$"), second:
            raise AssertionError("both are in it")
        with lock(tmp_path.parent):
            pass
    with lock(tmp_path):
        pass


def test_what_fails_within_a_lock_is_raised(tmp_path: Path):
    """Also an error of the system, which does not mean that there are no locks."""
    alone = lock(tmp_path)
    with pytest.raises(BlockingIOError, match="of the work"), alone:
        raise BlockingIOError("of the work")


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    sentence = (
        f"cannot write to --out={tmp_path} (Not a directory: {tmp_path / 'file' / 'x'}): "
        "make it writable, or choose another folder."
    )
    writing = writing_to(tmp_path, "--out")
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"), writing:
        (tmp_path / "file" / "x").write_text("")


def test_other_errors_are_no_sentences():
    with pytest.raises(ZeroDivisionError), as_user_error(str):
        raise ZeroDivisionError


ROOT = Path(__file__).parents[1]
BINARY = {("os", "open"), ("ts", "open"), ("gzip", "open")}  # or not of text at all


def without_encoding(program: str) -> Iterator[int]:
    """The lines of calls that read or write text in the encoding of the locale."""
    for node in ast.walk(ast.parse(program)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        is_method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if is_method else getattr(node.func, "id", "")
        owner = getattr(node.func.value, "id", "") if is_method else ""
        words = {word.arg: word.value for word in node.keywords}
        modes = [*node.args[not is_method :][:1], *([words["mode"]] if "mode" in words else [])]
        is_binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
        is_open = name == "open" and (owner, name) not in BINARY and not is_binary
        if is_open or name in ("read_text", "write_text", "fdopen") or "text" in words:
            yield node.lineno


@pytest.mark.parametrize("folder", ["tpipe_jax", "launch", "configs"])
def test_texts_are_utf_8_whatever_the_locale(folder: str):
    assert not [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in without_encoding(path.read_text(encoding="utf-8"))
    ]


def test_calls_without_an_encoding_are_found():
    good = "open(p, 'rb'); p.open(mode='wb'); p.read_text(encoding='utf-8'); os.open(p, 0)\n"
    bad = ["open(p)", "open(p, 'w')", "p.open('a')", "p.write_text(t)", "run(c, text=True)"]
    assert list(without_encoding(good + "\n".join(bad))) == [2, 3, 4, 5, 6]


def test_a_tokenizer_is_written_in_a_locale_without_its_characters(tmp_path: Path):
    (tmp_path / "text.txt").write_text("h\u00e4 \u4e2d \u00e4 " * 100, encoding="utf-8")
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "tokenize.py", "--out=o", "--train-bpe=300", "text.txt"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b""), done
    assert "\u0120" in (tmp_path / "o.tokenizer.json").read_text(encoding="utf-8")  # a space
    assert (tmp_path / "o" / "index.json").exists()
