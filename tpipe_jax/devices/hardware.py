"""Facts about a device from its maker: its generation and its peak speed."""

from typing import Any

from jax.sharding import Mesh

from tpipe_jax.config.settings import Config


def compute_capability(device: Any) -> tuple[int, int] | None:
    """Returns the CUDA compute capability, such as (8, 0); None for devices without one."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def oldest_device(mesh: Mesh) -> Any:
    """Returns the device with the least compute capability: all others can do as much."""
    return min(mesh.devices.flat, key=lambda device: compute_capability(device) or (0, 0))


# Peak TFLOP/s of dense products in float16 or bfloat16, from the makers' data sheets. The first of
# these names that is part of jax's name for the device counts.
_PEAK_TFLOPS = {
    "V100": 125,
    "A100": 312,
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
}


def peak_flops(config: Config, device: Any) -> float | None:
    """Returns the peak FLOP/s of a device in the config's format, from the settings or from the
    maker's data sheet; None where that is not known.
    """
    if config.metrics.peak_tflops is not None:
        return config.metrics.peak_tflops * 1e12
    if config.precision.compute == "float32":
        return None
    known = (peak for name, peak in _PEAK_TFLOPS.items() if name in device.device_kind)
    peak = next(known, None)
    return None if peak is None else peak * 1e12
