"""The number format that a run computes in.

float16 also needs a loss scale: see `training.loss_scale`.
"""

from dataclasses import replace

from tpipe_jax.config.settings import Config, Format, PrecisionConfig
from tpipe_jax.devices.hardware import DeviceFacts


def compute_format(config: PrecisionConfig, device: DeviceFacts) -> Format:
    """Returns the name of the dtype of matrix products and activations, with `auto` resolved.

    GPUs before Ampere (compute capability 8.0) have fast products in float16 only.
    """
    if config.compute != "auto":
        return config.compute
    if device.platform == "cpu":
        return "float32"
    return "float16" if device.capability and device.capability < (8, 0) else "bfloat16"


def resolve_precision(config: Config, device: DeviceFacts) -> Config:
    """Returns the config with `precision.compute` resolved for these devices."""
    compute = compute_format(config.precision, device)
    return replace(config, precision=replace(config.precision, compute=compute))


def is_slow(config: PrecisionConfig, device: DeviceFacts) -> bool:
    """Whether the devices have no arithmetic for the format, so that another would be faster."""
    return compute_format(config, device) == "float16" and device.platform == "cpu"
