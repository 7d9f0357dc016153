"""The plan of a step: how a data shard cuts its batch and its sequences, in plain numbers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tpipe_jax.config.fields import MAX_INT
from tpipe_jax.config.settings import ScheduleName
from tpipe_jax.errors import UserError, shown
from tpipe_jax.json_files import is_number, read_json
from tpipe_jax.planning.bounds import MAX_SEQUENCES, MAX_SHAPES, MAX_STAGES, most_slices

Nested = tuple[tuple[float, ...], ...]
CHUNKS = 2, 4  # numbers of chunks per stage that the planner tries
MAX_SECONDS = 1e9  # longest time that a file may hold, so that sums are finite
ROUNDED = 1e-6  # by which a part may exceed the whole, since latency.json has nine digits


@dataclass(frozen=True)
class Prediction:
    """The times that the latency model predicts for a plan."""

    step_seconds: float
    """Time of the whole step, including `outside_seconds`, its part outside the pipeline."""
    outside_seconds: float
    slice_forward_seconds: Nested
    """How long each token slice of each batch slice occupies a stage, with its transfer."""
    slice_backward_seconds: Nested
    slice_transfer_seconds: Nested
    """The part of each forward or backward time in which a stage hands the slice on."""
    is_optimal: bool
    lower_bound_seconds: float
    """According to the model, no plan under the same schedule takes less time than this."""
    slice_weight_seconds: Nested | None = None
    """Time of the gradients of weights; None where the backward passes include them."""


@dataclass(frozen=True)
class Plan:
    """The batch slices, the token slices of each batch slice, and the schedule."""

    num_stages: int
    batch_slices: tuple[int, ...]
    token_slices: tuple[tuple[int, ...], ...]
    prediction: Prediction | None = None
    schedule: ScheduleName = "terapipe"
    num_chunks: int = 1
    """Chunks of each stage."""

    @property
    def batch_size(self) -> int:
        """Sequences of one data shard."""
        return sum(self.batch_slices)

    @property
    def seq_len(self) -> int:
        return sum(self.token_slices[0])

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """The distinct shapes of the slices: (sequences, tokens)."""
        pairs = zip(self.batch_slices, self.token_slices, strict=True)
        return {(b, n) for b, slices in pairs for n in slices}

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `plan.json`."""
        content: dict[str, Any] = {
            "num_stages": self.num_stages,
            "schedule": self.schedule,
            "batch_slices": self.batch_slices,
            "token_slices": self.token_slices,
        }
        if self.num_chunks > 1:
            content["num_chunks"] = self.num_chunks
        if self.prediction:
            content |= {
                "predicted_step_seconds": self.prediction.step_seconds,
                "outside_seconds": self.prediction.outside_seconds,
                "slice_forward_seconds": self.prediction.slice_forward_seconds,
                "slice_backward_seconds": self.prediction.slice_backward_seconds,
                "slice_transfer_seconds": self.prediction.slice_transfer_seconds,
                "optimal": self.prediction.is_optimal,
                "lower_bound_seconds": self.prediction.lower_bound_seconds,
            }
            if self.prediction.slice_weight_seconds:
                content["slice_weight_seconds"] = self.prediction.slice_weight_seconds
        return content

    def save(self, path: Path) -> None:
        """Writes `plan.json`."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class PlanRequest:
    """What a plan must keep to; a field is None where the planner chooses."""

    num_stages: int
    batch_size: int
    """Sequences of one data shard."""
    seq_len: int
    batch_slices: tuple[int, ...] | None = None
    token_slices: tuple[int, ...] | None = None
    schedule: ScheduleName | None = None
    num_chunks: int | None = None
    """Chunks of each stage, under interleaved."""
    num_layers: int | None = None
    """Layers of the model; None where not known, and then stages may have any number of chunks."""

    @property
    def schedules(self) -> tuple[ScheduleName, ...]:
        """The schedules that may be planned. With one batch slice, 1f1b would be terapipe; on one
        stage nothing waits, so neither interleaved nor 1f1b-deferred would help.
        """
        if self.schedule:
            return (self.schedule,)
        is_one = self.batch_size == 1 or len(self.batch_slices or (1, 1)) == 1
        is_possible: dict[ScheduleName, bool] = {
            "terapipe": True,
            "1f1b": not is_one,
            "interleaved": self.num_layers is not None and bool(self.chunk_options),
            "1f1b-deferred": not is_one and self.num_stages > 1,
        }
        return tuple(name for name, is_one_of_them in is_possible.items() if is_one_of_them)

    @property
    def chunk_options(self) -> tuple[int, ...]:
        """The numbers of chunks per stage that may be planned under interleaved."""
        if self.num_stages == 1:
            return ()
        numbers = (self.num_chunks,) if self.num_chunks else CHUNKS
        most = np.inf if self.num_layers is None else self.num_layers // self.num_stages
        return tuple(n for n in numbers if n <= most)


def read_plan(content: Any) -> Plan:
    """Returns the plan from its `to_dict`. Raises ValueError, with the reason, if it is no plan."""
    try:
        num_stages = content["num_stages"]
        batch_slices = tuple(content["batch_slices"])
        token_slices = tuple(map(tuple, content["token_slices"]))
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from error
    except TypeError as error:
        raise ValueError(f"it does not hold what a plan does ({error})") from error
    num_chunks = content.get("num_chunks", 1)
    counts = [
        num_stages,
        num_chunks,
        *batch_slices,
        *(n for slices in token_slices for n in slices),
    ]
    if not all(type(n) is int and 0 < n <= MAX_INT for n in counts):
        raise ValueError(f"a size in it is not a positive whole number up to {MAX_INT}")
    if not batch_slices or len(token_slices) != len(batch_slices):
        raise ValueError(
            f"it has {len(batch_slices)} batch slices, but tokens of {len(token_slices)}"
        )
    schedule = content.get("schedule", "terapipe")
    if schedule not in get_args(ScheduleName):
        raise ValueError(f"it has a schedule that is not known, {shown(repr(schedule))}")
    if (num_chunks > 1) != (schedule == "interleaved"):
        raise ValueError(f"it has {num_chunks} chunks of a stage under {schedule}")
    _check_work(num_stages, num_chunks, token_slices)
    prediction = _read_prediction(content)
    return Plan(num_stages, batch_slices, token_slices, prediction, schedule, num_chunks)


def _check_work(
    num_stages: int, num_chunks: int, token_slices: tuple[tuple[int, ...], ...]
) -> None:
    """Raises ValueError if a plan asks for more than can be run."""
    num_slices, most = num_chunks * sum(map(len, token_slices)), most_slices(num_stages)
    num_lengths = len({n for own in token_slices for n in own})
    if len(token_slices) > MAX_SEQUENCES:
        raise ValueError(f"its {len(token_slices)} batch slices are more than {MAX_SEQUENCES}")
    if num_stages > MAX_STAGES:
        raise ValueError(f"its {num_stages} stages are more than {MAX_STAGES}")
    if num_slices > most:
        raise ValueError(
            f"it has {num_slices} slices, more than the {most} that {num_stages} stages can work on"
        )
    if num_lengths > MAX_SHAPES:
        raise ValueError(f"its slices have {num_lengths} lengths, more than {MAX_SHAPES}")


def load_plan(path: Path, request: PlanRequest) -> Plan:
    """Reads `plan.json`. Raises `UserError` if the file is not a valid plan, or was made for other
    settings.
    """
    try:
        plan = read_plan(read_json(path))
    except (OSError, ValueError) as error:
        is_file = isinstance(error, OSError)
        what = f"it cannot be read ({error.strerror})" if is_file else str(error)
        raise UserError(
            f"config.plan.file={path} is no plan: {what}. Make one with tpipe plan, or set "
            "config.plan.token_slices."
        ) from error
    check_plan(f"config.plan.file={path}", plan, request)
    return plan


def check_plan(name: str, plan: Plan, request: PlanRequest) -> None:
    """Raises `UserError` if a plan was made for other settings; `name` begins the sentence."""
    lengths = {sum(slices) for slices in plan.token_slices}
    schedule = request.schedule or plan.schedule
    for what, planned, setting, wanted in (
        ("sequences of", lengths, "config.model.seq_len", request.seq_len),
        (
            "a batch of",
            {plan.batch_size},
            "config.train.batch_size / config.mesh.data",
            request.batch_size,
        ),
        ("a number of stages of", {plan.num_stages}, "config.mesh.pipe", request.num_stages),
        ("a schedule of", {plan.schedule}, "config.plan.schedule", schedule),
        (
            "a number of chunks of",
            {plan.num_chunks},
            "config.plan.chunks",
            request.num_chunks or plan.num_chunks,
        ),
    ):
        if planned != {wanted}:
            raise UserError(
                f"{name} is for {what} {', '.join(map(str, sorted(planned)))}, "
                f"but {setting} is {wanted}: plan anew with tpipe plan, or change the setting."
            )
    most = request.num_layers
    if most is not None and plan.num_chunks * plan.num_stages > max(most, plan.num_stages):
        raise UserError(
            f"{name} is for {plan.num_chunks} chunks of {plan.num_stages} stages each, but "
            f"config.model.num_layers is {most}: plan anew with tpipe plan."
        )


def _read_prediction(content: dict[str, Any]) -> Prediction | None:
    if "predicted_step_seconds" not in content:
        return None
    try:
        slices = content["token_slices"]
        none = [[0.0] * len(own) for own in slices]

        def times(key: str, default: Any = None) -> Nested:
            nested = content[key] if default is None else content.get(key, default)
            if not isinstance(nested, list) or not all(isinstance(own, list) for own in nested):
                raise ValueError(f"{key} is no list of lists")
            return tuple(tuple(map(_seconds, own)) for own in nested)

        has_weights = content.get("slice_weight_seconds") is not None
        prediction = Prediction(
            step_seconds=_seconds(content["predicted_step_seconds"]),
            outside_seconds=_seconds(content.get("outside_seconds", 0)),
            slice_forward_seconds=times("slice_forward_seconds"),
            slice_backward_seconds=times("slice_backward_seconds"),
            slice_transfer_seconds=times("slice_transfer_seconds", none),
            slice_weight_seconds=times("slice_weight_seconds") if has_weights else None,
            is_optimal=content["optimal"],
            lower_bound_seconds=_seconds(content["lower_bound_seconds"]),
        )
        if not isinstance(prediction.is_optimal, bool):
            raise ValueError(
                f"optimal is {shown(repr(prediction.is_optimal))}, neither true nor false"
            )
        if (content.get("schedule") == "1f1b-deferred") != has_weights:
            raise ValueError("times of gradients of weights are of 1f1b-deferred")
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"its predicted times are no times ({error})") from error
    for nested in (
        prediction.slice_forward_seconds,
        prediction.slice_backward_seconds,
        prediction.slice_transfer_seconds,
        none if prediction.slice_weight_seconds is None else prediction.slice_weight_seconds,
    ):
        if list(map(len, nested)) != list(map(len, slices)):
            raise ValueError("its predicted times are not of its slices")
    _check_sums(prediction)
    return prediction


def _check_sums(prediction: Prediction) -> None:
    """Raises ValueError if a part of a predicted time is longer than the whole."""
    whole = prediction.step_seconds
    for name, part in (
        ("outside_seconds", prediction.outside_seconds),
        ("lower_bound_seconds", prediction.lower_bound_seconds),
    ):
        if part > whole * (1 + ROUNDED):
            raise ValueError(f"its {name}={part:g} is above its predicted_step_seconds={whole:g}")
    for name, nested in (
        ("slice_forward_seconds", prediction.slice_forward_seconds),
        ("slice_backward_seconds", prediction.slice_backward_seconds),
    ):
        for i, rows in enumerate(zip(prediction.slice_transfer_seconds, nested, strict=True)):
            for j, (transfer, seconds) in enumerate(zip(*rows, strict=True)):
                if transfer > seconds * (1 + ROUNDED):
                    raise ValueError(
                        f"its slice_transfer_seconds[{i}][{j}]={transfer:g} is above its "
                        f"{name}[{i}][{j}]={seconds:g}, of which it is a part"
                    )


def _seconds(value: Any) -> float:
    """Returns a time from a file as a float. Raises ValueError if it is no time."""
    if not is_number(value) or not 0 <= value <= MAX_SECONDS:
        raise ValueError(f"{shown(repr(value))} is not a time")
    return float(value)
