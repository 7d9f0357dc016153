"""Processes of one machine, with a program that needs no jax."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import several_processes
from tpipe_jax.config.command_line import without_option
from tpipe_jax.config.flags import Flags, ProcessFlags
from tpipe_jax.config.settings import Config, MeshConfig
from tpipe_jax.errors import UserError
from tpipe_jax.runtime import launcher
from tpipe_jax.runtime.launcher import supervise

PROGRAM = """
import os, signal, sys, time
arguments = dict(word.split("=") for word in sys.argv[1:] if "=" in word)
index, what = int(arguments.get("--process-id", 0)), arguments.get("what")
if what == "restart":
    assert "--max-restarts" not in arguments
    if index == 0:
        with open(arguments["starts"], "a+") as file:
            file.write("x")
            file.seek(0)
            status = int(arguments["status"]) if len(file.read()) < 4 else 0
        if status < 0:
            os.kill(os.getpid(), -status)
        sys.exit(status)
if what in ("interrupt", "orphan"):
    from tpipe_jax.runtime.launcher import end_with_launcher
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: sys.exit(f"saved {index}"))
    if what == "orphan":
        def save(*_):
            open(f"{arguments['folder']}/{index}", "x").close()
            os._exit(0)
        signal.signal(signal.SIGHUP, save)
    end_with_launcher()
    print("ready", flush=True)
    while True:
        time.sleep(0.1)  # a signal between two statements does not end a sleep that follows
if what == "much":
    print("ready", flush=True)
    time.sleep(0.5)
    for _ in range(100):
        print("x" * 10000)
    sys.exit()
if index == 1 and what == "fail":
    sys.exit(7)
if index == 1 and what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "together":
    sys.exit(7)
