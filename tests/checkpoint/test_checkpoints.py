"""What is saved, and that it is restored bit by bit."""

import errno
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from support import several_processes, zarr_files
from support.checkpoints import FOUR, ONE, PIECES, assert_same, like, names, open_folder
from support.numbered_states import MODEL, numbered, state_on
from tpipe_jax.checkpoint import checkpoints as saving
from tpipe_jax.checkpoint import manifest
from tpipe_jax.cli.main import run
from tpipe_jax.config.settings import MeshConfig, ModelConfig
from tpipe_jax.errors import UserError

ROOT = Path(__file__).parents[2]


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
    tokens = state.params["embed"]["tokens"][: MODEL.vocab_size]  # the others are padding
    np.testing.assert_array_equal(arrays["params/embed/tokens"], tokens)
    for layer in range(MODEL.num_layers):
        for part in ("kernel", "bias"):
            got = arrays[f"params/blocks/{layer}/ff_in/{part}"]
            np.testing.assert_array_equal(got, state.params["blocks"][layer]["ff_in"][part][0])
    assert arrays["step"] == 7
    manifest = json.loads((tmp_path / "7" / "manifest.json").read_text())
    assert manifest["identity"]["model"]["d_model"] == MODEL.d_model
    of_arrays = {name for name in manifest["files"] if name.endswith("/.zarray")}
    assert of_arrays == {f"{name}/.zarray" for name in arrays}


@pytest.fixture
def may_write(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, no array of a checkpoint is written."""
    event, write = threading.Event(), saving.write_arrays

    def late(*args: Any) -> Any:
        assert event.wait(60)
        return write(*args)

    monkeypatch.setattr(saving, "write_arrays", late)
    return event


def test_state_may_be_donated_right_after_save(tmp_path: Path, may_write: threading.Event):
    step = jax.jit(lambda state: jax.tree.map(lambda x: -x - 1, state), donate_argnums=0)
    state = step(state_on(FOUR))  # an output of a jitted step, as in training
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        before = state
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        assert before.step.is_deleted()
        may_write.set()
    arrays = zarr_files.read_all(tmp_path / "1")
    assert arrays["step"] == -8
    kernel = numbered()["blocks"][3]["ff_in"]["kernel"]
    np.testing.assert_array_equal(arrays["params/blocks/3/ff_in/kernel"], -kernel - 1)
    np.testing.assert_array_equal(arrays["opt_state/1/0/mu/blocks/3/ff_in/kernel"], -2 * kernel - 1)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, may_write: threading.Event):
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


def test_a_reader_is_told_which_newer_checkpoints_are_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "checkpoints"
    with open_folder(folder, keep=3) as checkpoints:
        for step in (2, 4, 10):
            checkpoints.save(step, state_on(ONE))
    assert saving.newest_sound(tmp_path)[0] == folder / "10"
    assert capsys.readouterr() == ("", "")
    (folder / "10" / "foreign").write_text("")
    (folder / "4" / manifest.MANIFEST).write_text("")
    assert saving.newest_sound(tmp_path)[0] == folder / "2"
    out, told = capsys.readouterr()
    assert (out, told) == (
        "",
        f"warning: {folder} has newer checkpoints that are damaged (10: foreign does not belong "
        "to it; 4: manifest.json or manifest.sha256 has changed): the one of step 2 is taken, "
        "which is older.\n",
    )
    assert saving.newest_sound(tmp_path, 2)[0] == folder / "2"
    with pytest.raises(UserError, match=r"no sound checkpoint .*10: foreign"):
        saving.newest_sound(tmp_path, 10)
    assert capsys.readouterr() == ("", "")


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


def test_names_each_setting_of_another_model(tmp_path: Path):
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(ONE))
    other = replace(MODEL, d_model=32, seq_len=16, d_ff=64)
    with open_folder(tmp_path, model=other) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.newest_step()
    assert str(caught.value) == (
        f"the checkpoint in {tmp_path} was written with config.model.d_model=16, but this run has "
        "32; with config.model.seq_len=8, but this run has 16: use the same settings, or start "
        "another run with --workdir."
    )


@pytest.mark.parametrize("block", [None, "gpt2"])
def test_a_checkpoint_may_be_older_than_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: str | None
):
    """Which then was as it is without being set; the block of GPT-2 once had that name."""
    identity_of = saving.identity_of
    then = "num_layers", "d_model", "num_heads", "d_ff", "vocab_size", "seq_len"

    def older(model: ModelConfig) -> dict[str, Any]:
        values = identity_of(model)["model"]
        named = {} if block is None else {"block": block}
        return {"model": {name: values[name] for name in then} | named}

    with monkeypatch.context() as patch:
        patch.setattr(saving, "identity_of", older)
        with open_folder(tmp_path) as checkpoints:
            checkpoints.save(1, state_on(ONE))
    assert "family" not in manifest.read_manifest(tmp_path / "1").identity["model"]
    with open_folder(tmp_path) as checkpoints:
        assert checkpoints.newest_step() == 1
    other = replace(MODEL, block="my_block.py:MyBlock")
    with (
        open_folder(tmp_path, model=other) as checkpoints,
        pytest.raises(UserError, match=r"with config\.model\.block=family, but this run has my_"),
    ):
        checkpoints.newest_step()


def test_llama_goes_on_with_what_is_no_parameter(tmp_path: Path):
    """Another length and other positions are said; another width is refused."""
    model = replace(MODEL, family="llama", num_kv_heads=1)
    with open_folder(tmp_path, model=model) as checkpoints:
        checkpoints.save(1, state_on(ONE))
    said: list[str] = []
    longer = replace(model, seq_len=32, rope_scaling="yarn:4,8")
    with open_folder(tmp_path, model=longer, said=said) as checkpoints:
        assert checkpoints.newest_step() == 1
    assert said == [
        "the checkpoint of step 1 was written with config.model.seq_len=8: this run goes on from "
        "it with 32",
        "the checkpoint of step 1 was written with config.model.rope_scaling=None: this run goes "
        "on from it with yarn:4,8",
    ]
    with (
        open_folder(tmp_path, model=replace(model, qk_norm=True)) as checkpoints,
        pytest.raises(UserError, match="qk_norm=False, but this run has True: use the same"),
    ):
        checkpoints.newest_step()


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
    megabytes = manifest.num_bytes(tmp_path / "checkpoints" / "8") / 1e6
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


def test_the_command_does_not_call_damaged_what_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    with open_folder(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state_on(ONE))
    monkeypatch.setattr(manifest, "check", fail)
    assert run("checkpoints", [str(tmp_path)]) == 1
    line = capsys.readouterr().out
    assert line.endswith("cannot be read: [Errno 116] Stale file handle\n")


@pytest.mark.slow
def test_processes_save_together(tmp_path: Path):
    """Two of four, which have copies of what the others have, have nothing to save."""
    args = [*PIECES, f"--workdir={tmp_path}", "--config.optim.shard-state=false"]
    answers = several_processes.results(several_processes.start_all(4, "save", *args))
    assert [status for status, _, _ in answers] == [0] * 4, answers
    assert all(out.endswith("restored\n") for _, out, _ in answers)
    assert names(tmp_path) == ["1"]
    manifest.check(tmp_path / "1")
