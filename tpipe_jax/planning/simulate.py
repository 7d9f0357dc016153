"""Simulates when each stage works on which item, if stages wait only for each other. No jax."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tpipe_jax.planning.schedule import IDLE, Schedule

Kind = Literal["forward", "backward", "weights"]


@dataclass(frozen=True)
class Box:
    """The work on one item on one stage in a timeline, in seconds."""

    stage: int
    item: int
    kind: Kind
    """The pass, or `weights`: gradients of weights that the backward pass has left out."""
    start_seconds: float
    stop_seconds: float


@dataclass(frozen=True)
class Timeline:
    """When each stage works on which item."""

    boxes: tuple[Box, ...]
    step_seconds: float
    """Time from the first start until all stages are free (the makespan)."""
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
    """Returns the timeline of a schedule as the executor follows it.

    If any stage has work in a direction of a tick, all stages exchange results after that work. A
    stage then waits until its neighbour is done, even if the neighbour has nothing to hand on.
    All stages wait for each other where a part of the batch is embedded, and where its losses or
    the gradients of its embedding are taken; this work itself takes no time here.

    Args:
        schedule: any schedule that the executor can follow.
        forward_seconds: time of the forward pass of each item, without transfer.
        backward_seconds: time of the backward pass of each item, without transfer.
        weight_seconds: time of each item's gradients of weights, if the schedule defers them.
        chunk_factors: time of each chunk of each stage, divided by the times above; chunk c of
            stage s is at index c * P + s; 1 if left out. A transfer takes about as long after a
            chunk as after a whole stage, so its time is multiplied by the factor and by the number
            of chunks.
        transfer_seconds: how long a stage needs to hand an item on after its pass; 0 if left out.
    """
    clock = _Clock(schedule, chunk_factors, transfer_seconds)
    embed_ticks, loss_ticks, embed_grad_ticks = (
        {getattr(part, when) for part in schedule.parts}
        for when in ("embed_tick", "loss_tick", "embed_grad_tick")
    )
    tables = schedule.forward.tolist(), schedule.backward.tolist()
    weights = [] if schedule.weights is None else schedule.weights.tolist()
    for tick, (forward, backward) in enumerate(zip(*tables, strict=True)):
        clock.meet(tick in embed_ticks)
        clock.go(forward, forward_seconds, "forward")
        clock.meet(tick in loss_ticks)
        clock.go(backward, backward_seconds, "backward")
        clock.meet(tick in embed_grad_ticks)
        for stage, items in enumerate(weights[tick] if weights else []):
            for item in items:
                if item != IDLE:
                    assert weight_seconds
                    clock.work(stage, item, weight_seconds, "weights")
    return Timeline(tuple(clock.boxes), max(clock.free), schedule.num_stages)


class _Clock:
    """Keeps the time at which each stage is free, while a schedule is simulated."""

    def __init__(
        self,
        schedule: Schedule,
        chunk_factors: Sequence[float] | None,
        transfer_seconds: Sequence[float] | None,
    ) -> None:
        self._chunks = [item.chunk for item in schedule.items]
        self._num_stages, self._num_chunks = schedule.num_stages, 1 + max(self._chunks)
        self._factors = chunk_factors or [1.0] * (self._num_stages * self._num_chunks)
        self._transfers = transfer_seconds or [0.0] * len(schedule.items)
        self.boxes: list[Box] = []
        self.free = [0.0] * self._num_stages

    def work(self, stage: int, item: int, seconds: Sequence[float], kind: Kind) -> None:
        """The stage works on an item as soon as it is free, then hands on the result of a pass."""
        factor = self._factors[self._chunks[item] * self._num_stages + stage]
        start, stop = self.free[stage], self.free[stage] + factor * seconds[item]
        self.boxes.append(Box(stage, item, kind, start, stop))
        is_handed_on = kind != "weights"
        self.free[stage] = stop + self._num_chunks * factor * self._transfers[item] * is_handed_on

    def go(self, row: Sequence[int], seconds: Sequence[float], kind: Kind) -> None:
        """All stages do their work in one direction of a tick, then wait for their neighbours."""
        if all(item == IDLE for item in row):
            return
        for stage, item in enumerate(row):
            if item != IDLE:
                self.work(stage, item, seconds, kind)
        done, step = self.free, -1 if kind == "forward" else 1
        before = [stage + step for stage in range(self._num_stages)]
        if self._num_chunks > 1:
            before = [stage % self._num_stages for stage in before]
        self.free = [
            max(own, done[n]) if 0 <= n < self._num_stages else own
            for own, n in zip(done, before, strict=True)
        ]

    def meet(self, is_due: bool) -> None:
        """All stages wait for each other if `is_due`."""
        if is_due:
            self.free = [max(self.free)] * self._num_stages
