"""The format that a run computes in, and the dynamic loss scale that float16 needs.

float16 has no numbers below 6e-8, which many gradients are. So the loss is multiplied before the
backward pass and its gradients are divided afterwards, in float32. Where they have overflowed, the
step is skipped and the scale is divided; after some steps without, it is multiplied (Micikevicius
et al. 2018, arXiv 1710.03740).
"""

from dataclasses import replace

import jax.numpy as jnp
from jax.sharding import Mesh

from tpipe_jax.config.settings import Config, Format, PrecisionConfig
from tpipe_jax.devices.hardware import compute_capability, oldest_device


def compute_format(config: PrecisionConfig, mesh: Mesh) -> Format:
    """The name of the dtype of matrix products and activations, `auto` resolved for the devices.

    GPUs before Ampere (compute capability 8.0) have fast products in float16 only.
    """
    if config.compute != "auto":
        return config.compute
    device = oldest_device(mesh)
    if device.platform == "cpu":
        return "float32"
    capability = compute_capability(device)
    return "float16" if capability and capability < (8, 0) else "bfloat16"


def resolve_precision(config: Config, mesh: Mesh) -> Config:
    """The config with `precision.compute` as it is on these devices."""
    compute = compute_format(config.precision, mesh)
    return replace(config, precision=replace(config.precision, compute=compute))


def compute_dtype(config: PrecisionConfig, mesh: Mesh) -> jnp.dtype:
    """`compute_format` as a dtype."""
    return jnp.dtype(compute_format(config, mesh))


def is_slow(config: PrecisionConfig, mesh: Mesh) -> bool:
    """Whether the devices have no arithmetic of the format, and another would be faster."""
    return compute_format(config, mesh) == "float16" and mesh.devices.flat[0].platform == "cpu"
