"""The sliced pipeline: a scan over ticks. In each tick every stage works on its own item and hands
the result to its neighbour.

    tick t:  [stage 0: item 3] -> [stage 1: item 2] -> [stage 2: item 1]      -> is a ppermute

This is code of one device inside `shard_map`, with the axis 'pipe' manual. The tables of the
schedule say which item each stage works on in each tick. Items of the same shape share one compiled
body, since their position is a run-time value. The scan carries the state of the stage from item to
item (attention caches, saved activations, sums of gradients) and updates it in place.

The forward and the backward lane are the same code with the stages in opposite order. Where stages
have several chunks of layers, the last stage hands its result to the first stage, which goes on
with the next chunk. `execute` follows a schedule, with both lanes in a tick; `sweep` runs one lane
alone. The scan is never differentiated, since that would keep a copy of the state for every tick.
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
from tpipe_jax.devices.inplace import Position, read, write
from tpipe_jax.devices.scopes import BACKWARD, FORWARD, WHOLE_BATCH
from tpipe_jax.devices.skips import CONDITIONALS, Skips
from tpipe_jax.pipeline.balance import Routing
from tpipe_jax.pipeline.buffers import routings, with_routings
from tpipe_jax.pipeline.lane import Carry, ItemShape, ItemWork, Lane, State
from tpipe_jax.planning.schedule import IDLE, Item, Part, Schedule

SavedT = TypeVar("SavedT")
GradientsT = TypeVar("GradientsT")
SumsT = TypeVar("SumsT")


class StepWork(NamedTuple):
    """The functions that `execute` calls. Their argument `row` is the first sequence of a part of
    the batch.
    """

    embed: Callable[[Array | int, int], Array]
    """`(row, num_rows)` to `x [b, T, D]`, the input of the first stage."""
    forward: ItemWork
    """`(chunk, x [B, L, D], position, saved)` to `(y [B, L, D], saved)`."""
    losses: Callable[[Array, Array | int, Any], tuple[Array, Any]]
    """`(y [b, T, D], row, sums)` to `(d_y [b, T, D], sums)`: the input of the backward pass on the
    last stage, and the sums with the losses added. y is read on the last stage only."""
    backward: Callable[[Any, int, Array, Position, Any], tuple[Array, Any]] | None = None
    """`(saved, chunk, d_y [B, L, D], position, gradients)` to `(d_x [B, L, D], gradients)`."""
    weights: Callable[[Any, Any, Any], Any] | None = None
    """`(each, saved, gradients)` to `gradients`, with the gradients of weights of some slices added
    where backward passes leave these out. `each(function, state)` calls `function(chunk, (B, L),
    position, state)` for each of these slices.
    """
    balance: Callable[[list[Routing]], list[Routing]] | None = None
    """What all stages do together once the whole batch has gone forward, with the routing of their
    layers, if there is a balance loss."""
    embed_grads: Callable[[Array, Array | int, Any], Any] | None = None
    """`(d_x [b, T, D], row, sums)` to the sums with the gradients of the embedding added. d_x is
    read on the first stage only."""


def execute(
    schedule: Schedule,
    work: StepWork,
    trunk_RTD: Array,
    saved: SavedT,
    gradients: GradientsT,
    sums: SumsT,
    skips: Skips = CONDITIONALS,
) -> tuple[SavedT, GradientsT, SumsT]:
    """Follows a schedule that `schedule_check.check` accepts. Returns the new `saved`, `gradients`
    and `sums`.

    Args:
        trunk_RTD: a buffer with one row for each sequence in the pipeline
            (R = `schedule.num_rows`). The embedding is written to it. Each stage replaces its input
            by its output, forward and backward. Between the two, the gradients of the losses
            replace the output.
        saved: buffers that the forward passes fill and the backward passes read.
        gradients: buffers that the backward passes fill.
        sums: sums that all stages compute together.
        skips: how work is skipped in ticks in which it is not due.
    """
    if not schedule.has_passes:  # XLA must not see that gradients are zeros
        gradients = lax.optimization_barrier(gradients)
    slot_rows = None if schedule.slots is None else schedule.longest_shape[0] * schedule.slots
    in_sweeps = _runs_in_sweeps(schedule, skips)
    forward, backward = (
        Lane(
            *(schedule.items, schedule.buffer_rows, schedule.num_stages, reverse, slot_rows),
            skips,
            may_idle=not in_sweeps or schedule.num_stages > 1,
        )
        for reverse in (False, True)
    )
    if in_sweeps:
        lanes = forward, backward
        return _execute_in_sweeps(schedule, work, lanes, trunk_RTD, saved, gradients, sums)

    on_part = partial(_on_part, skips, schedule.parts)

    def tick(carry, row):
        trunk, ahead, back, saved, gradients, sums = carry
        trunk = on_part(row["embed"], partial(_embed, work), trunk)
        if schedule.has_passes:
            with jax.named_scope(FORWARD):
                saved, trunk, ahead = skips.run_on_all_if(
                    row["any_forward"],
                    partial(forward.tick, work.forward, row["forward"]),
                    (saved, trunk, ahead),
                )
        trunk, sums = on_part(row["losses"], partial(_losses, work), (trunk, sums))
        if work.balance:
            routing = on_part(row["losses"], partial(_balance, work), routings(saved))
            saved = with_routings(saved, routing)
        if work.backward and schedule.has_passes:
            with jax.named_scope(BACKWARD):
                gradients, trunk, back = skips.run_on_all_if(
                    row["any_backward"],
                    partial(backward.tick, partial(work.backward, saved), row["backward"]),
                    (gradients, trunk, back),
                )
        if work.embed_grads:
            sums = on_part(row["embed_grads"], partial(_embed_grads, work, trunk), sums)
        if "weights" in row:  # last, since the next tick overwrites the values that they need
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


def _runs_in_sweeps(schedule: Schedule, skips: Skips) -> bool:
    """Whether all items go forward, then all backward, in a loop each. A loop over a single item
    would be unrolled by XLA, and gradients of weights may be due in any tick.
    """
    has_batch = len(schedule.parts) == 1 and schedule.weights is None and len(schedule.items) > 1
    return has_batch and (schedule.num_stages == 1 or skips.in_sweeps)


def _execute_in_sweeps(
    schedule: Schedule,
    work: StepWork,
    lanes: tuple[Lane, Lane],
    trunk: Array,
    saved: SavedT,
    gradients: GradientsT,
    sums: SumsT,
) -> tuple[SavedT, GradientsT, SumsT]:
    """As `execute`, for a schedule that has the whole batch at once: all items forward, the losses,
    and all items backward. No tick has to find out which of these it is, for which a GPU would ask
    the host.
    """
    [part] = schedule.parts
    rows = _Rows(part.row, part.num_rows, Position(part.buffer_row, 0))
    packets = [lane.empty_packet(trunk.shape[-1], trunk.dtype) for lane in lanes]
    (saved, trunk, gradients, *packets) = varying((saved, trunk, gradients, *packets))

    def ticks(lane: Lane, item_work: ItemWork, table: np.ndarray, carry: Carry) -> Carry:
        own = table[(table != IDLE).any(1)]
        return lax.scan(lambda c, row: (lane.tick(item_work, row, c), None), carry, _kept(own))[0]

    with jax.named_scope(WHOLE_BATCH):
        trunk = _embed(work, rows, trunk)
    with jax.named_scope(FORWARD):
        carry = saved, trunk, packets[0]
        saved, trunk, _ = ticks(lanes[0], work.forward, schedule.forward, carry)
    with jax.named_scope(WHOLE_BATCH):
        trunk, sums = _losses(work, rows, (trunk, sums))
        if work.balance:
            saved = with_routings(saved, _balance(work, rows, routings(saved)))
    if work.backward:
        with jax.named_scope(BACKWARD):
            carry = gradients, trunk, packets[1]
            item_work = partial(work.backward, saved)
            gradients, trunk, _ = ticks(lanes[1], item_work, schedule.backward, carry)
    if work.embed_grads:
        with jax.named_scope(WHOLE_BATCH):
            sums = _embed_grads(work, trunk, rows, sums)
    return saved, gradients, sums


def _tick_rows(schedule: Schedule, is_training: bool) -> dict[str, np.ndarray]:
    """The tables that `execute` scans over, by name, with one row a tick."""
    rows = {
        "embed": schedule.parts_at(lambda part: part.embed_tick),
        "forward": schedule.forward,
        "any_forward": (schedule.forward != IDLE).any(1),
        "losses": schedule.parts_at(lambda part: part.loss_tick),
    }
    if not is_training:  # all ticks after the last losses are backward
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
    skips: Skips = CONDITIONALS,
) -> State:
    """Calls `function(chunk, (B, L), position, state)` for each item of a table `[tick, stage, n]`,
    as `execute` does for gradients of weights. Returns the state.
    """
    lane = Lane(items, [item.row for item in items], table.shape[1], skips=skips)

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
    skips: Skips = CONDITIONALS,
) -> tuple[Array, State]:
    """Sends all items of a batch through all stages in one direction.

    Args:
        table: `[tick, stage]`, the index of the item or IDLE; a run-time value if it is an Array.
        items: the items that the indices stand for.
        work: the work of a stage, `(chunk, x [B, L, D], position, state)` to
            `(y [B, L, D], state)`.
        trunk_BTD: the input of the sweep; the stage where items enter reads each item from it.
        state: the state of this stage between items, a tree of arrays.
        reverse: whether items enter at the last stage and leave at the first.
        skips: how stages that idle skip the work.

    Returns:
        The outputs of `work` on this stage, `[B, T, D]`, which replace the trunk, and the state. On
        the stage where items leave, these outputs are the result of the sweep.
    """
    chex.assert_rank([table, trunk_BTD], [2, 3])
    lane = Lane(items, [item.row for item in items], table.shape[1], reverse, skips=skips)

    def tick(carry: Carry, row: Array) -> tuple[Carry, None]:
        return lane.tick(work, row, carry), None

    packet_BLD = lane.empty_packet(trunk_BTD.shape[-1], trunk_BTD.dtype)
    start = varying((state, trunk_BTD, packet_BLD))
    (state, trunk_BTD, _), _ = lax.scan(tick, start, _kept(jnp.asarray(table)))
    return trunk_BTD, state


class _Rows(NamedTuple):
    """A part of the batch. Its number of rows is known when the program is compiled."""

    row: Array | int
    num_rows: int
    in_buffers: Position


def _embed(work: StepWork, part: _Rows, trunk: Array) -> Array:
    return write(trunk, work.embed(part.row, part.num_rows), part.in_buffers)


def _losses(work: StepWork, part: _Rows, carry: tuple[Array, SumsT]) -> tuple[Array, SumsT]:
    trunk, sums = carry
    y_BTD = read(trunk, part.in_buffers, part.num_rows, trunk.shape[1])
    d_y_BTD, sums = work.losses(y_BTD, part.row, sums)
    return write(trunk, d_y_BTD, part.in_buffers), sums


def _balance(work: StepWork, part: _Rows, routing: list[Routing]) -> list[Routing]:
    assert work.balance
    return work.balance(routing)


def _embed_grads(work: StepWork, trunk: Array, part: _Rows, sums: SumsT) -> SumsT:
    assert work.embed_grads
    d_x_BTD = read(trunk, part.in_buffers, part.num_rows, trunk.shape[1])
    return work.embed_grads(d_x_BTD, part.row, sums)


def _on_part(
    skips: Skips,
    parts: Sequence[Part],
    index: Array,
    function: Callable[[_Rows, State], State],
    state: State,
) -> State:
    """Calls `function(part, state)` on all devices for the part with this index. Returns the state,
    unchanged for IDLE.
    """
    if len(parts) == 1:  # known rows: XLA need not copy the buffer to read all of it
        [part] = parts
        rows = _Rows(part.row, part.num_rows, Position(part.buffer_row, 0))
        return skips.run_on_all_if(index != IDLE, partial(function, rows), state)
    places = jnp.array([(part.row, part.buffer_row, part.num_rows) for part in parts])
    row, buffer_row, num_rows = places[index]
    for size in sorted({part.num_rows for part in parts}):
        rows = _Rows(row, size, Position(buffer_row, 0))
        is_due = (index != IDLE) & (num_rows == size)
        state = skips.run_on_all_if(is_due, partial(function, rows), state)
    return state


def _kept(rows: State) -> State:
    """Returns the tables behind a barrier. Without it XLA would see that stages are idle, and leave
    out the work that the profiler times.
    """
    return lax.optimization_barrier(jax.tree.map(jnp.asarray, rows))
