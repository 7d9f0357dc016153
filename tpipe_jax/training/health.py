"""How a run is doing: steps that were not finite, and losses that jump.

Part of the state, so that a resumed run counts on as if nothing had happened.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

WINDOW = 50  # losses that the mean is over, of which the older ones count less
SPIKE_DEVIATIONS = 5  # above the mean, which makes a loss a spike: 3 in 10^7 of normal noise


class Health(NamedTuple):
    """Scalars of a run up to now."""

    skipped_steps: Array
    """Steps that changed nothing, since their loss or gradients were not finite."""
    consecutive_skips: Array
    """The last ones of them, without those that only lower the loss scale of float16."""
    loss_spikes: Array
    """Steps whose loss was `SPIKE_DEVIATIONS` standard deviations above the mean before it."""
    num_losses: Array
    loss_mean: Array
    loss_variance: Array


def new_health() -> Health:
    """That of a run which has not begun."""
    # Arrays of their own, since a step takes each of them over for its results.
    counts = jnp.int32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0)
    return Health(*counts, jnp.float32(0), jnp.float32(0))


def next_health(health: Health, loss: Array, is_finite: Array, is_expected: Array) -> Health:
    """That after a step; `is_expected` where one that is not finite is no sign of divergence."""
    is_bad = ~is_finite & ~is_expected
    threshold = health.loss_mean + SPIKE_DEVIATIONS * jnp.sqrt(health.loss_variance)
    is_spike = is_finite & (health.num_losses >= WINDOW) & (loss > threshold)
    share = 1 / jnp.minimum(health.num_losses + 1, WINDOW)
    change = loss - health.loss_mean
    counted = health._replace(
        loss_spikes=health.loss_spikes + is_spike,
        consecutive_skips=jnp.int32(0),
        num_losses=health.num_losses + 1,
        loss_mean=health.loss_mean + share * change,
        loss_variance=(1 - share) * (health.loss_variance + share * change**2),
    )
    skipped = health._replace(
        skipped_steps=health.skipped_steps + 1,
        consecutive_skips=health.consecutive_skips + is_bad,
    )
    return Health(*(jnp.where(is_finite, a, b) for a, b in zip(counted, skipped, strict=True)))
