"""What the maker says of a device: its generation, and its fastest products."""

from typing import Any

from jax.sharding import Mesh

from tpipe_jax.config.settings import Config


def compute_capability(device: Any) -> tuple[int, int] | None:
    """CUDA's, as (8, 0); None for other devices."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def oldest_device(mesh: Mesh) -> Any:
    """The one of least compute capability, which is what all of a mesh can do."""
    return min(mesh.devices.flat, key=lambda device: compute_capability(device) or (0, 0))


# Dense products in float16 or bfloat16, TFLOP/s, by what jax calls the device, from the makers'
# data sheets; the first that fits counts.
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
    """What a device can do in the config's format, FLOP/s, as set or as its maker says; None where
    that is not known.
    """
    if config.metrics.peak_tflops is not None:
        return config.metrics.peak_tflops * 1e12
    if config.precision.compute == "float32":
        return None
    known = (peak for name, peak in _PEAK_TFLOPS.items() if name in device.device_kind)
    peak = next(known, None)
    return None if peak is None else peak * 1e12
