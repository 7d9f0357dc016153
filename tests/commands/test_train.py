"""Whole runs: what they leave behind, resuming, interruptions, and refusals."""

import dataclasses
import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from support import reference
from support.runs import changed, launch, metrics, run, small_config
from tpipe_jax.config.settings import Config, MeshConfig, from_dict, resolved
from tpipe_jax.data.batches import open_data
from tpipe_jax.errors import Infeasible, UserError
from tpipe_jax.model import transformer
from tpipe_jax.planning.plan import Plan, Prediction
from tpipe_jax.reporting import metrics as reporting_metrics
from tpipe_jax.training import comparison
from tpipe_jax.training.optimizer import learning_rate

pytestmark = pytest.mark.usefixtures("short_flags")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_config(tmp_path)


def test_a_run_leaves_its_files(config: Config, tmp_path: Path):
    workdir = tmp_path / "run"
    config = changed(config, train={"sample_tokens": 3, "compare_steps": 2})
    said = run(config, workdir)
    on_cpu = {"precision": {"compute": "float32"}, "attention": {"backend": "xla"}}
    expected = resolved(changed(config, **on_cpu))  # what auto is there
    assert from_dict(json.loads((workdir / "config.json").read_text())) == expected
    assert json.loads((workdir / "plan.json").read_text()) == {
        "num_stages": 2,
        "schedule": "terapipe",
        "batch_slices": [4],
        "token_slices": [[6, 6, 4]],
    }
    lines = metrics(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    fields = {"step", "loss", "grad_norm", "learning_rate", "step_seconds", "tokens_per_second"}
    fields |= {"tokens_per_second_per_device", "tflops_per_device", "data_wait_seconds"}
    fields |= {"skipped_steps", "loss_spikes", "peak_memory_gib"}
    for line in lines:
        assert set(line) == fields | ({"eval_loss"} if line["step"] in (4, 6) else set())
        assert line["tokens_per_second"] == pytest.approx(4 * 16 / line["step_seconds"])
    # Guessing among 256 tokens costs log(256), and training helps.
    assert lines[0]["loss"] == pytest.approx(np.log(256), abs=0.1)
    assert lines[-1]["loss"] < lines[0]["loss"]
    for name in ("timeline.png", "loss.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").iterdir())
    assert said[-1] == f"Trained 6 steps; everything is in {workdir}."
    assert re.fullmatch(
        r"token slices: [\d.]+ ms a step; whole sequences on the same two stages: [\d.]+ ms; "
        r"[\d.]+ times as fast",
        said[-2],
    )


@pytest.mark.slow
def test_whole_sequences_are_not_compared_with_themselves(config: Config, tmp_path: Path):
    config = changed(
        config, train={"num_steps": 1, "compare_steps": 2}, plan={"token_slices": "uniform:1"}
    )
    said = run(config, tmp_path / "run")
    assert said[-2] == "the plan has whole sequences, so there is nothing to compare them with"


def test_a_picture_that_fails_ends_no_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise ValueError("no fonts")

    monkeypatch.setattr(reporting_metrics, "draw_losses", fail)
    said = run(config, tmp_path / "run")
    assert said.count("loss.png could not be drawn: no fonts") == 1
    assert said[-1].startswith("Trained 6 steps;")
    assert len(metrics(tmp_path / "run")) == 6


@pytest.mark.slow
def test_whole_sequences_that_do_not_fit_are_not_compared(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any) -> Any:
        raise Infeasible("they do not fit.")

    monkeypatch.setattr(comparison, "fitting_step", refuse)
    said = run(changed(config, train={"num_steps": 1, "compare_steps": 2}), tmp_path / "run")
    assert said[-2:-1] == ["whole sequences cannot be compared: they do not fit."]
    assert said[-1].startswith("Trained 1 step;")


def test_the_other_plan_has_whole_sequences_one_by_one():
    prediction = Prediction(1, 0, ((1.0,),), ((1.0,),), ((0.0,),), True, 1)
    plan = Plan(2, (2, 1), ((5, 3), (8,)), prediction, "interleaved", 2)
    whole = Plan(2, (1, 1, 1), ((8,), (8,), (8,)), None, "interleaved", 2)
    assert comparison.whole_sequences(plan) == whole


