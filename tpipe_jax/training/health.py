"""The health of a run: steps whose loss or gradients were not finite, and losses that jump.

It is part of the training state, so that a resumed run goes on counting as if never stopped.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

WINDOW = 50  # losses in the running mean, where older ones count less
SPIKE_DEVIATIONS = 5  # a loss so far above the mean is a spike: 3 in 10^7 of normal noise


class Health(NamedTuple):
    """Counts and statistics of a run so far, all scalars."""

    skipped_steps: Array
    """Steps that changed nothing, since their loss or gradients were not finite."""
    consecutive_skips: Array
    """Skipped steps since the last finite one, without those that only lower the loss scale."""
    loss_spikes: Array
    """Steps whose loss was over `SPIKE_DEVIATIONS` standard deviations above the earlier mean."""
    num_losses: Array
    loss_mean: Array
    loss_variance: Array


def new_health() -> Health:
    """Returns the health of a run that has not begun."""
    # One array for each field: a step donates them all, and none can be donated twice.
    counts = jnp.int32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0)
    return Health(*counts, jnp.float32(0), jnp.float32(0))


def next_health(health: Health, loss: Array, is_finite: Array, is_expected: Array) -> Health:
    """Returns the health after a step. `is_expected` says that a loss or gradients which are not
    finite would be no sign of divergence.
    """
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
