"""The work of one stage on one slice: its layers forward, and backward from the saved values.

Rematerialisation goes by name. In the forward pass a block runs with a tape that records its named
values. In the backward pass it runs with a tape that returns the saved value instead of the
recomputed one and routes the gradient to the recomputed one. So XLA drops the recomputation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from tpipe_jax.attention.base import Attention, KVCache, Slice
from tpipe_jax.devices.inplace import Position, in_shared_rows, read, write
from tpipe_jax.devices.skips import CONDITIONALS, Skips
from tpipe_jax.model.block import Params, merge_heads, split_heads
from tpipe_jax.model.functional import BlockFunctions
from tpipe_jax.pipeline.balance import add_choices, with_balance
from tpipe_jax.pipeline.buffers import Gradients, Saved
from tpipe_jax.pipeline.linears import linear_gradients
from tpipe_jax.pipeline.packing import JoinedBiases, Packing, split_biases, sum_of_outputs
from tpipe_jax.pipeline.replay import substitute, tap
from tpipe_jax.planning.context_blocks import query_block

LayerState = TypeVar("LayerState")
Value = TypeVar("Value")

OWN = ("x", "q", "attn", "lse")  # values of the stage; the others are the block's


class Chunk(NamedTuple):
    """Layers of a stage that a slice goes through one after another."""

    places: range
    """Indices of the layers in lists with one entry a layer, such as `Stage.params`."""
    num_active: Array | int
    """How many of these places are layers of this stage, a run-time scalar; the rest is padding."""
    min_active: int
    """The least `num_active` of all stages. So many layers run without a condition."""


class Stage(NamedTuple):
    """The layers of one stage.

    Stages may have different numbers of layers. All have the same number of places; a place without
    a layer is skipped.
    """

    block: BlockFunctions
    num_queries: int
    """Heads of queries."""
    attention: Attention
    params: list[Params]
    chunks: tuple[Chunk, ...]
    packing: Packing
    """How `Saved.values` has the values that are saved."""
    deferred_tokens: int
    """About as many tokens go into each product of deferred gradients of weights."""
    starts_BT1: Array | None = None
    """Where the document of each token begins in its sequence, `[B, T, 1]` int32, if documents do
    not see each other; None if they do."""
    window: int | None = None
    """Tokens that a token sees, itself included, if attention has to be told; else None."""
    num_chosen: int = 0
    """Experts that a token goes through, where a block has a router."""
    counts_BT1: Array | None = None
    """Which tokens count in the balance loss, 1 or 0, `[B, T, 1]` float32; None if all do."""
    shares_gradient_rows: bool = False
    """Whether parts of the batch go backward one after another in the same rows of
    `Gradients.cache`."""
    has_slots: bool = False
    """Whether slices wait in slots of `Gradients.d_outputs`."""
    skips: Skips = CONDITIONALS

    def infer(
        self, chunk: int, x_BLD: Array, at: Position, caches: list[KVCache]
    ) -> tuple[Array, list[KVCache]]:
        """Runs a slice forward and keeps only its keys and values."""

        def layer(n: int, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
            y_BLD, cache, _ = self._layer(n, *carry, at)
            return y_BLD, cache

        return self._each_layer(self.chunks[chunk], layer, x_BLD, caches)

    def forward(
        self, chunk: int, x_BLD: Array, at: Position, saved: list[Saved]
    ) -> tuple[Array, list[Saved]]:
        """Runs a slice forward and saves the values that its backward pass needs."""

        def layer(n: int, carry: tuple[Array, Saved]) -> tuple[Array, Saved]:
            x_BLD, (cache, buffers, routing) = carry
            y_BLD, cache, values = self._layer(n, x_BLD, cache, at)
            new = self.packing.pack(values)
            new |= {name: values[name] for name in buffers if name not in new}
            if routing is not None:
                logits_BLE = values[self.block.router_logits]
                counts_BL1 = self._counts(at, *x_BLD.shape[:2])
                routing = add_choices(routing, logits_BLE, self.num_chosen, counts_BL1)
            buffers = {name: write(buffers[name], new[name], at) for name in buffers}
            return y_BLD, Saved(cache, buffers, routing)

        return self._each_layer(self.chunks[chunk], layer, x_BLD, saved)

    def backward(
        self,
        saved: list[Saved],
        chunk: int,
        d_y_BLD: Array,
        at: Position,
        gradients: list[Gradients],
    ) -> tuple[Array, list[Gradients]]:
        """Runs a slice backward. The slices of a sequence must come in descending order."""
        B, L, _ = d_y_BLD.shape
        cache = gradients[0].cache
        if self.shares_gradient_rows:  # the rows may still hold another sequence's gradients
            is_first = at.token + L == cache.k.shape[-2]
            d_at = in_shared_rows(at._replace(token=0), cache.k, len(saved[0].cache.k))
            zeroed = partial(_with_zeroed_cache, d_at, B)
            # As one of two pieces: a conditional alone would copy what it leaves as it is.
            gradients = self.skips.run_if(is_first, zeroed, gradients, num_pieces=2)

        def layer(n: int, carry: tuple[Array, Gradients]) -> tuple[Array, Gradients]:
            return self._layer_backward(n, saved[n], *carry, at)

        return self._each_layer(self.chunks[chunk], layer, d_y_BLD, gradients, reverse=True)

    def weight_gradients(
        self, each: Callable[..., Any], saved: list[Saved], gradients: list[Gradients]
    ) -> list[Gradients]:
        """Computes the gradients of the weights of linear layers that backward passes have left
        out, and adds them. Called as `executor.StepWork.weights`.
        """

        def of_slice(
            chunk: int, shape: tuple[int, int], at: Position, sums: list[Params]
        ) -> list[Params]:
            def layer(n: int, carry: tuple[tuple[()], Params]) -> tuple[tuple[()], Params]:
                d_outputs = gradients[n].d_outputs
                more = self._weight_gradients(n, saved[n], d_outputs, shape, at)
                return (), _sum(carry[1], more)

            return self._each_layer(self.chunks[chunk], layer, (), sums)[1]

        # The state is only the sums: XLA would copy buffers that are only read.
        sums = each(of_slice, [d.params for d in gradients])
        return [d._replace(params=own) for d, own in zip(gradients, sums, strict=True)]

    def param_gradients(self, saved: list[Saved], gradients: list[Gradients]) -> list[Params]:
        """Returns the gradients of the parameters of each layer, float32, after the last slice."""
        return [self._params_of(n, saved[n], d) for n, d in enumerate(gradients)]

    def _params_of(self, n: int, saved: Saved, gradients: Gradients) -> Params:
        sums, d_outputs, linears = gradients.params, gradients.d_outputs, self.block.linears
        if isinstance(sums, JoinedBiases):
            return split_biases(linears, sums, self.params[n])
        is_left = d_outputs and sums.keys().isdisjoint(linears)
        return sums | (self._deferred(n, saved, d_outputs) if is_left else {})

    def _layer(
        self, n: int, x_BLD: Array, cache: KVCache, at: Position
    ) -> tuple[Array, KVCache, dict[str, Array]]:
        values: dict[str, Array] = {}

        def record(name: str, value: Array) -> Array:
            values[name] = value
            return value

        B, L, _ = x_BLD.shape
        starts_BL1 = self._starts(at, B, L)
        q, k, v = self.block.qkv(self.params[n], x_BLD, _positions(at, L, starts_BL1), record)
        # What is read next is what was written: else XLA reads the old cache, and so copies it.
        cache = self.skips.read_first(self.attention.layout.write(cache, k, v, at))
        attn, lse = self.attention.forward(self._slice(q, cache, at, starts_BL1))
        y_BLD = self.block.finish(self.params[n], x_BLD, attn, record)
        own = {"x": x_BLD, "q": merge_heads(q), "attn": merge_heads(attn), "lse": lse}
        return y_BLD, cache, values | own

    def _layer_backward(
        self, n: int, saved: Saved, d_y_BLD: Array, gradients: Gradients, at: Position
    ) -> tuple[Array, Gradients]:
        B, L, _ = d_y_BLD.shape
        params, cache, (d_cache, d_params, d_outputs) = self.params[n], saved.cache, gradients
        linears, starts_BL1 = self.block.linears, self._starts(at, B, L)
        values = self._values(saved, at, B, L)
        of_block = _of_block(values)
        x_BLD, known = values["x"], {**linears, **self.block.norms}
        others = {name: params[name] for name in params if name not in known}
        taps = {
            name: jnp.broadcast_to(x_BLD[..., :1], (B, L, params[layer]["kernel"].shape[-1]))
            for layer, (_, name) in linears.items()
        }

        def replay(function: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Array]]]:
            """Wraps `function` for `jax.vjp`. Arguments: parameters outside linear layers, taps,
            inputs. Also returns the named values.
            """

            def run(others: Params, taps: dict[str, Array], *inputs: Array):
                seen: dict[str, Array] = {}

                def tape(name: str, value: Array) -> Array:
                    is_saved = name in of_block
                    value = substitute(value, of_block[name]) if is_saved else value
                    seen[name] = tap(value, taps[name]) if name in taps else value
                    return seen[name]

                return function(params | others, *inputs, tape), seen

            return run

        q, attn, lse = self._attention_again(n, values, cache, at)
        finish, d_out = replay(self.block.finish), d_y_BLD
        if saved.routing is not None:
            counts_BL1 = self._counts(at, B, L)
            finish = with_balance(finish, self.block.router_logits, saved.routing, counts_BL1)
            d_out = d_y_BLD, jnp.ones_like(saved.routing.slopes[0])
        _, finish_vjp, seen = jax.vjp(finish, others, taps, x_BLD, attn, has_aux=True)
        d_others, d_taps, d_x_BLD, d_attn = finish_vjp(d_out)
        own = self._slice(q, cache, at, starts_BL1)
        d_q, d_kv, d_cache = self.attention.backward(own, attn, lse, d_attn, d_cache)
        positions = _positions(at, L, starts_BL1)
        _, qkv_vjp, seen_before = jax.vjp(
            replay(lambda params, x, tape: self.block.qkv(params, x, positions, tape)),
            *(others, taps, x_BLD),
            has_aux=True,
        )
        # Only one of the two functions uses each tap, so the other adds zero to its gradient.
        d_others, d_taps, d_x_BLD = jax.tree.map(
            jnp.add, (d_others, d_taps, d_x_BLD), qkv_vjp((d_q, *d_kv))
        )
        if d_outputs:
            place = self._outputs_at(at)
            d_outputs = {name: write(d_outputs[name], d_taps[name], place) for name in d_outputs}
            d_params = _sum(d_params, d_others)
        elif isinstance(d_params, JoinedBiases):
            # A barrier, so that sums and products read one array in the short format.
            d_taps = lax.optimization_barrier(d_taps)
            more = linear_gradients(linears, params, seen_before | seen, d_taps, has_biases=False)
            biases = d_params.biases + sum_of_outputs(linears, params, d_taps)
            d_params = JoinedBiases(biases, _sum(d_params.params, d_others | more))
        else:
            more = linear_gradients(linears, params, seen_before | seen, d_taps)
            d_params = _sum(d_params, d_others | more)
        return d_x_BLD, Gradients(d_cache, d_params, d_outputs)

    def _values(
        self, saved: Saved, at: Position, num_rows: int, num_tokens: int
    ) -> dict[str, Array]:
        """Returns the saved values of a slice, by name."""
        found = {n: read(buffer, at, num_rows, num_tokens) for n, buffer in saved.values.items()}
        return self.packing.unpack(found)

    def _attention_again(
        self, n: int, values: dict[str, Array], cache: KVCache, at: Position
    ) -> tuple[Array, Array, Array]:
        """Returns the queries, output and log-sum-exp of a slice's attention, each either saved or
        computed again.
        """
        x_BLD, num_queries = values["x"], self.num_queries
        starts_BL1 = self._starts(at, *x_BLD.shape[:2])
        if "q" in values:
            q = split_heads(values["q"], num_queries)
        else:
            positions = _positions(at, x_BLD.shape[1], starts_BL1)
            q = self.block.query(self.params[n], x_BLD, positions, _of_block(values).get)
        if "attn" not in values:
            return q, *self.attention.forward(self._slice(q, cache, at, starts_BL1))
        return q, split_heads(values["attn"], num_queries), values["lse"]

    def _deferred(self, n: int, saved: Saved, d_outputs: dict[str, Array]) -> Params:
        """Returns the gradients of the weights of a layer, summed over all slices.

        They are computed part by part: all at once, the recomputed values would take as much memory
        as if they had been saved.
        """
        B, T, _ = next(iter(saved.values.values())).shape
        num_tokens = _divisor(T, self.deferred_tokens)
        num_rows = _divisor(B, max(1, self.deferred_tokens // num_tokens))

        def add_part(i: Array, sums: Params) -> Params:
            row, token = jnp.divmod(i, T // num_tokens)
            at = Position(row * num_rows, token * num_tokens, row * num_rows)
            shape = num_rows, num_tokens
            more = self._weight_gradients(n, saved, d_outputs, shape, at)
            return jax.tree.map(jnp.add, sums, more)

        weights = {name: self.params[n][name] for name in self.block.linears}
        zeros = jax.tree.map(lambda a: jnp.zeros_like(a, jnp.float32), weights)
        return lax.fori_loop(0, B // num_rows * (T // num_tokens), add_part, zeros)

    def _weight_gradients(
        self,
        n: int,
        saved: Saved,
        d_outputs: dict[str, Array],
        shape: tuple[int, int],
        at: Position,
    ) -> Params:
        """Returns the gradients of the weights of a layer for a slice, computed from the values and
        output gradients that its passes have stored.
        """
        values = self._values(saved, at, *shape)
        of_block = _of_block(values)
        seen: dict[str, Array] = {}

        def tape(name: str, value: Array) -> Array:
            return seen.setdefault(name, of_block.get(name, value))

        B, L = shape
        positions = _positions(at, L, self._starts(at, B, L))
        self.block.qkv(self.params[n], values["x"], positions, tape)
        _, attn, _ = self._attention_again(n, values, saved.cache, at)
        self.block.finish(self.params[n], values["x"], attn, tape)
        weights = {name: self.params[n][name] for name in self.block.linears}
        place = self._outputs_at(at)
        d_own = {name: read(buffer, place, *shape) for name, buffer in d_outputs.items()}
        return linear_gradients(self.block.linears, weights, seen, d_own)

    def _outputs_at(self, at: Position) -> Position:
        """The position of a slice in the buffers of `Gradients.d_outputs`."""
        return Position(at.slot_row, 0) if self.has_slots else at

    def _counts(self, at: Position, num_rows: int, num_tokens: int) -> Array | float:
        """Which tokens of a slice count in the balance loss, `[B, L, 1]`, or 1 if all do."""
        if self.counts_BT1 is None:
            return 1.0
        return read(self.counts_BT1, at._replace(row=at.batch_row), num_rows, num_tokens)

    def _starts(self, at: Position, num_rows: int, num_tokens: int) -> Array | None:
        """Where the document of each token of a slice begins, `[B, L, 1]`."""
        if self.starts_BT1 is None:
            return None
        return read(self.starts_BT1, at._replace(row=at.batch_row), num_rows, num_tokens)

    def _slice(
        self, q_BLNK: Array, cache: KVCache, at: Position, starts_BL1: Array | None
    ) -> Slice:
        """Returns a slice that sees what its documents and the window let it see."""
        if self.window is not None:
            B, L, _, _ = q_BLNK.shape
            first_L1 = jnp.maximum(at.token + jnp.arange(1 - self.window, L + 1 - self.window), 0)
            first_BL1 = jnp.broadcast_to(first_L1[:, None], (B, L, 1))
            starts_BL1 = first_BL1 if starts_BL1 is None else jnp.maximum(starts_BL1, first_BL1)
        return Slice(q_BLNK, cache, at, starts_BL1)

    def _each_layer(
        self,
        chunk: Chunk,
        layer: Callable[[int, tuple[Value, LayerState]], tuple[Value, LayerState]],
        value: Value,
        states: list[LayerState],
        reverse: bool = False,
    ) -> tuple[Value, list[LayerState]]:
        states, order = list(states), list(enumerate(chunk.places))
        for place, n in reversed(order) if reverse else order:
            run, carry = partial(layer, n), (value, states[n])
            if place < chunk.min_active:
                value, states[n] = run(carry)
            else:
                is_own = place < chunk.num_active
                value, states[n] = self.skips.run_if(is_own, run, carry)
        return value, states


def _with_zeroed_cache(at: Position, num_rows: int, gradients: list[Gradients]) -> list[Gradients]:
    """Returns the gradients with the sums for keys and values set to zero in `num_rows` rows."""

    def cleared(d: Array) -> Array:
        return write(d, jnp.zeros((num_rows, *d.shape[1:]), d.dtype), at)

    return [g._replace(cache=KVCache(*map(cleared, g.cache))) for g in gradients]


def _of_block(values: dict[str, Array]) -> dict[str, Array]:
    """The saved values that the block has given to the tape."""
    return {name: value for name, value in values.items() if name not in OWN}


def _positions(at: Position, num_tokens: int, starts_BL1: Array | None) -> Array:
    """Positions of a slice's tokens in their documents, `[B, L]`, or `[1, L]` where each sequence
    is one document.
    """
    positions_1L = (at.token + jnp.arange(num_tokens))[None]
    return positions_1L if starts_BL1 is None else positions_1L - starts_BL1[..., 0]


def _divisor(total: int, near: int) -> int:
    """A divisor of `total` near `near`; `total` if there is none."""
    size = query_block(total, near)
    return total if total % size else size


def _sum(gradients: Params, more: Params) -> Params:
    """Returns the sums with the gradients of some parameters added."""
    sums = {name: jax.tree.map(jnp.add, gradients[name], more[name]) for name in more}
    return gradients | sums
