"""Mixtures of experts: each token goes through a few of many feed-forward layers, its experts.

A router gives each token a probability for each expert, and the token goes to those that are the
most likely (Shazeer et al. 2017, arXiv 1701.06538). No token is dropped, however many want the same
expert. So a token's output depends on that token alone, and slices change nothing.

The products are in rounds. A round takes the next C tokens of every expert, for one product of all
experts. C is a little more than the mean, so that one round is mostly enough. `lax.ragged_dot`
would compute each token's product with every expert (docs/models.md has both times).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.devices.collectives import varying_like

ROOM = 1.25  # places of an expert in a round, for each token that it has on average
PLACES = 8  # that number is a multiple of this one


class Experts(nnx.Module):
    """The feed-forward layers of all experts, SwiGLU without biases."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        assert config.num_experts
        E, D, F = config.num_experts, config.d_model, config.ff_width
        init = nnx.initializers.normal(0.02)
        residual_init = nnx.initializers.normal(0.02 * (2 * config.num_layers) ** -0.5)
        self.ff_in = nnx.Param(init(rngs.params(), (E, D, 2 * F), jnp.float32))
        self.ff_out = nnx.Param(residual_init(rngs.params(), (E, F, D), jnp.float32))
        self.num_chosen, self.is_normed = config.experts_of_token, config.norm_topk_prob
        self.dtype = dtype

    @staticmethod
    def specs() -> dict:
        """'model' divides the experts."""
        return {"ff_in": PartitionSpec("model"), "ff_out": PartitionSpec("model")}

    def __call__(self, x_BLD: Array, logits_BLE: Array) -> Array:
        """Returns the sum of the outputs of each token's experts, weighted by their probabilities.
        `logits_BLE` are the router's.
        """
        B, L, D = x_BLD.shape
        x_MD, logits_ME = x_BLD.reshape(-1, D), logits_BLE.reshape(B * L, -1)
        weights_MJ, experts_MJ = self._choose(logits_ME)
        kernels = tuple(kernel[...].astype(self.dtype) for kernel in (self.ff_in, self.ff_out))
        y_MD = _of_experts(x_MD, weights_MJ, experts_MJ, *kernels)
        return y_MD.reshape(B, L, D)

    def _choose(self, logits_ME: Array) -> tuple[Array, Array]:
        """Returns the weights of each token's experts, float32, and which experts these are."""
        weights_MJ, experts_MJ = lax.top_k(probabilities(logits_ME), self.num_chosen)
        if self.is_normed:
            weights_MJ = weights_MJ / weights_MJ.sum(-1, keepdims=True)
        return weights_MJ, experts_MJ


def probabilities(logits: Array) -> Array:
    """Returns the router's probabilities of all experts, float32.

    XLA may leave out the rounding of logits where it computes them, but not where they were saved.
    They are rounded here in any case. Otherwise the backward pass could go through other experts
    than the forward pass.
    """
    about = jnp.finfo(logits.dtype)
    rounded = lax.reduce_precision(logits.astype(jnp.float32), about.nexp, about.nmant)
    return jax.nn.softmax(rounded, -1)


