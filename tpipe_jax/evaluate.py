"""The loss of a model on all of some data, through the pipeline."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tpipe_jax.collectives import compile_checked
from tpipe_jax.config import BYTES, PlanConfig, UserError
from tpipe_jax.data import Share
from tpipe_jax.loss import IGNORE
from tpipe_jax.mesh import put_rows
from tpipe_jax.plan import Plan, read_settings
from tpipe_jax.schedule import terapipe
from tpipe_jax.train_state import abstract_rows
from tpipe_jax.train_step import make_loss
from tpipe_jax.trained import Trained


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of data."""

    num_tokens: int
    """Those that are predicted, each once."""
    loss: float
    """Nats per token."""
    is_bytes: bool
    """Whether a token is a byte."""

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss))

    @property
    def bits_per_byte(self) -> float | None:
        """None where it is not known how many bytes a token is."""
        return self.loss / math.log(2) if self.is_bytes else None


def evaluate(
    trained: Trained,
    shares: Sequence[Share],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """The mean loss of every token of these shares but the first of each, in windows of `seq_len`
    tokens that begin anew, as in training; weights don't count.
    """
    config, mesh, params, _ = trained
    batch_size, seq_len = config.train.batch_size, config.model.seq_len
    windows = [
        (source, start, min(start + seq_len + 1, positions.stop))
        for source, positions, _ in shares
        for start in range(positions.start, positions.stop - 1, seq_len)
    ]
    num_targets = sum(stop - start - 1 for _, start, stop in windows)
    if not num_targets:
        raise UserError(f"{shares[0].source.setting} has a single token: give two at least.")
    loss = compile_checked(
        make_loss(config, mesh, terapipe(_plan(trained))), mesh, params, abstract_rows(config, mesh)
    )
    total = 0.0
    for first in range(0, len(windows), batch_size):
        own = windows[first : first + batch_size]
        rows = np.full((batch_size, seq_len + 1), IGNORE, np.int32)
        for row, (source, start, stop) in zip(rows, own, strict=False):
            row[: stop - start] = source.read(start, stop)
        num_counted = sum(stop - start - 1 for _, start, stop in own)
        total += num_counted * float(loss(params, put_rows(mesh, rows)))
        on_progress(first + len(own), len(windows))
    return Evaluation(num_targets, total / num_targets, config.model.vocab_size == BYTES)


def _plan(trained: Trained) -> Plan:
    """Whole sequences on one stage; on several, two slices for each."""
    num_stages = trained.config.mesh.pipe
    num_slices = min(2 * num_stages, trained.config.model.seq_len) if num_stages > 1 else 1
    slices = PlanConfig(f"uniform:{num_slices}", "uniform:1")
    plan = read_settings(replace(trained.config, plan=slices))
    assert isinstance(plan, Plan)  # all slices are given
    return plan
