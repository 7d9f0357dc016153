"""The balance loss of mixtures of experts, the least when all experts get equally many tokens.

    loss = E sum_e f_e P_e      (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6)

f_e is how often a token chooses expert e, and P_e the mean probability of e. Both are means over
all tokens of the batch in all layers, as in transformers; padding does not count. The choices have
no gradient. So the gradient with respect to one probability is a number for each expert, its slope
E f_e, over the count of tokens. It takes the choices of the whole batch: stages sum them up in the
forward passes, and all devices exchange the sums before the first backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tpipe_jax.devices.collectives import psum
from tpipe_jax.model.experts import probabilities


class Routing(NamedTuple):
    """What a layer knows of its router's choices, `[E]` float32 each."""

    choices: Array
    """How often the tokens so far have chosen each expert."""
    probabilities: Array
    """Sums of the probabilities of each expert, over the same tokens."""
    slopes: Array
    """Gradients of the loss, with its weight, with respect to the probabilities of a token; zeros
    until the whole batch has gone forward."""


def no_routing(num_experts: int) -> Routing:
    """Returns zeroed sums."""
    return Routing(*(jnp.zeros(num_experts, jnp.float32) for _ in Routing._fields))


def add_choices(
    routing: Routing, logits_BLE: Array, num_chosen: int, counts_BL1: Array | float
) -> Routing:
    """Returns the sums with the tokens of a slice added, from their logits. `counts_BL1` is 1 for
    tokens and 0 for padding.
    """
    of_tokens = probabilities(logits_BLE)
    chosen_BLJ = lax.top_k(of_tokens, num_chosen)[1]
    is_chosen = (chosen_BLJ[..., None] == jnp.arange(of_tokens.shape[-1])).any(2)
    return routing._replace(
        choices=routing.choices + (counts_BL1 * is_chosen).sum((0, 1)),
        probabilities=routing.probabilities + (counts_BL1 * of_tokens).sum((0, 1)),
    )


def slope_of(logits_BLE: Array, slopes: Array, counts_BL1: Array | float) -> Array:
    """Returns the sum of the probabilities of a slice's tokens times these slopes. Its gradient is
    that of the balance loss. `counts_BL1` as in `add_choices`.
    """
    return (counts_BL1 * probabilities(logits_BLE) * slopes).sum()


def with_balance(
    finish: Callable[..., Any], router_logits: str, routing: Routing, counts_BL1: Array | float
) -> Callable[..., Any]:
    """Returns the second part of a layer with the balance loss of its tokens as a further result.
    `finish` returns the output `[B, L, D]` and the named values, of which `router_logits` are the
    logits.
    """

    def run(*inputs: Any) -> tuple[tuple[Array, Array], dict[str, Array]]:
        y_BLD, seen = finish(*inputs)
        return (y_BLD, slope_of(seen[router_logits], routing.slopes, counts_BL1)), seen

    return run


def with_slopes(layers: Sequence[Routing], count: Array, weight: Array) -> list[Routing]:
    """Returns the sums of a stage's layers with the slopes of the loss times `weight`. `count` are
    the tokens of the batch, once for each layer of the model, float32.

    All devices call it together, after the last forward pass.
    """
    choices, _ = _totals(layers)
    slopes = weight * len(choices) * choices / count / count
    return [own._replace(slopes=jnp.zeros_like(own.slopes) + slopes) for own in layers]


def balance_loss(layers: Sequence[Routing], count: Array) -> Array:
    """Returns the loss of the batch, the same on all devices. Arguments as in `with_slopes`."""
    choices, of_tokens = _totals(layers)
    return len(choices) * (choices / count * (of_tokens / count)).sum()


def _totals(layers: Sequence[Routing]) -> tuple[Any, Any]:
    """Returns choices and probabilities, summed over all layers and data shards."""
    own = jax.tree.map(lambda *a: sum(a[1:], a[0]), *layers)
    return psum((own.choices, own.probabilities), ("data", "pipe"))
