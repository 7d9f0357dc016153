"""Which compilers for devices that are not here are installed."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import jax
from jax.experimental.compilation_cache import compilation_cache

from tpipe_jax.devices.hardware import OLDEST_JAX_FOR_GPUS
from tpipe_jax.devices.targets import VARIABLES

WITHOUT_FLASH = 'needs pip install -e ".[flash12]"'
WITHOUT_COMPILER = 'needs Python 3.12 or newer, and pip install -e ".[compile]"'


def has_gpu_compiler() -> bool:
    is_installed = find_spec("jax_cuda12_plugin") is not None
    return is_installed and jax.__version_info__ >= OLDEST_JAX_FOR_GPUS


def has_flash() -> bool:
    return find_spec("dew_flash_attn") is not None


def has_tpu_compiler() -> bool:
    return find_spec("libtpu") is not None


def compilers_without_devices() -> Iterator[None]:
    """Compilers as `prepare_compiler` sets them, for a fixture. Programs for other devices cannot
    be read from a cache of compiled programs.
    """
    os.environ.update(VARIABLES)
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