if what in ("fail", "kill"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(100)
print("out", *sys.argv[1:], sorted(os.sched_getaffinity(0)))
print("[Gloo] Rank [Gloo] Rank 0 is connected")
print("0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1")
print()
print("err", file=sys.stderr)
print("no end of line", end="")
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def flags(num_processes: int, num_devices: int = 4) -> Flags:
    config = Config(mesh=MeshConfig(pipe=num_devices))
    return Flags(config, Path("w"), ProcessFlags(local_processes=num_processes))


def test_output_is_relayed_and_devices_and_cores_are_shared_out(
    program: str, capsys: pytest.CaptureFixture[str]
):
    before = os.sched_getaffinity(0)
    assert supervise([program, "--local-processes=2", "--x=1"], flags(2)) == 0
    assert os.sched_getaffinity(0) == before
    out, err = capsys.readouterr()
    assert sorted(err.splitlines()) == ["[0] err", "[1] err"]
    lines = [line for line in sorted(out.splitlines()) if " out " in line]
    assert sorted(set(out.splitlines()) - set(lines)) == [
        "[0] no end of line",
        "[1] no end of line",
    ]
    assert len(lines) == 2
    cores = []
    for i, line in enumerate(lines):
        words, _, own = line.removeprefix("[").rpartition(" [")
        assert words.startswith(f"{i}] out --x=1 --coordinator=127.0.0.1:")
        ids = f"{2 * i} {2 * i + 1}"
        assert words.endswith(f"--num-processes=2 --process-id={i} --local-device-ids {ids}")
        cores += [int(core) for core in own.rstrip("]").split(",")]
    if len(before) % 2 == 0:
        assert sorted(cores) == sorted(before)


@pytest.mark.parametrize(
    ("what", "status", "message", "reason"),
    [
        ("fail", 7, "process 1 ended with 7", "it may be the one that hangs"),
        ("kill", 137, "process 1 was ended by SIGKILL", "it waited for the other"),
    ],
)
def test_the_first_failure_ends_all_and_is_the_status(
    program: str,
    what: str,
    status: int,
    message: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The others would run for 100 s, and don't listen to SIGTERM."""
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.5)
    start = time.monotonic()
    assert supervise([program, f"what={what}"], flags(4)) == status
    assert time.monotonic() - start < 50
    assert capsys.readouterr().err.splitlines() == [
        f"{message}, before the others",
        *(f"process {i} did not end by itself and was killed: {reason}" for i in (0, 2, 3)),
    ]


def test_those_that_end_alike_have_said_why(program: str, capsys: pytest.CaptureFixture[str]):
    assert supervise([program, "what=together"], flags(4)) == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("num_processes", "status", "max_restarts", "num_starts"),
    [
        (2, 7, 0, 1),
        (2, 7, 2, 3),
        (2, 2, 2, 1),  # something to mend first
        (2, 130, 2, 1),  # stopped
        (1, 7, 5, 4),  # the fourth one works
        (None, 7, 1, 2),
        (None, 7, 5, 4),
        (None, -9, 0, 1),
    ],
)
def test_what_has_failed_is_started_again_as_often_as_it_may_be(
    program: str,
    tmp_path: Path,
    num_processes: int | None,
    status: int,
    max_restarts: int,
    num_starts: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(launcher, "RESTART_SECONDS", 0.1)
    starts = tmp_path / "starts"
    argv = [program, "what=restart", f"starts={starts}", f"status={status}"]
    argv += [f"--max-restarts={max_restarts}"]
    asked = ProcessFlags(local_processes=num_processes, max_restarts=max_restarts)
    expected = 0 if num_starts == 4 else status if status > 0 else 128 - status
    assert supervise(argv, Flags(Config(mesh=MeshConfig(pipe=4)), Path("w"), asked)) == expected
    assert starts.read_text() == "x" * num_starts
    lines = capfd.readouterr().err.splitlines()
    assert ("the process was ended by SIGKILL" in lines) == (status < 0)
    again = [line for line in lines if "starting again" in line]
    assert len(again) == num_starts - 1
    if again:
        assert f"; {max_restarts - 1} more restarts are allowed" in again[0]


@pytest.fixture
def caller(tmp_path: Path) -> str:
    """A launcher in a process of its own."""
    path = tmp_path / "caller.py"
    path.write_text(
        "import sys; from pathlib import Path; from tpipe_jax.runtime.launcher import supervise\n"
        "from tpipe_jax.config import *; from tpipe_jax.config.flags import *\n"
        "from tpipe_jax.runtime.exits import exit_status\n"
        "from tpipe_jax.runtime.outputs import leave_out\n"
        "processes = ProcessFlags(local_processes=2, max_restarts=3)\n"
        "flags = Flags(Config(mesh=MeshConfig(pipe=2)), Path('w'), processes)\n"
        "def main():\n"
        "    if 'run=1' in sys.argv:\n"
        "        leave_out(Path(sys.argv[1]).parent)\n"
        "    return supervise(sys.argv[1:], flags)\n"
        "sys.exit(exit_status(main))\n"
    )
    return str(path)


def started(caller: str, *args: str) -> subprocess.Popen[str]:
    child = several_processes.start(*args, program=caller)
    assert child.stdout is not None
    assert sorted(child.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_passed_on(program: str, caller: str, number: signal.Signals):
    child = started(caller, program, "what=interrupt")
    child.send_signal(number)
    _, err = child.communicate(timeout=400)
    assert sorted(err.splitlines())[:2] == ["[0] saved 0", "[1] saved 1"]
    assert "starting again" not in err  # who stops a run does not want it started again
    assert child.returncode == 1


def test_signals_that_come_before_a_process_reach_it(program: str):
    lifeline, _ = ends = os.pipe()
    children = launcher.Children(lifeline)
    children.pass_on(signal.SIGKILL)
    assert children.start([sys.executable, program]).wait(60) == -signal.SIGKILL
    for end in ends:
        os.close(end)


def test_processes_whose_launcher_is_killed_save_and_end(program: str, caller: str, tmp_path: Path):
    child = started(caller, program, "what=orphan", f"folder={tmp_path}")
    child.kill()
    child.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while not (tmp_path / "0").exists() or not (tmp_path / "1").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("kind", "status", "said"), [("run=1", 0, True), ("run=0", 141, False)])
def test_what_processes_print_is_read_though_nobody_reads_it_here(
    program: str, caller: str, kind: str, status: int, said: bool
):
    """Each prints more than a pipe holds, so it would wait for ever, or end by that."""
    child = started(caller, program, "what=much", kind)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    with child.stderr as errors:
        err = errors.read()
    assert child.wait(60) == status
    assert ("note: standard output cannot be written (Broken pipe)" in err) == said
    assert err.count("\n") == said


def test_devices_that_do_not_divide_are_refused():
    with pytest.raises(UserError) as error:
        supervise(["program"], flags(3))
    assert "--local-processes=3 does not divide the 4 devices" in str(error.value)


@pytest.mark.parametrize(
    "words",
    [["--local-processes=2"], ["--local_processes", "2"], ["--local-processes", "2"]],
)
def test_option_is_left_out_in_all_spellings(words: list[str]):
    assert without_option(["a", *words, "--b=1"], "local-processes") == ["a", "--b=1"]
