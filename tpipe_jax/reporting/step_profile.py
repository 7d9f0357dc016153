"""Takes a profile of some steps, for xprof, TensorBoard and Perfetto."""

import re
from pathlib import Path

import jax

from tpipe_jax.config.settings import TrainConfig
from tpipe_jax.errors import UserError


def parse_steps(value: str | None, config: TrainConfig) -> range | None:
    """Returns the steps of --profile=START:STOP, both included. Raises `UserError` if they are not
    steps of the run.
    """
    if value is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", value)
    steps = range(int(found[1]), int(found[2]) + 1) if found else range(0)
    if not steps or not 1 <= steps[0] <= steps[-1] <= config.num_steps:
        raise UserError(
            f"--profile={value} must be START:STOP, the first and the last of some steps between 1 "
            f"and config.train.num_steps={config.num_steps}, as 10:12."
        )
    return steps


class ProfiledSteps:
    """Records what devices and host do during some steps of a run, in a folder."""

    def __init__(self, steps: range | None, folder: Path) -> None:
        self._steps, self._is_running, self._is_done = steps or range(0), False, False
        several = jax.process_count() > 1  # on one host their files would have the same name
        self._folder = folder / f"process-{jax.process_index()}" if several else folder

    def has(self, step: int) -> bool:
        """Whether the step is one of those to profile."""
        return step in self._steps

    def is_first(self, step: int) -> bool:
        """Whether the profile starts here: at the first of its steps that this run comes to."""
        return step in self._steps and not (self._is_running or self._is_done)

    def is_last(self, step: int) -> bool:
        return self._is_running and step >= self._steps[-1]

    def start(self) -> None:
        """Starts the profile. Raises `UserError` if it cannot be taken."""
        try:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--profile cannot be taken ({error}): see that {self._folder} can be written, "
                "or leave it out; the same command continues."
            ) from error
        self._is_running = True

    def stop(self) -> str:
        """Ends the profile. Returns a sentence on where it is, or why it is lost."""
        self._is_running, self._is_done = False, True
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError, ValueError) as error:
            return f"the profile of steps {self._steps[0]} to {self._steps[-1]} is lost: {error}"
        return (
            f"a profile of steps {self._steps[0]} to {self._steps[-1]} is in {self._folder}: open "
            "it with xprof or TensorBoard, or its perfetto_trace.json.gz in ui.perfetto.dev"
        )

    def close(self) -> None:
        """Ends a profile that a stop has cut short."""
        if self._is_running:
            self.stop()
