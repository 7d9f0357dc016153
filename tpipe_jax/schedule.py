"""The schedule: which slice each stage works on at each tick, as a table of plain numbers.

TeraPipe's schedule (Li et al. 2021, section 3.2) for P stages and S items, all forward passes, then
all backward passes in the opposite order. Three stages and four items:

    tick       0  1  2  3  4  5     0  1  2  3  4  5
    stage 0    0  1  2  3  .  .     .  .  3  2  1  0
    stage 1    .  0  1  2  3  .     .  3  2  1  0  .
    stage 2    .  .  0  1  2  3     3  2  1  0  .  .
               forward              backward

The executor in `pipeline.py` follows any table in which the neighbour has finished an item one tick
earlier.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tpipe_jax.plans import Plan

IDLE = -1


@dataclass(frozen=True)
class Item:
    """One piece of work: `num_rows` sequences from `row` on by `num_tokens` from `token` on."""

    row: int
    token: int
    num_rows: int
    num_tokens: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.num_tokens


@dataclass(frozen=True)
class Schedule:
    """Items, and for each direction a table `[tick, stage]` of indices into them, or IDLE."""

    items: tuple[Item, ...]
    forward: np.ndarray
    backward: np.ndarray

    @property
    def num_stages(self) -> int:
        return self.forward.shape[1]


@dataclass(frozen=True)
class Box:
    """One item on one stage in a timeline, seconds."""

    stage: int
    item: int
    is_backward: bool
    start_seconds: float
    stop_seconds: float


@dataclass(frozen=True)
class Timeline:
    """When each stage works on what."""

    boxes: tuple[Box, ...]
    step_seconds: float
    """From the first start to the last stop, the makespan."""
    num_stages: int

    @property
    def bubble(self) -> float:
        """The fraction of the stages' time in which they do not work."""
        work = sum(box.stop_seconds - box.start_seconds for box in self.boxes)
        return 1 - work / (self.num_stages * self.step_seconds) if self.step_seconds else 0.0


def slice_order(plan: Plan) -> list[tuple[int, int]]:
    """In which order the slices enter the pipeline, as (batch slice, token slice).

    The first token slice of all batch slices, then the second of all: so neighbouring stages mostly
    work on slices that take as long, and devices that exchange results all at once wait little.
    """
    slices = [(m, n) for m, own in enumerate(plan.token_slices) for n in range(len(own))]
    return sorted(slices, key=lambda index: index[::-1])


def terapipe(plan: Plan) -> Schedule:
    """All items forward through the stages, then all of them backward."""
    items = [
        Item(
            row=sum(plan.batch_slices[:m]),
            token=sum(plan.token_slices[m][:n]),
            num_rows=plan.batch_slices[m],
            num_tokens=plan.token_slices[m][n],
        )
        for m, n in slice_order(plan)
    ]
    S, P = len(items), plan.num_stages
    tick, stage = np.arange(S + P - 1)[:, None], np.arange(P)[None, :]
    forward = np.where((tick >= stage) & (tick - stage < S), tick - stage, IDLE)
    # Backward is forward run in reverse: last item first, last stage first.
    return Schedule(tuple(items), forward.astype(np.int32), forward[::-1].astype(np.int32))


def simulate(
    schedule: Schedule,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    *,
    stage_factors: Sequence[float] | None = None,
    transfer_seconds: Sequence[float] | None = None,
) -> Timeline:
    """The timeline of a schedule whose stages wait for nothing but their neighbours.

    A stage starts an item as soon as it has finished the one before and its neighbour has handed
    this one on.

    Args:
        schedule: any table in which a neighbour has an item before it is due.
        forward_seconds: the work on each item in the forward pass.
        backward_seconds: the work on each item in the backward pass.
        transfer_seconds: how long a stage is held, after its work on an item, until that is handed
            on; none without.
        stage_factors: what each stage takes over all these times; all alike without.
    """
    factors = stage_factors or [1.0] * schedule.num_stages
    transfers = transfer_seconds or [0.0] * len(schedule.items)
    boxes, free = [], [0.0] * schedule.num_stages
    for table, seconds, is_backward in (
        (schedule.forward, forward_seconds, False),
        (schedule.backward, backward_seconds, True),
    ):
        ready = [0.0] * len(schedule.items)  # when the neighbour hands each item on
        for row in table:
            for stage, item in enumerate(row.tolist()):
                if item != IDLE:
                    start = max(free[stage], ready[item])
                    stop = start + factors[stage] * seconds[item]
                    free[stage] = ready[item] = stop + factors[stage] * transfers[item]
                    boxes.append(Box(stage, item, is_backward, start, stop))
    return Timeline(tuple(boxes), max(free), schedule.num_stages)
