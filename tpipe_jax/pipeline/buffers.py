"""The buffers of a stage between slices: attention caches, saved values, gradients."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tpipe_jax.attention.base import KVCache
from tpipe_jax.model.block import Params

# When a stage computes the gradients of weights: how long after the backward pass of a slice.
WeightGrads = Literal["at once", "some ticks later", "at the end"]
# Saved values that every device of 'model' holds whole; these devices divide all other values.
UNDIVIDED = ("x", "middle", "out", "norm_1", "norm_2")


class Saved(NamedTuple):
    """The values that a layer saves in its forward pass for its backward pass, for any slices."""

    cache: KVCache
    values: dict[str, Array]
    """The input x `[B, T, D]`, and by name the values that are not computed again: q
    `[B, G H, T, K]`, attn `[B, T, G H K]` with its log-sum-exp lse `[B, G H, T, 1]`, and other
    values of the block `[B, T, width]`."""


class Gradients(NamedTuple):
    """The gradients that the backward passes of one layer have computed so far."""

    cache: KVCache
    """Gradients with respect to keys and values, float32 sums, for the sequences that go backward
    at the same time."""
    params: Params
    """Gradients of the parameters, float32 sums; without the linear layers if the gradients of
    their weights are left for the end."""
    d_outputs: dict[str, Array]
    """Gradients with respect to the outputs of linear layers, if the gradients of their weights
    are deferred; otherwise empty. `[B, T, ...]`, or the rows and tokens of slots."""


def empty_caches(num_layers: int, shape_BHTK: tuple[int, ...], dtype: jnp.dtype) -> list[KVCache]:
    """Returns zeros for the keys and values of every layer, or for their gradients."""
    return [
        KVCache(jnp.zeros(shape_BHTK, dtype), jnp.zeros(shape_BHTK, dtype))
        for _ in range(num_layers)
    ]


def empty_saved(
    caches: list[KVCache], widths: Mapping[str, int], num_queries: int, names: Sequence[str]
) -> list[Saved]:
    """Returns zeroed buffers of every layer, for its input and for each value in `names` that the
    layer has.

    `widths` are the widths of the input x and of the block's own values; `num_queries` is the
    number of heads of queries.
    """

    def values(cache: KVCache) -> dict[str, Array]:
        B, _, T, K = cache.k.shape
        shapes = {name: (B, T, width) for name, width in widths.items()}
        shapes |= {"attn": (B, T, num_queries * K), "q": (B, num_queries, T, K)}
        kept = [name for name in ("x", *names) if name in shapes]
        own = {name: jnp.zeros(shapes[name], cache.k.dtype) for name in kept}
        return own | ({"lse": jnp.zeros((B, num_queries, T, 1))} if "attn" in kept else {})

    return [Saved(cache, values(cache)) for cache in caches]


def empty_gradients(
    d_caches: list[KVCache],
    block_shapes: Params,
    linears: Mapping[str, tuple[str, str]],
    weight_grads: WeightGrads,
    outputs: tuple[int, int],
    dtype: jnp.dtype,
) -> list[Gradients]:
    """Returns zeroed sums of every layer and, if gradients of weights are deferred, buffers for the
    gradients with respect to the outputs of linear layers.

    `block_shapes` is the tree of a block's parameters, as arrays or shapes. `outputs` are the rows
    and tokens of those buffers.
    """

    def sums() -> Params:
        is_left = {name: weight_grads == "at the end" and name in linears for name in block_shapes}
        summed = {name: shapes for name, shapes in block_shapes.items() if not is_left[name]}
        return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), summed)

    def d_outputs() -> dict[str, Array]:
        widths = {name: block_shapes[n]["kernel"].shape[-1] for n, (_, name) in linears.items()}
        return {name: jnp.zeros((*outputs, width), dtype) for name, width in widths.items()}

    is_deferred = weight_grads != "at once"
    return [Gradients(d, sums(), d_outputs() if is_deferred else {}) for d in d_caches]
