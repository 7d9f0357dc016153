"""Times a step in token slices beside the same step with whole sequences, on the same stages."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import jax
from jax import Array
from jax.stages import Compiled

from tpipe_jax.planning.plan import Plan
from tpipe_jax.training.memory import fitting_step
from tpipe_jax.training.prepare import Run
from tpipe_jax.training.state import TrainState

WARM_UP = 2  # steps of each kind that are not counted


@dataclass(frozen=True)
class Comparison:
    """Median times of a step, in seconds."""

    sliced_seconds: float
    whole_seconds: float


def whole_sequences(plan: Plan) -> Plan:
    """Returns the plan of the same batch, stages and schedule without token slices, in which each
    sequence is a batch slice of its own.
    """
    count = plan.batch_size
    return replace(
        plan,
        batch_slices=(1,) * count,
        token_slices=((plan.seq_len,),) * count,
        prediction=None,
    )


def compare(
    run: Run,
    plan: Plan,
    train_step: Compiled,
    state: TrainState,
    rows: Array,
    is_stopped: Callable[[], bool],
) -> Comparison | None:
    """Times `config.train.compare_steps` steps of each kind, in turns.

    `train_step` is the compiled step of the plan. The state goes on through both kinds, and cannot
    be used any more. All processes must agree on `is_stopped()`; then returns None. Raises
    `Infeasible` if whole sequences do not fit in memory.
    """
    _, whole_step = fitting_step(run.spec, whole_sequences(plan), run.optimizer)
    seconds: dict[str, list[float]] = {"sliced": [], "whole": []}
    for _ in range(WARM_UP + run.config.train.compare_steps):
        if is_stopped():
            return None
        for name, step in (("sliced", train_step), ("whole", whole_step)):
            start = time.monotonic()
            state, metrics = step(state, rows)
            jax.block_until_ready((state, metrics))
            seconds[name].append(time.monotonic() - start)
    return Comparison(*(median(seconds[name][WARM_UP:]) for name in ("sliced", "whole")))
