"""config.mesh=auto: which mesh is taken, and what is said of the others."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

import tpipe_jax
from support import several_processes
from support.fake_profiler import FakeProfiler
from support.runs import Lines, changed, metrics, small_config
from tpipe_jax.commands.plan import plan_run
from tpipe_jax.commands.train import train
from tpipe_jax.config.command_line import parse
from tpipe_jax.config.settings import Config, MeshConfig
from tpipe_jax.devices.exchanges import Collective, check_branches
from tpipe_jax.errors import UserError
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.profiling import measured_plan
from tpipe_jax.profiling.mesh_search import choose_mesh, factorisations, take_latencies
from tpipe_jax.reporting.console import Ranked
from tpipe_jax.reporting.workdir import run_lock

pytestmark = pytest.mark.usefixtures("short_flags")


class Seen(Lines):
    """Keeps the ranking."""

    ranking: tuple[Ranked, ...] = ()

    def show_ranking(self, ranking: Any) -> None:
        super().show_ranking(ranking)
        self.ranking = tuple(ranking)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(measured_plan, "Profiler", FakeProfiler)
    monkeypatch.setattr(FakeProfiler, "calls", 0)
    return changed(
        small_config(tmp_path),
        model={"num_layers": 2},
        mesh={"pipe": 4, "auto": True},
        plan={"token_slices": "auto", "batch_slices": "auto", "unit_tokens": 2},
        train={"num_steps": 2, "eval_every": 100, "eval_batches": 1},
    )


def sizes(mesh: MeshConfig) -> tuple[int, int, int]:
    return mesh.data, mesh.pipe, mesh.model


def test_every_way_to_divide_the_devices():
    found = [sizes(mesh) for mesh in factorisations(MeshConfig(), 12)]
    assert len(found) == len(set(found)) == 18
    assert all(data * pipe * model == 12 for data, pipe, model in found)
    assert found[0] == (1, 12, 1)
    assert found[-1] == (1, 1, 12)


def test_the_fastest_mesh_is_taken(config: Config, tmp_path: Path):
    """Four sequences over four shards have no stage to wait for and no operator to divide. Four
    stages have two layers, and two heads are not for four.
    """
    console = Seen()
    chosen = choose_mesh(config, jax.devices()[:4], tmp_path / "run", console)
    assert sizes(chosen.mesh) == (4, 1, 1)
    seconds = [ranked.seconds for ranked in console.ranking]
    assert seconds == sorted(seconds)
    assert {sizes(ranked.mesh) for ranked in console.ranking} == {
        *[(1, 4, 1), (2, 2, 1), (1, 2, 2), (4, 1, 1), (2, 1, 2), (1, 1, 4)]
    }
    reasons = {sizes(ranked.mesh): ranked.reason for ranked in console.ranking}
    assert reasons[1, 4, 1] == "there are 2 layers."
    assert "config.mesh.model=4 does not divide" in reasons[1, 1, 4]
    take_latencies(chosen.mesh, tmp_path / "run")
    best = json.loads((tmp_path / "run" / "latency.json").read_text())
    assert best["profile"]["key"]["mesh"]["data"] == 4
    # What was measured is kept.
    calls = FakeProfiler.calls
    assert calls == 4
    assert choose_mesh(config, jax.devices()[:4], tmp_path / "run", console) == chosen
    assert FakeProfiler.calls == calls


def test_one_sequence_is_for_stages(config: Config, tmp_path: Path):
    config = changed(config, train={"batch_size": 1})
    console = Seen()
    chosen = choose_mesh(config, jax.devices()[:2], tmp_path / "run", console)
    assert sizes(chosen.mesh) == (1, 2, 1)
    assert "batch_size=1 is not a multiple" in console.ranking[-1].reason


@pytest.mark.slow
def test_a_run_trains_on_the_mesh_that_is_found(config: Config, tmp_path: Path):
    console = Seen()
    for num_steps in (2, 3):  # and goes on with it
        steps = changed(config, train={"num_steps": num_steps})
        train(steps, tmp_path / "run", jax.devices()[:4], console)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [described["mesh"][axis] for axis in ("data", "pipe", "model")] == [4, 1, 1]
    assert not any("changed since" in text for text in console.said if "num_steps" not in text)


@pytest.mark.slow
def test_what_is_planned_is_what_a_run_finds(config: Config, tmp_path: Path):
    """Nothing is measured again, and the state of the optimiser is divided as on that mesh."""
    workdir, console = tmp_path / "run", Seen()
    plan_run(config, workdir, jax.devices()[:4], console)
    calls = FakeProfiler.calls
    assert calls == 4
    train(config, workdir, jax.devices()[:4], console)
    assert FakeProfiler.calls == calls
    described = json.loads((workdir / "config.json").read_text())
    assert described["optim"]["shard_state"]
    assert described["mesh"]["data"] == 4
    # A file that is damaged is measured again.
    (workdir / "meshes" / "2x2x1" / "latency.json").write_text("{")
    choose_mesh(config, jax.devices()[:4], workdir, console)
    assert FakeProfiler.calls == calls + 1


def test_files_of_others_are_kept(config: Config, tmp_path: Path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "latency.json").write_text(
        '{"unit_tokens": 8, "forward": [[[1]]], "backward": [[[1]]]}'
    )
    with pytest.raises(UserError, match="was not measured here, and would be overwritten"):
        choose_mesh(config, jax.devices()[:4], workdir, Seen())
    assert FakeProfiler.calls == 0
    (workdir / "latency.json").unlink()
    (workdir / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not the folder of a run"):
        choose_mesh(config, jax.devices()[:4], workdir, Seen())


def test_a_stop_while_measuring(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The mesh whose measurement it has cut short is measured again, and no other."""
    monkeypatch.setattr(FakeProfiler, "stopped_call", 2)
    workdir, console = tmp_path / "run", Seen()
    train(config, workdir, jax.devices()[:4], console)
    assert console.said[-1] == "Interrupted before a mesh was chosen: the same command goes on."
    assert FakeProfiler.calls == 2
    assert [path.parent.name for path in workdir.glob("meshes/*/latency.json")] == ["2x2x1"]
    assert not (workdir / "checkpoints").exists()
    choose_mesh(config, jax.devices()[:4], workdir, console)
    assert FakeProfiler.calls == 5