class _Places(NamedTuple):
    """Where the tokens of each expert are, in its order of tokens."""

    tokens: Array
    """The choices that tokens have made, as `token * J + choice`, ordered by expert, `[M J]`."""
    rank_MJ: Array
    """The place of each choice among the choices of its expert."""
    expert_MJ: Array
    """The expert of each choice, from 0 on; the number of experts here if it is none of these."""
    counts_E: Array
    """Choices of each expert."""
    starts_E: Array
    """Where the choices of each expert begin in `tokens`."""

    @classmethod
    def of(cls, experts_MJ: Array, num_experts: int) -> "_Places":
        """The places for experts of these numbers; other numbers are experts of other devices."""
        is_here = (experts_MJ >= 0) & (experts_MJ < num_experts)
        expert_MJ = jnp.where(is_here, experts_MJ, num_experts)
        order = jnp.argsort(expert_MJ.reshape(-1), stable=True)
        # Of choices by other devices' experts, too, so that each has a rank.
        counts = (expert_MJ.reshape(-1, 1) == jnp.arange(num_experts + 1)).sum(0)
        starts = jnp.cumsum(counts) - counts
        rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
        rank_MJ = rank.reshape(expert_MJ.shape) - starts[expert_MJ]
        return cls(order, rank_MJ, expert_MJ, counts[:-1], starts[:-1])

    def rows(self, first: Array, size: int) -> tuple[Array, Array]:
        """Returns the choices of each expert from its number `first` on, `[E, C]`, and which of
        these places have a choice.
        """
        rank_C = first + jnp.arange(size)
        is_one_EC = rank_C < self.counts_E[:, None]
        index_EC = jnp.minimum(self.starts_E[:, None] + rank_C, self.tokens.size - 1)
        return self.tokens[index_EC], is_one_EC

    def taken(self, values_ECx: Array, first: Array) -> Array:
        """Returns the values of each choice in this round, `[M, J, ...]`; zeros for the others."""
        E, C = values_ECx.shape[:2]
        place_MJ = self.rank_MJ - first
        is_in_MJ = (place_MJ >= 0) & (place_MJ < C) & (self.expert_MJ < E)
        flat = values_ECx.reshape(E * C, *values_ECx.shape[2:])
        found = flat[jnp.where(is_in_MJ, self.expert_MJ * C + place_MJ, 0)]
        return jnp.where(is_in_MJ.reshape(*is_in_MJ.shape, *(1,) * (found.ndim - 2)), found, 0)


@jax.custom_vjp
def _of_experts(
    x_MD: Array, weights_MJ: Array, experts_MJ: Array, in_EDF: Array, out_EFD: Array
) -> Array:
    """Returns the weighted sum of the outputs of each token's experts, `[M, D]`."""
    return _divided(_forward, 1, (x_MD, weights_MJ, experts_MJ, in_EDF, out_EFD))[0]


def _of_experts_forward(*given: Array) -> tuple[Array, tuple[Array, ...]]:
    return _of_experts(*given), given


def _of_experts_backward(given: tuple[Array, ...], d_y_MD: Array) -> tuple[Array | None, ...]:
    d_x, d_weights, d_in, d_out = _divided(_backward, 2, (*given, d_y_MD))
    return d_x, d_weights, None, d_in, d_out


_of_experts.defvjp(_of_experts_forward, _of_experts_backward)


