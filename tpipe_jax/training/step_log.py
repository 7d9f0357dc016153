"""Measures the steps of a run, logs those that are due, and ends a run that has diverged."""

import math
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array

from tpipe_jax.devices.hardware import peak_flops
from tpipe_jax.errors import UserError
from tpipe_jax.model.flops import step_flops
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.planning.estimator import predicted_timeline
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.settings import work_factors
from tpipe_jax.reporting.console import Console
from tpipe_jax.reporting.metrics import Metrics
from tpipe_jax.training.optimizer import learning_rate_at

RISES = 8  # of the loss from line to line, after which it is told; noise alone: one in 8!
COMPARED_STEPS = 20  # to time before prediction and measurement are compared
STEP_METRICS = (
    *("loss", "balance_loss", "grad_norm"),
    *("loss_scale", "skipped_steps", "loss_spikes"),
)


class StepLog:
    """Measures the steps of a run, and logs those that are due.

    Call `begin` when a step has been dispatched, and `finish` to wait for it. `step_seconds` is the
    mean over the steps since the last line. It leaves out evaluations, and includes the time for
    which checkpoints keep training waiting. After `COMPARED_STEPS` steps the console shows how well
    the plan's prediction and the measurement agree.
    """

    def __init__(
        self, spec: StageSpec, plan: Plan, metrics: Metrics | None, console: Console
    ) -> None:
        config = spec.config
        self._train, self._metrics, self._console = config.train, metrics, console
        self._precision, self._optim = config.precision, config.optim
        may_skip = self._train.on_nonfinite == "skip"
        self._num_allowed = self._train.max_consecutive_skips if may_skip else 0
        self._prediction, self._compared = plan.prediction, (0, 0.0)
        self._is_warming_up, self._save_seconds = True, 0.0
        self._measured_bubble: float | None = None
        self._flops, self._num_devices = step_flops(config), spec.mesh.size
        self._device = spec.mesh.local_devices[0]
        self._peak_flops = peak_flops(config, spec.device.kind)
        self._has_trouble = False  # with the picture of the losses, which is told once
        self._bubble = None
        if plan.prediction:
            self._bubble = predicted_timeline(plan, work_factors(config, plan)).bubble
        self._rising: list[float] = []  # the losses of the lines since the last that did not rise
        self._tokens_per_step = config.train.batch_size * config.model.seq_len
        self._learning_rate = partial(learning_rate_at, config)
        self._running: tuple[int, dict[str, Array]] | None = None
        self.start()

    def start(self, since: float | None = None) -> None:
        """Counts time from `since`, a time of `time.monotonic`, or from now on."""
        self._since = time.monotonic() if since is None else since
        self._num_timed, self._wait_seconds = 0, 0.0

    def begin(self, step: int, values: dict[str, Array]) -> None:
        self._running = step, values

    def add_save(self, seconds: float) -> None:
        """Logs with the next line how long checkpoints have kept training waiting."""
        self._save_seconds += seconds

    def add_wait(self, seconds: float) -> None:
        """Logs with the next line how long a step has waited for its batch."""
        self._wait_seconds += seconds

    def add_bubble(self, share: float | None) -> None:
        """Logs with the next line in what share of a traced step the stages were idle."""
        self._measured_bubble = share

    def leave_out(self, seconds: float) -> None:
        """Leaves out `seconds` that did not belong to a step."""
        self._since += seconds

    def finish(
        self, evaluate: Callable[[], float] | None = None, is_next_running: bool = False
    ) -> None:
        """Waits for the step that was begun, if there is one, and logs it if it is due.

        `evaluate` returns a held-out loss, and makes the step due. If the next step has been
        dispatched already, the time for writing the line belongs to that step. Nothing here may use
        the devices then, since they would do it after that step. Raises `UserError` if the run has
        diverged.
        """
        if self._running is None:
            return
        (step, values), self._running = self._running, None
        values = jax.device_get(values)  # sorts the names; STEP_METRICS has their order
        now = time.monotonic()
        line = {name: values[name].item() for name in STEP_METRICS if name in values}
        self._num_timed += 1
        is_finite = math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
        num_bad = int(values["consecutive_skips"])
        has_diverged = not is_finite and num_bad > self._num_allowed
        if not is_finite and 0 < num_bad <= self._num_allowed:
            self._console.say(f"step {step}: loss or gradients are not finite, and not applied")
        if not (
            has_diverged
            or evaluate
            or step % self._train.log_every == 0
            or step == self._train.num_steps
        ):
            return
        step_seconds = (now - self._since) / self._num_timed
        # Updates of the optimiser before this step: earlier steps that were not skipped.
        num_updates = step - 1 - line["skipped_steps"] + (not is_finite)
        line |= {
            "learning_rate": self._learning_rate(num_updates),
            "step_seconds": step_seconds,
            **self._speed(step_seconds),
            "data_wait_seconds": self._wait_seconds / self._num_timed,
            "peak_memory_gib": _peak_bytes(self._device) / 2**30,
        }
        if self._bubble is not None:
            line["bubble_predicted"] = self._bubble
        if self._measured_bubble is not None:
            line["bubble_measured"], self._measured_bubble = self._measured_bubble, None
        if self._save_seconds:
            line["checkpoint_stall_seconds"], self._save_seconds = self._save_seconds, 0.0
        if evaluate and not has_diverged:
            line["eval_loss"] = evaluate()
        if self._metrics:
            self._metrics.write(step, line)
            if evaluate:
                trouble = self._metrics.draw(is_last=step == self._train.num_steps)
                if trouble and not self._has_trouble:
                    self._console.say(trouble)
                self._has_trouble = bool(trouble)
        self._console.show_progress(step, line)
        if has_diverged:
            raise UserError(self._divergence(step, num_bad))
        self._watch(step, line["loss"])
        self._compare(step, step_seconds)
        self.start(now if is_next_running else None)

    def _speed(self, step_seconds: float) -> dict[str, float]:
        tokens, flops = (n / step_seconds for n in (self._tokens_per_step, self._flops))
        speed = {
            "tokens_per_second": tokens,
            "tokens_per_second_per_device": tokens / self._num_devices,
            "tflops_per_device": flops / self._num_devices / 1e12,
        }
        if self._peak_flops:
            speed["mfu"] = flops / self._num_devices / self._peak_flops
        return speed

    def _divergence(self, step: int, num_bad: int) -> str:
        scale = self._precision.loss_scale_min
        steps = f"step {step} are" if num_bad == 1 else f"{num_bad} steps up to {step} were"
        return (
            f"training has diverged: loss or gradients of {steps} not finite"
            + f", with the loss scale at its lower bound {scale:g}"
            * (self._precision.compute == "float16")
            + f"; lower config.optim.learning_rate={self._optim.learning_rate:g} or raise "
            f"config.optim.warmup_steps={self._optim.warmup_steps}, and the same command goes on "
            "from the last checkpoint, which is untouched, or starts again with another --workdir."
        )

    def _watch(self, step: int, loss: float) -> None:
        """Says it, once, if the loss only rises."""
        if self._rising and not loss > self._rising[-1]:
            self._rising = []
        self._rising.append(loss)
        if len(self._rising) == RISES + 1:
            self._console.say(
                f"step {step}: the loss has risen in {RISES} lines in a row, from "
                f"{self._rising[0]:.3f} to {loss:.3f}: lower "
                f"config.optim.learning_rate={self._optim.learning_rate:g}, or look at the data"
            )

    def _compare(self, step: int, step_seconds: float) -> None:
        """Shows once how well prediction and measurement agree, when enough steps have been timed.
        The steps of the first line warm up, and do not count.
        """
        if self._is_warming_up and step < self._train.num_steps:
            self._is_warming_up = False
            return
        num_steps, seconds = self._compared
        self._compared = num_steps + self._num_timed, seconds + self._num_timed * step_seconds
        is_due = self._compared[0] >= COMPARED_STEPS or step == self._train.num_steps
        if self._prediction and is_due:
            measured = self._compared[1] / self._compared[0]
            self._console.show_agreement(self._prediction.step_seconds, measured)
            self._prediction = None


def _peak_bytes(device: Any) -> int:
    """Returns the most bytes that have been in use: on the device, or by the process if the device
    does not report them.
    """
    reported = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if reported is not None:
        return reported
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
