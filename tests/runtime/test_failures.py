"""What takes too long ends a run. Failures of several processes are in test_processes.py."""

import os
import signal
import time
from typing import Any

import pytest

from support import several_processes
from tpipe_jax.runtime import failures
from tpipe_jax.runtime.failures import watched


@pytest.fixture
def given_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(failures, "POLL_SECONDS", 0.05)
    return []


def give_up(texts: list[str]) -> Any:
    """Keeps the text, where the program would end."""

    def keep(text: str) -> None:
        texts.append(text)

    return keep


def wait_for(texts: list[str]) -> None:
    deadline = time.monotonic() + 60
    while not texts:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_takes_longer_than_it_may_is_given_up(given_up: list[str]):
    with watched(give_up(given_up)) as expect:
        expect("quick", 100)
        time.sleep(0.3)
        assert given_up == []
        expect("slow", 0.2)
        wait_for(given_up)
    assert given_up[0] == "slow"


def test_what_is_next_starts_anew(given_up: list[str]):
    with watched(give_up(given_up)) as expect:
        for n in range(20):  # together longer than one of them may take
            expect(f"step {n}", 1)
            time.sleep(0.1)
    assert given_up == []


@pytest.mark.slow
def test_time_in_which_the_process_is_stopped_does_not_count():
    """It is stopped (as by Ctrl-Z) for longer than it may take, then goes on to its end."""
    child = several_processes.start("watched 3")
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGSTOP)
    time.sleep(4)
    child.send_signal(signal.SIGCONT)
    [(status, out, err)] = several_processes.results([child])
    assert (status, out, err) == (0, "done\n", "")


def test_a_process_that_hangs_ends_and_tells_where():
    [(status, out, err)] = several_processes.results([several_processes.start("watched 0.5")])
    assert (status, out) == (1, "ready\n")
    lines = err.splitlines()
    assert lines[0] == "sleeping"
    assert "Thread MainThread (most recent call last):" in lines
    assert lines[-1].strip() == "time.sleep(1.5)"
    assert os.path.basename(several_processes.__file__) in lines[-2]
