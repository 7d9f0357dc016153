"""The optimiser against its formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tpipe_jax.config.settings import Config, OptimConfig, TrainConfig
from tpipe_jax.training.optimizer import (
    clipped,
    global_norm,
    learning_rate,
    learning_rate_at,
    make_optimizer,
)

NUM_STEPS = 20
TRAIN = TrainConfig(num_steps=NUM_STEPS)


def formula(step: int, config: OptimConfig, num_steps: int) -> float:
    """Linear to the peak, then half a cosine to a tenth of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    return config.learning_rate * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * done)))


@pytest.mark.parametrize("warmup", [0, 1, 5, 19, 20, 50])
def test_learning_rate(warmup: int):
    config = OptimConfig(learning_rate=0.3, warmup_steps=warmup)
    whole = Config(train=TRAIN, optim=config)
    schedule, steps = learning_rate(whole), range(NUM_STEPS + 5)
    expected = [formula(step, config, NUM_STEPS) for step in steps]
    np.testing.assert_allclose([float(schedule(n)) for n in steps], expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose([learning_rate_at(whole, n) for n in steps], expected, rtol=1e-12)


@pytest.mark.parametrize("grad_clip", [0.0, 1.0, 100.0])
def test_adamw(grad_clip: float):
    """Decoupled decay on kernels only, bias-corrected moments, clipping by the norm of all."""
    config = OptimConfig(
        learning_rate=0.1,
        warmup_steps=1,
        weight_decay=0.5,
        beta1=0.8,
        beta2=0.9,
        grad_clip=grad_clip,
    )
    rng = np.random.default_rng(0)
    shapes = {
        "embed": {"tokens": (6, 3), "positions": (4, 3)},
        "blocks": [{"ff_in": {"kernel": (2, 3, 4), "bias": (2, 4)}}],
        "norm": {"scale": (3,)},
    }
    is_shape = lambda value: isinstance(value, tuple)  # noqa: E731
    params = jax.tree.map(lambda s: jnp.array(rng.normal(size=s)), shapes, is_leaf=is_shape)
    optimizer = make_optimizer(Config(train=TRAIN, optim=config))
    state = optimizer.init(params)

    leaves, structure = jax.tree.flatten(params)
    is_kernel = [
        path[-1].key == "kernel" for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    assert sum(is_kernel) == 1
    values = [np.asarray(leaf, np.float64) for leaf in leaves]
    first, second = ([np.zeros_like(v) for v in values] for _ in range(2))
    for step in range(4):
        grads = [rng.normal(size=v.shape) for v in values]
        tree = jax.tree.unflatten(structure, list(map(jnp.array, grads)))
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        np.testing.assert_allclose(global_norm(tree), norm, rtol=1e-6)
        updates, state = optimizer.update(clipped(config, tree, norm), state, params)
        params = optax.apply_updates(params, updates)

        assert 1 < norm < 100
        rate = formula(step, config, NUM_STEPS)
        for i, g in enumerate(grads):
            if grad_clip:
                g = g * min(1, grad_clip / norm)
            first[i] = 0.8 * first[i] + 0.2 * g
            second[i] = 0.9 * second[i] + 0.1 * g**2
            mean, square = first[i] / (1 - 0.8 ** (step + 1)), second[i] / (1 - 0.9 ** (step + 1))
            decay = 0.5 * values[i] if is_kernel[i] else 0
            values[i] = values[i] - rate * (mean / (np.sqrt(square) + 1e-8) + decay)
    for actual, expected in zip(jax.tree.leaves(params), values, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
