"""Signals that end a program that has nothing to save: it cleans up and has the signal's status."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tpipe_jax.runtime.exits import STOPS, heeded, is_insisted

PROGRAM = """
import sys, time
from pathlib import Path
from tpipe_jax.runtime import exits

def program():
    half = Path(sys.argv[1])
    half.touch()
    try:
        print("ready", flush=True)
        for _ in range(1000):
            time.sleep(0.1)
    finally:
        half.unlink()

sys.exit(exits.exit_status(program))
"""


def start(folder: Path, prefix: tuple[str, ...] = (), program: str = PROGRAM) -> subprocess.Popen:
    child = subprocess.Popen(
        [*prefix, sys.executable, "-c", program, str(folder / "half")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("number", STOPS)
def test_what_is_half_written_is_removed(number: signal.Signals, tmp_path: Path):
    child = start(tmp_path)
    child.send_signal(number)
    assert child.communicate(timeout=60)[1] == "stopped\n"
    assert child.returncode == 128 + number
    assert not (tmp_path / "half").exists()


def test_a_terminal_that_closes_twice_does_not_end_the_cleaning(tmp_path: Path):
    slow = PROGRAM.replace("half.unlink()", "time.sleep(0.5); half.unlink()")
    child = start(tmp_path, program=slow)
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
        child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode == 129
    assert not (tmp_path / "half").exists()


def test_a_program_that_cannot_clean_up_ends_all_the_same(tmp_path: Path):
    """As where the main thread is in a library; here it is in a handler."""
    hanging = PROGRAM.replace("half.unlink()", "time.sleep(100)")
    hanging = hanging.replace("\ndef", "\nexits.CLEANUP_SECONDS = 0.5\n\ndef")
    child = start(tmp_path, program=hanging)
    child.send_signal(signal.SIGUSR1)
    assert child.communicate(timeout=60)[1] == "stopped\n"
    assert child.returncode == 138


def test_nohup_keeps_a_program_alive(tmp_path: Path):
    child = start(tmp_path, ("nohup",))
    child.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 143


def test_ignored_signals_are_not_heeded_but_those_of_users_are():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        assert signal.SIGUSR1 not in heeded()
        assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2} <= set(heeded())
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ("INT", False),
        ("INT INT", True),
        ("HUP INT", True),  # from a person
        ("TERM TERM", True),
        ("INT TERM", True),
        ("HUP HUP", False),  # from the shell and from the kernel
        ("HUP TERM", False),  # from systemd
        ("USR1 TERM", False),  # from Slurm, before the time is up and when it is
        ("XCPU XCPU", False),  # each second
        ("USR1 TERM TERM", True),
    ],
)
def test_which_signals_ask_for_an_end_at_once(numbers: str, expected: bool):
    *before, last = (signal.Signals[f"SIG{name}"] for name in numbers.split())
    assert is_insisted(last, before) == expected
