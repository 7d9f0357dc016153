"""Which compilers for devices that are not here are installed."""

from importlib.util import find_spec

import jax

from tpipe_jax.devices.hardware import OLDEST_JAX_FOR_GPUS

WITHOUT_FLASH = 'needs pip install -e ".[flash12]"'
WITHOUT_COMPILER = 'needs Python 3.12 or newer, and pip install -e ".[compile]"'


def has_gpu_compiler() -> bool:
    is_installed = find_spec("jax_cuda12_plugin") is not None
    return is_installed and jax.__version_info__ >= OLDEST_JAX_FOR_GPUS


def has_flash() -> bool:
    return find_spec("dew_flash_attn") is not None


def has_tpu_compiler() -> bool:
    return find_spec("libtpu") is not None
