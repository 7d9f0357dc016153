"""Sums and other exchanges between the devices of a mesh, for code of one device."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

Tree = TypeVar("Tree")


def varying(tree: Tree, axes: Sequence[str] = ("data", "pipe")) -> Tree:
    """Tells jax that arrays may differ along these mesh axes. The initial carry of a loop needs
    this.
    """

    def cast(a: Array) -> Array:
        missing = tuple(sorted(set(axes) - set(jax.typeof(a).manual_axis_type.varying)))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, tree)


def varying_like(value: Array, others: Sequence[Array]) -> Array:
    """Tells jax that a value may differ along all mesh axes along which one of the others may."""
    axes = {axis for other in others for axis in jax.typeof(other).manual_axis_type.varying}
    return varying(value, sorted(axes))


def needs_sums(mesh: Mesh | AbstractMesh) -> bool:
    """Whether programs sum over 'data' and 'pipe'.

    XLA (jax 0.10) refuses such a sum if 'data' and 'pipe' both have one device and 'model' has
    several. In this case programs also switch off jax's check that values which may differ between
    devices are summed (`check_vma`).
    """
    sizes = mesh.shape
    return sizes["data"] * sizes["pipe"] > 1 or sizes["model"] == 1


def psum(tree: Tree, axes: str | tuple[str, ...]) -> Tree:
    """Returns the sum over axes of the mesh."""
    return lax.psum(tree, axes) if needs_sums(jax.sharding.get_abstract_mesh()) else tree


def pmax(value: Array, axis: str) -> Array:
    """Returns the largest value along an axis of the mesh."""
    return lax.pmax(value, axis) if needs_sums(jax.sharding.get_abstract_mesh()) else value


def sum_over_stages(value: Array) -> Array:
    """Returns the sum over 'pipe', computed in float32, in the dtype of `value`.

    XLA for CPUs, as of jax 0.10, aborts on an all-reduce of bfloat16 over a manual axis.
    """
    total = _in_parts(partial(psum, axes="pipe"), value.astype(jnp.float32))
    return total.astype(value.dtype)


def from_stage(stage: int, value: Array) -> Array:
    """Returns the value of one stage, on all stages; -1 means the last stage."""
    stage %= lax.axis_size("pipe")
    return sum_over_stages(jnp.where(lax.axis_index("pipe") == stage, value, 0))


def handed_on(value: Array, pairs: Sequence[tuple[int, int]]) -> Array:
    """Returns what the giver in `pairs` (giver, taker) of stages has as `value`; zeros where none
    gives.
    """
    return _in_parts(partial(lax.ppermute, axis_name="pipe", perm=pairs), value)


def _in_parts(exchange: Callable[[Array], Array], value: Array) -> Array:
    """Returns `exchange(value)`, for an exchange between stages that treats all elements alike.

    The devices that share operators hold the same value. Each of them exchanges one part of it, and
    then they put the parts together. So the value crosses a network between hosts once, and not
    once for each of these devices. What has only a number for each token, `[B, L]`, is exchanged
    whole, since a further exchange would take longer.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    num_parts = sizes["model"]
    if num_parts == 1 or sizes["pipe"] == 1 or value.ndim < 3 or value.size % num_parts:
        return exchange(value)

    def exchange_part(value: Array) -> Array:
        parts = value.reshape(num_parts, -1)
        return exchange(lax.dynamic_slice_in_dim(parts, lax.axis_index("model"), 1))

    whole, parts = PartitionSpec(None), PartitionSpec("model", None)
    # By hand: GSPMD would divide the value where it is made, and exchange parts of it there.
    divided = jax.shard_map(exchange_part, axis_names={"model"}, in_specs=whole, out_specs=parts)
    return lax.with_sharding_constraint(divided(value), whole).reshape(value.shape)
