"""What gradients of weights take that are taken later, with a clock whose readings are known."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from support.profiled_config import CONFIG
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.pipeline.spec import StageSpec, make_spec
from tpipe_jax.planning.schedule import IDLE
from tpipe_jax.profiling import profiler
from tpipe_jax.profiling.profiler import Profiler, Program
from tpipe_jax.profiling.shapes import TimedShape


def test_deferral_is_timed_beside_what_it_replaces(monkeypatch: pytest.MonkeyPatch):
    """Without gradients of weights a backward pass takes 2 of 3 parts, and they alone 1.5."""

    def program(self: Profiler, spec: StageSpec, shape: TimedShape) -> Program:
        run: Any = SimpleNamespace(shape=shape, is_deferred=spec.weight_grads == "some ticks later")
        return Program(run, (3, 5))

    def seconds(self: Profiler, run: Any, *tables: np.ndarray) -> float:
        work = [len(t) * (t.ravel()[0] != IDLE) * run.shape.size * 1e-4 for t in tables]
        if len(tables) == 1:
            return 0.5 + 1.5 * work[0]
        return 0.5 + work[0] + (2 if run.is_deferred else 3) * work[1]

    def compiled(work: Any, mesh: Mesh, *args: Any) -> Any:
        return SimpleNamespace(shape=work)

    monkeypatch.setattr(Profiler, "__init__", lambda self: None)
    monkeypatch.setattr(Profiler, "_program", program)
    monkeypatch.setattr(Profiler, "_seconds", seconds)
    monkeypatch.setattr(profiler, "compile_checked", compiled)
    monkeypatch.setattr(
        profiler, "make_weights_work", lambda spec, item: TimedShape(*item.shape, (0,))
    )
    made = Profiler()  # pyrefly: ignore
    made._spec = make_spec(CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:2]))
    made._inputs = ()
    shapes = [TimedShape(1, 64, (0,)), TimedShape(1, 17, (0, 8)), TimedShape(4, 33, (0,))]
    programs, parts = {shape: program(made, made._spec, shape) for shape in shapes}, []
    weights, saved = made._time_deferral(shapes, programs, lambda: parts.append(1))
    assert weights == pytest.approx((0, 1.5e-4), abs=1e-9)
    assert saved == pytest.approx((0, 1e-4), abs=1e-9)
    assert len(parts) == 3


def test_short_slices_count_as_much_as_long_ones():
    """Of three times, each off by a share, the shortest one's line is not lost."""
    shapes = [TimedShape(1, n, (0,)) for n in (10, 100, 10000)]
    seconds = np.array([0.4, 1.0, 90.0])
    sizes = np.array([10, 100, 10000])
    constant, per_token = profiler._line(shapes, seconds, 1)
    errors = (constant + per_token * sizes - seconds) / sizes
    for a, b in ((1e-3, 0), (-1e-3, 0), (0, 1e-5), (0, -1e-5)):
        other = (constant + a + (per_token + b) * sizes - seconds) / sizes
        assert (other**2).sum() > (errors**2).sum()
