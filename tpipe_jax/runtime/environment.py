"""Variables of the environment that change what a process computes. No jax."""

import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

# Each is read by XLA, jax or a library of theirs. What `jax_options.py` sets is not among them.
VARIABLES = (
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DEFAULT_PRNG_IMPL",
    "JAX_RANDOM_SEED_OFFSET",
    "JAX_THREEFRY_PARTITIONABLE",
    "NVIDIA_TF32_OVERRIDE",
    "LIBTPU_INIT_ARGS",
)
# Beginnings of flags of XLA that may differ: devices and files of a process, and its threads.
OWN_FLAGS = (
    "--xla_force_host_platform_device_count",
    "--xla_dump_",
    "--xla_gpu_dump_",
    "--xla_gpu_cuda_data_dir",
    "--xla_gpu_force_compilation_parallelism",
    "--xla_gpu_kernel_cache_file",
    "--xla_gpu_per_fusion_autotune_cache_dir",
)


def computing(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that must be the same in all processes; those not set are `not set`."""
    found = {name: environ.get(name) or "not set" for name in VARIABLES}
    return {"XLA_FLAGS": xla_flags(environ.get("XLA_FLAGS", "")), **found}


def xla_flags(text: str) -> str:
    """Returns flags of XLA without those that may differ, sorted, as the last of each name counts.
    If the text names a file, as XLA has it, the flags are those in the file.
    """
    text = text.strip()
    if text and not text.startswith("-"):
        with suppress(OSError, UnicodeDecodeError):
            text = Path(text).read_text(encoding="utf-8")
    try:
        words = shlex.split(text)
    except ValueError:  # a quotation mark alone
        words = text.split()
    values = dict[str, str]()
    for word in words:
        name, is_assigned, value = word.partition("=")
        values[name] = value if is_assigned else "true"
    own = [f"{k}={v}" for k, v in sorted(values.items()) if not k.startswith(OWN_FLAGS)]
    return " ".join(own) or "not set"
