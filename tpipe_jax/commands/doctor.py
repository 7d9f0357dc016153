"""Facts about this machine that bug reports need, and about a run on it."""

import os
import platform
import shutil
from collections import Counter
from importlib import metadata
from pathlib import Path

import jax

from tpipe_jax.config.settings import FLASH_PACKAGES, Config
from tpipe_jax.devices.hardware import peak_flops
from tpipe_jax.devices.startup import find_devices
from tpipe_jax.errors import UserError, brief
from tpipe_jax.pipeline.spec import spec_on_devices
from tpipe_jax.training.memory import GIB, limit_bytes
from tpipe_jax.version import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tensorstore", "grain", "tyro", "rich")
PLUGINS = (
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    *FLASH_PACKAGES,
    "libtpu",
)
VARIABLES = "JAX_", "XLA_", "CUDA_VISIBLE", "TPU_", "LIBTPU_", "NCCL_"


def examine(config: Config, workdir: Path) -> dict[str, str]:
    """Returns the facts as text, each by a short name. Changes nothing.

    A run that cannot work here is a fact too, with the sentence that it would end with.
    """
    variables = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)]
    facts = {
        "tpipe_jax": __version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "packages": ", ".join(_versions(PACKAGES)),
        "plugins": ", ".join(_versions(PLUGINS)) or "none",
        "variables": " ".join(variables) or "none of jax, XLA, CUDA or NCCL",
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": _memory(),
        "disk": _disk(workdir),
    }
    try:
        devices = find_devices(config.mesh)
    except (RuntimeError, UserError) as error:
        return facts | {"devices": f"none can be used: {brief(error)}"}
    kinds = Counter(device.device_kind for device in devices)
    facts["devices"] = ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
    if devices[0].platform == "cpu":
        facts["devices"] += " (made of the cores, as many as the mesh asks for)"
    facts["a run here"] = _run(config, devices)
    return facts


def _versions(names: tuple[str, ...]) -> list[str]:
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def _memory() -> str:
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    free = page * os.sysconf("SC_AVPHYS_PAGES")
    info = Path("/proc/meminfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
    return f"{free / GIB:.1f} of {page * pages / GIB:.1f} GiB free"


def _disk(workdir: Path) -> str:
    folder = next(
        path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists()
    )
    usage = shutil.disk_usage(folder)
    is_writable = "" if os.access(folder, os.W_OK) else ", which this user may not write to"
    return f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free for {workdir}{is_writable}"


def _run(config: Config, devices: list[jax.Device]) -> str:
    """Returns the part of the devices that a run of this config would use."""
    mesh = config.mesh
    if mesh.auto:
        return f"would search for the fastest division of {len(devices)} devices"
    try:
        spec = spec_on_devices(config, devices)
    except UserError as error:
        return f"cannot work: {error}"
    limit, peak = limit_bytes(spec), peak_flops(spec.config, spec.device.kind)
    memory = "memory without a known limit" if limit is None else f"at most {limit / GIB:.1f} GiB"
    speed = "" if peak is None else f", peak {peak / 1e12:g} TFLOP/s each"
    attention = spec.config.attention.backend
    return (
        f"data {mesh.data} x pipe {mesh.pipe} x model {mesh.model} of {len(devices)} devices"
        f"{speed}, {spec.config.precision.compute}, attention {attention}, "
        f"{memory} on each"
    )
