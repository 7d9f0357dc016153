"""What one stage does with one slice: its layers forward, and backward from what forward saved.

Rematerialisation by name: a block runs with a recorder in the forward pass and with a replayer in
the backward pass, which returns the saved value and routes the gradient to the recomputed one, so
that XLA drops the computation.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from tpipe_jax.attention import KVCache, attend, attend_backward
from tpipe_jax.inplace import Position, read, run_if, write
from tpipe_jax.model import BlockFunctions, Params

LayerState = TypeVar("LayerState")


UNDIVIDED = ("x", "middle")  # saved values that all devices of 'model' hold; they divide the others


class Saved(NamedTuple):
    """What the backward pass of a layer needs of its forward pass, whatever the slices."""

    cache: KVCache
    values: dict[str, Array]
    """x, middle `[B, T, D]`, q, attn `[B, H, T, K]`, lse `[B, H, T, 1]` and hidden `[B, T, F]`."""


class Gradients(NamedTuple):
    """What the backward pass of one layer has summed up so far, float32."""

    cache: KVCache
    params: Params


class Stage(NamedTuple):
    """The layers of one stage; a layer that only some stages have is skipped on the others."""

    block: BlockFunctions
    params: list[Params]
    num_active: Array | int
    """How many of `params` are layers of this stage, a run-time scalar; the others are padding."""
    min_active: int
    """The least `num_active` of all stages: these layers need no condition."""

    def infer(
        self, x_BLD: Array, at: Position, caches: list[KVCache]
    ) -> tuple[Array, list[KVCache]]:
        """Runs a slice and keeps nothing but its keys and values."""

        def layer(n: int, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
            y_BLD, cache, _ = self._layer(n, *carry, at)
            return y_BLD, cache

        return self._each_layer(layer, x_BLD, caches)

    def forward(self, x_BLD: Array, at: Position, saved: list[Saved]) -> tuple[Array, list[Saved]]:
        """Runs a slice and saves what its backward pass needs."""

        def layer(n: int, carry: tuple[Array, Saved]) -> tuple[Array, Saved]:
            x_BLD, (cache, buffers) = carry
            y_BLD, cache, values = self._layer(n, x_BLD, cache, at)
            return y_BLD, Saved(
                cache, {name: write(buffers[name], values[name], at) for name in buffers}
            )

        return self._each_layer(layer, x_BLD, saved)

    def backward(
        self, saved: list[Saved], d_y_BLD: Array, at: Position, gradients: list[Gradients]
    ) -> tuple[Array, list[Gradients]]:
        """Walks back through the layers; the slices of a sequence must come in descending order."""
        B, L, _ = d_y_BLD.shape

        def layer(n: int, carry: tuple[Array, Gradients]) -> tuple[Array, Gradients]:
            d_y_BLD, (d_cache, d_params) = carry
            params, (cache, buffers) = self.params[n], saved[n]
            values = {name: read(buffer, at, B, L) for name, buffer in buffers.items()}
            x_BLD, attn_BHLK = values["x"], values["attn"]

            def replay(name: str, value: Array) -> Array:
                return _substitute(value, values[name])

            def finish(params: Params, x_BLD: Array, attn_BHLK: Array) -> Array:
                return self.block.finish(params, x_BLD, attn_BHLK, replay)

            _, finish_vjp = jax.vjp(finish, params, x_BLD, attn_BHLK)
            d_params_finish, d_x_finish, d_attn_BHLK = finish_vjp(d_y_BLD)
            d_q, d_cache = attend_backward(
                values["q"], cache, at, attn_BHLK, values["lse"], d_attn_BHLK, d_cache
            )
            d_qkv = jnp.stack([d_q, *(read(d, at, B, L).astype(d_q.dtype) for d in d_cache)])
            _, qkv_vjp = jax.vjp(self.block.qkv, params, x_BLD)
            d_params_qkv, d_x_qkv = qkv_vjp(d_qkv)
            d_params = jax.tree.map(
                lambda total, a, b: total + a + b, d_params, d_params_finish, d_params_qkv
            )
            return d_x_finish + d_x_qkv, Gradients(d_cache, d_params)

        return self._each_layer(layer, d_y_BLD, gradients, reverse=True)

    def _layer(
        self, n: int, x_BLD: Array, cache: KVCache, at: Position
    ) -> tuple[Array, KVCache, dict[str, Array]]:
        q, k, v = self.block.qkv(self.params[n], x_BLD)
        cache = KVCache(write(cache.k, k, at), write(cache.v, v, at))
        attn, lse = attend(q, cache, at)
        values = {"x": x_BLD, "q": q, "attn": attn, "lse": lse}
        y_BLD = self.block.finish(
            self.params[n], x_BLD, attn, lambda name, value: values.setdefault(name, value)
        )
        return y_BLD, cache, values

    def _each_layer(
        self,
        layer: Callable[[int, tuple[Array, LayerState]], tuple[Array, LayerState]],
        x_BLD: Array,
        states: list[LayerState],
        reverse: bool = False,
    ) -> tuple[Array, list[LayerState]]:
        states, order = list(states), range(len(self.params))
        for n in reversed(order) if reverse else order:
            run, carry = partial(layer, n), (x_BLD, states[n])
            if n < self.min_active:
                x_BLD, states[n] = run(carry)
            else:
                x_BLD, states[n] = run_if(n < self.num_active, run, carry)
        return x_BLD, states


def empty_caches(num_layers: int, shape_BHTK: tuple[int, ...], dtype: jnp.dtype) -> list[KVCache]:
    """Zeroed keys and values of every layer, or gradients with respect to them."""
    return [
        KVCache(jnp.zeros(shape_BHTK, dtype), jnp.zeros(shape_BHTK, dtype))
        for _ in range(num_layers)
    ]


def empty_saved(
    num_layers: int, shape_BHTK: tuple[int, ...], ff_width: int, dtype: jnp.dtype
) -> list[Saved]:
    """Zeroed buffers of every layer."""
    B, H, T, K = shape_BHTK

    def values() -> dict[str, Array]:
        shapes = {"x": (B, T, H * K), "q": (B, H, T, K), "attn": (B, H, T, K), "lse": (B, H, T, 1)}
        shapes |= {"middle": (B, T, H * K), "hidden": (B, T, ff_width)}
        return {
            name: jnp.zeros(s, jnp.float32 if name == "lse" else dtype)
            for name, s in shapes.items()
        }

    return [Saved(cache, values()) for cache in empty_caches(num_layers, shape_BHTK, dtype)]


@jax.custom_vjp
def _substitute(value: Array, saved: Array) -> Array:
    """The saved value, with its gradient routed to `value`."""
    return saved


_substitute.defvjp(
    lambda value, saved: (saved, None), lambda _, gradient: (gradient, jnp.zeros_like(gradient))
)
