"""The schedule: which slice each stage works on at each tick, as tables of plain numbers.

In a tick each stage works forward on one item or none, then backward on one item or none. It hands
both results to its neighbours, which have them in the next tick. Three stages and four items under
TeraPipe's schedule (Li et al. 2021, section 3.2), all forward and then all backward:

    tick       0  1  2  3  4  5  6  7  8  9 10 11
    stage 0    0  1  2  3  .  .  .  .  3  2  1  0
    stage 1    .  0  1  2  3  .  .  3  2  1  0  .
    stage 2    .  .  0  1  2  3  3  2  1  0  .  .

Three stages and four sequences of two slices each under 1F1B over slices (Seq1F1B, Sun et al.
2025). F/B means forward on item F and backward on item B in one tick. A sequence goes backward as
soon as all of it has gone forward:

    tick       0   1   2   3   4   5   6   7   8   9  10  11  12
    stage 0    0   1   2   3   4  5/1 6/0 7/3  2   5   4   7   6
    stage 1    .   0   1   2  3/1 4/0 5/3 6/2 7/5  4   7   6   .
    stage 2    .   .   0  1/1 2/0 3/3 4/2 5/5 6/4 7/7  6   .   .

Under both schedules, S equal items on P stages take the time of (S + P - 1) forward and (S + P - 1)
backward passes: stages that work in the same direction of a tick take equally long, so it costs
nothing that they wait for each other. But the second schedule keeps only a few sequences in memory
at a time, however many there are.

Two other schedules shorten the bubble, the (P - 1) passes in which stages wait:

- interleaved (after Narayanan et al. 2021, here with all forward before any backward). Each stage
  has v chunks of layers: stage s has those of the stages s, P + s, 2 P + s ... of a pipeline with
  v P stages. All slices go round v times, and stages wait for passes through one chunk, which take
  1 / v of the time.
- 1f1b-deferred (after Qi et al. 2024, zero bubble). Backward passes leave gradients of weights for
  ticks in which their stage would idle. If S >= 2 P - 1, a stage waits for (P - 1)(f + b - w): a
  forward pass takes f, a backward pass without gradients of weights b, and these gradients w <= f.

The executor (`pipeline.executor`) follows any tables that `schedule_check.check` accepts. No jax.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tpipe_jax.config.settings import ScheduleName
from tpipe_jax.planning.plan import Plan

IDLE = -1


@dataclass(frozen=True)
class Item:
    """What a stage works on at once: `num_rows` sequences from `row` on, and of these `num_tokens`
    tokens from `token` on, in one chunk of its layers.
    """

    row: int
    token: int
    num_rows: int
    num_tokens: int
    chunk: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.num_tokens


@dataclass(frozen=True)
class Part:
    """Sequences that are embedded together, and whose losses are taken together.

    All stages take part in both, each for its share of the vocabulary, in the ticks below.
    """

    row: int
    num_rows: int
    buffer_row: int
    """The first row of the stages' buffers that holds these sequences. The part occupies its rows
    from `embed_tick` to `last_tick`."""
    embed_tick: int
    """The sequences are embedded before the forward passes of this tick."""
    loss_tick: int
    """Their losses are taken between the forward and the backward passes of this tick."""
    embed_grad_tick: int
    """The gradients of their embedding are taken after the backward passes of this tick."""
    last_tick: int
    """The last tick that needs the rows of these sequences."""

    @property
    def buffer_rows(self) -> range:
        return range(self.buffer_row, self.buffer_row + self.num_rows)


@dataclass(frozen=True)
class Schedule:
    """Items, and for each direction a table `[tick, stage]` of indices of items, or IDLE."""

    items: tuple[Item, ...]
    parts: tuple[Part, ...]
    forward: np.ndarray
    backward: np.ndarray
    num_rows: int
    """Rows of a stage's buffers, one for each sequence that it stores at a time."""
    num_gradient_rows: int
    """Rows of a stage's buffers for gradients of keys and values. If they are fewer than
    `num_rows`, parts use the same rows in turn."""
    weights: np.ndarray | None = None
    """`[tick, stage, n]`: the items whose gradients of weights a stage computes in a tick, after
    its passes. None where the backward passes include these gradients."""
    slots: np.ndarray | None = None
    """`[item, stage]`: the slot in which a stage stores an item's data until it computes the item's
    gradients of weights."""

    @property
    def num_stages(self) -> int:
        return self.forward.shape[1]

    @property
    def num_ticks(self) -> int:
        return len(self.forward)

    @property
    def has_passes(self) -> bool:
        """Whether stages work on items at all, which they don't in an `idle_schedule`."""
        return bool((self.forward != IDLE).any())

    @property
    def num_slots(self) -> int:
        return 0 if self.slots is None else int(self.slots.max()) + 1

    @property
    def longest_shape(self) -> tuple[int, int]:
        """The most sequences and the most tokens of an item, perhaps of different items."""
        shapes = [item.shape for item in self.items]
        return max(b for b, _ in shapes), max(n for _, n in shapes)

    @property
    def part_of(self) -> list[int]:
        """The index of the part of each item."""
        of_row = {
            part.row + n: i for i, part in enumerate(self.parts) for n in range(part.num_rows)
        }
        return [of_row[item.row] for item in self.items]

    @property
    def buffer_rows(self) -> list[int]:
        """The first buffer row of each item."""
        parts = [self.parts[i] for i in self.part_of]
        pairs = zip(self.items, parts, strict=True)
        return [part.buffer_row + item.row - part.row for item, part in pairs]

    def parts_at(self, when: Callable[[Part], int]) -> np.ndarray:
        """For each tick, the part with `when(part) == tick`, as an index; IDLE if there is none."""
        parts = np.full(self.num_ticks, IDLE, np.int32)
        for i, part in enumerate(self.parts):
            parts[when(part)] = i
        return parts


