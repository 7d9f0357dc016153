"""What a step takes outside of its slices."""

import dataclasses

import jax
import pytest

from support.profiled_config import CONFIG
from tpipe_jax.config.settings import PlanConfig
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import idle_schedule, make_schedule
from tpipe_jax.profiling.outside import any_state, make_idle_step, of_layers, time_outside
from tpipe_jax.training.memory import compile_step, program_bytes
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_state, init_state


def test_each_further_layer_adds_the_same():
    assert of_layers(7, [(1, 10.0), (2, 12.0)]) == 22
    assert of_layers(2, [(2, 12.0)]) == 12
    assert of_layers(7, [(1, 10.0), (2, 9.0)]) == 10  # noise


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["terapipe", "1f1b"])
def test_an_idle_step_does_all_but_the_slices(schedule: str):
    """Its gradients are buffers of zeros for all that XLA knows, so that the optimiser reads them;
    it compiles no layer; and the state is as that of training.
    """
    config = dataclasses.replace(CONFIG, plan=PlanConfig(schedule=schedule))
    spec = make_spec(config, make_mesh(CONFIG.mesh, jax.devices()[:2]))
    plan = Plan(2, (2, 2), ((16,) * 4,) * 2, schedule=schedule)
    made, optimizer = (
        make_idle_step(spec, idle_schedule(make_schedule(plan))),
        make_optimizer(config),
    )
    whole = compile_step(spec, make_schedule(plan), optimizer)
    assert len(made.compiled.as_text()) < 0.7 * len(whole.as_text())
    assert 0 < program_bytes(made.compiled) < program_bytes(whole)
    norms = [
        line
        for line in made.compiled.as_text().splitlines()
        if "grad" in line and "constant" in line and f"f32[{16 * 64}]" in line
    ]
    assert norms == []
    fresh = init_state(spec, optimizer)
    for got, expected, like in zip(
        *map(jax.tree.leaves, (any_state(spec), fresh, abstract_state(spec, optimizer))),
        strict=True,
    ):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert got.sharding.is_equivalent_to(like.sharding, got.ndim)
    [seconds] = time_outside([made], lambda _: None)
    assert 0 < seconds < 10
