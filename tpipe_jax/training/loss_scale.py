"""The dynamic loss scale that float16 needs.

float16 has no numbers below 6e-8, which many gradients are. So the loss is multiplied before the
backward pass and its gradients are divided afterwards, in float32. Where they have overflowed, the
step is skipped and the scale is divided; after some steps without, it is multiplied (Micikevicius
et al. 2018, arXiv 1710.03740).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from tpipe_jax.config.settings import PrecisionConfig


class LossScale(NamedTuple):
    """What the loss is multiplied by, and how it has gone; scalars. Only float16 reads it."""

    value: Array
    good_steps: Array
    """Steps without overflow since `value` has changed."""


def new_loss_scale(config: PrecisionConfig) -> LossScale:
    """The scale that a run starts with."""
    return LossScale(jnp.float32(config.loss_scale_start), jnp.int32(0))


def next_loss_scale(config: PrecisionConfig, scale: LossScale, is_finite: Array) -> LossScale:
    """The scale after a step, whose gradients were all finite or not."""
    is_due = scale.good_steps + 1 >= config.loss_scale_interval
    factor, low, high = config.loss_scale_factor, config.loss_scale_min, config.loss_scale_max
    higher = jnp.where(is_due, jnp.minimum(scale.value * factor, high), scale.value)
    lower = jnp.maximum(scale.value / factor, low)
    return LossScale(
        jnp.where(is_finite, higher, lower),
        jnp.where(is_finite & ~is_due, scale.good_steps + 1, 0),
    )
