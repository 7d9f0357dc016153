"""Sums and other exchanges between the devices of a mesh, for code of one device."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh

Tree = TypeVar("Tree")


def varying(tree: Tree, axes: Sequence[str] = ("data", "pipe")) -> Tree:
    """Tells jax that arrays may differ along these mesh axes. The initial carry of a loop needs
    this.
    """

    def cast(a: Array) -> Array:
        missing = tuple(sorted(set(axes) - set(jax.typeof(a).manual_axis_type.varying)))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, tree)


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


def sum_over(axis: str, value: Array) -> Array:
    """Returns the sum over an axis of the mesh, computed in float32, in the dtype of `value`.

    XLA for CPUs, as of jax 0.10, aborts on an all-reduce of bfloat16 over a manual axis.
    """
    return psum(value.astype(jnp.float32), axis).astype(value.dtype)


def from_stage(stage: int, value: Array) -> Array:
    """Returns the value of one stage, on all stages; -1 means the last stage."""
    stage %= lax.axis_size("pipe")
    return sum_over("pipe", jnp.where(lax.axis_index("pipe") == stage, value, 0))
