"""Times what a step does outside of its slices: embedding, losses, gradients and optimiser.

The program is a training step whose stages do nothing. Layers are alike, so a step with one layer
on each stage and a step with two tell what a step with any number of layers takes.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.stages import Compiled

from tpipe_jax.data.rows import RowLayout
from tpipe_jax.devices.mesh import put_rows
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import Schedule, idle_schedule, make_schedule, terapipe
from tpipe_jax.planning.settings import needs_whole_batch, uniform
from tpipe_jax.profiling.clock import REPEATS, OnProgress, agreed
from tpipe_jax.training.memory import budget, compile_step, limit_bytes
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import TrainState, abstract_state


class IdleStep(NamedTuple):
    """A training step whose stages do nothing."""

    spec: StageSpec
    compiled: Compiled
    state: TrainState
    """Random numbers as parameters, and zeros otherwise."""


def make_idle_step(spec: StageSpec, schedule: Schedule) -> IdleStep:
    """Compiles the step of a spec that follows a schedule of idle stages, and makes a state."""
    compiled = compile_step(spec, schedule, make_optimizer(spec.config))
    return IdleStep(spec, compiled, any_state(spec))


def any_state(spec: StageSpec) -> TrainState:
    """Returns a state to take time with. Its parameters are random, since a GPU may be faster on
    plainer numbers.
    """
    state = abstract_state(spec, make_optimizer(spec.config))
    noise = 0.02 * np.random.default_rng(0).normal(size=2**16)

    def made(like: jax.ShapeDtypeStruct, values: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            shape = like.sharding.shard_shape(like.shape) if like.sharding else like.shape
            return np.resize(values.astype(like.dtype), shape)

        return jax.make_array_from_callback(like.shape, like.sharding, part, dtype=like.dtype)

    zero, one = np.zeros(1), np.ones(1)

    def all_of(tree: Any, values: np.ndarray) -> Any:
        return jax.tree.map(lambda like: made(like, values), tree)

    return TrainState(
        all_of(state.params, noise),
        all_of(state.opt_state, zero),
        all_of(state.step, zero),
        all_of(state.loss_scale, one),
        all_of(state.health, zero),
    )


def time_outside(steps: Sequence[IdleStep], on_progress: OnProgress) -> list[float]:
    """Returns the seconds of each step. Their states are used up."""
    states, rounds = [step.state for step in steps], []
    rows = [_rows(step.spec) for step in steps]
    for _ in range(1 + REPEATS):  # the first one warms up
        seconds = []
        for n, step in enumerate(steps):
            start = time.perf_counter()
            states[n], values = step.compiled(states[n], rows[n])
            jax.block_until_ready((states[n], values))
            seconds.append(time.perf_counter() - start)
            on_progress(0)
        rounds.append(seconds)
    return agreed(np.median(rounds[1:], 0)).tolist()


def of_layers(num_layers: int, figures: Sequence[tuple[int, float]]) -> float:
    """Returns a figure of stages with `num_layers` layers, from those of stages with fewer, given
    as (layers, figure). A further layer adds the same each time, and never less than nothing.
    """
    (first, figure), *others = figures
    if not others:
        return figure
    [(second, more)] = others
    return figure + (num_layers - first) * max(0.0, (more - figure) / (second - first))


def idle_step_schedule(spec: StageSpec) -> Schedule:
    """Returns a schedule whose stages do nothing: for the whole batch at once, or for one sequence
    after another if the settings ask for 1f1b, or leave the schedule open and the whole batch does
    not fit in memory.
    """
    config, num_stages = spec.config, spec.num_stages
    num_rows = config.train.batch_size // config.mesh.data
    seq_len, limit = config.model.seq_len, limit_bytes(spec)
    whole = terapipe(Plan(num_stages, (num_rows,), ((seq_len,),)))
    is_one_by_one = config.plan.schedule == "1f1b"
    if config.plan.schedule == "auto" and limit is not None:
        is_one_by_one = sum(budget(spec, whole, make_optimizer(config)).values()) > limit
    if num_rows == 1 or needs_whole_batch(config) or not is_one_by_one:
        return idle_schedule(whole)
    token_slices = uniform(seq_len, min(2 * num_stages, seq_len))  # enough to keep few rows
    return idle_schedule(
        make_schedule(
            Plan(num_stages, (1,) * num_rows, (token_slices,) * num_rows, schedule="1f1b")
        )
    )


def _rows(spec: StageSpec) -> Any:
    """Returns random tokens as rows of a batch, on the mesh."""
    config = spec.config
    shape = config.train.batch_size, config.model.seq_len + 1
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return put_rows(spec.mesh, RowLayout.of(config).of_tokens(tokens))
