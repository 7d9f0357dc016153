"""What is counted as the time of a step."""

from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import runs
from tpipe_jax import step_log
from tpipe_jax.mesh import make_mesh
from tpipe_jax.metrics import Metrics
from tpipe_jax.plans import Plan


def test_what_is_left_out_is_no_time_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(step_log.time, "monotonic", lambda: now)
    config = runs.changed(runs.small_config(tmp_path), train={"log_every": 2})
    plan = Plan(2, (4,), ((6, 6, 4),))
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.num_devices])
    console = runs.Lines()
    names = "loss", "grad_norm", "skipped_steps", "loss_spikes", "consecutive_skips"
    with closing(Metrics(tmp_path, 0)) as metrics, console.progress(0, 4):
        log = step_log.StepLog(config, plan, mesh, metrics, console)
        for step in (1, 2, 3, 4):
            now += 1.5
            if step == 3:
                now += 10
                log.leave_out(10)
            log.begin(step, {name: jnp.float32(0) for name in names})
            log.finish()
    assert [line["step_seconds"] for line in runs.metrics(tmp_path)] == [1.5, 1.5]
