"""The dynamic loss scale that float16 needs.

float16 has no numbers below 6e-8, but many gradients are smaller. So a step multiplies the loss by
the scale before the backward pass, and divides the gradients by it afterwards, in float32. If
gradients overflow, the step is skipped and the scale is lowered. After some steps without overflow
the scale is raised (Micikevicius et al. 2018, arXiv 1710.03740).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from tpipe_jax.config.settings import PrecisionConfig


class LossScale(NamedTuple):
    """The loss scale and its recent history, as scalars. Only float16 uses them."""

    value: Array
    good_steps: Array
    """Steps without overflow since `value` was last lowered or due to be raised."""


def new_loss_scale(config: PrecisionConfig) -> LossScale:
    """The scale that a run starts with."""
    return LossScale(jnp.float32(config.loss_scale_start), jnp.int32(0))


def next_loss_scale(config: PrecisionConfig, scale: LossScale, is_finite: Array) -> LossScale:
    """Returns the scale after a step; `is_finite` says whether loss and gradients were finite."""
    is_due = scale.good_steps + 1 >= config.loss_scale_interval
    factor, low, high = config.loss_scale_factor, config.loss_scale_min, config.loss_scale_max
    higher = jnp.where(is_due, jnp.minimum(scale.value * factor, high), scale.value)
    lower = jnp.maximum(scale.value / factor, low)
    return LossScale(
        jnp.where(is_finite, higher, lower),
        jnp.where(is_finite & ~is_due, scale.good_steps + 1, 0),
    )