def slice_order(schedule: Schedule, plan: Plan) -> list[tuple[int, int]]:
    """Returns the batch slice and the token slice of each item, by their numbers in the plan."""
    index = {(item.row, item.token): (m, n) for m, n, item in _slices(plan)}
    return [index[item.row, item.token] for item in schedule.items]


def make_schedule(plan: Plan) -> Schedule:
    """Returns the tables of a plan under the schedule that the plan names."""
    return SCHEDULES[plan.schedule](plan)


def terapipe(plan: Plan) -> Schedule:
    """Sends all items forward through the stages, then all of them backward.

    The first token slices of all batch slices enter first, then all second ones, and so on. So
    neighbouring stages mostly work on slices that take equally long, and wait little when all
    devices exchange results at once. An item enters the next chunk of the first stage when all
    items have entered the chunk before, and no sooner than it has left the last stage.
    """
    slices = [item for _, _, item in sorted(_slices(plan), key=lambda s: (s[1], s[0]))]
    S, P = len(slices), plan.num_stages
    items = tuple(replace(item, chunk=c) for c in range(plan.num_chunks) for item in slices)
    entries = [c * max(S, P) + n for c in range(plan.num_chunks) for n in range(S)]
    num_ticks = entries[-1] + P
    forward = np.full((num_ticks, P), IDLE, np.int32)
    for stage in range(P):
        forward[np.array(entries) + stage, stage] = range(len(items))
    idle, last = np.full_like(forward, IDLE), 2 * num_ticks - 1
    part = Part(0, plan.batch_size, 0, 0, num_ticks - 1, embed_grad_tick=last, last_tick=last)
    # Backward is forward run in reverse: last item first, last stage first.
    return Schedule(
        items,
        (part,),
        np.concatenate([forward, idle]),
        np.concatenate([idle, forward[::-1]]),
        *(plan.batch_size, plan.batch_size),
    )


def one_forward_one_backward(plan: Plan) -> Schedule:
    """Sends each batch slice backward as soon as it has gone forward; the next ones go forward
    meanwhile.

    On a single stage the next batch slice waits until this one has gone backward. That costs no
    time, since the stage is busy meanwhile.
    """
    items, P = tuple(item for _, _, item in _slices(plan)), plan.num_stages
    forward_entries: list[int] = []  # the tick in which each item enters the first stage
    backward_entries: dict[int, int] = {}  # and the last stage on its way back, in this order
    parts: list[Part] = []
    row, last = 0, -1  # sequences so far, and the last tick in which one enters the last stage
    for size, own in zip(plan.batch_slices, plan.token_slices, strict=True):
        first, count = len(forward_entries), len(own)
        embed_tick = 1 + max(forward_entries[-1:], default=-1)
        if P == 1 and parts:
            embed_tick = parts[-1].embed_grad_tick + 1
        forward_entries += range(embed_tick, embed_tick + count)
        loss_tick = forward_entries[-1] + P - 1
        start = max(loss_tick, 1 + last)
        backward_entries |= {first + count - 1 - n: start + n for n in range(count)}
        last, embed_grad_tick = start + count - 1, start + count + P - 2
        ticks = embed_tick, loss_tick, embed_grad_tick
        parts.append(Part(row, size, 0, *ticks, last_tick=embed_grad_tick))
        row += size
    num_ticks = parts[-1].embed_grad_tick + 1
    forward, backward = (np.full((num_ticks, P), IDLE, np.int32) for _ in range(2))
    for stage in range(P):
        for item, entry in enumerate(forward_entries):
            forward[entry + stage, stage] = item
            backward[backward_entries[item] + P - 1 - stage, stage] = item
    return _with_rows(Schedule(items, tuple(parts), forward, backward, 0, 0))


