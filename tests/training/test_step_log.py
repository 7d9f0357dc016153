"""What is counted as the time of a step."""

from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from support import runs
from tpipe_jax.config.settings import Config, MetricsConfig, PrecisionConfig
from tpipe_jax.devices.hardware import peak_flops
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.plan import Plan, Prediction
from tpipe_jax.reporting.metrics import Metrics
from tpipe_jax.training import step_log


def test_what_is_left_out_is_no_time_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(step_log.time, "monotonic", lambda: now)
    config = runs.changed(runs.small_config(tmp_path), train={"log_every": 2})
    plan = Plan(2, (4,), ((6, 6, 4),))
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.num_devices])
    console = runs.Lines()
    names = "loss", "grad_norm", "skipped_steps", "loss_spikes", "consecutive_skips"
    with closing(Metrics(tmp_path, 0)) as metrics, console.progress(0, 4):
        log = step_log.StepLog(make_spec(config, mesh), plan, metrics, console)
        for step in (1, 2, 3, 4):
            now += 1.5
            if step == 3:
                now += 10
                log.leave_out(10)
            log.begin(step, {name: jnp.float32(0) for name in names})
            log.finish()
    assert [line["step_seconds"] for line in runs.metrics(tmp_path)] == [1.5, 1.5]


def test_a_line_is_written_while_the_next_step_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Steps of 2 s, and lines of 1.5 s: that is a part of the next step, unless none runs yet."""
    now = 0.0
    monkeypatch.setattr(step_log.time, "monotonic", lambda: now)
    config = runs.small_config(tmp_path)
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.num_devices])

    def write_line(step: int) -> None:
        nonlocal now
        now += 1.5

    console = runs.Lines(write_line)
    names = "loss", "grad_norm", "skipped_steps", "loss_spikes", "consecutive_skips"
    with closing(Metrics(tmp_path, 0)) as metrics, console.progress(0, 4):
        log = step_log.StepLog(make_spec(config, mesh), Plan(2, (4,), ((16,),)), metrics, console)
        for step in (1, 2, 3, 4):
            is_behind = 1 < step < 4  # while a line was written
            now += 0.5 if is_behind else 2
            log.begin(step, {name: jnp.float32(0) for name in names})
            log.finish(is_next_running=step < 3)
    assert [line["step_seconds"] for line in runs.metrics(tmp_path)] == [2, 2, 2, 2]


def test_a_line_does_not_wait_for_the_step_that_runs(tmp_path: Path):
    config = runs.small_config(tmp_path)
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.num_devices])
    console = runs.Lines()
    names = "loss", "grad_norm", "skipped_steps", "loss_spikes", "consecutive_skips"

    @jax.jit
    def long(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 1000, lambda i, a: jnp.tanh(a @ a), a)

    next_step = long.lower(jnp.ones((256, 256))).compile()
    with closing(Metrics(tmp_path, 0)) as metrics, console.progress(0, 2):
        log = step_log.StepLog(make_spec(config, mesh), Plan(2, (4,), ((16,),)), metrics, console)
        log.begin(1, {name: jax.block_until_ready(jnp.float32(0)) for name in names})
        running = next_step(jnp.ones((256, 256)))
        log.finish(is_next_running=True)
        assert not running.is_ready()
    jax.block_until_ready(running)


def test_speed_wait_and_bubbles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of steps of 2 s on two devices: the operations by hand, and predicted slices of 1 and 2 s."""
    now = 0.0
    monkeypatch.setattr(step_log.time, "monotonic", lambda: now)
    config = runs.changed(runs.small_config(tmp_path), metrics={"peak_tflops": 1e-6})
    # Two slices on two stages, of which the second has half the layers: busy for 6 and for 3 of
    # the 2.5 s forward and 5 s backward.
    seconds = Prediction(9.0, 0.0, ((1.0, 1.0),), ((2.0, 2.0),), ((0.0, 0.0),), True, 9.0)
    plan = Plan(2, (4,), ((8, 8),), seconds)
    mesh = make_mesh(config.mesh, jax.devices()[:2])
    console = runs.Lines()
    names = "loss", "grad_norm", "skipped_steps", "loss_spikes", "consecutive_skips"
    with closing(Metrics(tmp_path, 0)) as metrics, console.progress(0, 2):
        log = step_log.StepLog(make_spec(config, mesh), plan, metrics, console)
        for step in (1, 2):
            log.add_wait(0.25 * step)
            now += 2
            if step == 2:
                log.add_bubble(0.45)
            log.begin(step, {name: jnp.float32(0) for name in names})
            log.finish()
    first, second = runs.metrics(tmp_path)
    D, T, V, layers, tokens = 16, 16, 256, 3, 4 * 16
    pairs = 4 * T * (T + 1) / 2
    flops = 3 * (layers * (2 * tokens * 12 * D * D + 4 * D * pairs) + 2 * tokens * D * V)
    assert first["tokens_per_second"] == tokens / 2
    assert first["tokens_per_second_per_device"] == tokens / 2 / 2
    assert first["tflops_per_device"] == pytest.approx(flops / 2 / 2 / 1e12)
    assert first["mfu"] == pytest.approx(flops / 2 / 2 / 1e6)
    assert (first["data_wait_seconds"], second["data_wait_seconds"]) == (0.25, 0.5)
    assert first["bubble_predicted"] == second["bubble_predicted"] == pytest.approx(1 - 9 / 15)
    assert "bubble_measured" not in first
    assert second["bubble_measured"] == 0.45
    assert 0.05 < first["peak_memory_gib"] < 100


def test_peaks_of_known_devices():
    def peak(kind: str, compute: Any = "bfloat16", **metrics: float) -> float | None:
        config = Config(
            precision=PrecisionConfig(compute=compute), metrics=MetricsConfig(**metrics)
        )
        return peak_flops(config, kind)

    assert peak("Tesla V100-SXM2-16GB", "float16") == 125e12
    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == 989e12
    assert peak("NVIDIA H100 PCIe") == 756e12
    assert peak("TPU v5 lite") == 197e12
    assert peak("cpu") is None
    assert peak("NVIDIA H200", "float32") is None
    assert peak("cpu", "float32", peak_tflops=2.0) == 2e12


@pytest.mark.parametrize(("losses", "is_said"), [("0123456789", True), ("0123426789", False)])
def test_a_loss_that_only_rises_is_told_once(losses: str, is_said: bool, tmp_path: Path):
    config = runs.changed(runs.small_config(tmp_path), train={"num_steps": 20})
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.num_devices])
    console = runs.Lines()
    names = "loss", "grad_norm", "skipped_steps", "loss_spikes", "consecutive_skips"
    with closing(Metrics(tmp_path, 0)) as metrics, console.progress(0, 20):
        log = step_log.StepLog(make_spec(config, mesh), Plan(2, (4,), ((16,),)), metrics, console)
        for step, loss in enumerate(losses, 1):
            log.begin(step, {name: jnp.float32(0) for name in names} | {"loss": jnp.float32(loss)})
            log.finish()
    said = [line for line in console.said if "has risen" in line]
    assert (
        said
        == [
            "step 9: the loss has risen in 8 lines in a row, from 0.000 to 8.000: lower "
            "config.optim.learning_rate=0.001, or look at the data"
        ]
        * is_said
    )
