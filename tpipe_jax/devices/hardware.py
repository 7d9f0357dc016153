"""The facts about a device that programs depend on: its generation, memory, libraries and speed."""

import math
import os
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from tpipe_jax.config.settings import Config
from tpipe_jax.errors import UserError

GIB = 2**30
FRACTION_VARIABLES = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"
"""Environment variables for the share of a GPU's memory that jax takes; the second since 0.12."""
DEFAULT_FRACTION = 0.75
OLDEST_JAX_FOR_GPUS = (0, 11, 1)


@dataclass(frozen=True)
class DeviceFacts:
    """The devices of a run, as far as its programs depend on them.

    `facts_of` asks devices that are here. `targets` has the facts about devices that are not.
    """

    platform: str
    """cpu, gpu or tpu."""
    kind: str
    """Name of the device, as jax has it."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability, such as (8, 0); None for devices without one."""
    cudnn: int | None = None
    """Version of cuDNN, such as 91002 for 9.10.2; None without it."""
    memory_bytes: float | None = None
    """Bytes that programs may use on a device of this process; None where that is not known."""


def facts_of(mesh: Mesh) -> DeviceFacts:
    """Returns the facts about the devices of a mesh. If there are several kinds, these are the
    facts about the oldest: all others can do as much.
    """
    device = min(mesh.devices.flat, key=lambda device: _capability(device) or (0, 0))
    capability = _capability(device)
    return DeviceFacts(
        device.platform,
        device.device_kind,
        capability,
        cudnn_version() if capability else None,
        (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit"),
    )


def memory_fraction() -> float:
    """Returns the share of a GPU's memory that jax takes. Raises `UserError` if it is no share."""
    given = [(name, os.environ[name]) for name in FRACTION_VARIABLES if name in os.environ]
    for name, text in given:
        try:
            fraction = float(text)
        except ValueError:
            fraction = math.nan
        if not 0 < fraction <= 1:
            raise UserError(f"{name}={text} must be a number above 0 and at most 1, such as 0.9.")
        return fraction
    return DEFAULT_FRACTION


def check_jax_for_gpus() -> None:
    """Raises `UserError` if this version of jax compiles slow programs for GPUs: XLA before 0.11.1
    copies whole buffers in each tick.
    """
    if jax.__version_info__ < OLDEST_JAX_FOR_GPUS:
        oldest = ".".join(map(str, OLDEST_JAX_FOR_GPUS))
        raise UserError(
            f"GPUs need jax {oldest} or newer, and this is jax {jax.__version__}, whose programs "
            "for GPUs copy gigabytes in each tick: install tpipe_jax under Python 3.12 or newer."
        )


def cudnn_version() -> int | None:
    """Returns the version of cuDNN here, such as 91002 for 9.10.2. None if jax finds no cuDNN, or
    has another interface to it.
    """
    try:
        from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version

        return check_cudnn_version()
    except (ImportError, RuntimeError):
        return None


def _capability(device: Any) -> tuple[int, int] | None:
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


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


def peak_flops(config: Config, kind: str) -> float | None:
    """Returns the peak FLOP/s of a kind of device in the config's format, from the settings or from
    the maker's data sheet; None where that is not known.
    """
    if config.metrics.peak_tflops is not None:
        return config.metrics.peak_tflops * 1e12
    if config.precision.compute == "float32":
        return None
    peak = next((peak for name, peak in _PEAK_TFLOPS.items() if name in kind), None)
    return None if peak is None else peak * 1e12
