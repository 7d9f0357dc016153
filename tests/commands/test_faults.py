"""Whole runs of one process that are stopped, diverge, or lose their data, disk or folder."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from support.runs import Lines, changed, metrics, run, saved_arrays, small_config
from tpipe_jax.checkpoint import checkpoints
from tpipe_jax.commands import train as train_module
from tpipe_jax.config.settings import Config
from tpipe_jax.data import prefetch
from tpipe_jax.data.batches import open_data
from tpipe_jax.errors import UserError
from tpipe_jax.pipeline import vocab_parallel
from tpipe_jax.profiling import measured_plan
from tpipe_jax.training.optimizer import learning_rate

pytestmark = pytest.mark.usefixtures("short_flags")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_config(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_bitwise_uninterrupted(
    config: Config, tmp_path: Path, number: int
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(config, whole)
    said = run(config, parts, lambda step: os.kill(os.getpid(), number) if step == 2 else None)
    assert "the same command continues" in said[-1]
    stopped = metrics(parts)[-1]["step"]
    assert 2 <= stopped < 6
    said = run(config, parts)
    assert f"continuing after step {stopped}" in said
    for key in ("step", "loss", "grad_norm", "learning_rate"):
        assert [m[key] for m in metrics(parts)] == [m[key] for m in metrics(whole)]
    chex.assert_trees_all_equal(saved_arrays(parts, 6), saved_arrays(whole, 6))


def test_a_stop_that_comes_while_programs_compile_is_kept(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compile_programs = train_module.compile_programs

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return compile_programs(*args)

    monkeypatch.setattr(train_module, "compile_programs", stopped)
    said = run(config, tmp_path / "run")
    assert said[-1] == "Interrupted after step 0: the same command goes on."
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["checkpoints"]


def test_a_stop_that_comes_with_the_last_save_lets_it_end(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = checkpoints.write_arrays

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        return write(*args)

    monkeypatch.setattr(checkpoints, "write_arrays", stopped)
    config = changed(config, train={"num_steps": 2})
    assert "Trained 2 steps" in run(config, tmp_path / "run")[-1]
    assert saved_arrays(tmp_path / "run", 2)["step"] == 2


def test_a_run_whose_last_save_fails_does_not_say_that_it_can_continue(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints, "write_arrays", fail)
    console = Lines(lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None)
    with pytest.raises(UserError, match="no space left"):
        train_module.train(config, tmp_path / "run", jax.devices()[:2], console)
    assert not any("Interrupted" in line for line in console.said)


def test_stalls_of_saves_are_logged(config: Config, tmp_path: Path):
    run(changed(config, checkpoint={"every": 2, "async_": False}), tmp_path / "run")
    stalls = [line.get("checkpoint_stall_seconds") for line in metrics(tmp_path / "run")]
    assert [stall is not None for stall in stalls] == [False, False, True, False, True, False]
    assert all(stall is None or stall > 0 for stall in stalls)


def test_second_interruption_stops_at_once(config: Config, tmp_path: Path):
    def interrupt_twice(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", interrupt_twice)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(
    config: Config, tmp_path: Path, compute: str
):
    """By a learning rate that is far too large, after a few good steps."""
    config = changed(config, precision={"compute": compute, "loss_scale_start": 1.0})
    run(changed(config, train={"num_steps": 3}), tmp_path / "run")
    diverging = {"learning_rate": 1e4, "warmup_steps": 0, "grad_clip": 0.0}
    with pytest.raises(UserError, match="training has diverged") as error:
        run(changed(config, train={"num_steps": 30}, optim=diverging), tmp_path / "run")
    text = str(error.value)
    assert "config.optim.learning_rate=10000" in text
    assert ("the loss scale at its lower bound 1" in text) == (compute == "float16")
    lines = metrics(tmp_path / "run")
    step = lines[-1]["step"]
    assert f"of step {step} are not finite" in text
    assert [line["step"] for line in lines] == list(range(1, step + 1))
    assert lines[-1]["loss"] is None or lines[-1]["grad_norm"] is None
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["3"]
    arrays = saved_arrays(tmp_path / "run", 3)
    assert all(np.isfinite(array).all() for array in arrays.values())


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states of a batch with a tilde in it are no numbers."""
    embed = vocab_parallel.embed

    def spoilt(params: Any, tokens_BT: Any, *args: Any) -> Any:
        x_BTD = embed(params, tokens_BT, *args)
        return jnp.where((tokens_BT == ord("~")).any(), jnp.nan, x_BTD)

    monkeypatch.setattr(vocab_parallel, "embed", spoilt)


