"""The plan of a step: how the batch of a data shard and its sequences are cut, in plain numbers."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from tpipe_jax.config import Config, ScheduleName, UserError

Nested = tuple[tuple[float, ...], ...]
MAX_SECONDS = 1e9  # that a file may give for a time; sums of such are finite


@dataclass(frozen=True)
class Prediction:
    """What the latency model says of a plan."""

    step_seconds: float
    """The whole step, of which `outside_seconds` are not the pipeline's."""
    outside_seconds: float
    slice_forward_seconds: Nested
    """For each slice of each batch slice, how long it holds a stage."""
    slice_backward_seconds: Nested
    slice_transfer_seconds: Nested
    """The part of both in which the slice is handed on."""
    is_optimal: bool
    lower_bound_seconds: float
    """No plan under its schedule takes less, says the model."""


@dataclass(frozen=True)
class Plan:
    """Batch slices, and the token slices of each."""

    num_stages: int
    batch_slices: tuple[int, ...]
    token_slices: tuple[tuple[int, ...], ...]
    prediction: Prediction | None = None
    schedule: ScheduleName = "terapipe"

    @property
    def batch_size(self) -> int:
        """Sequences of one data shard."""
        return sum(self.batch_slices)

    @property
    def seq_len(self) -> int:
        return sum(self.token_slices[0])

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """The different sizes of its slices, sequences and tokens."""
        pairs = zip(self.batch_slices, self.token_slices, strict=True)
        return {(b, n) for b, slices in pairs for n in slices}

    def to_dict(self) -> dict[str, Any]:
        """What `plan.json` holds."""
        content: dict[str, Any] = {
            "num_stages": self.num_stages,
            "schedule": self.schedule,
            "batch_slices": self.batch_slices,
            "token_slices": self.token_slices,
        }
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
        return content

    def save(self, path: Path) -> None:
        """Writes `plan.json`."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is asked for; None where the slices are the planner's to choose."""

    num_stages: int
    batch_size: int
    """Sequences of one data shard."""
    seq_len: int
    batch_slices: tuple[int, ...] | None = None
    token_slices: tuple[int, ...] | None = None
    schedule: ScheduleName | None = None

    @property
    def schedules(self) -> tuple[ScheduleName, ...]:
        """Those that may be planned: with one batch slice, 1f1b would be terapipe."""
        if self.schedule:
            return (self.schedule,)
        is_one = self.batch_size == 1 or len(self.batch_slices or (1, 1)) == 1
        return ("terapipe",) if is_one else get_args(ScheduleName)


def read_settings(config: Config) -> Plan | PlanRequest:
    """The plan that the settings spell out or name, or what they leave to the planner.

    Raises `UserError` where they don't fit each other.
    """
    train, mesh = config.train, config.mesh
    if train.batch_size % mesh.data:
        raise UserError(
            f"config.train.batch_size={train.batch_size} is not a multiple of "
            f"config.mesh.data={mesh.data}: set a batch size of "
            f"{mesh.data * max(1, round(train.batch_size / mesh.data))}, or another mesh."
        )
    batch_slices = parse_slices(
        config.plan.batch_slices,
        train.batch_size // mesh.data,
        "config.plan.batch_slices",
        "the batch of one data shard, config.train.batch_size / config.mesh.data",
    )
    token_slices = parse_slices(
        config.plan.token_slices,
        config.model.seq_len,
        "config.plan.token_slices",
        "config.model.seq_len",
    )
    unit_tokens(config)
    schedule = _read_schedule(config, batch_slices)
    request = PlanRequest(
        mesh.pipe,
        train.batch_size // mesh.data,
        config.model.seq_len,
        batch_slices,
        token_slices,
        schedule,
    )
    if config.plan.file is not None:
        if batch_slices or token_slices:
            raise UserError(
                f"config.plan.file={config.plan.file} and slices of their own exclude each other: "
                "leave config.plan.batch_slices and config.plan.token_slices at auto."
            )
        if config.plan.schedule == "auto":
            request = replace(request, schedule=None)  # the file's own
        return load_plan(Path(config.plan.file), request)
    if batch_slices and token_slices:
        slices = batch_slices, (token_slices,) * len(batch_slices)
        return Plan(mesh.pipe, *slices, schedule=schedule or "terapipe")
    return request


def _read_schedule(config: Config, batch_slices: tuple[int, ...] | None) -> ScheduleName | None:
    """None where it is the planner's to choose. Raises `UserError` where it has no use."""
    schedule = config.plan.schedule
    if schedule == "1f1b":
        num_rows = config.train.batch_size // config.mesh.data
        if num_rows == 1 or len(batch_slices or (1, 1)) == 1:
            raise UserError(
                f"config.plan.schedule={schedule} sends one batch slice backward while others go "
                f"forward, and a data shard has only one: set config.plan.schedule=terapipe, or "
                f"config.{'plan.batch_slices' if num_rows > 1 else 'train.batch_size'} so that "
                "there are several."
            )
        if config.memory.defer_weight_grads:
            raise UserError(
                f"config.plan.schedule={schedule} keeps a part of the batch at a time, and "
                "config.memory.defer_weight_grads=true needs all of it: leave one of them out."
            )
    if schedule == "auto":
        return "terapipe" if config.memory.defer_weight_grads else None
    return schedule


