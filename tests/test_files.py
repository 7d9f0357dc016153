"""Files that cannot be written, and folders that one process has to itself."""

import errno
import fcntl
import os
import re
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tpipe_jax.errors import UserError
from tpipe_jax.files import as_user_error, locked, writing_to


def lock(folder: Path, is_needed: bool = False) -> AbstractContextManager[None]:
    return locked(os.open(folder, os.O_RDONLY), "somebody else is here.", is_needed)


def test_where_there_are_no_locks_they_are_left_out_unless_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with lock(tmp_path):
        pass
    with pytest.raises(OSError, match="No locks available"), lock(tmp_path, is_needed=True):
        raise AssertionError("nobody is kept out")


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