@pytest.mark.slow
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_batch_that_is_not_finite_is_skipped_or_ends_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_nonfinite: str
):
    text = Path(config.data.train).read_text()
    Path(config.data.train).write_text(text[:1000] + "~" + text[1001:])
    config = changed(config, train={"num_steps": 70, "on_nonfinite": on_nonfinite})
    train_data, _ = open_data(config)
    bad = [n + 1 for n in range(70) if (train_data.batch(n) == ord("~")).any()]
    assert len(bad) in (1, 2)
    poisoned(monkeypatch)
    if on_nonfinite == "stop":
        with pytest.raises(UserError, match=f"loss or gradients of step {bad[0]} are not finite"):
            run(config, tmp_path / "run")
        return
    said = run(config, tmp_path / "run")
    assert [line for line in said if "not applied" in line] == [
        f"step {n}: loss or gradients are not finite, and not applied" for n in bad
    ]
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["loss"] is None] == bad
    assert [line["skipped_steps"] for line in lines] == [
        sum(n <= step for n in bad) for step in range(1, 71)
    ]
    # Skipped steps are no steps of the learning rate.
    rates = [float(learning_rate(config)(n)) for n in range(70)]
    assert lines[-1]["learning_rate"] == pytest.approx(rates[69 - len(bad)])


@pytest.mark.slow
def test_too_many_skipped_steps_in_a_row_end_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Path(config.data.train).write_text("~" * 1000)
    poisoned(monkeypatch)
    config = changed(config, train={"on_nonfinite": "skip", "max_consecutive_skips": 3})
    with pytest.raises(UserError, match="loss or gradients of 4 steps up to 4 were not finite"):
        run(config, tmp_path / "run")
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_data_that_is_lost_ends_the_run_with_all_steps_saved(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And with the data back it goes on as if nothing had happened."""
    monkeypatch.setattr(prefetch, "PACE_SECONDS", 0)
    config = changed(config, train={"num_steps": 30, "eval_every": 1})
    run(config, tmp_path / "whole")
    text, parts = Path(config.data.train), tmp_path / "parts"
    content = text.read_bytes()
    with pytest.raises(UserError, match="shorter than at the start") as error:
        run(config, parts, lambda step: text.write_bytes(b"") and None if step == 2 else None)
    assert str(error.value).startswith(f"config.data.train={text} cannot be read any more (")
    steps = [line["step"] for line in metrics(parts)]
    assert steps == list(range(1, len(steps) + 1))
    assert 2 <= len(steps) < 30
    assert saved_arrays(parts, len(steps))["step"] == len(steps)
    text.write_bytes(content)
    assert f"continuing after step {len(steps)}" in run(config, parts)
    chex.assert_trees_all_equal(saved_arrays(parts, 30), saved_arrays(tmp_path / "whole", 30))
    assert [line["loss"] for line in metrics(parts)] == [
        line["loss"] for line in metrics(tmp_path / "whole")
    ]


def test_a_second_run_in_a_workdir_is_refused(config: Config, tmp_path: Path):
    refusals: list[str] = []

    def start_another(step: int) -> None:
        if step == 2:
            with pytest.raises(UserError) as error:
                run(config, tmp_path / "run")
            refusals.append(str(error.value))

    assert "Trained 6 steps" in run(config, tmp_path / "run", start_another)[-1]
    assert refusals == [
        f"another run is at work in --workdir={tmp_path / 'run'}: wait for its end, stop it, or "
        "choose another folder."
    ]


def test_a_stop_while_slices_are_measured_ends_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Interrupted:
        def __init__(self, *_: Any) -> None: ...

        def profile(self, on_progress: Any, with_deferral: bool) -> None:
            on_progress(1, 3)
            os.kill(os.getpid(), signal.SIGTERM)
            on_progress(2, 3)
            raise AssertionError("it goes on")

    monkeypatch.setattr(measured_plan, "Profiler", Interrupted)
    said = run(changed(config, plan={"token_slices": "auto"}), tmp_path / "run")
    assert said[-1] == "Interrupted after step 0: the same command goes on."
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["checkpoints"]


def test_a_second_stop_does_not_wait_for_a_save(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    is_writing, may_go_on = threading.Event(), threading.Event()
    write = checkpoints.write_arrays

    def hang(*args: Any) -> Any:
        is_writing.set()
        may_go_on.wait(100)
        return write(*args)

    def interrupt() -> None:
        is_writing.wait(100)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(checkpoints, "write_arrays", hang)
    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        run(
            config,
            tmp_path / "run",
            lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 1 else None,
        )
    assert not may_go_on.is_set()
    may_go_on.set()
    other.join()


def test_a_device_without_enough_memory_is_a_sentence(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> Any:
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nand more")

    monkeypatch.setattr(train_module, "init_state", fail)
    with pytest.raises(UserError) as error:
        run(config, tmp_path / "run")
    assert str(error.value).startswith(
        "a device has too little memory (RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.): "
    )
