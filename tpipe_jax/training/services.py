"""Whom a run tells what it does, and who may end it."""

from dataclasses import dataclass

from tpipe_jax.reporting.console import Console
from tpipe_jax.runtime.failures import Expect
from tpipe_jax.runtime.stop import Stop

PHASE_SECONDS = 3600  # that planning, compiling or restoring may take, if steps may not take more


@dataclass(frozen=True)
class Services:
    """The surroundings of a run in its process."""

    console: Console
    stop: Stop
    expect: Expect
    """Told what the process does from now on; it ends the run if that takes too long."""
    step_timeout_seconds: int

    def within(self, what: str, is_step: bool = True) -> None:
        """Says what is done from now on, and that it may not take longer than the settings allow
        for a step, or for another phase of the run.
        """
        seconds = self.step_timeout_seconds
        if not is_step:
            seconds = max(seconds, PHASE_SECONDS)
        self.expect(
            f"error: {what} has taken longer than {seconds} s: a device, a disk or another process "
            "hangs, or config.train.step_timeout_seconds is too short for it; the same command "
            "continues from the last checkpoint.",
            seconds,
        )
