"""Checkpoints that are damaged, and those that cannot be written."""

import errno
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support import several_processes
from support.checkpoints import ONE, PIECES, assert_same, like, names, open_folder
from support.numbered_states import state_on
from tpipe_jax.checkpoint import checkpoints as saving
from tpipe_jax.checkpoint import manifest
from tpipe_jax.checkpoint.checkpoints import Checkpoints
from tpipe_jax.errors import UserError


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file of this process may grow beyond `room` bytes; works for root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_damaged_checkpoint_is_put_aside_and_an_older_one_used(tmp_path: Path):
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(ONE, number=1))
        checkpoints.save(2, state_on(ONE, number=2))
    damaged = tmp_path / "2" / "params/blocks/3/ff_in/kernel/0.0"
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    said: list[str] = []
    with open_folder(tmp_path, said=said) as checkpoints:
        assert checkpoints.newest_step() == 1
        assert said == [
            "the checkpoint of step 2 is damaged (params/blocks/3/ff_in/kernel/0.0 has changed): "
            f"it is now {tmp_path}/2.damaged"
        ]
        assert_same(checkpoints.restore(1, like()), state_on(ONE, number=1))
        checkpoints.save(2, state_on(ONE, number=3))  # which is not in the way any more
        checkpoints.wait()
        assert checkpoints.newest_step() == 2
    assert names(tmp_path) == ["1", "2", "2.damaged"]


def test_what_cannot_be_read_just_now_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(ONE))
        checkpoints.save(2, state_on(ONE))
        checkpoints.wait()
        monkeypatch.setattr(manifest, "check", fail)
        with pytest.raises(UserError, match=r"/2 cannot be read .*Stale file handle.*move it away"):
            checkpoints.newest_step()
    assert names(tmp_path) == ["1", "2"]


def test_an_old_one_that_cannot_be_removed_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> Any:
        raise OSError(errno.EBUSY, "busy")

    said: list[str] = []
    monkeypatch.setattr(manifest, "remove", fail)
    with open_folder(tmp_path, keep=1, said=said) as checkpoints:
        checkpoints.save(1, state_on(ONE))
        checkpoints.save(2, state_on(ONE))
    assert names(tmp_path) == ["1", "2"]
    assert said == ["the old checkpoint of step 1 is not removed ([Errno 16] busy)"]


def test_where_all_are_damaged_none_is_used_and_all_stay(tmp_path: Path):
    """So that the same command does not start from the beginning."""
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(ONE))
        checkpoints.save(2, state_on(ONE))
    for step in ("1", "2"):
        (tmp_path / step / "step" / "0").unlink()
    sentence = rf"no checkpoint in {tmp_path} is sound \(2: step/0 is missing\): restore"
    for _ in range(2):
        with open_folder(tmp_path) as checkpoints, pytest.raises(UserError, match=sentence):
            checkpoints.newest_step()
    assert names(tmp_path) == ["1", "2"]


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("params/norm/scale/.zarray", None),
        ("params/norm/scale/.zarray", "{"),
        ("params/norm/scale/0", "short"),
        ("params/norm/scale/0", None),
        ("step/.zarray", None),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, path: str, content: str | None, capfd: pytest.CaptureFixture[str]
):
    """Damaged after it was checked, or written by another program."""
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(3, state_on(ONE))
        checkpoints.wait()
        (tmp_path / "3" / path).unlink()
        if content is not None:
            (tmp_path / "3" / path).write_text(content)
        with pytest.raises(UserError, match=f"the checkpoint in {tmp_path}/3 cannot be read"):
            checkpoints.restore(3, like())
    assert capfd.readouterr().err == ""


def test_hosts_that_see_other_checkpoints_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(3, state_on(ONE))
        checkpoints.wait()
        monkeypatch.setattr(saving, "from_first", lambda _: "[5, 3]")
        with pytest.raises(UserError, match=r"of steps \[5, 3\] for process 0 and \[3\] for"):
            checkpoints.newest_step()


def test_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(UserError, match=r"cannot write checkpoints to .*/file/checkpoints .*--work"),
        open_folder(tmp_path / "file" / "checkpoints"),
    ):
        pass


def test_folder_that_vanished_fails_at_once(tmp_path: Path):
    with open_folder(tmp_path / "checkpoints") as checkpoints:
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("in the way")
        checkpoints.save(1, state_on(ONE))
        with pytest.raises(UserError, match=r"cannot write checkpoints to .*/checkpoints .*--work"):
            checkpoints.wait()


def test_folder_without_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # chmod does not stop root
    with (
        pytest.raises(UserError, match=r"cannot write checkpoints to .*permission denied.*--work"),
        open_folder(tmp_path),
    ):
        pass


@pytest.mark.parametrize("room", [0, 100, 3000, 8000])  # the last has no room for the manifest
def test_full_disk_is_reported_and_the_step_does_not_count(
    tmp_path: Path, room: int, capfd: pytest.CaptureFixture[str]
):
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(ONE))
        checkpoints.wait()
        with full_disk(room):
            checkpoints.save(2, state_on(ONE))
            with pytest.raises(UserError, match=f"cannot write checkpoints to {tmp_path} .*--work"):
                checkpoints.wait()
    assert names(tmp_path) == ["1", "2.saving"]
    with open_folder(tmp_path) as checkpoints:
        assert checkpoints.newest_step() == 1
        checkpoints.save(2, state_on(ONE))
        checkpoints.wait()
        assert checkpoints.newest_step() == 2
    assert capfd.readouterr().err == ""


def test_a_failure_in_the_background_is_told_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(saving, "write_arrays", fail)
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(ONE))
        deadline = time.monotonic() + 400
        while not (failure := failure_of(checkpoints)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "no space left" in failure
        assert checkpoints.newest_step() is None
    assert manifest.list_steps(tmp_path) == []


def test_a_save_that_takes_too_long_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So that a run whose save hangs does not go on without ever saving."""
    write = saving.write_arrays

    def late(*args: Any) -> Any:
        time.sleep(1)
        return write(*args)

    monkeypatch.setattr(saving, "write_arrays", late)
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(ONE))
        time.sleep(0.2)
        checkpoints.raise_failure(60)
        assert names(tmp_path) != ["1"]
        checkpoints.raise_failure(0.1)
        assert names(tmp_path) == ["1"]


def test_what_fails_first_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(saving, "write_arrays", fail)

    def save_and_fail() -> None:
        with open_folder(tmp_path) as checkpoints:
            checkpoints.save(1, state_on(ONE))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_and_fail()


def failure_of(checkpoints: Checkpoints) -> str:
    try:
        checkpoints.raise_failure()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("save where one fails", "(no space in the last process): make it writable"),
        ("save apart", "has gone): make it writable, see that the disk has space and that all ho"),
    ],
)
def test_processes_fail_together(tmp_path: Path, what: str, sentence: str):
    """With what is wrong in one of them, and no checkpoint."""
    args = [*PIECES, f"--workdir={tmp_path}", "--config.optim.shard-state=true"]
    answers = several_processes.results(several_processes.start_all(2, what, *args))
    assert [status for status, _, _ in answers] == [2, 2], answers
    assert sentence in answers[0][2]
    assert not list(tmp_path.rglob(manifest.MANIFEST))