def unit_tokens(config: Config) -> int:
    """What planned slices are multiples of: 8 tokens unless set, and more in long sequences.

    Raises `UserError` if the setting does not divide the sequence.
    """
    seq_len, unit = config.model.seq_len, config.plan.unit_tokens
    if unit is None:
        return next(n for n in range(max(8, seq_len // 256), 0, -1) if seq_len % n == 0)
    if seq_len % unit:
        raise UserError(
            f"config.plan.unit_tokens={unit} does not divide config.model.seq_len={seq_len}: pick "
            "a divisor."
        )
    return unit


def parse_slices(text: str, total: int, setting: str, total_name: str) -> tuple[int, ...] | None:
    """Reads `uniform:N`, a list as `96,64,56,40`, or `auto` as None.

    Uniform slices differ by one where N does not divide the total; the longer ones come first,
    since they have the shorter context. Raises `UserError` for anything but positive lengths that
    sum to `total`.
    """
    if text.strip() == "auto":
        return None
    kind, _, count = text.partition(":")
    if kind.strip() == "uniform" and count.strip().isdecimal():
        num = int(count)
        if not 1 <= num <= total:
            raise UserError(
                f"{setting}={text} must ask for 1 to {total} slices, since {total_name} is {total}."
            )
        return uniform(total, num)
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(
            f"{setting}={text} is neither auto nor uniform:N nor a list of positive lengths as "
            "96,64,56,40."
        )
    slices = tuple(map(int, parts))
    if sum(slices) != total:
        raise UserError(
            f"{setting}={text} sums to {sum(slices)}, but {total_name} is {total}: "
            f"change the slices, or let uniform:{min(len(slices), total)} divide it."
        )
    return slices


def uniform(total: int, num: int) -> tuple[int, ...]:
    """`num` parts of `total` that differ by at most one, the larger ones first."""
    return tuple(total // num + (i < total % num) for i in range(num))


def read_plan(content: Any) -> Plan:
    """The inverse of `Plan.to_dict`. Raises ValueError, which says why, for what is no plan."""
    try:
        num_stages = content["num_stages"]
        batch_slices = tuple(content["batch_slices"])
        token_slices = tuple(tuple(slices) for slices in content["token_slices"])
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from error
    except TypeError as error:
        raise ValueError(f"it does not hold what a plan does ({error})") from error
    counts = [num_stages, *batch_slices, *(n for slices in token_slices for n in slices)]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in counts):
        raise ValueError("a size in it is not a positive whole number")
    if not batch_slices or len(token_slices) != len(batch_slices):
        raise ValueError(
            f"it has {len(batch_slices)} batch slices, but tokens of {len(token_slices)}"
        )
    schedule = content.get("schedule", "terapipe")
    if schedule not in get_args(ScheduleName):
        raise ValueError(f"it has a schedule that is not known, {schedule!r}")
    return Plan(num_stages, batch_slices, token_slices, _read_prediction(content), schedule)


def load_plan(path: Path, request: PlanRequest) -> Plan:
    """Reads `plan.json`. Raises `UserError` if it is none, or is not of what is requested."""
    try:
        plan = read_plan(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        is_file = isinstance(error, OSError)
        what = f"it cannot be read ({error.strerror})" if is_file else str(error)
        raise UserError(
            f"config.plan.file={path} is no plan: {what}. Make one with launch/plan.py, or set "
            "config.plan.token_slices."
        ) from error
    check_plan(f"config.plan.file={path}", plan, request)
    return plan


def check_plan(name: str, plan: Plan, request: PlanRequest) -> None:
    """Raises `UserError` if a plan is not of what is requested."""
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
    ):
        if planned != {wanted}:
            raise UserError(
                f"{name} is for {what} {', '.join(map(str, sorted(planned)))}, "
                f"but {setting} is {wanted}: plan anew with launch/plan.py, or change the setting."
            )


def _read_prediction(content: dict[str, Any]) -> Prediction | None:
    if "predicted_step_seconds" not in content:
        return None
    try:
        slices = content["token_slices"]
        none = [[0.0] * len(own) for own in slices]
        forward, backward, transfer = (
            tuple(tuple(map(_seconds, times)) for times in nested)
            for nested in (
                content["slice_forward_seconds"],
                content["slice_backward_seconds"],
                content.get("slice_transfer_seconds", none),
            )
        )
        prediction = Prediction(
            step_seconds=_seconds(content["predicted_step_seconds"]),
            outside_seconds=_seconds(content.get("outside_seconds", 0)),
            slice_forward_seconds=forward,
            slice_backward_seconds=backward,
            slice_transfer_seconds=transfer,
            is_optimal=bool(content["optimal"]),
            lower_bound_seconds=_seconds(content["lower_bound_seconds"]),
        )
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"its predicted times are no times ({error})") from error
    for times in (forward, backward, transfer):
        if list(map(len, times)) != list(map(len, slices)):
            raise ValueError("its predicted times are not of its slices")
    return prediction


def _seconds(value: Any) -> float:
    """A time as a file may hold it. Raises `TypeError` or `ValueError` for anything else."""
    if isinstance(value, bool) or not 0 <= value <= MAX_SECONDS:
        raise ValueError(f"{value!r} is not a time")
    return float(value)
