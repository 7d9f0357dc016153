import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

import several
import zarr_files
from states import MODEL, abstract, numbered, state_on
from tpipe_jax import checkpoint, checkpoint_files
from tpipe_jax.checkpoint import Checkpoints
from tpipe_jax.config import CheckpointConfig, MeshConfig, ModelConfig, UserError
from tpipe_jax.train_state import TrainState

ROOT = Path(__file__).parents[1]
ONE, FOUR = MeshConfig(), MeshConfig(1, 2, 2)


@contextmanager
def open_folder(
    folder: Path,
    keep: int = 2,
    model: ModelConfig = MODEL,
    said: list[str] | None = None,
    **more: Any,
) -> Iterator[Checkpoints]:
    config = CheckpointConfig(keep=keep, **more)
    say = (said if said is not None else []).append
    with Checkpoints(folder, config, model, say) as checkpoints:
        yield checkpoints


def like(config: MeshConfig = ONE) -> TrainState:
    return abstract(config)[1]


def assert_same(got: TrainState, want: TrainState) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file of this process may grow beyond `room` bytes; works for root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("before", [ONE, FOUR, MeshConfig(2, 3, 1)], ids=str)
def test_restores_on_any_mesh_what_was_saved_bit_by_bit(tmp_path: Path, before: MeshConfig):
    folder = tmp_path / "new" / "checkpoints"
    with open_folder(folder) as checkpoints:
        assert checkpoints.newest_step() is None
        checkpoints.save(7, state_on(before))
    with open_folder(folder) as checkpoints:
        assert checkpoints.newest_step() == 7
        for after in (before, ONE, FOUR, MeshConfig(1, 8, 1)):
            restored = checkpoints.restore(7, like(after))
            assert_same(restored, state_on(after))
            chex.assert_trees_all_equal(
                jax.tree.map(lambda a: a.sharding, restored),
                jax.tree.map(lambda a: a.sharding, like(after)),
            )


def test_the_files_are_as_documented(tmp_path: Path):
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(7, state_on(FOUR))
    arrays = zarr_files.read_all(tmp_path / "7")
    state = jax.device_get(state_on(ONE))
    np.testing.assert_array_equal(arrays["params/embed/tokens"], state.params["embed"]["tokens"])
    assert arrays["params/embed/tokens"].shape == (MODEL.vocab_size, MODEL.d_model)
    for layer in range(MODEL.num_layers):
        for part in ("kernel", "bias"):
            got = arrays[f"params/blocks/{layer}/ff_in/{part}"]
            np.testing.assert_array_equal(got, state.params["blocks"][layer]["ff_in"][part][0])
    assert arrays["step"] == 7
    manifest = json.loads((tmp_path / "7" / "manifest.json").read_text())
    assert manifest["identity"]["model"]["d_model"] == MODEL.d_model
    of_arrays = {name for name in manifest["files"] if name.endswith("/.zarray")}
    assert of_arrays == {f"{name}/.zarray" for name in arrays}


def test_state_may_be_donated_right_after_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step = jax.jit(lambda state: jax.tree.map(lambda x: -x - 1, state), donate_argnums=0)
    state = step(state_on(FOUR))  # an output of a jitted step, as in training
    are_done, write = threading.Event(), checkpoint._write

    def late(*args: Any) -> Any:
        assert are_done.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpoint, "_write", late)
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        before = state
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        assert before.step.is_deleted()
        are_done.set()
    arrays = zarr_files.read_all(tmp_path / "1")
    assert arrays["step"] == -8
    kernel = numbered()["blocks"][3]["ff_in"]["kernel"]
    np.testing.assert_array_equal(arrays["params/blocks/3/ff_in/kernel"], -kernel - 1)
    np.testing.assert_array_equal(arrays["opt_state/1/0/mu/blocks/3/ff_in/kernel"], -2 * kernel - 1)


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    may_write, write = threading.Event(), checkpoint._write

    def late(*args: Any) -> Any:
        assert may_write.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpoint, "_write", late)
    with open_folder(tmp_path) as checkpoints:
        seconds = checkpoints.save(1, state_on(ONE))
        assert "1" not in names(tmp_path)
        checkpoints.raise_failure()  # which does not wait
        assert seconds < 30
        may_write.set()
        checkpoints.wait()
        assert names(tmp_path) == ["1"]
    may_write.clear()
    threading.Timer(0.5, may_write.set).start()
    with open_folder(tmp_path, async_=False) as checkpoints:
        assert checkpoints.save(2, state_on(ONE)) > 0.4
        assert names(tmp_path) == ["1", "2"]


