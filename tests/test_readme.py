"""The commands of the README, read out of it and run in order, in a folder like a fresh clone."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.compilers import WITHOUT_COMPILER, has_gpu_compiler
from support.runs import ROOT

README = (ROOT / "README.md").read_text()
LINKED = ("docs", "launch", "examples", "configs")
MOST = 12  # commands from a fresh clone to a model in transformers


def commands(heading: str) -> list[str]:
    """The indented lines below a heading that are commands."""
    [section] = re.findall(rf"^## {heading}\n(.*?)(?=^## )", README, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.startswith(("python ", "tpipe ", "sbatch ", "srun "))]


START, PLAN, FIT, OWN = (
    commands(name)
    for name in (
        "Quick start",
        "Plan without a device",
        r"Will it fit the GPUs\?",
        "Your own text",
    )
)


def test_there_are_few():
    assert len(START + OWN) <= MOST
    assert [line.split()[:2] for line in OWN[:2]] == [["tpipe", "tokenize"], ["tpipe", "train"]]


def test_each_names_what_there_is():
    for line in START + PLAN + FIT + OWN + commands("On a cluster"):
        words = shlex.split(line)
        if words[0] == "tpipe":
            assert (ROOT / "tpipe_jax" / "cli" / f"{words[1]}.py").exists(), line
        for word in words:
            if word.startswith(("launch/", "examples/", "docs")):
                assert (ROOT / word).exists(), line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the commands need of a clone."""
    for name in LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def environment() -> dict[str, str]:
    """`python` and `tpipe` are those that run the tests, without what makes tests compile fast."""
    own = Path(sys.executable).parent
    assert (own / "tpipe").exists(), 'install the package: pip install -e ".[test]"'
    given = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    return given | {"PATH": f"{own}:{given['PATH']}"}


def run(line: str, folder: Path) -> str:
    start = time.monotonic()
    done = subprocess.run(
        shlex.split(line), cwd=folder, env=environment(), capture_output=True, text=True
    )
    print(f"{time.monotonic() - start:6.1f} s  {line}")  # pytest -rP shows it
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_until(line: str, folder: Path, pattern: str) -> str:
    """Runs a command and presses Ctrl-C when a line matches; returns all that it said."""
    child = subprocess.Popen(
        shlex.split(line), cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True
    )
    said: list[str] = []
    with child:
        assert child.stdout is not None
        for text in child.stdout:
            said.append(text)
            if re.match(pattern, text):
                child.send_signal(signal.SIGINT)
                pattern = r"(?!)"  # once
    assert child.returncode == 130, "".join(said)
    return "".join(said)


def next_steps(out: str) -> Iterator[str]:
    """The commands that a run prints at its end, without those that name a file to choose."""
    for line in out.partition("what next:\n")[2].splitlines():
        found = re.search(r"  ((?:python|tpipe|tensorboard) .*)", line)
        if found:
            yield found[1]


@pytest.mark.slow
def test_the_quick_start_shows_what_slices_gain(folder: Path):
    """And the commands that it ends with are commands."""
    _, train = START
    out = run(train, folder)
    # How much slices gain depends on the machine, and on other tests: bench/ measures it.
    line = r"token slices: [\d.]+ ms a step; whole sequences on the same two stages: [\d.]+ ms; "
    assert len(re.findall(rf"^{line}[\d.]+ times as fast$", out, re.MULTILINE)) == 1
    losses = [float(loss) for loss in re.findall(r"held-out loss ([\d.]+) nats", out)]
    assert losses[-1] <= 2.6
    assert (folder / "runs" / "quickstart" / "loss.png").exists()
    following = list(next_steps(out))
    assert len(following) == 6
    for line in following:
        if line.startswith("tensorboard"):
            assert (Path(sys.executable).parent / "tensorboard").exists()
        elif "--config.train.num-steps" not in line and "--config.data.train" not in line:
            assert run(line, folder)


@pytest.mark.slow
def test_a_plan_without_a_device(folder: Path):
    [line] = PLAN
    out = run(line, folder)
    shown = re.findall(
        r"^    ((?:predicted step|unsliced would take|the best uniform).*)", README, re.MULTILINE
    )
    assert len(shown) == 2
    for text in shown:
        assert text in out  # the very figures that the README shows


@pytest.mark.slow
@pytest.mark.skipif(not has_gpu_compiler(), reason=WITHOUT_COMPILER)
def test_a_step_is_compiled_for_gpus_that_are_not_here(folder: Path):
    _, compiled, planned = FIT
    out = run(compiled, folder)
    assert "384 x Tesla V100-SXM2-16GB on 48 hosts" in out
    assert "It fits" in out
    out = run(planned, folder)
    assert "8 x h100" in out
    assert "compiles for these GPUs and fits" in " ".join(out.split())
    assert (folder / "runs" / "gpt3_1b" / "meshes.png").exists()


@pytest.mark.slow
def test_own_text_becomes_a_model_in_transformers(folder: Path):
    tokenize, train, goes_on, *others, install, load = OWN
    assert train in run(tokenize, folder)
    out = run_until(train, folder, r"step 20: ")
    assert re.search(r"^Interrupted after step \d+: the same command continues", out, re.MULTILINE)
    assert "    tpipe train --workdir=runs/mine" in out
    out = run_until(goes_on, folder, r"step 60: ")  # all steps would take two minutes
    assert "changed since the last start: config.optim.learning_rate 0.002 -> 0.001" in out
    assert re.search(r"^continuing after step \d+", out, re.MULTILINE)
    assert "profiling" not in out
    for line in others:
        assert run(line, folder)
    assert install == 'python -m pip install -e ".[interop]"'
    if find_spec("transformers") is None or find_spec("torch") is None:
        pytest.skip("needs torch and transformers for the last command")
    text = run(load, folder)
    assert text.startswith("The ")
    assert len(text) > 20
