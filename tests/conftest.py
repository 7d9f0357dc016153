import os
from collections.abc import Iterator

import jax
import pytest
from hypothesis import settings
from jax.experimental.compilation_cache import compilation_cache
from matplotlib.figure import Figure

# Read when jax looks for devices, which are CPUs unless test_gpu.py is asked for. Flags are as
# `mesh.prepare_cpu` has them: one process has 8 devices, so operators need no threads of their own.
# And programs run for less time than their machine code would take to be optimised.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false --xla_cpu_experimental_ynn_fusion_type=-reduce "
    "--xla_cpu_copy_insertion_use_region_analysis=true "
    "--xla_backend_optimization_level=0 "
    f"{os.environ.get('XLA_FLAGS', '')}".strip()
)
jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", deadline=None, database=None, max_examples=5000)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def program_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def kept_programs(program_cache: str) -> Iterator[None]:
    """Programs are compiled once for all runs of the tests that ask for it, and those of other
    processes into machine code that is not optimised.
    """
    options = {"compilation_cache_dir": program_cache, "persistent_cache_min_compile_time_secs": 0}
    before = dict(os.environ)
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    for name, value in options.items():
        os.environ[f"JAX_{name.upper()}"] = str(value)
        jax.config.update(f"jax_{name}", value)
    yield
    os.environ.clear()
    os.environ |= before
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that have been saved, as they were drawn."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: saved.append(self) or save(self, *args, **kw)
    )
    return saved