@pytest.mark.slow
def test_what_a_run_cannot_use_is_found_before_measuring(config: Config, tmp_path: Path):
    devices, workdir = jax.devices()[:4], tmp_path / "run"
    with pytest.raises(UserError, match=r"config\.data\.train"):
        train(changed(config, data={"train": "missing.txt"}), workdir, devices, Seen())
    assert not workdir.exists()
    train(config, workdir, devices, Seen())
    before, calls = (workdir / "latency.json").read_bytes(), FakeProfiler.calls
    other = changed(config, train={"batch_size": 8})
    with pytest.raises(UserError, match=r"batch_size 4 -> 8\), whose plan would be overwritten"):
        plan_run(other, workdir, devices, Seen())
    assert (workdir / "latency.json").read_bytes() == before
    plan_run(config, workdir, devices, Seen())
    assert FakeProfiler.calls == calls


def test_a_mesh_that_cannot_be_compiled_is_one_of_those_that_do_not_serve(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Refusing(FakeProfiler):
        def __init__(self, spec: StageSpec) -> None:
            if spec.config.mesh.data > 2:
                branch = Collective("all-gather", "attn_in", ((0, 1),), in_branch=True)
                check_branches([branch], spec.mesh)
            if spec.config.mesh.data == 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            super().__init__(spec)

    monkeypatch.setattr(measured_plan, "Profiler", Refusing)
    console = Seen()
    chosen = choose_mesh(config, jax.devices()[:4], tmp_path / "run", console)
    assert sizes(chosen.mesh) == (1, 2, 2)
    reasons = {sizes(ranked.mesh): ranked.reason for ranked in console.ranking}
    assert "XLA has put a collective (all-gather for attn_in)" in reasons[4, 1, 1]
    assert "a device has too little memory" in reasons[2, 2, 1]


@pytest.mark.slow
def test_processes_choose_one_mesh(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("all of them " * 100)
    settings = [
        *("--config.mesh=auto", "--config.mesh.pipe=2", f"--workdir={tmp_path / 'run'}"),
        *("--config.model.num-layers=2", "--config.model.d-model=16", "--config.model.num-heads=2"),
        *(
            "--config.model.seq-len=16",
            "--config.train.batch-size=4",
            f"--config.data.train={text}",
        ),
        *("--config.train.num-steps=2", "--config.train.sample-tokens=0"),
        *("--config.train.eval-batches=1", "--config.plan.unit-tokens=2"),
    ]
    answers = several_processes.results(several_processes.start_all(2, "auto", *settings))
    assert [(status, err) for status, _, err in answers] == [(0, "")] * 2
    assert [json.loads(out.splitlines()[-1]) for _, out, _ in answers] == [[2, 1, 1]] * 2
    assert metrics(tmp_path / "run")[-1]["step"] == 2


def test_one_run_measures_at_a_time(config: Config, tmp_path: Path):
    with (
        run_lock(tmp_path / "run" / "meshes"),
        pytest.raises(UserError, match=r"another run is at work in --workdir=\S*/run:"),
    ):
        choose_mesh(config, jax.devices()[:4], tmp_path / "run", Seen())
    assert FakeProfiler.calls == 0


def test_what_does_not_measure_needs_a_mesh(config: Config):
    with pytest.raises(UserError, match=r"config.mesh.auto=True is for training and tpipe plan"):
        tpipe_jax.make_train_step(config, devices=jax.devices()[:4])


def test_no_mesh_serves(config: Config, tmp_path: Path):
    config = changed(config, train={"batch_size": 3}, model={"num_layers": 1, "num_heads": 1})
    with pytest.raises(UserError, match="finds no way to divide 2 devices"):
        choose_mesh(config, jax.devices()[:2], tmp_path / "run", Seen())
    assert not (tmp_path / "run" / "latency.json").exists()


def test_slices_that_are_given_have_no_times(config: Config, tmp_path: Path):
    config = changed(config, plan={"token_slices": "uniform:2", "batch_slices": "uniform:1"})
    with pytest.raises(UserError, match="the settings have all slices, whose times are unknown"):
        choose_mesh(config, jax.devices()[:1], tmp_path / "run", Seen())


def test_the_flag(tmp_path: Path):
    assert parse(["--config.mesh=auto", "--config.mesh.pipe=4"], "program").config.mesh.auto
    assert not parse(["--config.mesh.pipe=4"], "program").config.mesh.auto
