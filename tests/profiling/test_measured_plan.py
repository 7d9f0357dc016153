"""Planning as a user meets it: runs that measure and plan by themselves, and launch/plan.py."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from support.latencies import profile
from support.runs import Lines, changed, launch, metrics, run, small_config
from tpipe_jax.commands.plan import plan_run
from tpipe_jax.config.settings import Config
from tpipe_jax.errors import UserError
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.planning.latency import Deferral, Profile, Sample
from tpipe_jax.planning.latency_file import load_table
from tpipe_jax.planning.plan import PlanRequest, load_plan
from tpipe_jax.profiling import measured_plan
from tpipe_jax.profiling.cache_key import profile_key

pytestmark = pytest.mark.usefixtures("short_flags")

ROOT = Path(__file__).parents[2]

SLOW = Deferral(weights=(1.0, 0.0), saved=(0.0, 0.0))  # not worth it


class FakeProfiler:
    """Times that are known, in place of a machine's."""

    calls: list[str]

    def __init__(self, spec: StageSpec) -> None:
        self._spec, self._config = spec, spec.config

    @staticmethod
    def sample(b: int, i: int, j: int) -> Sample:
        seconds = 1e-3 * (2 + b * i * (1 + 0.01 * j))
        return Sample(b, i, j, seconds, 2 * seconds, False)

    def profile(self, on_progress: Any, with_deferral: bool) -> Profile:
        self.calls.append("profile")
        on_progress(1, 1)
        batch_size = self._config.train.batch_size // self._config.mesh.data
        seq_len = self._config.model.seq_len
        shapes = [(b, i, j) for b in (1, batch_size) for i in (2, seq_len) for j in (0, 2, 4)]
        return profile(
            batch_size=batch_size,
            seq_len=seq_len,
            samples=tuple(self.sample(*shape) for shape in shapes if sum(shape[1:]) <= seq_len),
            transfer=(1e-5, 1e-7),
            outside_seconds=0.001,
            key_block=1,
            key=profile_key(self._spec),
            deferral=SLOW if with_deferral else None,
        )

    def refine(self, before: Profile, wanted: list[tuple[int, int]], on_progress: Any) -> Profile:
        self.calls.append(f"refine {wanted}")
        more = tuple(self.sample(b, i, 0) for b, i in wanted)
        return dataclasses.replace(before, samples=before.samples + more)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the profiler."""
    calls: list[str] = []
    monkeypatch.setattr(FakeProfiler, "calls", calls, raising=False)
    monkeypatch.setattr(measured_plan, "Profiler", FakeProfiler)
    return calls


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return changed(
        small_config(tmp_path),
        plan={"token_slices": "auto", "batch_slices": "auto", "unit_tokens": 2},
        train={"num_steps": 2, "eval_every": 100, "eval_batches": 1, "sample_tokens": 0},
        checkpoint={"every": 500},
    )


def test_a_run_measures_once_and_plans_its_slices(config: Config, tmp_path: Path, calls: list[str]):
    workdir = tmp_path / "run"
    said = run(config, workdir)
    assert calls[0] == "profile"
    table = load_table(workdir / "latency.json")
    assert table.profile is not None
    plan = load_plan(workdir / "plan.json", PlanRequest(2, 4, 16))
    # What it trains with was timed: slices that the profile lacks have been asked for.
    assert plan.shapes <= {sample[:2] for sample in table.profile.samples}
    assert plan.prediction is not None
    predicted = f"predicted step {plan.prediction.step_seconds * 1e3:.3g} ms"
    assert any(text.startswith(predicted) for text in said)
    assert any(text.startswith("unsliced would take") for text in said)
    assert any(text.startswith("the best uniform slices would take") for text in said)
    assert any(text.startswith("a step takes") and "predicted were" in text for text in said)
    assert len(metrics(workdir)) == 2

    # Going on needs no measurement, and takes the same plan.
    calls.clear()
    said = run(changed(config, train={"num_steps": 3}), workdir)
    assert calls == []
    assert any("as measured before" in text for text in said)
    assert load_plan(workdir / "plan.json", PlanRequest(2, 4, 16)) == plan
    # A run that has finished plans nothing.
    run(changed(config, train={"num_steps": 3}), workdir)
    assert calls == []


def test_another_precision_is_measured_anew(config: Config, tmp_path: Path, calls: list[str]):
    plan_run(config, tmp_path, jax.devices()[:2], Lines())
    calls.clear()
    other = changed(config, precision={"compute": "bfloat16"})
    plan_run(other, tmp_path, jax.devices()[:2], Lines())
    assert calls[0] == "profile"


@pytest.mark.slow
def test_what_was_measured_for_more_schedules_serves_fewer(
    config: Config, tmp_path: Path, calls: list[str]
):
    terapipe = changed(config, plan={"schedule": "terapipe"})
    plan_run(config, tmp_path, jax.devices()[:2], Lines())
    calls.clear()
    plan_run(terapipe, tmp_path, jax.devices()[:2], Lines())
    assert "profile" not in calls
    plan_run(terapipe, tmp_path / "other", jax.devices()[:2], Lines())
    calls.clear()
    plan_run(config, tmp_path / "other", jax.devices()[:2], Lines())
    assert calls[0] == "profile"


@pytest.mark.slow
def test_plan_json_is_the_formula_of_latency_json(config: Config, tmp_path: Path, calls: list[str]):
    """As another tool would check it, from the two files alone. Stages are alike here."""
    config = changed(config, model={"num_layers": 4}, plan={"schedule": "terapipe"})
    console = Lines()
    plan_run(config, tmp_path, jax.devices()[:2], console)
    latency, plan = (
        json.loads((tmp_path / name).read_text()) for name in ("latency.json", "plan.json")
    )
    unit = latency["unit_tokens"]
    assert unit == 2
    assert sum(plan["batch_slices"]) == 4
    forward, backward = [], []
    for m, (b, slices) in enumerate(zip(plan["batch_slices"], plan["token_slices"], strict=True)):
        assert sum(slices) == 16
        context = 0
        for n, num_tokens in enumerate(slices):
            index = b - 1, num_tokens // unit - 1, context // unit
            for times, name in ((forward, "forward"), (backward, "backward")):
                times.append(latency[name][index[0]][index[1]][index[2]])
                assert plan[f"slice_{name}_seconds"][m][n] == pytest.approx(times[-1])
            context += num_tokens
    step = sum(forward) + sum(backward) + (plan["num_stages"] - 1) * (max(forward) + max(backward))
    step += plan["outside_seconds"]
    assert plan["predicted_step_seconds"] == pytest.approx(step)
    assert plan["lower_bound_seconds"] == pytest.approx(step)
    assert plan["optimal"] is True
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    # A run in the same folder takes the measurements over, and one elsewhere takes the plan.
    calls.clear()
    run(config, tmp_path)
    assert calls == []
    file = {"file": str(tmp_path / "plan.json")}
    run(changed(config, plan=file), tmp_path / "elsewhere")
    assert calls == []
    there = json.loads((tmp_path / "elsewhere" / "plan.json").read_text())
    assert there == plan
    assert not (tmp_path / "elsewhere" / "latency.json").exists()


def test_one_kind_of_slices_may_be_given(config: Config, tmp_path: Path, calls: list[str]):
    plan_run(changed(config, plan={"token_slices": "7,5,4"}), tmp_path, jax.devices()[:2], Lines())
    content = json.loads((tmp_path / "plan.json").read_text())
    assert set(map(tuple, content["token_slices"])) == {(7, 5, 4)}
    plan_run(changed(config, plan={"batch_slices": "1,3"}), tmp_path, jax.devices()[:2], Lines())
    assert json.loads((tmp_path / "plan.json").read_text())["batch_slices"] == [1, 3]
    given = {"batch_slices": "1,3", "token_slices": "16"}
    with pytest.raises(UserError, match="nothing to plan"):
        plan_run(changed(config, plan=given), tmp_path, jax.devices()[:2], Lines())


def test_memory_limit_is_kept(config: Config, tmp_path: Path, calls: list[str]):
    with pytest.raises(UserError, match=r"limit_gib=1e-06 is .* less than a step takes"):
        run(changed(config, memory={"limit_gib": 1e-6}), tmp_path / "run")
    assert calls == []  # nothing is measured for it


def test_latencies_of_another_origin_are_not_overwritten(
    config: Config, tmp_path: Path, calls: list[str]
):
    times = json.dumps({"unit_tokens": 8, "forward": [[[1.0]]], "backward": [[[1.0]]]})
    for text, sentence in ((times, "not measured here"), ("mine", "no latency file")):
        (tmp_path / "latency.json").write_text(text)
        with pytest.raises(UserError, match=sentence):
            plan_run(config, tmp_path, jax.devices()[:2], Lines())
        assert (tmp_path / "latency.json").read_text() == text
        assert calls == []


@pytest.mark.slow
def test_a_run_is_not_planned_over(config: Config, tmp_path: Path, calls: list[str]):
    run(config, tmp_path)
    plan_run(config, tmp_path, jax.devices()[:2], Lines())
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    other = changed(config, model={"num_layers": 4})
    with pytest.raises(UserError, match=r"holds a run with other settings .*num_layers 3 -> 4"):
        plan_run(other, tmp_path, jax.devices()[:2], Lines())
    args = f"--latency={tmp_path}/latency.json", "--num-stages=2", "--batch-size=4", "--seq-len=16"
    done = launch_plan(*args, f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "holds a run, whose plan would be overwritten" in done.stderr
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.json")}


@pytest.mark.slow
def test_an_unreadable_latency_file_is_measured_anew(
    config: Config, tmp_path: Path, calls: list[str]
):
    run(config, tmp_path)
    (tmp_path / "latency.json").write_text("{")
    calls.clear()
    run(changed(config, train={"num_steps": 3}), tmp_path)
    assert calls[0] == "profile"
    load_table(tmp_path / "latency.json")


def plan_of_2_stages(**changes: Any) -> dict[str, Any]:
    plan = {"num_stages": 2, "schedule": "terapipe"}
    plan |= {"batch_slices": [3, 1], "token_slices": [[9, 7], [16]]}
    return plan | changes


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (plan_of_2_stages(num_stages=3), "a number of stages of 3, but config.mesh.pipe is 2"),
        (
            plan_of_2_stages(batch_slices=[3, 2]),
            "a batch of 5, but config.train.batch_size / config.mesh.data is 4",
        ),
        (
            plan_of_2_stages(token_slices=[[9, 8], [17]]),
            "sequences of 17, but config.model.seq_len is 16",
        ),
        (plan_of_2_stages(token_slices=[[9, 7]]), "2 batch slices, but tokens of 1"),
        (plan_of_2_stages(token_slices=[[9, 7], [20, -4]]), "not a positive whole number"),
        (plan_of_2_stages(batch_slices=[3, 1.0]), "not a positive whole number"),
        (plan_of_2_stages(batch_slices=4), "does not hold what a plan does"),
        (plan_of_2_stages(predicted_step_seconds=1.0), "it has no slice_forward_seconds"),
        ({"num_stages": 2}, "it has no batch_slices"),
        ([], "does not hold what a plan does"),
        (None, "cannot be read"),
    ],
)
def test_plan_files_that_do_not_fit_are_refused(
    config: Config, tmp_path: Path, content: Any, sentence: str
):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        run(changed(config, plan={"file": str(path)}), tmp_path / "run")
    assert sentence in str(error.value)
    assert f"config.plan.file={path}" in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_plan_file_and_slices_exclude_each_other(config: Config, tmp_path: Path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_of_2_stages()))
    with pytest.raises(UserError, match="exclude each other"):
        run(changed(config, plan={"file": str(path), "token_slices": "16"}), tmp_path / "run")
    run(changed(config, plan={"file": str(path)}), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == plan_of_2_stages()


def test_a_unit_that_does_not_divide_the_sequence_is_refused(config: Config, tmp_path: Path):
    with pytest.raises(UserError, match=r"config\.plan\.unit_tokens=5 does not divide"):
        run(changed(config, plan={"unit_tokens": 5}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_attention_that_cannot_run_is_refused(config: Config, tmp_path: Path):
    with pytest.raises(UserError, match=r"one that can run here, xla\.$"):
        plan_run(
            changed(config, attention={"backend": "cudnn"}),
            tmp_path / "run",
            jax.devices()[:2],
            Lines(),
        )
    assert not (tmp_path / "run").exists()


def launch_plan(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/plan.py", *args],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.fixture
def latency(tmp_path: Path) -> Path:
    """Six units of 8 tokens, two sequences; slices have a floor."""
    b, i, j = np.ogrid[1:3, 1:7, 0:6]
    forward = np.maximum(b * i * (1 + 0.2 * j), 2.0) / 1000
    lists = [
        [[t if i + j <= 5 else None for j, t in enumerate(row)] for i, row in enumerate(rows)]
        for rows in forward.tolist()
    ]
    content = {"unit_tokens": 8, "forward": lists, "backward": lists}
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(content))
    return path


def test_a_file_is_planned_without_jax(latency: Path, tmp_path: Path):
    """jax cannot even be imported here."""
    broken = tmp_path / "broken"
    for name in ("jax", "jaxlib", "flax"):
        (broken / name).mkdir(parents=True)
        (broken / name / "__init__.py").write_text("raise ImportError('not here')\n")
    workdir = tmp_path / "planned"
    args = f"--latency={latency}", "--num-stages=3", "--batch-size=3", "--seq-len=48"
    done = launch_plan(*args, f"--workdir={workdir}", PYTHONPATH=str(broken))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "proven" in done.stdout
    plan = json.loads((workdir / "plan.json").read_text())
    assert (plan["num_stages"], sum(plan["batch_slices"])) == (3, 3)
    assert all(sum(slices) == 48 for slices in plan["token_slices"])
    forward = [t for times in plan["slice_forward_seconds"] for t in times]
    backward = [t for times in plan["slice_backward_seconds"] for t in times]
    step = sum(forward) + sum(backward) + 2 * (max(forward) + max(backward))
    assert plan["predicted_step_seconds"] == pytest.approx(step)
    assert plan["optimal"] is True
    assert (workdir / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--seq-len=50"], "50 tokens is not a multiple of the unit of the latencies, 8 tokens"),
        (["--seq-len=96"], "no allowed slices cover 1 sequences of 96 tokens"),
        (["--num-stages=0"], "--num-stages=0 must be at least 1"),
        (["--batch-size=-1"], "--batch-size=-1 must be at least 1"),
        (["--latency=no/file.json"], "no/file.json is no latency file"),
        (["--memory-limit-gib=1"], "the latencies come without the memory"),
        (["--memory-limit-gib=nan"], "--memory-limit-gib=nan must be a finite number"),
        (["--stage-factors", "1", "0.5"], "--stage-factors must be 3 positive numbers"),
        (["--workdir=/proc/plan"], "cannot write to --workdir=/proc/plan"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(
    latency: Path, tmp_path: Path, args: list[str], sentence: str
):
    good = [f"--latency={latency}", "--num-stages=3", "--batch-size=1", "--seq-len=48"]
    done = launch_plan(*good, f"--workdir={tmp_path / 'planned'}", *args)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "planned").exists()


def test_a_run_with_a_plan_file_that_is_wrong_ends_with_status_2(tmp_path: Path):
    (tmp_path / "plan.json").write_text(json.dumps(plan_of_2_stages()))
    process = launch(f"--config.plan.file={tmp_path / 'plan.json'}", f"--workdir={tmp_path}/run")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 2
    assert "is for sequences of 16, but config.model.seq_len is 1024" in err
    assert err.count("\n") == 1