@pytest.mark.slow
def test_each_step_takes_the_next_batch(config: Config, tmp_path: Path):
    """Without learning, the losses of a run are those of the plain model on batch after batch."""
    config = changed(
        config,
        optim={"learning_rate": 0.0},
        train={"num_steps": 7, "log_every": 4, "eval_every": 3},
    )
    run(config, tmp_path / "run")
    params = transformer.init(config.model, jax.random.key(config.train.seed))
    loss = jax.jit(partial(reference.loss, config.model, params))
    train_data, held_out = open_data(config)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 4, 6, 7]
    eval_loss = np.mean([float(loss(held_out.batch(i))) for i in range(2)])
    for line in lines:
        expected = float(loss(train_data.batch(line["step"] - 1)))
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        if "eval_loss" in line:
            assert line["eval_loss"] == pytest.approx(eval_loss, rel=1e-5)
    assert ["eval_loss" in line for line in lines] == [True, False, True, True]


def test_a_finished_run_says_how_to_go_on_and_changes_nothing(config: Config, tmp_path: Path):
    workdir = tmp_path / "run"
    run(changed(config, train={"num_steps": 2}), workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    said = run(changed(config, train={"num_steps": 2}), workdir)
    assert "--config.train.num-steps=4" in said[-1]
    assert "--workdir" in said[-1]
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_losses_do_not_depend_on_the_mesh(config: Config, tmp_path: Path):
    meshes = {"1x2x1": MeshConfig(1, 2, 1), "2x2x2": MeshConfig(2, 2, 2)}
    losses = {}
    for name, mesh in meshes.items():
        run(dataclasses.replace(config, mesh=mesh), tmp_path / name)
        losses[name] = [line["loss"] for line in metrics(tmp_path / name)]
    # Sums are taken in another order: 1e-4 after six updates in float32.
    np.testing.assert_allclose(losses["2x2x2"], losses["1x2x1"], rtol=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_under_another_schedule(config: Config, tmp_path: Path):
    """Whose stages have other layers: checkpoints have those of the model."""
    config = changed(config, model={"num_layers": 5}, train={"sample_tokens": 3})
    for num_steps, schedule in ((2, "interleaved"), (4, "1f1b-deferred"), (6, "interleaved")):
        plan = {"schedule": schedule, "batch_slices": "uniform:4"}
        other = changed(config, train={"num_steps": num_steps}, plan=plan)
        run(other, tmp_path / "others")
    run(config, tmp_path / "one")
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("others", "one")]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_shorter_formats_train_as_float32_does(config: Config, tmp_path: Path):
    for compute in ("float32", "bfloat16", "float16"):
        run(changed(config, precision={"compute": compute}), tmp_path / compute)
    exact, *rounded = (
        [line["loss"] for line in metrics(tmp_path / compute)]
        for compute in ("float32", "bfloat16", "float16")
    )
    # bfloat16 has 8 bits: an error of 2^-9 an operation, on losses near 5.5.
    for losses in rounded:
        np.testing.assert_allclose(losses, exact, rtol=1e-2)
    assert {line["skipped_steps"] for line in metrics(tmp_path / "float16")} == {0}


@pytest.mark.slow
def test_a_scale_that_is_too_large_costs_a_few_steps_only(config: Config, tmp_path: Path):
    """Steps that overflow are counted, use up a batch, and are no steps of the learning rate; the
    scale is part of the checkpoint.
    """
    scales = {"compute": "float16", "loss_scale_start": 2.0**32, "loss_scale_max": 2.0**32}
    scales |= {"loss_scale_factor": 2.0**10, "loss_scale_interval": 1}  # grows after each good step
    config = changed(config, precision=scales)
    said = run(changed(config, train={"num_steps": 4}), tmp_path / "run")
    assert any("CPUs compute float16 in float32" in line for line in said)
    run(config, tmp_path / "run")
    scale, skipped = 2.0**32, 0
    for n, line in enumerate(metrics(tmp_path / "run")):
        is_skipped = line["grad_norm"] is None
        assert line["loss_scale"] == scale
        rate = float(learning_rate(config)(n - skipped))
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-5)  # that is float32
        scale = scale / 2**10 if is_skipped else min(scale * 2**10, 2.0**32)
        skipped += is_skipped
        assert line["skipped_steps"] == skipped
    assert 2 <= skipped <= 4


