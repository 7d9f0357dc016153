"""Runs of several processes: the same losses as one, one log, one set of files, and two hosts."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import chex
import numpy as np
import pytest

from support import reference, several_processes, timeline_file, zarr_files

pytestmark = pytest.mark.usefixtures("short_flags")

PROGRAM = "launch/multihost.py"
SETTINGS = [
    "--config.model.num-layers=2",
    "--config.model.d-model=16",
    "--config.model.num-heads=2",
    "--config.model.seq-len=16",
    "--config.mesh.data=2",
    "--config.mesh.pipe=2",
    "--config.plan.token-slices=9,7",
    "--config.plan.batch-slices=uniform:1",
    "--config.train.num-steps=6",
    "--config.train.batch-size=4",
    "--config.train.log-every=2",
    "--config.train.eval-every=4",
    "--config.train.eval-batches=2",
    "--config.train.sample-tokens=0",
    # With local, gradients that are zero but for rounding (of the biases of keys) are larger than
    # Adam's epsilon, so these biases are noise.
    "--config.train.init=normal",
]


def metrics(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def run(workdir: Path, *args: str) -> str:
    child = several_processes.start(*SETTINGS, f"--workdir={workdir}", *args, program=PROGRAM)
    [(status, out, err)] = several_processes.results([child])
    assert (status, err) == (0, ""), (out, err)
    return out


def check_same(workdir: Path, other: Path) -> None:
    """Sums over devices are taken in another order: 1e-6 is seen."""
    lines, expected = metrics(workdir), metrics(other)
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [2, 4, 6]
    for name in ("loss", "grad_norm", "eval_loss"):
        values, wanted = ([line.get(name) for line in own] for own in (lines, expected))
        assert [v is None for v in values] == [v is None for v in wanted]
        pairs = [(v, w) for v, w in zip(values, wanted, strict=True) if v is not None]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run in one process."""
    workdir = tmp_path_factory.mktemp("alone")
    out = run(workdir)
    assert "Trained 6 steps" in out
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_losses_do_not_depend_on_the_processes(num_processes: int, alone: Path, tmp_path: Path):
    out = run(tmp_path, f"--local-processes={num_processes}", "--config.train.trace-step=5")
    check_same(tmp_path, alone)
    timeline_file.check_measured(tmp_path, step=5, num_stages=2, num_slices=2)
    lines = out.splitlines()
    assert [line for line in lines if not line.startswith("[0] ")] == []  # one of them logs
    [hosts] = [line.split() for line in lines if f" 0-{num_processes - 1} " in line]
    assert hosts[2:] == [f"0-{num_processes - 1}", "4", "0-1", "0-1"]
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {path.name for path in alone.iterdir()}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    want = zarr_files.read_all(alone / "checkpoints" / "6")
    got = zarr_files.read_all(tmp_path / "checkpoints" / "6")
    reference.assert_close(got, want, 1e-5)


@pytest.mark.slow
def test_what_processes_have_saved_goes_on(tmp_path: Path):
    """In as many processes bitwise, in one and on another mesh up to rounding."""
    checkpoints = tmp_path / "checkpoints"
    settings = ["--config.train.num-steps=4", "--config.checkpoint.every=2"]
    run(tmp_path, "--local-processes=2", *settings)
    whole, lines = zarr_files.read_all(checkpoints / "4"), metrics(tmp_path)

    def lose_the_last() -> None:
        for path in checkpoints.iterdir():
            if path.name != "2":
                shutil.rmtree(path)

    lose_the_last()
    assert "continuing after step 2" in run(tmp_path, "--local-processes=2", *settings)
    chex.assert_trees_all_equal(zarr_files.read_all(checkpoints / "4"), whole)
    lose_the_last()
    out = run(tmp_path, "--config.mesh.data=1", "--config.mesh.pipe=3", *settings)
    assert "continuing after step 2" in out
    reference.assert_close(zarr_files.read_all(checkpoints / "4"), whole, 1e-4)
    for line, expected in zip(metrics(tmp_path), lines, strict=True):
        assert line["step"] == expected["step"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.slow
def test_processes_plan_together(tmp_path: Path):
    """They measure, sample, and don't measure again to go further."""
    workdir = f"--workdir={tmp_path}"
    settings = [s for s in SETTINGS if "slices" not in s]
    settings += ["--config.plan.unit-tokens=8", "--config.train.sample-tokens=4"]
    settings += ["--config.mesh.data=1", "--config.train.batch-size=1"]
    child = several_processes.start(*settings, workdir, "--local-processes=2", program=PROGRAM)
    [(status, out, err)] = several_processes.results([child])
    assert (status, err) == (0, ""), (out, err)
    assert out.count("profiling ...") == out.count("predicted step") == 1
    assert "how the model continues it" in out
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4, 6]

    more = [*settings, workdir, "--local-processes=2", "--config.train.num-steps=8"]
    [(status, out, err)] = several_processes.results(
        [several_processes.start(*more, program=PROGRAM)]
    )
    assert (status, err) == (0, ""), (out, err)
    assert "latencies as measured before" in out
    assert "continuing after step 6" in out
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4, 6, 8]


