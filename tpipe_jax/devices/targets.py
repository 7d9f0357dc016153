"""Devices that are not here: facts about them, and devices to compile for.

XLA compiles programs for a GPU or TPU on any machine, if it is told what the device is like. Such
devices run nothing.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies

from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.devices.hardware import (
    GIB,
    DeviceFacts,
    check_jax_for_gpus,
    memory_fraction,
)
from tpipe_jax.errors import UserError, brief

# What XLA cannot know without the device: kernels that are chosen by timing them and their scratch
# memory, as that of cuDNN's backward pass. On an H100 and an H200, steps of 6 to 35 GiB needed at
# most 0.5 GiB more by XLA's own figures there than when compiled elsewhere (docs/compile.md).
ALLOWANCE_BYTES = GIB // 2


@dataclass(frozen=True)
class _Gpu:
    """A GPU, as XLA describes it."""

    kind: str
    capability: tuple[int, int]
    num_cores: int
    memory_bytes: int
    bandwidth: int
    """Bytes a second."""
    l2_bytes: int
    clock_ghz: float
    shared_bytes_of_core: int
    shared_bytes_of_block: int
    lanes_of_core: int
    """Units for float32."""
    cudnn: int


# From XLA's own target files (github.com/openxla/xla, xla/backends/gpu/target_config/specs), and
# for the V100 of 32 GB that of 16 GB with twice the memory. cuDNN is the oldest that jax's wheels
# accept; for V100s it is also the last.
GPUS = {
    "v100": _Gpu(
        *("Tesla V100-SXM2-16GB", (7, 0), 80, 16935682048, 898048000000, 6291456, 1.53),
        *(98304, 98304, 64, 91002),
    ),
    "v100-32": _Gpu(
        *("Tesla V100-SXM2-32GB", (7, 0), 80, 33871364096, 898048000000, 6291456, 1.53),
        *(98304, 98304, 64, 91002),
    ),
    "a100": _Gpu(
        *("NVIDIA A100-SXM4-80GB", (8, 0), 108, 85100068864, 2039040000000, 41943040, 1.41),
        *(167936, 166912, 64, 91002),
    ),
    "a100-40": _Gpu(
        *("NVIDIA A100-SXM4-40GB", (8, 0), 108, 42331013120, 1555200000000, 41943040, 1.41),
        *(167936, 166912, 64, 91002),
    ),
    "h100": _Gpu(
        *("NVIDIA H100 80GB HBM3", (9, 0), 132, 84942979072, 3352320000000, 52428800, 1.98),
        *(233472, 232448, 128, 91002),
    ),
    "h200": _Gpu(
        *("NVIDIA H200 141GB HBM3e", (9, 0), 132, 151397597184, 4800000000000, 52428800, 1.98),
        *(233472, 232448, 128, 91002),
    ),
    "b200": _Gpu(
        *("NVIDIA B200", (10, 0), 148, 191514411008, 7672320000000, 132644864, 1.965),
        *(233472, 232448, 128, 91002),
    ),
}

# libtpu would look for TPUs of this machine, write logs, and run in one process only.
VARIABLES = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# Memory of a device that programs may use, in GiB, as libtpu 0.0.52 states it when they do not fit.
_TPU_GIB = {"TPU v4": 15.25, "TPU v5 lite": 15.75, "TPU v5": 95.73, "TPU v6 lite": 31.24}


@dataclass(frozen=True)
class Target:
    """Devices to compile for."""

    devices: Sequence[Any]
    facts: DeviceFacts
    device_bytes: float
    """All memory of a device, in bytes; 0 where that is not known."""
    num_hosts: int


def prepare_compiler() -> None:
    """Makes XLA's compilers work without their devices. Call it before any use of jax, which then
    has only CPUs.

    Variables that the user has set stay as they are, and so do the user's flags of XLA.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot be read without devices
    flags = "--xla_gpu_autotune_level=0"  # kernels cannot be timed
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)


def gpu_target(name: str, mesh: MeshConfig, num_hosts: int | None) -> Target:
    """Returns GPUs for a mesh. Hosts have 8, unless their number is given or there are fewer.

    Raises `UserError` if the hosts do not divide the mesh, or there is no compiler for GPUs.
    """
    check_jax_for_gpus()
    total = mesh.num_devices
    hosts = num_hosts or max(1, total // 8)
    if total % hosts or (not num_hosts and total > 8 and total % 8):
        asked = f"--hosts={num_hosts}" if num_hosts else "hosts of 8 GPUs"
        raise UserError(
            f"{asked} cannot share the {total} devices of config.mesh evenly: set --hosts to a "
            f"divisor of {total}."
        )
    gpu = GPUS[name]
    topology = _topology(
        "cuda",
        "GPUs",
        'pip install "tpipe_jax[compile]", on Python 3.12 or newer',
        target_config=_target_config(gpu),
        topology=f"1x{hosts}x{total // hosts}",
    )
    # CUDA, NCCL and the libraries of the process get their memory from the rest.
    usable = memory_fraction() * gpu.memory_bytes - ALLOWANCE_BYTES
    facts = DeviceFacts("gpu", gpu.kind, gpu.capability, gpu.cudnn, usable)
    return Target(topology.devices, facts, gpu.memory_bytes, hosts)


def tpu_target(name: str, mesh: MeshConfig) -> Target:
    """Returns the TPUs of a topology that libtpu knows, such as v5e:2x2.

    Raises `UserError` if it knows none of this name, or there is no compiler for TPUs.
    """
    topology = _topology("tpu", "TPUs", 'pip install "tpipe_jax[tpu]"', topology_name=name)
    devices = topology.devices
    if len(devices) != mesh.num_devices:
        raise UserError(
            f"--tpu={name} has {len(devices)} devices, and config.mesh has "
            f"{mesh.num_devices}: change one of the two."
        )
    gib = _TPU_GIB.get(devices[0].device_kind)
    memory = None if gib is None else gib * GIB
    facts = DeviceFacts("tpu", devices[0].device_kind, memory_bytes=memory)
    return Target(devices, facts, memory or 0, 1 + max(device.process_index for device in devices))


def _topology(platform: str, devices: str, remedy: str, **options: str) -> Any:
    """Returns jax's description of devices. Raises `UserError` where it cannot be had."""
    if not _is_installed({"cuda": "jax-cuda12-plugin", "tpu": "libtpu"}[platform]):
        raise UserError(f"there is no compiler for {devices} here: {remedy}.")
    try:
        return topologies.get_topology_desc(platform=platform, **options)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        if platform == "cuda":
            raise UserError(
                f"the compiler for {devices} does not work here ({brief(error)}): {remedy}."
            ) from error
        raise UserError(
            f"the compiler for {devices} does not take --tpu={options['topology_name']} "
            f"({brief(error)}): name another topology, such as v5e:2x2."
        ) from error


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _target_config(gpu: _Gpu) -> str:
    """Returns what XLA wants to know of a GPU, in the text format of its protocol buffer."""
    major, minor = gpu.capability
    # Code for Hopper and later uses features that no other generation has.
    features = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    versions = gpu.cudnn // 10000, gpu.cudnn // 100 % 100, gpu.cudnn % 100
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_bytes_of_core}
  shared_memory_per_block_optin: {gpu.shared_bytes_of_block}
  core_count: {gpu.num_cores} fpus_per_core: {gpu.lanes_of_core} clock_rate_ghz: {gpu.clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2_bytes}
  device_memory_size: {gpu.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {versions[0]} minor: {versions[1]} patch: {versions[2]} }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{gpu.kind}"
"""
