"""The steps of a run, one after another, with the evaluations and checkpoints between them."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax import Array

from tpipe_jax.checkpoint.checkpoints import Checkpoints
from tpipe_jax.data.batches import Batches
from tpipe_jax.data.prefetch import Prefetcher
from tpipe_jax.data.rows import RowLayout
from tpipe_jax.devices.mesh import put_read_rows
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.reporting import stragglers
from tpipe_jax.reporting.measured_ticks import gathered_ticks, traced
from tpipe_jax.reporting.step_profile import ProfiledSteps
from tpipe_jax.reporting.stragglers import Stragglers
from tpipe_jax.runtime.processes import gathered
from tpipe_jax.training.evaluation import mean_loss
from tpipe_jax.training.prepare import Programs, Run
from tpipe_jax.training.services import Services
from tpipe_jax.training.state import TrainState, abstract_rows
from tpipe_jax.training.step_log import StepLog

StepResult = tuple[TrainState, dict[str, Array]]


@dataclass(frozen=True)
class Loop:
    """Runs the steps of a plan, and reports on them to the log, the files and the console."""

    run: Run
    plan: Plan
    programs: Programs
    workdir: Path
    checkpoints: Checkpoints
    log: StepLog
    profiled: ProfiledSteps
    services: Services
    stragglers: Stragglers | None = None
    """What process 0 knows of slow stages, in all processes; None if they are not timed."""

    def steps(
        self, state: TrainState, first_step: int, held_out: Sequence[Array]
    ) -> tuple[int, TrainState]:
        """Runs the steps that are left. Returns how many steps of the run are done and saved, and
        the state.

        If a batch cannot be read, the steps before it are still run, and are saved if all processes
        hear of the failure in time. Then raises `UserError`.
        """
        config, num_steps = self.run.config, self.run.config.train.num_steps
        log, checkpoints, within = self.log, self.checkpoints, self.services.within
        read = partial(put_batch, self.run, self.run.train_data)
        batches = Prefetcher(read, first_step, num_steps, self.services.stop.request)

        step, traced_step = first_step, self._traced_step()
        with closing(batches), closing(self.profiled):
            log.start()
            while step < num_steps and not self.services.stop.is_due():
                within(f"step {step + 1}")
                start = time.monotonic()
                step, rows = step + 1, batches.take()
                wait_seconds = time.monotonic() - start
                if step == traced_step:
                    log.finish()  # so that the trace does not show the step before
                    state, values = self._traced(step, state, rows)
                elif self._times_stages(step):
                    log.finish()
                    state, values = self._with_stage_times(step, state, rows)
                else:
                    if self.profiled.is_first(step):
                        log.finish()
                        log.leave_out(self._start_profile())
                        within(f"step {step}")
                    state, values = self.programs.train_step(state, rows)
                    # Waits for the step before; meanwhile devices go on to this one.
                    log.finish(is_next_running=True)
                log.add_wait(wait_seconds)
                log.begin(step, values)
                if self.profiled.is_last(step):
                    log.finish()
                    log.leave_out(self._end_profile())
                if step % config.train.eval_every == 0 or step == num_steps:
                    log.finish(partial(self._evaluate, state, held_out))
                if step % config.checkpoint.every == 0:
                    log.finish()  # before the save, so that no kill during it loses the line
                    within(f"saving step {step}")
                    log.add_save(checkpoints.save(step, state))
                checkpoints.raise_failure(config.train.step_timeout_seconds)
            within(f"step {step}")
            log.finish()
        within(f"saving step {step}")
        if step > first_step:
            checkpoints.save(step, state)
        checkpoints.wait()  # before the run says how it has ended
        batches.raise_failure()
        return step, state

    def _traced_step(self) -> int:
        """Returns the step whose ticks are measured; 0 for none."""
        train, is_piped = self.run.config.train, self.run.config.mesh.pipe > 1
        step = min(train.trace_step, train.num_steps) if is_piped else 0
        if step and self.profiled.has(step):
            self.services.console.say(f"step {step} is profiled, so its ticks are not measured")
            return 0
        return step

    def _traced(self, step: int, state: TrainState, rows: Array) -> StepResult:
        """Runs a step and records its ticks. The log times the step alone, not the recording."""
        start, train_step = time.monotonic(), self.programs.train_step
        run_step, text = partial(train_step, state, rows), train_step.as_text() or ""
        result, boxes, seconds = traced(run_step, text, make_schedule(self.plan), self.run.mesh)
        outcome, bubble = gathered_ticks(boxes, self.workdir, self.plan, step)
        self.services.console.say(f"step {step} was traced: {outcome}")
        self.log.add_bubble(bubble)
        self.log.leave_out(time.monotonic() - start - seconds)
        return result

    def _times_stages(self, step: int) -> bool:
        """Whether a step shows which stages are slow."""
        is_due = self.stragglers and step % self.run.config.metrics.stage_times_every == 0
        return bool(is_due) and not self.profiled.has(step)

    def _with_stage_times(self, step: int, state: TrainState, rows: Array) -> StepResult:
        """Runs a step and times its stages. Says so if one is slower than the others for long."""
        assert self.stragglers
        start, train_step = time.monotonic(), self.programs.train_step
        run_step, text = partial(train_step, state, rows), train_step.as_text() or ""
        result, boxes, seconds = traced(run_step, text, make_schedule(self.plan), self.run.mesh)
        found = stragglers.to_text(stragglers.work_seconds(boxes))
        add = partial(self.stragglers.add, step)
        if line := gathered(f"stage times {step}", found, add):
            self.services.console.say(f"step {step}: {line}")
        self.log.leave_out(time.monotonic() - start - seconds)
        return result

    def _start_profile(self) -> float:
        """Starts the profile. Returns how long that took, seconds."""
        start = time.monotonic()
        self.services.within("starting the profile", is_step=False)
        self.profiled.start()
        return time.monotonic() - start

    def _end_profile(self) -> float:
        """Ends and writes the profile. Returns how long that took, seconds."""
        start = time.monotonic()
        self.services.within("writing the profile", is_step=False)
        self.services.console.say(self.profiled.stop())
        return time.monotonic() - start

    def _evaluate(self, state: TrainState, held_out: Sequence[Array]) -> float:
        """Returns the mean loss of all held-out targets, nats per token."""
        layout = RowLayout.of(self.run.config)

        def batches() -> Iterator[tuple[Array, int]]:
            for i, rows in enumerate(held_out):
                self.services.within(f"batch {i + 1} of an evaluation")
                yield rows, int(_num_counted(layout, rows))

        return mean_loss(self.programs.loss, state.params, batches())[0]


@partial(jax.jit, static_argnums=0)
def _num_counted(layout: RowLayout, rows: Array) -> Array:
    """Returns the number of targets that count."""
    return layout.counts(rows).sum()


def put_batch(run: Run, batches: Batches, index: int) -> Array:
    """Puts a batch on the mesh. Each process reads only the rows of its own data shards."""
    shape = abstract_rows(run.spec).shape
    return put_read_rows(run.mesh, partial(batches.batch, index), shape, np.int32)
