"""The number format that a run computes in.

float16 also needs a loss scale: see `training.loss_scale`.
"""

from dataclasses import replace

from jax.sharding import Mesh

from tpipe_jax.config.settings import Config, Format, PrecisionConfig
from tpipe_jax.devices.hardware import compute_capability, oldest_device


def compute_format(config: PrecisionConfig, mesh: Mesh) -> Format:
    """Returns the name of the dtype of matrix products and activations, with `auto` resolved.

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
    """Returns the config with `precision.compute` resolved for these devices."""
    compute = compute_format(config.precision, mesh)
    return replace(config, precision=replace(config.precision, compute=compute))


def is_slow(config: PrecisionConfig, mesh: Mesh) -> bool:
    """Whether the devices have no arithmetic for the format, so that another would be faster."""
    return compute_format(config, mesh) == "float16" and mesh.devices.flat[0].platform == "cpu"
