"""Finds the devices of a run and makes CPU devices fast. Must run before any other use of jax."""

import ctypes
import os
import platform

import jax

from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.devices.hardware import check_jax_for_gpus
from tpipe_jax.devices.mesh import asked_product
from tpipe_jax.errors import UserError

MAX_CPU_DEVICES = 1024  # the most that a process makes; each has threads of its own


def find_devices(config: MeshConfig, num_processes: int = 1) -> list[jax.Device]:
    """Returns the devices of all processes; on CPUs, as many as the mesh asks for.

    Call it before any other use of jax, which counts its devices only once. Raises `UserError` if
    the processes cannot have equally many CPU devices, or if jax is too old for GPUs.
    """
    num_local, rest = divmod(config.num_devices, num_processes)
    prepare_cpu(num_local)
    jax.config.update("jax_num_cpu_devices", min(max(num_local, 1), MAX_CPU_DEVICES))
    devices = jax.devices()
    if devices[0].platform == "gpu":
        check_jax_for_gpus()
    if rest and devices[0].platform == "cpu":
        raise UserError(
            f"{asked_product(config)} CPU devices cannot be shared out evenly among "
            f"{num_processes} processes: start a number that divides them."
        )
    return devices


def prepare_cpu(num_devices: int) -> None:
    """Makes the CPU devices of this process fast: sets flags of XLA, and keeps freed memory.

    Call it before any other use of jax. docs/design.md has the gain from each. Flags that the user
    has set come last, so they override these. Other platforms ignore the flags.
    """
    flags = [
        # XLA compiles sums itself; they are slower in its library for matrix products.
        "--xla_cpu_experimental_ynn_fusion_type=-reduce",
        # XLA analyses buffers that are updated in place better, so it copies fewer of them.
        "--xla_cpu_copy_insertion_use_region_analysis=true",
    ]
    if num_devices >= len(os.sched_getaffinity(0)):  # no core to spare for threads in an operator
        flags.append("--xla_cpu_multi_thread_eigen=false")
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*(f for f in flags if f not in given), *given])
    # glibc returns large buffers to the system. A step that allocates them again would then have a
    # page fault for each of their pages.
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(ctypes.c_int(-4), ctypes.c_int(0))  # M_MMAP_MAX: no buffer of its own mapping
        libc.mallopt(ctypes.c_int(-1), ctypes.c_int(-1))  # M_TRIM_THRESHOLD: never shrink the heap
