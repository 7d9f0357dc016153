import os

import jax
import pytest
from hypothesis import settings
from matplotlib.figure import Figure

# Read when jax looks for devices. One process has 8 of them, so operators need no threads of their
# own.
os.environ["XLA_FLAGS"] = (
    f"--xla_cpu_multi_thread_eigen=false {os.environ.get('XLA_FLAGS', '')}".strip()
)
jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that have been saved, as they were drawn."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: saved.append(self) or save(self, *args, **kw)
    )
    return saved