def wait_for_steps(child: subprocess.Popen, workdir: Path) -> None:
    """Until one is logged."""
    deadline = time.monotonic() + 400
    while not (workdir / "metrics.jsonl").exists() or not metrics(workdir):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of(child: subprocess.Popen) -> list[int]:
    """The processes that a launcher has started."""
    return [
        int(n) for n in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    ]


@pytest.mark.slow
def test_ctrl_c_saves_at_one_step_in_all_processes(alone: Path, tmp_path: Path):
    args = [*SETTINGS, f"--workdir={tmp_path}", "--local-processes=2"]
    many = "--config.train.num-steps=100000"
    child = several_processes.start(*args, many, program=PROGRAM)
    wait_for_steps(child, tmp_path)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=400)
    assert child.returncode == 130, (out, err)
    assert out.count("Finishing the step and saving") == 1
    [said] = [line for line in out.splitlines() if "Interrupted after step" in line]
    stopped = int(said.split("step ")[1].split(":")[0])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(stopped)]

    child = several_processes.start(*args, many, program=PROGRAM)
    assert child.stdout is not None
    while "continuing after step" not in (line := child.stdout.readline()):
        assert line, child.communicate()
    os.kill(processes_of(child)[1], signal.SIGTERM)  # one of them, before the first step
    out, err = child.communicate(timeout=400)
    assert child.returncode == 143, (out, err)
    [said] = [line for line in out.splitlines() if "Interrupted after step" in line]
    again = int(said.split("step ")[1].split(":")[0])
    assert stopped <= again
    stopped = again

    further = f"--config.train.num-steps={stopped + 2}"
    out = run(tmp_path, further)  # in one process
    assert f"continuing after step {stopped}" in out
    steps = [line["step"] for line in metrics(tmp_path)]
    assert steps == sorted({*range(2, stopped + 2, 2), stopped + 2})


@pytest.mark.slow
def test_processes_that_were_started_by_hand_restart_each_on_its_own(tmp_path: Path):
    """One is killed; the other fails by that, and both find each other again."""
    settings = [*SETTINGS, f"--workdir={tmp_path}", "--config.checkpoint.every=2"]
    settings += [f"--coordinator=127.0.0.1:{several_processes.free_port()}", "--num-processes=2"]
    settings += ["--max-restarts=1", "--config.train.num-steps=40", "--config.mesh.data=1"]
    children = [
        several_processes.start(
            *settings, f"--process-id={i}", "--local-device-ids=0", program=PROGRAM
        )
        for i in range(2)
    ]
    wait_for_steps(children[0], tmp_path)
    while not list((tmp_path / "checkpoints").glob("*[0-9]")):
        assert children[0].poll() is None, children[0].communicate()
        time.sleep(0.05)
    os.kill(processes_of(children[1])[0], signal.SIGKILL)
    answers = several_processes.results(children)
    assert [status for status, _, _ in answers] == [0, 0], answers
    assert all("starting again from the last checkpoint" in err for _, _, err in answers)
    assert "continuing after step" in answers[0][1]
    assert metrics(tmp_path)[-1]["step"] == 40


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[list[str]]]:
    """Two network namespaces as two hosts, with an address and a name each; how to run there."""
    names = [f"tpipe{os.getpid()}{end}" for end in "ab"]
    addresses = tmp_path / "hosts"
    addresses.write_text("127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n")
    link = [["link", "add", names[0], "netns", names[0], "type", "veth"]]
    link[0] += ["peer", "name", names[1], "netns", names[1]]
    commands = [["netns", "add", name] for name in names] + link
    for i, name in enumerate(names):
        commands.append(["-n", name, "addr", "add", f"10.77.0.{1 + i}/24", "dev", name])
        commands += [["-n", name, "link", "set", device, "up"] for device in ("lo", name)]
    try:
        for command in commands:
            try:
                subprocess.run(["ip", *command], check=True, capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("network namespaces need the program ip")
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces can be made here: {error.stderr.strip()}")
        script = f'mount --bind {addresses} /etc/hosts && hostname $0 && exec "$@"'
        yield [
            ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", script, host]
            for name, host in zip(names, ("host-a", "host-b"), strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_two_hosts_train_together(hosts: list[list[str]], alone: Path, tmp_path: Path):
    """By hand, each with its own address: stages go across the hosts."""
    workdir = tmp_path / "run"
    children = [
        several_processes.start(
            *SETTINGS,
            f"--workdir={workdir}",
            "--coordinator=10.77.0.1:7777",
            "--num-processes=2",
            f"--process-id={i}",
            program=PROGRAM,
            prefix=prefix,
        )
        for i, prefix in enumerate(hosts)
    ]
    answers = several_processes.results(children)
    assert [status for status, _, _ in answers] == [0, 0], answers
    lines = [line.split() for line in answers[0][1].splitlines()]
    assert ["host-a", "0", "2", "0", "0-1"] in lines
    assert ["host-b", "1", "2", "1", "0-1"] in lines
    said = answers[1][1].splitlines()
    assert [s for s in said if s and "[Gloo]" not in s and "connected peer ranks" not in s] == []
    check_same(workdir, alone)