def test_checkpoint_of_another_model_is_refused(config: Config, tmp_path: Path):
    workdir = tmp_path / "run"
    run(changed(config, train={"num_steps": 2}), workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="--workdir") as error:
        run(changed(config, model={"d_model": 32}), workdir)
    assert "config.model.d_model=16, but this run has 32" in str(error.value)
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"mesh": {"pipe": 1}, "plan": {"token_slices": "16"}},
        {"mesh": {"data": 2, "pipe": 2, "model": 2}, "optim": {"shard_state": False}},
    ],
    ids=str,
)
def test_a_run_goes_on_with_another_layout(
    config: Config, tmp_path: Path, whole: list[dict[str, float]], layout: dict[str, dict]
):
    """With the losses of an undisturbed run, and back again."""
    for stop, sections in ((2, {}), (4, layout), (None, {})):
        run(
            changed(config, **sections),
            tmp_path,
            lambda step, stop=stop: os.kill(os.getpid(), signal.SIGINT) if step == stop else None,
        )
    for got, want in zip(metrics(tmp_path), whole, strict=True):
        assert got["step"] == want["step"]
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


@pytest.fixture
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The metrics of a run that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("whole")
    run(config, workdir)
    return metrics(workdir)


def test_foreign_workdir_is_refused(config: Config, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"name": "something else"}')
    with pytest.raises(UserError, match="not the folder of a run"):
        run(config, tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"name": "something else"}'
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("name", ["plan.json", "timeline.png", "metrics.jsonl"])
def test_files_that_are_not_of_a_run_stay(config: Config, tmp_path: Path, name: str):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="not the folder of a run"):
        run(config, tmp_path)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.slow
def test_settings_that_a_state_does_not_depend_on_may_change(config: Config, tmp_path: Path):
    run(changed(config, train={"num_steps": 2}), tmp_path)
    said = run(changed(config, model={"d_ff": 64}, optim={"grad_clip": 0.0}), tmp_path)
    assert "changed since the last start: config.optim.grad_clip 1.0 -> 0.0" in said
    assert "changed since the last start: config.train.num_steps 2 -> 6" in said
    assert "continuing after step 2" in said
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"plan": {"token_slices": "6,6"}}, "sums to 12, but config.model.seq_len is 16"),
        ({"model": {"num_heads": 1}, "mesh": {"model": 2}}, "does not divide"),
        ({"train": {"batch_size": 3}, "mesh": {"data": 2}}, "is not a multiple of"),
        ({"data": {"train": "no/such/file"}}, "config.data.train=no/such/file does not exist"),
        ({"model": {"vocab_size": 50}}, "config.model.vocab_size=50"),
        ({"attention": {"backend": "cudnn"}}, "set auto, or one that can run here, xla."),
    ],
)
def test_nothing_is_written_before_all_settings_fit(
    config: Config, tmp_path: Path, change: dict, sentence: str
):
    with pytest.raises(UserError) as error:
        run(changed(config, **change), tmp_path / "run")
    assert sentence in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--config.model.num-layers=0"], "config.model.num_layers=0"),
        (["--config.plan.token-slices=100,100"], "config.plan.token_slices=100,100 sums to 200"),
        (["--workdir=/proc/run"], "--workdir"),
    ],
)
def test_the_program_answers_mistakes_in_one_sentence(args: list[str], sentence: str):
    process = launch(*args)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 2
    assert sentence in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_continue(tmp_path: Path):
    """The quick start as a user runs and interrupts it, then the same command to its end."""
    args = [f"--workdir={tmp_path}", "--config.train.num-steps=30", "--config.train.log-every=1"]
    args += ["--config.train.eval-batches=1", "--config.train.sample-tokens=4"]
    args += ["--config.plan.token-slices=uniform:4", "--config.plan.batch-slices=uniform:4"]
    args += ["--config.train.batch-size=4", "--config.model.seq-len=256"]
    process = launch(*args)
    deadline = time.monotonic() + 400
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 130, err
    assert "the same command continues" in out
    assert err == ""

    process = launch(*args)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "continuing after step" in out
    for expected in ("parameters", "mesh", "batch slices", "tokens/s", "held-out loss"):
        assert expected in out
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 31))


@pytest.mark.slow
def test_settings_that_are_rarely_meant_are_named(tmp_path: Path):
    config = changed(
        small_config(tmp_path),
        train={"num_steps": 2},
        model={"num_layers": 1},
        optim={"warmup_steps": 5},
    )
    said = run(config, tmp_path / "run")
    assert (
        "config.optim.warmup_steps=5 is not less than config.train.num_steps=2, so the learning "
        "rate never reaches config.optim.learning_rate=0.001"
    ) in said
    assert "1 stage of config.mesh.pipe=2 has no layer, with config.model.num_layers=1" in said
    plain = changed(small_config(tmp_path), optim={"warmup_steps": 1})
    assert not [line for line in run(plain, tmp_path / "plain") if "warmup" in line]
