"""The buffers of a stage between slices: attention caches, saved values, gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tpipe_jax.attention.base import KVCache
from tpipe_jax.model.block import Params
from tpipe_jax.pipeline.balance import Routing, no_routing
from tpipe_jax.pipeline.packing import JoinedBiases, Packing, join_biases

# When a stage computes the gradients of weights: how long after the backward pass of a slice.
WeightGrads = Literal["at once", "some ticks later", "at the end"]
# Saved values that every device of 'model' holds whole; these devices divide all other values.
UNDIVIDED = ("x", "middle", "out", "norm_1", "norm_2", "router")


class Saved(NamedTuple):
    """The values that a layer saves in its forward pass for its backward pass, for any slices."""

    cache: KVCache
    values: dict[str, Array]
    """The input x `[B, T, D]`, and the values that are not computed again: q and attn
    `[B, T, G H K]`, other values of the block `[B, T, width]`, all of these as a `Packing` joins
    them, and lse `[B, T, G H]`, the log-sum-exp that belongs to attn."""
    routing: Routing | None = None
    """What is known of a router's choices, if there is a balance loss."""


class Gradients(NamedTuple):
    """The gradients that the backward passes of one layer have computed so far."""

    cache: KVCache
    """Gradients with respect to keys and values, float32 sums, for the sequences that go backward
    at the same time."""
    params: Params | JoinedBiases
    """Gradients of the parameters, float32 sums; without the linear layers if the gradients of
    their weights are left for the end."""
    d_outputs: dict[str, Array]
    """Gradients with respect to the outputs of linear layers, if the gradients of their weights
    are deferred; otherwise empty. `[B, T, ...]`, or the rows and tokens of slots."""


def empty_caches(num_layers: int, shape: tuple[int, ...], dtype: jnp.dtype) -> list[KVCache]:
    """Returns zeros for the keys and values of every layer, or for their gradients."""
    return [KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(num_layers)]


def empty_saved(
    caches: list[KVCache],
    packing: Packing,
    num_queries: int,
    make: Callable[[tuple[int, ...], Any], Array] = lax.empty,
    num_experts: int = 0,
) -> list[Saved]:
    """Returns buffers of every layer, for the values of the packing, made by `make(shape, dtype)`.
    `num_queries` is the number of heads of queries, `num_experts` that of experts with a balance
    loss.
    """

    def values(cache: KVCache) -> dict[str, Array]:
        B, T = cache.k.shape[0], cache.k.shape[-2]
        own = {n: make((B, T, w), cache.k.dtype) for n, w in packing.shapes.items()}
        has_attn = any("attn" in group for group in packing.groups)
        return own | ({"lse": make((B, T, num_queries), jnp.float32)} if has_attn else {})

    routing = no_routing(num_experts) if num_experts else None
    return [Saved(cache, values(cache), routing) for cache in caches]


def routings(saved: Any) -> list[Routing]:
    """Returns what is known of the router of each layer."""
    return [layer.routing for layer in saved]


def with_routings(saved: Any, routing: Sequence[Routing]) -> Any:
    """Returns the saved values with this of each layer's router."""
    return [layer._replace(routing=own) for layer, own in zip(saved, routing, strict=True)]


def empty_gradients(
    d_caches: list[KVCache],
    block_shapes: Params,
    linears: Mapping[str, tuple[str, str]],
    weight_grads: WeightGrads,
    outputs: tuple[int, int],
    dtype: jnp.dtype,
    joins_biases: bool,
) -> list[Gradients]:
    """Returns zeroed sums of every layer and, if gradients of weights are deferred, buffers for the
    gradients with respect to the outputs of linear layers.

    `block_shapes` is the tree of a block's parameters, as arrays or shapes. `outputs` are the rows
    and tokens of those buffers.
    """

    def sums() -> Params | JoinedBiases:
        is_left = {name: weight_grads == "at the end" and name in linears for name in block_shapes}
        summed = {name: shapes for name, shapes in block_shapes.items() if not is_left[name]}
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), summed)
        return join_biases(linears, zeros) if joins_biases else zeros

    def d_outputs() -> dict[str, Array]:
        widths = {name: block_shapes[n]["kernel"].shape[-1] for n, (_, name) in linears.items()}
        return {name: jnp.zeros((*outputs, width), dtype) for name, width in widths.items()}

    is_deferred = weight_grads != "at once"
    return [Gradients(d, sums(), d_outputs() if is_deferred else {}) for d in d_caches]