def deferred_weights(plan: Plan) -> Schedule:
    """1F1B whose backward passes leave the gradients of weights for later.

    Slices reach the first stage last on their way back. It computes these gradients at once, in the
    tick of the backward pass. Every other stage fills its ticks up to the work of the busiest
    stage. Gradients that it computes after the passes of a tick count for the next tick. With many
    items it computes none until an item is back at the first stage. Then it computes about one a
    tick, and the rest at the end.
    """
    schedule = one_forward_one_backward(plan)
    passes = [table.tolist() for table in (schedule.forward, schedule.backward)]
    waiting: list[list[int]] = [[] for _ in range(plan.num_stages)]
    idle = [IDLE] * plan.num_stages
    rows: list[list[list[int]]] = []  # the items whose gradients are computed, [tick][stage]
    while len(rows) < schedule.num_ticks or any(waiting):
        tick = len(rows)
        _, backward = (own[tick] if tick < len(own) else idle for own in passes)
        for own, item in zip(waiting, backward, strict=True):
            own += [item] * (item != IDLE)
        follow = [own[tick + 1] if tick + 1 < len(own) else idle for own in passes]
        loads = [sum(item != IDLE for item in of_stage) for of_stage in zip(*follow, strict=True)]
        longest = max(*loads, loads[0] + len(waiting[0]), 1)
        counts = [longest - load for load in loads]
        rows.append([own[:count] for own, count in zip(waiting, counts, strict=True)])
        waiting = [own[count:] for own, count in zip(waiting, counts, strict=True)]
    weights = np.full((len(rows), plan.num_stages, max(len(i) for r in rows for i in r)), IDLE)
    for tick, row in enumerate(rows):
        for stage, items in enumerate(row):
            weights[tick, stage, : len(items)] = items
    more = ((0, len(rows) - schedule.num_ticks), (0, 0))
    last_ticks = _last_ticks(weights, np.array(schedule.part_of), len(schedule.parts))
    parts = (
        replace(part, last_tick=max(part.embed_grad_tick, last))
        for part, last in zip(schedule.parts, last_ticks, strict=True)
    )
    return _with_rows(
        replace(
            schedule,
            parts=tuple(parts),
            forward=np.pad(schedule.forward, more, constant_values=IDLE),
            backward=np.pad(schedule.backward, more, constant_values=IDLE),
            weights=weights.astype(np.int32),
            slots=_slots(schedule.backward, rows, len(schedule.items)),
        )
    )


def _slots(backward: np.ndarray, weights: list[list[list[int]]], num_items: int) -> np.ndarray:
    """Returns `[item, stage]`: the lowest free slot when the item goes backward, which the item
    holds until the tick of its gradients of weights.
    """
    slots = np.full((num_items, backward.shape[1]), IDLE, np.int32)
    for stage, column in enumerate(backward.T):
        free = list(range(num_items))
        for tick, item in enumerate(column):
            if item != IDLE:
                slots[item, stage] = heapq.heappop(free)
            for done in weights[tick][stage]:
                heapq.heappush(free, int(slots[done, stage]))
    return slots


def _last_ticks(table: np.ndarray, part_of: np.ndarray, num_parts: int) -> list[int]:
    """Returns the last tick in which the table has an item of each part."""
    last, found = np.full(num_parts, IDLE), table != IDLE
    np.maximum.at(last, part_of[table[found]], np.nonzero(found)[0])
    return last.tolist()


def _with_rows(schedule: Schedule) -> Schedule:
    """Returns the schedule with each part in the lowest free rows of the buffers."""
    parts: list[Part] = []
    alive: list[Part] = []
    for part in schedule.parts:  # each is embedded later than the one before
        alive = [other for other in alive if other.last_tick >= part.embed_tick]
        alive.append(replace(part, buffer_row=_free_row(alive, part.num_rows)))
        parts.append(alive[-1])
    num_rows = max(part.buffer_row + part.num_rows for part in parts)
    longest = max(part.num_rows for part in parts)
    return replace(
        schedule, parts=tuple(parts), num_rows=num_rows, num_gradient_rows=min(num_rows, longest)
    )


def _free_row(alive: Sequence[Part], num_rows: int) -> int:
    """Returns the lowest row from which `num_rows` rows belong to none of the parts `alive`."""
    starts = [0, *(part.buffer_row + part.num_rows for part in alive)]
    return min(
        start
        for start in starts
        if all(
            start + num_rows <= part.buffer_row or part.buffer_row + part.num_rows <= start
            for part in alive
        )
    )


def idle_schedule(schedule: Schedule) -> Schedule:
    """Returns the schedule with idle stages: parts are still embedded, and their losses and the
    gradients of their embedding are still taken. One item is left, which no tick works on; it is so
    small that it needs no memory.
    """
    table, item = np.full_like(schedule.forward, IDLE), Item(0, 0, 1, 1)
    idle = replace(schedule, items=(item,), forward=table, backward=table)
    return replace(idle, weights=None, slots=None)


SCHEDULES: dict[ScheduleName, Callable[[Plan], Schedule]] = {
    "terapipe": terapipe,
    "1f1b": one_forward_one_backward,
    "interleaved": terapipe,
    "1f1b-deferred": deferred_weights,
}


def _slices(plan: Plan) -> list[tuple[int, int, Item]]:
    """Returns (batch slice, token slice, item) for each slice, one batch slice after another."""
    return [
        (m, n, Item(sum(plan.batch_slices[:m]), sum(own[:n]), plan.batch_slices[m], own[n]))
        for m, own in enumerate(plan.token_slices)
        for n in range(len(own))
    ]
