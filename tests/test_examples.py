"""The library, and the examples, as they are started and as short as they are promised to be."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpipe_jax
from support import runs
from tpipe_jax.commands.evaluate import evaluate
from tpipe_jax.config.settings import Config, MeshConfig, ModelConfig, PlanConfig, TrainConfig
from tpipe_jax.data.batches import open_held_out
from tpipe_jax.errors import UserError
from tpipe_jax.planning.plan import Plan

EXAMPLES = sorted((runs.ROOT / "examples").glob("*.py"))
LEARNT = {"train_on_arrays": 1.25, "own_block": 2.5}  # at the end, from 4.6 and 5.5 nats


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path):
    """From another folder."""
    assert len(path.read_text().splitlines()) < 60
    command = [sys.executable, path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if path.stem in LEARNT:
        losses = re.findall(r"loss ([\d.]+) ", done.stdout)
        assert float(losses[-1]) < LEARNT[path.stem], done.stdout
    else:
        assert re.search(r"token slices .*\d+, \d+.*\npredicted step \d+ ms", done.stdout)


def small() -> Config:
    return Config(
        ModelConfig(num_layers=2, d_model=8, num_heads=2, vocab_size=11, seq_len=8),
        MeshConfig(pipe=2),
        PlanConfig("uniform:2", "uniform:1"),
        TrainConfig(batch_size=2, num_steps=2),
    )


def test_a_name_that_the_library_does_not_have():
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        tpipe_jax.missing  # noqa: B018


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        (Plan(2, (2,), ((4, 2),)), "sequences of 6, but config.model.seq_len is 8"),
        (Plan(3, (2,), ((4, 4),)), "a number of stages of 3, but config.mesh.pipe is 2"),
        (Plan(2, (1,), ((4, 4),)), "a batch of 1, but config.train.batch_size"),
    ],
)
def test_a_plan_of_another_config_is_refused(plan: Plan, what: str):
    with pytest.raises(UserError, match=f"the plan is for {what}"):
        tpipe_jax.make_train_step(small(), plan, jax.devices()[:2])


def test_a_step_takes_arrays_of_numpy_and_of_jax():
    step = tpipe_jax.make_train_step(small(), devices=jax.devices()[:2])
    rows = np.random.default_rng(0).integers(0, 11, (2, 9))
    losses = [float(step(step.init(), own)[1]["loss"]) for own in (rows, jnp.array(rows))]
    assert losses[0] == losses[1] == pytest.approx(np.log(11), abs=0.1)
    with pytest.raises(UserError, match=r"rows of shape \(2, 8\) must be of \(2, 9\)"):
        step(step.init(), rows[:, :8])


@pytest.mark.slow
def test_a_run_is_trained_and_loaded(tmp_path: Path):
    """And evaluated on what it holds out, as it has evaluated itself."""
    config = runs.changed(runs.small_config(tmp_path), train={"eval_batches": 1, "batch_size": 2})
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "eval.txt").write_text(text[: 2 * 16 + 1])
    (tmp_path / "text.txt").write_text(text[33:])
    config = runs.changed(config, data={"eval": str(tmp_path / "eval.txt")})
    tpipe_jax.train(config, str(tmp_path / "run"), jax.devices()[:2])
    trained = tpipe_jax.load(str(tmp_path / "run"), config=Config(mesh=MeshConfig(pipe=2)))
    assert (trained.step, trained.config.data.train) == (6, config.data.train)
    _, shares = open_held_out(trained.config)
    expected = runs.metrics(tmp_path / "run")[-1]["eval_loss"]
    assert evaluate(trained, shares).loss == pytest.approx(expected, rel=1e-5)
