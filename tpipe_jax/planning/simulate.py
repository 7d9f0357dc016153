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
    hands on, if that is only that there is nothing. All stages wait for each other where a
    part of the batch is embedded, and where its losses or the gradients of its embedding are taken;
    what they do together then takes no time here.

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
    """When each stage is free, while a schedule goes on."""

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
        """The stage works on an item as soon as it is free, and hands on what it makes of it."""
        factor = self._factors[self._chunks[item] * self._num_stages + stage]
        start, stop = self.free[stage], self.free[stage] + factor * seconds[item]
        self.boxes.append(Box(stage, item, kind, start, stop))
        is_handed_on = kind != "weights"
        self.free[stage] = stop + self._num_chunks * factor * self._transfers[item] * is_handed_on

    def go(self, row: Sequence[int], seconds: Sequence[float], kind: Kind) -> None:
        """All stages' work in one direction of a tick, and what they wait for then."""
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
        """All stages wait for each other."""
        if is_due:
            self.free = [max(self.free)] * self._num_stages
