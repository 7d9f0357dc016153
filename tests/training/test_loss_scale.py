"""float16's loss scale, and steps that are not finite."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import Array

from support import reference
from tpipe_jax.config.settings import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    PrecisionConfig,
    TrainConfig,
)
from tpipe_jax.devices.mesh import make_mesh, put_rows
from tpipe_jax.errors import UserError
from tpipe_jax.model import transformer
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.training.loss_scale import LossScale, new_loss_scale, next_loss_scale
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import TrainState, abstract_state, init_state
from tpipe_jax.training.step import apply_gradients, make_train_step


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 4), st.integers(0, 3))
def test_the_scale_grows_after_good_steps_and_shrinks_at_overflows(
    finite: list[bool], interval: int, start: int
):
    config = PrecisionConfig("float16", 2.0**start, interval, 2.0, 0.5, 8.0)
    scale = new_loss_scale(config)
    value, good = 2.0**start, 0
    for is_finite in finite:
        scale = next_loss_scale(config, scale, jnp.asarray(is_finite))
        good = good + 1 if is_finite else 0
        if not is_finite:
            value = max(value / 2, 0.5)
        elif good == interval:
            value, good = min(value * 2, 8.0), 0
        assert scale == LossScale(value, good)


def test_bounds_of_the_scale_must_be_in_order():
    with pytest.raises(UserError, match=r"loss_scale_start=1 must be between loss_scale_min=2 and"):
        Config(precision=PrecisionConfig(loss_scale_start=1, loss_scale_min=2))


CONFIG = Config(
    model=ModelConfig(num_layers=2, d_model=16, num_heads=2, vocab_size=11, seq_len=12),
    mesh=MeshConfig(data=2, pipe=2),
    plan=PlanConfig("6,6", "uniform:1"),
    train=TrainConfig(batch_size=4),
    optim=OptimConfig(warmup_steps=0),
    precision=PrecisionConfig("float16", loss_scale_start=2.0**10, loss_scale_interval=2),
)
MESH = make_mesh(CONFIG.mesh, jax.devices()[:4])
OPTIMIZER = make_optimizer(CONFIG)
ROWS = np.random.default_rng(0).integers(0, 11, (4, 13), np.int32)


def kept(state: TrainState) -> Any:
    """What a skipped step must leave as it is, of every device."""
    return jax.tree.map(
        lambda a: [np.array(shard.data) for shard in a.addressable_shards],
        (state.params, state.opt_state),
    )


@pytest.mark.parametrize("is_finite", [False, True])
def test_a_step_that_is_not_finite_changes_no_device(is_finite: bool):
    """Whatever its gradients are where they are finite."""
    state = init_state(make_spec(CONFIG, MESH), OPTIMIZER)
    before = kept(state)
    grads = jax.tree.map(lambda a: jax.device_put(np.full_like(a, 0.01), a.sharding), state.params)
    if not is_finite:  # on the second stage alone
        kernel = grads["blocks"][0]["ff_in"]["kernel"]
        spoilt = np.array(kernel)
        spoilt[1, 0] = [np.inf, np.nan] * (spoilt.shape[-1] // 2)
        grads["blocks"][0]["ff_in"]["kernel"] = jax.device_put(spoilt, kernel.sharding)
    places = jax.tree.map(lambda a: a.sharding, abstract_state(make_spec(CONFIG, MESH), OPTIMIZER))
    step = jax.jit(partial(apply_gradients, OPTIMIZER), out_shardings=places)
    state = step(state, grads, jnp.asarray(is_finite))
    assert state.step == 1
    if is_finite:
        with pytest.raises(AssertionError):
            chex.assert_trees_all_equal(kept(state), before)
    else:
        chex.assert_trees_all_equal(kept(state), before)


def overflowing(params: Any) -> Any:
    """Parameters whose backward pass overflows in the last stage, and whose forward pass is fine:
    large outgoing weights behind a GELU that nothing goes into.
    """
    block = params["blocks"][-1]
    block["ff_in"] = jax.tree.map(np.zeros_like, block["ff_in"])
    # Of both signs, since what comes back through the last norm sums to 0.
    block["ff_out"]["kernel"] = 6e4 * np.sign(block["ff_out"]["kernel"])
    return params


def test_a_step_that_overflows_is_skipped_and_later_ones_are_not():
    """In float16 with the real step; the second stage alone is what overflows."""
    step = make_train_step(
        make_spec(CONFIG, MESH), make_schedule(reference.plan_of(CONFIG)), OPTIMIZER
    )
    state = init_state(make_spec(CONFIG, MESH), OPTIMIZER)
    good = jax.device_get(state.params)
    plain = jax.device_get(transformer.init(CONFIG.model, jax.random.key(0)))
    spoilt = reference.to_stages(overflowing(plain), MESH)
    places = jax.tree.map(lambda a: a.sharding, state.params)
    state = state._replace(params=jax.device_put(spoilt, places))
    before, rows = kept(state), put_rows(MESH, ROWS)

    state, metrics = step(state, rows)
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    chex.assert_trees_all_equal(kept(state), before)
    assert metrics["loss_scale"] == 2.0**10
    assert (metrics["skipped_steps"], metrics["consecutive_skips"]) == (1, 0)  # the scale can fall
    assert state.loss_scale.value == 2.0**9

    state = state._replace(params=jax.device_put(good, places))
    for n in range(2):
        state, metrics = step(state, rows)
        assert np.isfinite(metrics["grad_norm"])
        assert (metrics["loss_scale"], metrics["skipped_steps"]) == (2.0**9, 1)
        assert state.step == 2 + n
    assert state.loss_scale.value == 2.0**10  # two steps without overflow
    change = optax.tree.norm(jax.tree.map(lambda a, b: a - b, jax.device_get(state.params), good))
    assert change > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float16", "bfloat16"])
def test_gradients_are_those_of_float32_whatever_the_scale(compute: Any):
    """Divided by the scale again; one that is far too large makes them overflow."""

    def grads(precision: PrecisionConfig) -> tuple[Any, dict[str, Array]]:
        config = Config(
            CONFIG.model, CONFIG.mesh, CONFIG.plan, CONFIG.train, CONFIG.optim, precision=precision
        )
        optimizer = optax.chain(keep_gradients(), optax.sgd(0.0))
        state = init_state(make_spec(config, MESH), optimizer)
        step = make_train_step(
            make_spec(config, MESH), make_schedule(reference.plan_of(config)), optimizer
        )
        state, metrics = step(state, put_rows(MESH, ROWS))
        return jax.device_get(state.opt_state[0]), metrics

    exact, exact_metrics = grads(PrecisionConfig("float32"))
    rounded, metrics = grads(PrecisionConfig(compute, loss_scale_start=2.0**12))
    assert metrics["loss"] == pytest.approx(float(exact_metrics["loss"]), rel=1e-3)
    # Eleven bits or eight, over a dozen operations.
    tolerance = 0.005 if compute == "float16" else 0.04
    for path, value in jax.tree.leaves_with_path(exact):
        got = dict(jax.tree.leaves_with_path(rounded))[path]
        error = np.linalg.norm(got - value) / np.linalg.norm(value)
        assert error < tolerance, jax.tree_util.keystr(path)

    far = PrecisionConfig(compute, loss_scale_start=2.0**40, loss_scale_max=2.0**40)
    _, metrics = grads(far)
    assert np.isfinite(metrics["loss"])
    assert (not np.isfinite(metrics["grad_norm"])) == (compute == "float16")


def keep_gradients() -> optax.GradientTransformation:
    """Keeps the last gradients as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, *_: (grads, grads)
    )
