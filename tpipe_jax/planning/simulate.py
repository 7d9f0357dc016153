"""When the stages work on what, if they wait for nothing but each other. No jax."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tpipe_jax.planning.schedule import IDLE, Schedule

Kind = Literal["forward", "backward", "weights"]


@dataclass(frozen=True)
class Box:
    """One item on one stage in a timeline, seconds."""

    stage: int
    item: int
    kind: Kind
    """A pass, or the gradients of weights that a backward pass has left out."""
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
    weight_seconds: Sequence[float] | None = None,
    chunk_factors: Sequence[float] | None = None,
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
        weight_seconds: that on the gradients of weights, which a schedule takes by themselves.
        transfer_seconds: how long a stage is held, after its work on an item, until that is handed
            on; none without.
        chunk_factors: what a chunk of a stage takes over all these times, chunk c of stage s at
            c * P + s; 1 without. A transfer takes as much longer, or less long, as that of the same
            stage without chunks.
    """
    P = schedule.num_stages
    num_chunks = 1 + max(item.chunk for item in schedule.items)
    factors = chunk_factors or [1.0] * (P * num_chunks)
    transfers = transfer_seconds or [0.0] * len(schedule.items)
    enters, turns, leaves = (
        {getattr(part, when) for part in schedule.parts} for when in ("enters", "turns", "leaves")
    )
    boxes: list[Box] = []
    free = [0.0] * P

    def work(stage: int, item: int, seconds: Sequence[float], kind: Kind) -> float:
        """Does it when the stage is free; returns when that is so again."""
        factor = factors[schedule.items[item].chunk * P + stage]
        start, stop = free[stage], free[stage] + factor * seconds[item]
        boxes.append(Box(stage, item, kind, start, stop))
        return stop + num_chunks * factor * transfers[item] * (kind != "weights")

    def go(row: Sequence[int], seconds: Sequence[float], kind: Kind) -> None:
        """All stages' work in one direction of a tick."""
        nonlocal free
        done = [
            free[stage] if item == IDLE else work(stage, item, seconds, kind)
            for stage, item in enumerate(row)
        ]
        before = [s - 1 if kind == "forward" else s + 1 for s in range(P)]
        if num_chunks > 1:
            before = [s % P for s in before]
        free = [max(done[s], done[n]) if 0 <= n < P else done[s] for s, n in enumerate(before)]

    def meet(tick: int, ticks: set[int]) -> None:
        nonlocal free
        if tick in ticks:
            free = [max(free)] * P

    tables = schedule.forward.tolist(), schedule.backward.tolist()
    weights = [] if schedule.weights is None else schedule.weights.tolist()
    for tick, (forward, backward) in enumerate(zip(*tables, strict=True)):
        meet(tick, enters)
        if any(item != IDLE for item in forward):
            go(forward, forward_seconds, "forward")
        meet(tick, turns)
        if any(item != IDLE for item in backward):
            go(backward, backward_seconds, "backward")
        meet(tick, leaves)
        for stage, items in enumerate(weights[tick] if weights else []):
            for item in items:
                if item != IDLE:
                    assert weight_seconds
                    free[stage] = work(stage, item, weight_seconds, "weights")
    return Timeline(tuple(boxes), max(free), P)
