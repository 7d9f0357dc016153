"""Stops of a process alone; tests/commands/test_multihost.py has those of several."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tpipe_jax.runtime.stop import Stop, Stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_kept_and_the_second_is_not(number: signal.Signals):
    said: list[str] = []
    before = signal.getsignal(number)
    with Stop(said.append) as stop:
        stop.check()
        assert not stop.is_due()
        os.kill(os.getpid(), number)
        assert stop.is_due()
        assert stop.is_due()
        with pytest.raises(Stopped):
            stop.check()
        assert said == ["Finishing the step and saving; once more stops without saving."]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_signal_in_the_middle_of_output_is_kept_too():
    def say(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    with Stop(say) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_due()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_signals_of_terminals_and_schedulers_stop_too_but_never_without_saving(
    number: signal.Signals,
):
    """Terminals and kernels send them more than once, and schedulers SIGTERM after them."""
    said: list[str] = []
    before = signal.getsignal(number)
    with Stop(said.append) as stop:
        for each in (number, number, signal.SIGTERM):
            os.kill(os.getpid(), each)
        assert stop.is_due()
        assert stop.status() == 128 + number
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(number) == before


def test_a_run_under_nohup_goes_on_when_the_terminal_closes():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(print) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_due()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


HANGING = """
import jax
from tpipe_jax.runtime.stop import Stop

with Stop(print):
    print("ready", flush=True)
    for_ever = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, jax.numpy.sin, x))
    for_ever(1.0).block_until_ready()
"""


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_waits_for_a_device():
    """Python calls no handler then."""
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    time.sleep(3)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (130, "stopped\n")


def test_a_run_may_ask_itself():
    with Stop(print) as stop:
        stop.request()
        assert stop.is_due()
        os.kill(os.getpid(), signal.SIGTERM)  # which is the first
