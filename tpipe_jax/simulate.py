"""When the stages work on what, if they wait for nothing but each other. No jax."""

from collections.abc import Sequence
from dataclasses import dataclass

from tpipe_jax.schedule import IDLE, Schedule


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


def simulate(
    schedule: Schedule,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    *,
    stage_factors: Sequence[float] | None = None,
    transfer_seconds: Sequence[float] | None = None,
) -> Timeline:
    """The timeline of a schedule as the executor follows it.

    In each direction in which a tick has any work, a stage goes on once it has what its neighbour
    hands on, if that is only that there is nothing. Where a part of the batch enters, turns or
    leaves, all stages wait for each other; what they do together then takes no time here.

    Args:
        schedule: any one that the executor can follow.
        forward_seconds: the work on each item in the forward pass.
        backward_seconds: the work on each item in the backward pass.
        transfer_seconds: how long a stage is held, after its work on an item, until that is handed
            on; none without.
        stage_factors: what each stage takes over all these times; all alike without.
    """
    P = schedule.num_stages
    factors = stage_factors or [1.0] * P
    transfers = transfer_seconds or [0.0] * len(schedule.items)
    enters, turns, leaves = (
        {getattr(part, when) for part in schedule.parts} for when in ("enters", "turns", "leaves")
    )
    boxes: list[Box] = []
    free = [0.0] * P

    def go(row: Sequence[int], seconds: Sequence[float], step: int) -> None:
        """All stages' work in one direction of a tick."""
        nonlocal free
        done = list(free)
        for stage, item in enumerate(row):
            if item != IDLE:
                start = free[stage]
                stop = start + factors[stage] * seconds[item]
                done[stage] = stop + factors[stage] * transfers[item]
                boxes.append(Box(stage, item, step < 0, start, stop))
        free = [max(done[s], done[s - step]) if 0 <= s - step < P else done[s] for s in range(P)]

    def meet(tick: int, ticks: set[int]) -> None:
        nonlocal free
        if tick in ticks:
            free = [max(free)] * P

    tables = schedule.forward.tolist(), schedule.backward.tolist()
    for tick, (forward, backward) in enumerate(zip(*tables, strict=True)):
        meet(tick, enters)
        if any(item != IDLE for item in forward):
            go(forward, forward_seconds, 1)
        meet(tick, turns)
        if any(item != IDLE for item in backward):
            go(backward, backward_seconds, -1)
        meet(tick, leaves)
    return Timeline(tuple(boxes), max(free), P)
