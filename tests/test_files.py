"""Files that cannot be written, and folders that one process has to itself."""

import re
from pathlib import Path

import pytest

from tpipe_jax.errors import UserError
from tpipe_jax.files import as_user_error, locked, writing_to


def test_a_folder_is_for_one_at_a_time(tmp_path: Path):
    with locked(tmp_path, "somebody else is here."):
        second = locked(tmp_path, "somebody else is here.")
        with pytest.raises(UserError, match=r"^somebody else is here\.$"), second:
            raise AssertionError("both are in it")
        with locked(tmp_path.parent, "this is another folder."):
            pass
    with locked(tmp_path, "it is free again."):
        pass


def test_what_fails_within_a_lock_is_raised(tmp_path: Path):
    """Also an error of the system, which does not mean that there are no locks."""
    alone = locked(tmp_path, "somebody else is here.")
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
