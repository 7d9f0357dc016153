"""What a stage keeps between slices: attention caches, saved values, gradients."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tpipe_jax.attention.base import KVCache
from tpipe_jax.model.block import Params

WeightGrads = Literal["at once", "some ticks later", "at the end"]  # after a backward pass
# What all devices of 'model' hold; they divide the rest.
UNDIVIDED = ("x", "middle", "out", "norm_1", "norm_2")


class Saved(NamedTuple):
    """What the backward pass of a layer needs of its forward pass, whatever the slices."""

    cache: KVCache
    values: dict[str, Array]
    """The input x `[B, T, D]`, and by name what is not computed again: q `[B, G H, T, K]`, attn
    `[B, T, G H K]` with its lse `[B, G H, T, 1]`, other values of the block `[B, T, width]`."""


class Gradients(NamedTuple):
    """What the backward pass of one layer has gathered so far."""

    cache: KVCache
    """Sums, float32, for the sequences that go backward at a time."""
    params: Params
    """Sums, float32; without those of linear layers, if these are left for the end."""
    d_outputs: dict[str, Array]
    """With respect to the outputs of linear layers, `[B, T, ...]` or rows and tokens of slots, if
    gradients of their weights are deferred; else empty."""


def empty_caches(num_layers: int, shape_BHTK: tuple[int, ...], dtype: jnp.dtype) -> list[KVCache]:
    """Zeroed keys and values of every layer, or gradients with respect to them."""
    return [
        KVCache(jnp.zeros(shape_BHTK, dtype), jnp.zeros(shape_BHTK, dtype))
        for _ in range(num_layers)
    ]


def empty_saved(
    caches: list[KVCache], widths: Mapping[str, int], num_queries: int, names: Sequence[str]
) -> list[Saved]:
    """Zeroed buffers of every layer for its input and those of the named values that it has.

    `widths` are those of the input x and of the block's own values, and `num_queries` the heads.
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
    """Zeroed sums of every layer, and buffers with so many rows and tokens for what linear layers
    give back; `block_shapes` is a tree of what has a shape.
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
