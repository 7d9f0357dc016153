"""The sliced pipeline: a scan over ticks in which every stage works on its own item and hands the
result to its neighbour.

    tick t:  [stage 0: item 3] -> [stage 1: item 2] -> [stage 2: item 1]      -> is a ppermute

This is code of one device inside `shard_map`, with the axis 'pipe' manual. The tables of the
schedule say what to do at each tick; items of one shape share one compiled body, since their
position is a run-time value. What a stage keeps between items (attention caches, saved activations,
sums of gradients) is the state that the scan carries and updates in place.

Forward and backward passes are the same lane with the stages in opposite order. Where stages have
several chunks of layers, what the last stage has made of an item goes to the first, for the next
chunk. `execute` follows a schedule, with both lanes in a tick; `sweep` is one lane alone. There is
no differentiation through the scan, which would keep a copy of the state for every tick.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tpipe_jax.devices.collectives import varying
from tpipe_jax.devices.inplace import Position, read, run_if, run_on_all_if, write
from tpipe_jax.planning.schedule import IDLE, Item, Part, Schedule

State = TypeVar("State")
Saved = TypeVar("Saved")
Gradients = TypeVar("Gradients")
Sums = TypeVar("Sums")
Carry = tuple[State, Array, Array]  # state, trunk, and the box that goes round the stages
Work = Callable[[int, Array, Position, State], tuple[Array, State]]
Shape = tuple[int, int]


class StepWork(NamedTuple):
    """What a step is made of; parts of the batch are given as their first row and its number."""

    embed: Callable[[Array | int, int], Array]
    """`(row, num_rows)` to `x [b, T, D]`, what the first stage is given."""
    forward: Work
    """`(chunk, x [B, L, D], position, saved)` to `(y [B, L, D], saved)`."""
    turn: Callable[[Array, Array | int, Any], tuple[Array, Any]]
    """`(y [b, T, D], row, sums)`, where y is read on the last stage only, to what that is given
    backward, and the sums, with the loss.
    """
    backward: Callable[[Any, int, Array, Position, Any], tuple[Array, Any]] | None = None
    """`(saved, chunk, d_y [B, L, D], position, gradients)` to `(d_x [B, L, D], gradients)`."""
    weights: Callable[[Any, Any, Any], Any] | None = None
    """`(each, saved, gradients)` to the gradients, with those of weights of some slices, where
    backward passes leave them out. `each(function, state)` calls `function(chunk, (B, L), position,
    state)` for each of these slices.
    """
    leave: Callable[[Array, Array | int, Any], Any] | None = None
    """`(d_x [b, T, D], row, sums)`, where d_x is read on the first stage only, to the sums."""


def execute(
    schedule: Schedule,
    work: StepWork,
    trunk_RTD: Array,
    saved: Saved,
    gradients: Gradients,
    sums: Sums,
) -> tuple[Saved, Gradients, Sums]:
    """Follows a schedule (`schedule_check.check`); returns what has become of the last three.

    Args:
        trunk_RTD: room for the part of the batch that is in the pipeline, R rows of the schedule.
            The embedding is written to it, each stage replaces it by what it makes of that, forward
            and backward, and its losses by their gradients.
        saved: what the forward passes fill and the backward passes read.
        gradients: what the backward passes fill.
        sums: what all stages add up together.
    """
    num_stages, (_, T, D) = schedule.num_stages, trunk_RTD.shape
    slot_rows = None if schedule.slots is None else schedule.longest_shape[0] * schedule.slots
    forward, backward = (
        _Lane(schedule.items, schedule.buffer_rows, num_stages, reverse, slot_rows)
        for reverse in (False, True)
    )

    def tick(carry, row):
        trunk, ahead, back, saved, gradients, sums = carry

        def embed(part: _Rows, trunk: Array) -> Array:
            return write(trunk, work.embed(part.row, part.num_rows), part.in_buffers)

        def turn(part: _Rows, carry: tuple[Array, Sums]) -> tuple[Array, Sums]:
            trunk, sums = carry
            y_BTD = read(trunk, part.in_buffers, part.num_rows, T)
            d_y_BTD, sums = work.turn(y_BTD, part.row, sums)
            return write(trunk, d_y_BTD, part.in_buffers), sums

        def leave(part: _Rows, sums: Sums) -> Sums:
            assert work.leave
            d_x_BTD = read(trunk, part.in_buffers, part.num_rows, T)
            return work.leave(d_x_BTD, part.row, sums)

        trunk = _on_part(schedule.parts, row["enters"], embed, trunk)
        saved, trunk, ahead = run_on_all_if(
            row["any_forward"],
            partial(forward.tick, work.forward, row["forward"]),
            (saved, trunk, ahead),
        )
        trunk, sums = _on_part(schedule.parts, row["turns"], turn, (trunk, sums))
        if work.backward:
            gradients, trunk, back = run_on_all_if(
                row["any_backward"],
                partial(backward.tick, partial(work.backward, saved), row["backward"]),
                (gradients, trunk, back),
            )
        if work.leave:
            sums = _on_part(schedule.parts, row["leaves"], leave, sums)
        if "weights" in row:  # last, since the next tick changes in place what they are taken from
            assert work.weights
            gradients = work.weights(partial(backward.each_alone, row["weights"]), saved, gradients)
        return (trunk, ahead, back, saved, gradients, sums), None

    ahead, back = (lane.empty_box(D, trunk_RTD.dtype) for lane in (forward, backward))
    start = *varying((trunk_RTD, ahead, back, saved, gradients)), sums
    rows = _kept(_tick_rows(schedule, is_training=work.backward is not None))
    (_, _, _, saved, gradients, sums), _ = lax.scan(tick, start, rows)
    return saved, gradients, sums


def _tick_rows(schedule: Schedule, is_training: bool) -> dict[str, np.ndarray]:
    """What the ticks are told."""
    rows = {
        "enters": schedule.parts_at(lambda part: part.enters),
        "forward": schedule.forward,
        "any_forward": (schedule.forward != IDLE).any(1),
        "turns": schedule.parts_at(lambda part: part.turns),
    }
    if not is_training:  # what comes after the last turn is backward
        return {name: a[: 1 + max(p.turns for p in schedule.parts)] for name, a in rows.items()}
    rows |= {
        "backward": schedule.backward,
        "any_backward": (schedule.backward != IDLE).any(1),
        "leaves": schedule.parts_at(lambda part: part.leaves),
    }
    return rows if schedule.weights is None else rows | {"weights": schedule.weights}


def each_alone(
    table: Array,
    items: Sequence[Item],
    function: Callable[[int, Shape, Position, State], State],
    state: State,
) -> State:
    """`function(chunk, (B, L), position, state)` for each item of a table `[tick, stage, n]`, as
    `execute` takes gradients of weights.
    """
    lane = _Lane(items, [item.row for item in items], table.shape[1])

    def tick(state: State, row: Array) -> tuple[State, None]:
        return lane.each_alone(row, function, state), None

    return lax.scan(tick, varying(state), _kept(table))[0]


def sweep(
    table: np.ndarray | Array,
    items: Sequence[Item],
    work: Work,
    trunk_BTD: Array,
    state: State,
    *,
    reverse: bool = False,
) -> tuple[Array, State]:
    """Sends all items of a batch through all stages in one direction.

    Args:
        table: `[tick, stage]`, the index of the item or IDLE; a run-time value if it is an Array.
        items: what the indices stand for.
        work: what a stage does: `(chunk, x [B, L, D], position, state)` to `(y [B, L, D], state)`.
        trunk_BTD: what the items are cut from on the stage where they enter.
        state: what this stage keeps between items, a tree of arrays.
        reverse: whether items enter at the last stage and leave at the first.

    Returns:
        What `work` has made of each item on this stage, `[B, T, D]`, which takes the place of the
        trunk: the result of the sweep on the stage where the items leave. And the state.
    """
    chex.assert_rank([table, trunk_BTD], [2, 3])
    lane = _Lane(items, [item.row for item in items], table.shape[1], reverse)

    def tick(carry: Carry, row: Array) -> tuple[Carry, None]:
        return lane.tick(work, row, carry), None

    box_BLD = lane.empty_box(trunk_BTD.shape[-1], trunk_BTD.dtype)
    start = varying((state, trunk_BTD, box_BLD))
    (state, trunk_BTD, _), _ = lax.scan(tick, start, _kept(jnp.asarray(table)))
    return trunk_BTD, state


class _Lane:
    """One direction through the stages."""

    def __init__(
        self,
        items: Sequence[Item],
        buffer_rows: Sequence[int],
        num_stages: int,
        reverse: bool = False,
        slot_rows: np.ndarray | None = None,
    ) -> None:
        """`slot_rows` `[item, stage]` are those of the items' positions, if they have slots."""
        ends, step = ((num_stages - 1, 0), -1) if reverse else ((0, num_stages - 1), 1)
        self._entry, self._exit = ends
        self._is_ring = any(item.chunk for item in items)
        pairs = [(s, s + step) for s in range(num_stages) if s != self._exit]
        self._neighbours = pairs + [(self._exit, self._entry)] * self._is_ring
        self._items = items
        self._places = jnp.array(
            [(first, item.token, item.row) for first, item in zip(buffer_rows, items, strict=True)]
        )
        self._slot_rows = None if slot_rows is None else jnp.asarray(slot_rows)

    def empty_box(self, width: int, dtype: Any) -> Array:
        """What goes from stage to stage."""
        shapes = [item.shape for item in self._items]
        longest = max(B for B, _ in shapes), max(L for _, L in shapes)
        return jnp.zeros((*longest, width), dtype)

    def tick(self, work: Work, row: Array, carry: Carry) -> Carry:
        """Each stage works on its item of the row, `[P]`, and hands the result on."""
        stage = lax.axis_index("pipe")

        def run(kind: tuple[int, Shape], at: Position, carry: Carry) -> Carry:
            (chunk, (B, L)), (state, trunk, box_BLD) = kind, carry
            x_BLD = jnp.where(stage == self._entry, read(trunk, at, B, L), box_BLD[:B, :L])
            y_BLD, state = work(chunk, x_BLD, at, state)
            return state, write(trunk, y_BLD, at), write(box_BLD, y_BLD, Position(0, 0))

        kinds = [(item.chunk, item.shape) for item in self._items]
        state, trunk, box_BLD = self._by_kind(kinds, row[stage], run, carry)
        if self._neighbours:
            box_BLD = lax.ppermute(box_BLD, "pipe", self._neighbours)
        if self._is_ring:  # where it waits for its turn in the next chunk

            def put(shape: Shape, at: Position, trunk: Array) -> Array:
                B, L = shape
                return write(trunk, box_BLD[:B, :L], at)

            index = jnp.where(stage == self._entry, row[self._exit], IDLE)
            trunk = self._by_kind([item.shape for item in self._items], index, put, trunk)
        return state, trunk, box_BLD

    def each_alone(
        self, row: Array, function: Callable[[int, Shape, Position, State], State], state: State
    ) -> State:
        """`function(chunk, (B, L), position, state)` for each of a stage's items of the row,
        `[P, n]`, which are handed to nobody.
        """
        own = row[lax.axis_index("pipe")]

        def run(kind: tuple[int, Shape], at: Position, state: State) -> State:
            return function(*kind, at, state)

        def one(n: Array, state: State) -> State:
            kinds = [(item.chunk, item.shape) for item in self._items]
            return self._by_kind(kinds, own[n], run, state)

        return lax.fori_loop(0, len(own), one, state)

    def _by_kind(
        self,
        kinds: Sequence[Any],
        index: Array,
        function: Callable[[Any, Position, State], State],
        state: State,
    ) -> State:
        """`function(kind, position, state)` of the item, of which each has one of a few kinds, that
        are known when the program is compiled; the state as it is for IDLE.
        """
        distinct, at = sorted(set(kinds)), Position(*self._places[index])
        if self._slot_rows is not None:
            at = at._replace(slot_row=self._slot_rows[index, lax.axis_index("pipe")])
        kind_of = jnp.array([distinct.index(kind) for kind in kinds])
        for n, kind in enumerate(distinct):
            is_due = (index != IDLE) & (kind_of[index] == n)
            state = run_if(is_due, partial(function, kind, at), state)
        return state


class _Rows(NamedTuple):
    """A part of the batch, whose number of rows is known when the program is compiled."""

    row: Array | int
    num_rows: int
    in_buffers: Position


def _on_part(
    parts: Sequence[Part], index: Array, function: Callable[[_Rows, State], State], state: State
) -> State:
    """`function(part, state)` on all devices, where the index is not IDLE."""
    if len(parts) == 1:  # its rows are known, so that XLA need not copy a buffer to read it whole
        [part] = parts
        rows = _Rows(part.row, part.num_rows, Position(part.buffer_row, 0))
        return run_on_all_if(index != IDLE, partial(function, rows), state)
    places = jnp.array([(part.row, part.buffer_row, part.num_rows) for part in parts])
    row, buffer_row, num_rows = places[index]
    for size in sorted({part.num_rows for part in parts}):
        rows = _Rows(row, size, Position(buffer_row, 0))
        is_due = (index != IDLE) & (num_rows == size)
        state = run_on_all_if(is_due, partial(function, rows), state)
    return state


def _kept(rows: State) -> State:
    """Without the barrier XLA would see that stages are idle, and drop what the profiler times."""
    return lax.optimization_barrier(jax.tree.map(jnp.asarray, rows))
