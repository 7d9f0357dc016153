import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from matplotlib.figure import Figure

# Read when jax looks for devices, which are CPUs unless test_gpu.py is asked for. Flags are as
# `startup.prepare_cpu` has them: one process has 8 devices, so operators need no threads of their
# own. And programs run for less time than their machine code would take to be optimised.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false --xla_cpu_experimental_ynn_fusion_type=-reduce "
    "--xla_cpu_copy_insertion_use_region_analysis=true "
    "--xla_backend_optimization_level=0 --xla_gpu_autotune_level=0 "
    f"{os.environ.get('XLA_FLAGS', '')}".strip()
)
jax.config.update("jax_num_cpu_devices", 8)

# Compiling is most of the tests' time. So each program is compiled once, for all tests and for the
# next time; other processes that tests start find it too.
PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs"
MAX_PROGRAMS_BYTES = 4 * 2**30
# Tests note their runs here, and not in the home folder of the user.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_STATE_HOME"] = str(PROGRAMS.with_name("state") / str(os.getpid()))
for name, value in {
    "compilation_cache_dir": PROGRAMS,
    "persistent_cache_min_compile_time_secs": 0,
    "persistent_cache_min_entry_size_bytes": -1,
}.items():
    os.environ[f"JAX_{name.upper()}"] = str(value)
    jax.config.update(f"jax_{name}", str(value) if isinstance(value, Path) else value)


def pytest_configure(config: pytest.Config) -> None:
    """Programs of older code are not kept for ever."""
    is_worker = hasattr(config, "workerinput")
    if not is_worker and PROGRAMS.exists():
        sizes = [path.stat().st_size for path in PROGRAMS.iterdir()]
        if sum(sizes) > MAX_PROGRAMS_BYTES:
            shutil.rmtree(PROGRAMS)


def pytest_unconfigure(config: pytest.Config) -> None:
    """The notes of runs are of no use to later tests."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, so that no worker waits for them in the end."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", deadline=None, database=None, max_examples=5000)
settings.load_profile("tests")


@pytest.fixture(scope="module")
def short_flags() -> Iterator[None]:
    """Other processes compile into machine code that is not optimised; their other flags are those
    that a run gives itself.
    """
    before = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    yield
    os.environ["XLA_FLAGS"] = before


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that have been saved, as they were drawn."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: saved.append(self) or save(self, *args, **kw)
    )
    return saved
