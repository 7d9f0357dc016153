"""Stops of a process alone; tests/test_multihost.py has those of several."""

import os
import signal

import pytest

from tpipe_jax.stop import Stop, Stopped


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


def test_a_run_may_ask_itself():
    with Stop(print) as stop:
        stop.request()
        assert stop.is_due()
