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
from tpipe_jax.devices.inplace import Position, read, run_on_all_if, write
from tpipe_jax.pipeline.lane import Carry, ItemShape, ItemWork, Lane, State
from tpipe_jax.planning.schedule import IDLE, Item, Part, Schedule

Saved = TypeVar("Saved")
Gradients = TypeVar("Gradients")
Sums = TypeVar("Sums")


class StepWork(NamedTuple):
    """The work of a step. A part of the batch is given as its first row and its number of rows."""

    embed: Callable[[Array | int, int], Array]
    """`(row, num_rows)` to `x [b, T, D]`, what the first stage is given."""
    forward: ItemWork
    """`(chunk, x [B, L, D], position, saved)` to `(y [B, L, D], saved)`."""
    losses: Callable[[Array, Array | int, Any], tuple[Array, Any]]
    """`(y [b, T, D], row, sums)`, where y is read on the last stage only, to what the last stage is
    given backward, and the sums with the losses."""
    backward: Callable[[Any, int, Array, Position, Any], tuple[Array, Any]] | None = None
    """`(saved, chunk, d_y [B, L, D], position, gradients)` to `(d_x [B, L, D], gradients)`."""
    weights: Callable[[Any, Any, Any], Any] | None = None
    """`(each, saved, gradients)` to the gradients, with those of weights of some slices, where
    backward passes leave them out. `each(function, state)` calls `function(chunk, (B, L), position,
    state)` for each of these slices.
    """
    embed_grads: Callable[[Array, Array | int, Any], Any] | None = None
    """`(d_x [b, T, D], row, sums)`, where d_x is read on the first stage only, to the sums with the
    gradients of the embedding."""


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
    slot_rows = None if schedule.slots is None else schedule.longest_shape[0] * schedule.slots
    forward, backward = (
        Lane(schedule.items, schedule.buffer_rows, schedule.num_stages, reverse, slot_rows)
        for reverse in (False, True)
    )

    def tick(carry, row):
        trunk, ahead, back, saved, gradients, sums = carry
        trunk = _on_part(schedule.parts, row["embed"], partial(_embed, work), trunk)
        saved, trunk, ahead = run_on_all_if(
            row["any_forward"],
            partial(forward.tick, work.forward, row["forward"]),
            (saved, trunk, ahead),
        )
        trunk, sums = _on_part(schedule.parts, row["losses"], partial(_losses, work), (trunk, sums))
        if work.backward:
            gradients, trunk, back = run_on_all_if(
                row["any_backward"],
                partial(backward.tick, partial(work.backward, saved), row["backward"]),
                (gradients, trunk, back),
            )
        if work.embed_grads:
            sums = _on_part(
                schedule.parts, row["embed_grads"], partial(_embed_grads, work, trunk), sums
            )
        if "weights" in row:  # last, since the next tick changes in place what they are taken from
            assert work.weights
            gradients = work.weights(partial(backward.each_alone, row["weights"]), saved, gradients)
        return (trunk, ahead, back, saved, gradients, sums), None

    ahead, back = (
        lane.empty_packet(trunk_RTD.shape[-1], trunk_RTD.dtype) for lane in (forward, backward)
    )
    start = *varying((trunk_RTD, ahead, back, saved, gradients)), sums
    rows = _kept(_tick_rows(schedule, is_training=work.backward is not None))
    (_, _, _, saved, gradients, sums), _ = lax.scan(tick, start, rows)
    return saved, gradients, sums


def _tick_rows(schedule: Schedule, is_training: bool) -> dict[str, np.ndarray]:
    """What the ticks are told."""
    rows = {
        "embed": schedule.parts_at(lambda part: part.embed_tick),
        "forward": schedule.forward,
        "any_forward": (schedule.forward != IDLE).any(1),
        "losses": schedule.parts_at(lambda part: part.loss_tick),
    }
    if not is_training:  # what comes after the last losses is backward
        return {name: a[: 1 + max(p.loss_tick for p in schedule.parts)] for name, a in rows.items()}
    rows |= {
        "backward": schedule.backward,
        "any_backward": (schedule.backward != IDLE).any(1),
        "embed_grads": schedule.parts_at(lambda part: part.embed_grad_tick),
    }
    return rows if schedule.weights is None else rows | {"weights": schedule.weights}


def each_alone(
    table: Array,
    items: Sequence[Item],
    function: Callable[[int, ItemShape, Position, State], State],
    state: State,
) -> State:
    """`function(chunk, (B, L), position, state)` for each item of a table `[tick, stage, n]`, as
    `execute` takes gradients of weights.
    """
    lane = Lane(items, [item.row for item in items], table.shape[1])

    def tick(state: State, row: Array) -> tuple[State, None]:
        return lane.each_alone(row, function, state), None

    return lax.scan(tick, varying(state), _kept(table))[0]


def sweep(
    table: np.ndarray | Array,
    items: Sequence[Item],
    work: ItemWork,
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
    lane = Lane(items, [item.row for item in items], table.shape[1], reverse)

    def tick(carry: Carry, row: Array) -> tuple[Carry, None]:
        return lane.tick(work, row, carry), None

    packet_BLD = lane.empty_packet(trunk_BTD.shape[-1], trunk_BTD.dtype)
    start = varying((state, trunk_BTD, packet_BLD))
    (state, trunk_BTD, _), _ = lax.scan(tick, start, _kept(jnp.asarray(table)))
    return trunk_BTD, state


class _Rows(NamedTuple):
    """A part of the batch, whose number of rows is known when the program is compiled."""

    row: Array | int
    num_rows: int
    in_buffers: Position


def _embed(work: StepWork, part: _Rows, trunk: Array) -> Array:
    return write(trunk, work.embed(part.row, part.num_rows), part.in_buffers)


def _losses(work: StepWork, part: _Rows, carry: tuple[Array, Sums]) -> tuple[Array, Sums]:
    trunk, sums = carry
    y_BTD = read(trunk, part.in_buffers, part.num_rows, trunk.shape[1])
    d_y_BTD, sums = work.losses(y_BTD, part.row, sums)
    return write(trunk, d_y_BTD, part.in_buffers), sums


def _embed_grads(work: StepWork, trunk: Array, part: _Rows, sums: Sums) -> Sums:
    assert work.embed_grads
    d_x_BTD = read(trunk, part.in_buffers, part.num_rows, trunk.shape[1])
    return work.embed_grads(d_x_BTD, part.row, sums)


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
