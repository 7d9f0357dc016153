"""The sliced pipeline: a scan over ticks in which every stage works on its own item and hands the
result to its neighbour.

    tick t:  [stage 0: item 3] -> [stage 1: item 2] -> [stage 2: item 1]      -> is a ppermute

This is code of one device inside `shard_map`, with the axis 'pipe' manual. The table of the
schedule says what to do at each tick; items of one shape share one compiled body, since their
position is a run-time value. What a stage keeps between items (attention caches, saved activations,
sums of gradients) is the state that the scan carries and updates in place.

Forward and backward passes are the same sweep with the stages in opposite order. There is no
differentiation through the scan, which would keep a copy of the state for every tick.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh

from tpipe_jax.inplace import Position, read, run_if, write
from tpipe_jax.schedule import IDLE, Item

State = TypeVar("State")
Carry = tuple[State, Array, Array]  # state, trunk, and the box that goes round the stages
Work = Callable[[Array, Position, State], tuple[Array, State]]


def varying(tree: State, axes: Sequence[str] = ("data", "pipe")) -> State:
    """Marks arrays as different along the axes, as the carry of a loop must be from the start."""

    def cast(a: Array) -> Array:
        missing = tuple(sorted(set(axes) - set(jax.typeof(a).manual_axis_type.varying)))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, tree)


def needs_sums(mesh: Mesh | AbstractMesh) -> bool:
    """Whether to sum over 'data' and 'pipe'.

    XLA (jax 0.10) refuses such a sum where none of them has several devices and 'model' has. The
    type system, which asks for sums where values may differ, is switched off there.
    """
    sizes = mesh.shape
    return sizes["data"] * sizes["pipe"] > 1 or sizes["model"] == 1


def psum(tree: State, axes: str | tuple[str, ...]) -> State:
    """The sum over axes of the mesh."""
    return lax.psum(tree, axes) if needs_sums(jax.sharding.get_abstract_mesh()) else tree


def pmax(value: Array, axis: str) -> Array:
    """The largest along an axis of the mesh."""
    return lax.pmax(value, axis) if needs_sums(jax.sharding.get_abstract_mesh()) else value


def sum_over(axis: str, value: Array) -> Array:
    """The sum over an axis of the mesh, taken in float32 and returned in the dtype of `value`.

    XLA for CPUs, as of jax 0.10, aborts on an all-reduce of bfloat16 over a manual axis.
    """
    return psum(value.astype(jnp.float32), axis).astype(value.dtype)


def from_stage(stage: int, value: Array) -> Array:
    """The value that one stage has, on all stages; -1 is the last stage."""
    stage %= lax.axis_size("pipe")
    return sum_over("pipe", jnp.where(lax.axis_index("pipe") == stage, value, 0))


def sweep(
    table: np.ndarray | Array,
    items: Sequence[Item],
    work: Work,
    trunk_BTD: Array,
    state: State,
    *,
    reverse: bool = False,
) -> tuple[Array, State]:
    """Sends all items of a batch through all stages.

    Args:
        table: `[tick, stage]`, the index of the item or IDLE; a run-time value if it is an Array.
        items: what the indices stand for.
        work: what a stage does: `(x [B, L, D], position, state)` to `(y [B, L, D], state)`.
        trunk_BTD: what the items are cut from on the stage where they enter.
        state: what this stage keeps between items, a tree of arrays.
        reverse: whether items enter at the last stage and leave at the first.

    Returns:
        What `work` has made of each item on this stage, `[B, T, D]`, which takes the place of the
        trunk: the result of the sweep on the stage where the items leave. And the state.
    """
    chex.assert_rank([table, trunk_BTD], [2, 3])
    num_stages, D = table.shape[1], trunk_BTD.shape[-1]
    entry, step = (num_stages - 1, -1) if reverse else (0, 1)
    neighbours = [(s, s + step) for s in range(num_stages) if 0 <= s + step < num_stages]
    stage = lax.axis_index("pipe")
    shapes = sorted({item.shape for item in items})
    shape_of = jnp.array([shapes.index(item.shape) for item in items])
    row_of = jnp.array([item.row for item in items])
    token_of = jnp.array([item.token for item in items])

    def run(shape: tuple[int, int], at: Position, carry: Carry) -> Carry:
        state, trunk_BTD, box_BLD = carry
        B, L = shape
        x_BLD = jnp.where(stage == entry, read(trunk_BTD, at, B, L), box_BLD[:B, :L])
        y_BLD, state = work(x_BLD, at, state)
        return state, write(trunk_BTD, y_BLD, at), write(box_BLD, y_BLD, Position(0, 0))

    def tick(carry: Carry, row: Array) -> tuple[Carry, None]:
        index = row[stage]
        at = Position(row_of[index], token_of[index])
        for kind, shape in enumerate(shapes):
            is_due = (index != IDLE) & (shape_of[index] == kind)
            carry = run_if(is_due, partial(run, shape, at), carry)
        state, trunk_BTD, box_BLD = carry
        if neighbours:
            box_BLD = lax.ppermute(box_BLD, "pipe", neighbours)
        return (state, trunk_BTD, box_BLD), None

    longest = max(B for B, _ in shapes), max(L for _, L in shapes)
    box_BLD = jnp.zeros((*longest, D), trunk_BTD.dtype)
    # Without the barrier XLA would see that stages are idle, and drop what the profiler times.
    rows = lax.optimization_barrier(jnp.asarray(table))
    (state, trunk_BTD, _), _ = lax.scan(tick, varying((state, trunk_BTD, box_BLD)), rows)
    return trunk_BTD, state
