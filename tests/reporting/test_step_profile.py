"""Profiles of some steps of a run."""

import gzip
import json
from pathlib import Path

import jax
import pytest
from jax.profiler import ProfileData

from support import runs
from tpipe_jax.commands.train import train
from tpipe_jax.config.settings import TrainConfig
from tpipe_jax.errors import UserError
from tpipe_jax.reporting.step_profile import ProfiledSteps, parse_steps

pytestmark = pytest.mark.usefixtures("short_flags")


@pytest.mark.slow
def test_a_profile_has_its_steps_and_changes_nothing(tmp_path: Path):
    config = runs.small_config(tmp_path)
    console = runs.Lines()
    train(config, tmp_path / "profiled", jax.devices()[:2], console, range(2, 4))
    runs.run(config, tmp_path / "plain")
    [said] = [text for text in console.said if text.startswith("a profile")]
    assert said.startswith(f"a profile of steps 2 to 3 is in {tmp_path / 'profiled/profile'}: open")
    losses = [
        [line["loss"] for line in runs.metrics(tmp_path / name)] for name in ("profiled", "plain")
    ]
    assert losses[0] == losses[1]

    folder = tmp_path / "profiled" / "profile"
    [path] = folder.rglob("*.xplane.pb")
    started = [
        event.name
        for plane in ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name.startswith("[0]") and event.name.endswith("(jit_train_step)")
    ]
    assert len(started) == 2, started
    [trace] = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("train_step" in event.get("name", "") for event in events)


def test_a_run_that_ends_within_its_profile(tmp_path: Path):
    """Leaves what it has, and another may begin."""
    config = runs.changed(runs.small_config(tmp_path), train={"eval_every": 100})

    class Stops(runs.Lines):
        def show_progress(self, step: int, metrics: dict[str, float]) -> None:
            if step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", jax.devices()[:2], Stops(), range(2, 5))
    jax.profiler.start_trace(tmp_path / "next")
    jax.profiler.stop_trace()


def test_a_run_that_goes_on_among_its_steps(tmp_path: Path):
    """Profiles those that are left."""
    steps = ProfiledSteps(range(2, 5), tmp_path)
    assert not steps.is_first(1)
    assert steps.is_first(3)
    steps.start()
    assert not steps.is_first(4)
    assert (steps.is_last(3), steps.is_last(4)) == (False, True)
    assert "a profile of steps 2 to 4 is in" in steps.stop()
    assert not steps.is_first(4)
    assert not ProfiledSteps(None, tmp_path).is_first(0)


@pytest.mark.slow
def test_a_profile_of_steps_that_are_done(tmp_path: Path):
    config = runs.changed(runs.small_config(tmp_path), train={"num_steps": 3})
    runs.run(config, tmp_path / "run")
    console = runs.Lines()
    config = runs.changed(config, train={"num_steps": 4})
    train(config, tmp_path / "run", jax.devices()[:2], console, range(2, 4))
    assert "no profile is taken, since steps 2 to 3 are done" in console.said
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.parametrize("value", ["", "3", "3:", "4:3", "0:2", "2:7", "a:b", "-1:3", "2:3:4"])
def test_what_is_no_range_of_steps(value: str):
    with pytest.raises(UserError, match=rf"--profile={value} must be START:STOP, .*num_steps=6"):
        parse_steps(value, TrainConfig(num_steps=6))


def test_steps_of_a_profile_include_both_ends():
    config = TrainConfig(num_steps=6)
    assert parse_steps("2:4", config) == range(2, 5)
    assert parse_steps("4:4", config) == range(4, 5)
    assert parse_steps(None, config) is None
