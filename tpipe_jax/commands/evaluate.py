"""Evaluates a model on data, through the pipeline."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jax import Array

from tpipe_jax.commands.trained_model import Trained
from tpipe_jax.config.settings import BYTES, BYTES_NAME, IGNORE, Config, PlanConfig
from tpipe_jax.data.batches import make_sequences, with_packing
from tpipe_jax.data.rows import RowLayout
from tpipe_jax.data.sources import Share
from tpipe_jax.data.tokenizer import open_tokenizer
from tpipe_jax.devices.exchanges import compile_checked
from tpipe_jax.devices.mesh import put_rows
from tpipe_jax.errors import UserError
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.planning.settings import read_settings
from tpipe_jax.training.evaluation import mean_loss
from tpipe_jax.training.state import abstract_rows
from tpipe_jax.training.step import make_loss


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on data."""

    num_tokens: int
    """Tokens that are predicted, each counted once."""
    loss: float
    """Nats per token."""
    num_bytes: int | None
    """Bytes of the text of these tokens; None where that is not known."""

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss))

    @property
    def bits_per_byte(self) -> float | None:
        """None where the number of bytes is not known."""
        if not self.num_bytes:
            return None
        return self.loss / math.log(2) * self.num_tokens / self.num_bytes


def evaluate(
    trained: Trained,
    shares: Sequence[Share],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Returns the mean loss of all tokens of these shares that are targets in training.

    Sequences are made as in training, but the last one may be shorter. The weights of the shares
    don't count. Calls `on_progress(done, total)`, counted in sequences, after each batch. Raises
    `UserError` if there is no target.
    """
    config, batch_size = with_packing(trained.config, shares), trained.config.train.batch_size
    spec, layout = trained.spec.with_config(config), RowLayout.of(config)
    sequences = [make_sequences(config, share, is_whole=False) for share in shares]
    rows_of_all = itertools.chain.from_iterable(map(iter, sequences))
    num_sequences = sum(map(len, sequences))
    if not num_sequences:
        raise UserError(f"{shares[0].source.setting} has a single token: give two at least.")
    like = abstract_rows(spec)
    program = make_loss(spec, make_schedule(_plan(config)))
    loss = compile_checked(program, spec.mesh, trained.params, like)
    count_bytes = _byte_counter(config)
    num_bytes: int | None = 0

    def batches() -> Iterator[tuple[Array, int]]:
        nonlocal num_bytes
        for done in range(0, num_sequences, batch_size):
            rows = np.full(like.shape, IGNORE, np.int32)
            for n, row in enumerate(itertools.islice(rows_of_all, batch_size)):
                rows[n] = row
            targets = layout.targets(rows)[layout.counts(rows)]
            yield put_rows(spec.mesh, rows), targets.size
            # From here on the loss of these rows is known.
            more = count_bytes(targets) if count_bytes else None
            num_bytes = None if num_bytes is None or more is None else num_bytes + more
            on_progress(min(done + batch_size, num_sequences), num_sequences)

    mean, num_targets = mean_loss(loss, trained.params, batches())
    if not num_targets:
        raise UserError(
            f"{shares[0].source.setting} has nothing to predict: give longer documents."
        )
    return Evaluation(num_targets, mean, num_bytes)


def _byte_counter(config: Config) -> Callable[[np.ndarray], int | None] | None:
    """Returns a function that counts the bytes of the text of tokens, or returns None where they do
    not say; None if the tokenizer is not known.
    """
    if config.data.tokenizer == BYTES_NAME and config.model.vocab_size != BYTES:
        return None
    tokenizer = open_tokenizer("config.data.tokenizer", config.data.tokenizer)

    def checked(tokens: np.ndarray) -> int | None:
        if tokens.size and tokens.max() >= tokenizer.vocab_size:
            raise UserError(
                f"config.data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} tokens, "
                f"but the data have token id {tokens.max()}: name the tokenizer that made them."
            )
        return tokenizer.num_bytes(tokens) if tokenizer.num_bytes else None

    return checked


def _plan(config: Config) -> Plan:
    """Returns a plan: whole sequences on one stage; on several, two token slices for each stage."""
    num_stages = config.mesh.pipe
    num_slices = min(2 * num_stages, config.model.seq_len) if num_stages > 1 else 1
    slices = PlanConfig(f"uniform:{num_slices}", "uniform:1")
    plan = read_settings(replace(config, plan=slices))
    assert isinstance(plan, Plan)  # all slices are given
    return plan