def _divided(
    function: Callable[..., tuple[Array, ...]], num_sums: int, given: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Returns `function(num_experts, *given)`, with the experts divided over 'model' by hand. Each
    device computes those that it has. The first `num_sums` results are summed, the others belong to
    experts.
    """
    num_experts = len(given[3])
    if jax.sharding.get_abstract_mesh().shape.get("model", 1) == 1:
        return function(num_experts, *given)

    def local(x: Array, weights: Array, experts: Array, in_EDF: Array, *more: Array):
        own = experts - lax.axis_index("model") * len(in_EDF)
        found = function(num_experts, x, weights, own, in_EDF, *more)
        return *(a[None] for a in found[:num_sums]), *found[num_sums:]

    whole, divided = PartitionSpec(), PartitionSpec("model")
    in_specs = whole, whole, whole, divided, divided, *(whole,) * (len(given) - 5)
    run = jax.shard_map(local, axis_names={"model"}, in_specs=in_specs, out_specs=divided)
    found = run(*given)
    # GSPMD makes an all-reduce of such a sum, as of the partial sums of other layers.
    sums = (lax.reduce(a, np.zeros((), a.dtype), lax.add, (0,)) for a in found[:num_sums])
    return *sums, *found[num_sums:]


def _forward(
    num_experts: int,
    x_MD: Array,
    weights_MJ: Array,
    experts_MJ: Array,
    in_EDF: Array,
    out_EFD: Array,
) -> tuple[Array]:
    places, J = _Places.of(experts_MJ, len(in_EDF)), experts_MJ.shape[1]
    size = _round_size(experts_MJ, num_experts)

    def add_round(n: Array, y_MD: Array) -> Array:
        choice_EC, _ = places.rows(n * size, size)
        _, _, swiglu_ECF = _hidden(x_MD[choice_EC // J], in_EDF)
        y_ECD = jnp.einsum("ecf,efd->ecd", swiglu_ECF, out_EFD)
        taken_MJD = places.taken(y_ECD, n * size).astype(jnp.float32)
        return y_MD + (weights_MJ[..., None] * taken_MJD).sum(1)

    zeros = varying_like(jnp.zeros(x_MD.shape, jnp.float32), (x_MD, in_EDF))
    y_MD = lax.fori_loop(0, _num_rounds(places, size), add_round, zeros)
    return (y_MD.astype(x_MD.dtype),)


def _backward(
    num_experts: int,
    x_MD: Array,
    weights_MJ: Array,
    experts_MJ: Array,
    in_EDF: Array,
    out_EFD: Array,
    d_y_MD: Array,
) -> tuple[Array, ...]:
    """Returns the gradients of inputs, weights and kernels."""
    places, J = _Places.of(experts_MJ, len(in_EDF)), experts_MJ.shape[1]
    size, dtype = _round_size(experts_MJ, num_experts), x_MD.dtype

    def add_round(n: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        choice_EC, is_one_EC = places.rows(n * size, size)
        # Zeros in places without a token: with another expert's token, a format may overflow.
        x_ECD, d_y_ECD, weight_EC1 = (
            jnp.where(is_one_EC[..., None], a, 0)
            for a in (
                x_MD[choice_EC // J],
                d_y_MD[choice_EC // J],
                weights_MJ.reshape(-1)[choice_EC][..., None],
            )
        )
        gate, value, swiglu_ECF = _hidden(x_ECD, in_EDF)
        # Of swiglu, before the weight: d_y is the same for all of a token's experts.
        d_ECF = jnp.einsum("ecd,efd->ecf", d_y_ECD, out_EFD).astype(jnp.float32)
        d_weight_EC = (swiglu_ECF.astype(jnp.float32) * d_ECF).sum(-1)
        weighted_ECF = (weight_EC1 * swiglu_ECF).astype(dtype)
        d_out_EFD = _sum_product("ecf,ecd->efd", weighted_ECF, d_y_ECD)
        slope, d_ECF = nnx.sigmoid(gate), weight_EC1 * d_ECF
        d_gate = d_ECF * value * slope * (1 + gate * (1 - slope))
        d_hidden = jnp.concatenate([d_gate, d_ECF * gate * slope], -1).astype(dtype)
        d_in_EDF = _sum_product("ecd,ecf->edf", x_ECD, d_hidden)
        d_x_ECD = jnp.einsum("ecf,edf->ecd", d_hidden, in_EDF)
        d_x_MD = places.taken(d_x_ECD, n * size).astype(jnp.float32).sum(1)
        more = d_x_MD, places.taken(d_weight_EC, n * size), d_in_EDF, d_out_EFD
        return jax.tree.map(jnp.add, sums, more)

    shapes = x_MD.shape, weights_MJ.shape, in_EDF.shape, out_EFD.shape
    zeros = [varying_like(jnp.zeros(shape, jnp.float32), (x_MD, in_EDF)) for shape in shapes]
    d_x, d_weights, d_in, d_out = lax.fori_loop(
        0, _num_rounds(places, size), add_round, tuple(zeros)
    )
    return d_x.astype(dtype), d_weights, d_in.astype(in_EDF.dtype), d_out.astype(out_EFD.dtype)


def _hidden(x_ECD: Array, in_EDF: Array) -> tuple[Array, Array, Array]:
    """Returns gates and values, float32, and their SwiGLU in the format of products."""
    hidden = jnp.einsum("ecd,edf->ecf", x_ECD, in_EDF).astype(jnp.float32)
    gate, value = jnp.split(hidden, 2, -1)
    return gate, value, (nnx.silu(gate) * value).astype(x_ECD.dtype)


def _sum_product(subscripts: str, a: Array, b: Array) -> Array:
    """A product whose sum over tokens is in float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _round_size(choices_MJ: Array, num_experts: int) -> int:
    """Places of each expert in a round."""
    most = choices_MJ.shape[0]  # a token chooses an expert once at most
    size = -(-int(ROOM * choices_MJ.size) // num_experts)
    return min(most, -(-size // PLACES) * PLACES)


def _num_rounds(places: _Places, size: int) -> Array:
    return -(-places.counts_E.max() // size)
