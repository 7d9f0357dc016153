"""How a program is run: a run that trains goes on where its output cannot be written."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs import ROOT, launch
from tpipe_jax.commands import launch as launching
from tpipe_jax.config.flags import Flags, PlanFlags, ProcessFlags
from tpipe_jax.config.settings import Config
from tpipe_jax.runtime import outputs
from tpipe_jax.runtime.outputs import NOTE


@pytest.mark.parametrize(("kind", "expected"), [(Flags, True), (PlanFlags, False)])
def test_only_a_run_leaves_out_what_cannot_be_written(
    kind: type[Flags] | type[PlanFlags],
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    lost = outputs._Lost()
    monkeypatch.setattr(outputs, "_lost", lost)
    monkeypatch.setattr(launching, "supervise", lambda *_: 0)
    flags = kind(Config(), tmp_path, ProcessFlags(local_processes=2))
    assert launching.launch(flags, lambda *_: 1) == 0
    assert (lost.is_left_out, lost.workdir) == (expected, tmp_path if expected else None)


SETTINGS = [
    "--config.data.train=docs",
    "--config.model.num-layers=2",
    "--config.model.d-model=16",
    "--config.model.num-heads=2",
    "--config.model.seq-len=16",
    "--config.mesh.pipe=2",
    "--config.plan.token-slices=9,7",
    "--config.plan.batch-slices=uniform:1",
    "--config.train.batch-size=4",
    "--config.train.log-every=1",
    "--config.train.sample-tokens=0",
    "--config.train.compare-steps=0",
    "--config.train.trace-step=0",
]


@pytest.mark.slow
@pytest.mark.usefixtures("short_flags")
def test_a_run_goes_on_when_its_reader_is_gone_and_a_closed_terminal_saves(tmp_path: Path):
    workdir = tmp_path / "run"
    args = [*SETTINGS, f"--workdir={workdir}", "--config.train.num-steps=100000"]
    child = launch(*args)
    assert child.stdout is not None
    assert child.stderr is not None
    while not child.stdout.readline().startswith("step 2:"):
        assert child.poll() is None
    child.stdout.close()

    def step() -> int:
        lines = (workdir / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
        return json.loads(lines[-1])["step"]

    while step() < 20:
        assert child.poll() is None
    child.stderr.close()
    child.send_signal(signal.SIGHUP)
    assert child.wait(100) == 129
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(step())]


@pytest.mark.slow
@pytest.mark.usefixtures("short_flags")
def test_a_run_without_outputs_trains(tmp_path: Path):
    """In two processes, whose launcher has no descriptor to print to."""
    workdir = tmp_path / "run"
    args = [*SETTINGS, f"--workdir={workdir}", "--config.train.num-steps=3"]
    words = [sys.executable, "launch/multihost.py", *args, "--local-processes=2"]
    done = subprocess.run(
        ["bash", "-c", '"$@" >&- 2>&- <&-', "bash", *words], cwd=ROOT, check=False, timeout=300
    )
    assert done.returncode == 0
    assert "standard output cannot be written" in (workdir / NOTE).read_text()
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 3