def test_keeps_the_newest(tmp_path: Path):
    with open_folder(tmp_path) as checkpoints:
        for step in (2, 4, 10):
            checkpoints.save(step, state_on(ONE, number=step))
    assert names(tmp_path) == ["10", "4"]
    with open_folder(tmp_path) as checkpoints:
        assert checkpoints.newest_step() == 10
        assert_same(checkpoints.restore(10, like()), state_on(ONE, number=10))


def test_a_step_that_is_saved_already_stays_as_it_is(tmp_path: Path):
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(5, state_on(ONE, number=1))
        checkpoints.save(5, state_on(ONE, number=2))
        checkpoints.wait()
        assert_same(checkpoints.restore(5, like()), state_on(ONE, number=1))


def test_what_a_killed_run_left_is_ignored_and_removed(tmp_path: Path):
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(ONE))
        checkpoints.save(3, state_on(ONE))
    (tmp_path / "3").rename(tmp_path / "3.saving")
    shutil.copytree(tmp_path / "1", tmp_path / "0.removing")
    with open_folder(tmp_path) as checkpoints:
        assert checkpoints.newest_step() == 1
        assert names(tmp_path) == ["1"]
        checkpoints.save(3, state_on(ONE))
    assert names(tmp_path) == ["1", "3"]


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
        monkeypatch.setattr(checkpoint_files, "check", fail)
        with pytest.raises(UserError, match=r"/2 cannot be read .*Stale file handle.*move it away"):
            checkpoints.newest_step()
    assert names(tmp_path) == ["1", "2"]


def test_an_old_one_that_cannot_be_removed_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> Any:
        raise OSError(errno.EBUSY, "busy")

    said: list[str] = []
    monkeypatch.setattr(checkpoint_files, "remove", fail)
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


def test_names_each_setting_of_another_model(tmp_path: Path):
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(ONE))
    other = replace(MODEL, d_model=32, seq_len=16)
    with open_folder(tmp_path, model=other) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.newest_step()
    assert str(caught.value) == (
        f"the checkpoint in {tmp_path} was written with config.model.d_model=16, but this run has "
        "32; with config.model.seq_len=8, but this run has 16: use the same settings, or start "
        "another run with --workdir."
    )


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
        monkeypatch.setattr(checkpoint, "from_first", lambda _: "[5, 3]")
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

    monkeypatch.setattr(checkpoint, "_write", fail)
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(ONE))
        deadline = time.monotonic() + 400
        while not (failure := failure_of(checkpoints)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "no space left" in failure
        assert checkpoints.newest_step() is None
    assert checkpoint_files.list_steps(tmp_path) == []


def failure_of(checkpoints: Checkpoints) -> str:
    try:
        checkpoints.raise_failure()
    except UserError as error:
        return str(error)
    return ""


def test_the_command_lists_them(tmp_path: Path):
    def listed() -> tuple[int, str, str]:
        command = [sys.executable, "launch/checkpoints.py", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    assert listed() == (
        2,
        "",
        f"error: {tmp_path} has no folder checkpoints: give the workdir of a run.\n",
    )
    with open_folder(tmp_path / "checkpoints") as checkpoints:
        for step in (8, 12):
            checkpoints.save(step, state_on(ONE))
    status, out, err = listed()
    assert (status, err) == (0, "")
    megabytes = checkpoint_files.num_bytes(tmp_path / "checkpoints" / "8") / 1e6
    assert [line.split() for line in out.splitlines()] == [
        ["step", "MB"],
        ["8", f"{megabytes:.1f}", "sound"],
        ["12", f"{megabytes:.1f}", "sound"],
    ]
    (tmp_path / "checkpoints/12/step/0").write_bytes(b"")
    (tmp_path / "checkpoints/3.damaged").mkdir()
    status, out, err = listed()
    assert (status, err) == (1, "")
    assert out.splitlines()[2].endswith("damaged: step/0 has 0 bytes instead of 4")
    assert out.splitlines()[3] == "3.damaged: no checkpoint"


PIECES = ["--config.mesh.data=2", "--config.mesh.pipe=1", "--config.mesh.model=2"]


def test_processes_save_together(tmp_path: Path):
    """Two of four, which have copies of what the others have, have nothing to save."""
    args = [*PIECES, f"--workdir={tmp_path}", "--config.optim.shard-state=false"]
    answers = several.results(several.start_all(4, "save", *args))
    assert [status for status, _, _ in answers] == [0] * 4, answers
    assert all(out.endswith("restored\n") for _, out, _ in answers)
    assert names(tmp_path) == ["1"]
    checkpoint_files.check(tmp_path / "1")


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
    answers = several.results(several.start_all(2, what, *args))
    assert [status for status, _, _ in answers] == [2, 2], answers
    assert sentence in answers[0][2]
    assert not list(tmp_path.rglob(checkpoint_files.MANIFEST))
