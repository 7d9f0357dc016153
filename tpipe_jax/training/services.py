"""How a run reports what it does, and how it is told to stop."""

from dataclasses import dataclass

from tpipe_jax.reporting.console import Console
from tpipe_jax.runtime.failures import Expect
from tpipe_jax.runtime.stop import Stop

PHASE_SECONDS = 3600  # for planning, compiling or restoring, unless steps may take longer


@dataclass(frozen=True)
class Services:
    """The console, the stop and the time limit of a run in its process."""

    console: Console
    stop: Stop
    expect: Expect
    """Call it with what the process does next; it ends the run if that takes too long."""
    step_timeout_seconds: int

    def within(self, what: str, is_step: bool = True) -> None:
        """Says what the process does from now on, and how long it may take: `step_timeout_seconds`,
        or at least `PHASE_SECONDS` if `is_step` is false.
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
