"""Counts of skipped steps and loss spikes, against numpy's mean and deviation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpipe_jax.training.health import SPIKE_DEVIATIONS, WINDOW, Health, new_health, next_health

step = jax.jit(next_health)


def after(losses: list[float], is_expected: bool = False) -> Health:
    health = new_health()
    for loss in losses:
        is_finite = jnp.asarray(np.isfinite(loss))
        health = step(health, jnp.float32(loss), is_finite, jnp.asarray(is_expected))
    return health


def test_mean_and_variance_are_those_of_the_losses_as_long_as_the_window():
    losses = np.random.default_rng(0).normal(3, 0.5, WINDOW).tolist()
    health = after([*losses[:7], np.nan, *losses[7:]])  # which does not count
    assert health.num_losses == WINDOW
    np.testing.assert_allclose(health.loss_mean, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(health.loss_variance, np.var(losses), rtol=1e-4)


def test_older_losses_count_less_beyond_the_window():
    health = after([1.0] * WINDOW + [2.0] * 2 * WINDOW)
    assert health.loss_mean == pytest.approx(2 - (1 - 1 / WINDOW) ** (2 * WINDOW), rel=1e-4)


@pytest.mark.parametrize(
    ("num_before", "deviations", "spikes"),
    [
        (WINDOW, SPIKE_DEVIATIONS + 0.1, 1),
        (WINDOW, SPIKE_DEVIATIONS - 0.1, 0),
        (WINDOW, -2.0 * SPIKE_DEVIATIONS, 0),
        (WINDOW - 1, 2.0 * SPIKE_DEVIATIONS, 0),  # too few to tell
        (WINDOW, np.inf, 0),  # skipped, which is another count
    ],
)
def test_losses_far_above_the_mean_are_spikes(num_before: int, deviations: float, spikes: int):
    losses = np.random.default_rng(1).normal(5, 0.1, num_before)
    health = after([*losses, np.mean(losses) + deviations * np.std(losses)])
    assert health.loss_spikes == spikes


@given(st.lists(st.sampled_from(["good", "bad", "lowering"]), max_size=30))
def test_skips_are_counted_and_those_in_a_row_too(steps: list[str]):
    health, skipped, in_a_row = new_health(), 0, 0
    for kind in steps:
        is_finite = kind == "good"
        health = step(
            health, jnp.float32(1), jnp.asarray(is_finite), jnp.asarray(kind == "lowering")
        )
        skipped += not is_finite
        in_a_row = 0 if is_finite else in_a_row + (kind == "bad")
        assert health.skipped_steps == skipped
        assert health.consecutive_skips == in_a_row


def test_a_skipped_step_changes_no_mean():
    before = after([1.0, 2.0])
    health = partial(step, before, jnp.float32(np.nan))(jnp.asarray(False), jnp.asarray(False))
    assert health == before._replace(skipped_steps=1, consecutive_skips=1)
