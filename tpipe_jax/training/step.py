"""The compiled programs: a training step, its loss and gradients alone, and evaluation."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.stages import Wrapped

from tpipe_jax.config.settings import IGNORE, Config
from tpipe_jax.data.rows import RowLayout
from tpipe_jax.devices.collectives import psum, varying
from tpipe_jax.errors import UserError
from tpipe_jax.model.block import Params
from tpipe_jax.pipeline import vocab_parallel
from tpipe_jax.pipeline.balance import balance_loss, with_slopes
from tpipe_jax.pipeline.buffers import routings
from tpipe_jax.pipeline.build import (
    block_gradients,
    caches_of,
    for_compute,
    gradients_of,
    make_head,
    make_stage,
    over_mesh,
    packing_of,
    saved_of,
)
from tpipe_jax.pipeline.executor import StepWork, execute
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.pipeline.vocab_parallel import Sums
from tpipe_jax.planning.schedule import Schedule
from tpipe_jax.planning.settings import needs_whole_batch
from tpipe_jax.training.health import next_health
from tpipe_jax.training.loss_scale import next_loss_scale
from tpipe_jax.training.optimizer import clipped, global_norm
from tpipe_jax.training.state import TrainState, abstract_state


def make_train_step(
    spec: StageSpec, schedule: Schedule, optimizer: optax.GradientTransformation
) -> Wrapped:
    """Returns the training step, `(state, rows)` (`RowLayout`) to the next state and the metrics.

    The metrics are `loss`, `grad_norm`, with experts the `balance_loss`, for float16 the
    `loss_scale` of this step, and the counts of `Health` after it. If loss or gradients are not
    finite on any device, all devices keep their parameters and optimiser state. The old state is
    donated.
    """
    config, losses_and_grads = spec.config, _make_losses_and_grads(spec, schedule)
    places = jax.tree.map(lambda a: a.sharding, abstract_state(spec, optimizer))
    is_scaled = config.precision.compute == "float16"

    @partial(jax.jit, donate_argnums=0, out_shardings=(places, None))
    def train_step(state: TrainState, rows: Array) -> tuple[TrainState, dict[str, Array]]:
        scale = state.loss_scale
        factor = jnp.float32(scale.value if is_scaled else 1.0)
        metrics, grads = losses_and_grads(state.params, rows, factor)
        metrics["grad_norm"] = global_norm(grads)
        is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        grads = clipped(config.optim, grads, metrics["grad_norm"])
        state = apply_gradients(optimizer, state, grads, is_finite)
        is_lowering = jnp.bool(False)  # a step that only lowers the loss scale is no divergence
        if is_scaled:
            is_lowering = scale.value > config.precision.loss_scale_min
            state = state._replace(loss_scale=next_loss_scale(config.precision, scale, is_finite))
            metrics["loss_scale"] = scale.value
        health = next_health(state.health, metrics["loss"], is_finite, is_lowering)
        counts = ("skipped_steps", "consecutive_skips", "loss_spikes")
        metrics |= {name: getattr(health, name) for name in counts}
        return state._replace(health=health), metrics

    return train_step


def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Params, is_finite: Array
) -> TrainState:
    """Returns the state after a step. Unless `is_finite`, only the number of steps changes."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = optax.apply_updates(state.params, updates), opt_state
    params, opt_state = jax.tree.map(
        partial(jnp.where, is_finite), new, (state.params, state.opt_state)
    )
    return state._replace(params=params, opt_state=opt_state, step=state.step + 1)


def make_loss_and_grads(spec: StageSpec, schedule: Schedule) -> Wrapped:
    """`(params, rows, scale=1)` (`RowLayout`) to the mean loss in nats per token and its float32
    gradients.

    The backward pass computes gradients of `scale` times the loss; they are divided by `scale` at
    the end. With experts, the gradients are those of the loss plus the weighted balance loss.
    Raises `UserError` if the settings need all of a batch at once, and the schedule has less.
    """
    losses_and_grads = _make_losses_and_grads(spec, schedule)

    def loss_and_grads(params: Params, rows: Array, scale: Any = 1.0) -> tuple[Array, Params]:
        losses, grads = losses_and_grads(params, rows, jnp.float32(scale))
        return losses["loss"], grads

    return jax.jit(loss_and_grads)


def _make_losses_and_grads(spec: StageSpec, schedule: Schedule) -> Wrapped:
    """As `make_loss_and_grads`, to the losses by name, `loss` and the `balance_loss` of a model
    with experts, and the gradients of `loss` plus config.train.balance_weight times `balance_loss`.
    """
    _check_has_batch(spec, schedule)
    config, packing = spec.config, packing_of(spec, schedule.longest_shape[1])
    model, balance_weight = config.model, config.balance_weight

    def local(params: Params, rows: Array, scale: Array) -> tuple[dict[str, Array], Params]:
        batch, given, params = _Batch.of(spec.config, rows), params, for_compute(spec, params)
        count = _count(batch.targets_BT)
        weight, head = scale / count, make_head(spec, params)
        counts_BT1 = _is_no_padding(batch.targets_BT)[..., None].astype(jnp.float32)
        stage = make_stage(spec, params, packing, batch.starts_BT1)._replace(
            shares_gradient_rows=schedule.num_gradient_rows < len(batch.tokens_BT),
            has_slots=schedule.slots is not None,
            counts_BT1=counts_BT1 if balance_weight else None,
        )

        def losses(y_BTD: Array, row: Array | int, sums: Sums) -> tuple[Array, Sums]:
            targets = batch.part(row, len(y_BTD)).targets_BT
            sums, d_y_BTD = vocab_parallel.add_cross_entropy_and_grads(
                model, sums, head, y_BTD, targets, weight
            )
            return d_y_BTD, sums

        num_tokens = psum(counts_BT1.sum(), "data") * model.num_layers
        balance = partial(with_slopes, count=num_tokens, weight=scale * balance_weight)

        def embed_grads(d_x_BTD: Array, row: Array | int, sums: Sums) -> Sums:
            tokens, _, starts = batch.part(row, len(d_x_BTD))
            d_embed = vocab_parallel.add_embed_grads(sums.d_embed, tokens, d_x_BTD, weight, starts)
            return sums._replace(d_embed=d_embed)

        work = StepWork(
            _embedding(params, batch, spec.dtype),
            stage.forward,
            losses,
            stage.backward,
            stage.weight_gradients,
            balance if balance_weight else None,
            embed_grads,
        )
        saved, gradients, sums = execute(
            schedule,
            work,
            _trunk(spec, schedule),
            saved_of(spec, packing, schedule.num_rows),
            gradients_of(spec, schedule.num_gradient_rows, _slot_buffer_shape(schedule)),
            vocab_parallel.no_sums(params),
            spec.skips,
        )
        d_blocks = stage.param_gradients(saved, gradients)
        blocks = {"blocks": block_gradients(spec, given, d_blocks)}
        grads = vocab_parallel.gradients_of(sums, weight) | blocks
        total, grads = psum((sums.loss, grads), "data")
        values = {"loss": total / count}
        if balance_weight:
            values["balance_loss"] = balance_loss(routings(saved), num_tokens)
        return values, jax.tree.map(lambda g: g / scale, grads)

    return over_mesh(spec, local, lambda specs: (PartitionSpec(), specs), num_scalars=1)


def _check_has_batch(spec: StageSpec, schedule: Schedule) -> None:
    """Raises `UserError` if the settings need all of a batch at once, but the schedule keeps only a
    part of it at a time.
    """
    setting = needs_whole_batch(spec.config)
    if setting and len(schedule.parts) > 1:
        raise UserError(
            f"{setting[0]} needs all of a batch at once, and the plan's schedule keeps a part at a "
            f"time: set {setting[1]}, or plan with config.plan.schedule=terapipe."
        )


def make_loss(spec: StageSpec, schedule: Schedule) -> Wrapped:
    """`(params, rows)` (`RowLayout`) to the mean loss in nats per token."""
    model = spec.config.model

    def local(params: Params, rows: Array) -> Array:
        batch, params = _Batch.of(spec.config, rows), for_compute(spec, params)
        head = make_head(spec, params)
        stage = make_stage(spec, params, starts_BT1=batch.starts_BT1)

        def losses(y_BTD: Array, row: Array | int, total: Array) -> tuple[Array, Array]:
            targets = batch.part(row, len(y_BTD)).targets_BT
            return y_BTD, total + vocab_parallel.cross_entropy(model, head, y_BTD, targets)

        _, _, total = execute(
            schedule,
            StepWork(_embedding(params, batch, spec.dtype), stage.infer, losses),
            _trunk(spec, schedule),
            caches_of(spec, spec.dtype, schedule.num_rows),
            (),
            varying(jnp.float32(0), ("data",)),
            spec.skips,
        )
        return psum(total, "data") / _count(batch.targets_BT)

    return over_mesh(spec, local, lambda _: PartitionSpec())


def checked_rows(config: Config, rows: np.ndarray) -> np.ndarray:
    """Returns rows of the shape that `RowLayout` says, as int32.

    Raises `UserError`, which names the first bad place, if they are not whole numbers, or if the
    model would take a place for something else than what it says. Sound rows are read once or
    twice, which takes no time beside a step.
    """
    if not np.issubdtype(rows.dtype, np.integer):
        raise UserError(
            f"rows of type {rows.dtype} must be whole numbers: give token ids as int32."
        )
    size, marks_documents = config.model.vocab_size, config.data.marks_documents
    tokens, starts = (rows[:, :2], rows[:, 2]) if marks_documents else (rows, None)
    lowest = int(tokens.min())
    if lowest < IGNORE or tokens.max() >= size or (marks_documents and tokens[:, 0].min() < 0):
        is_bad = (tokens < IGNORE) | (tokens >= size)
        if marks_documents:
            is_bad[:, 0] |= tokens[:, 0] < 0
        raise UserError(
            f"{_first(rows, is_bad)} is no token: ids are from 0 to {size - 1}, and a target that "
            f"does not count is tpipe_jax.config.IGNORE={IGNORE}."
        )
    if starts is not None:
        is_bad = (starts < 0) | (starts > np.arange(starts.shape[1]))
        if is_bad.any():
            is_bad = np.stack([np.zeros_like(is_bad)] * 2 + [is_bad], 1)
            raise UserError(
                f"{_first(rows, is_bad)} is no start of a document: that is the place of its first "
                "input, from 0 to the place of this one."
            )
    elif lowest == IGNORE:
        is_bad = (rows[:, :-1] == IGNORE) & (rows[:, 1:] != IGNORE)
        if is_bad.any():
            raise UserError(
                f"{_first(rows, is_bad)} is the input for a token that counts: only the end of a "
                "row may be IGNORE, unless config.data.packing=whole keeps targets apart."
            )
    return rows.astype(np.int32, copy=False)


def _first(rows: np.ndarray, is_bad: np.ndarray) -> str:
    """Returns the first bad place of rows, with its value, as text."""
    place = tuple(np.argwhere(is_bad)[0].tolist())
    return f"rows[{', '.join(map(str, place))}]={rows[place]}"


class _Batch(NamedTuple):
    """The rows of a data shard."""

    tokens_BT: Array
    targets_BT: Array
    starts_BT1: Array | None
    """Where the document of each token begins; None if documents see each other."""

    @classmethod
    def of(cls, config: Config, rows: Array) -> "_Batch":
        """Splits rows that are laid out as `RowLayout` says."""
        layout = RowLayout.of(config)
        starts_BT = layout.document_starts(rows)
        if starts_BT is None or config.data.cross_document_attention:
            return cls(layout.inputs(rows), layout.targets(rows), None)
        return cls(layout.inputs(rows), layout.targets(rows), starts_BT[..., None])

    def part(self, row: Array | int, num_rows: int) -> "_Batch":
        """Returns `num_rows` of the rows, from `row` on."""
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, row, num_rows), self)


def _embedding(params: Params, batch: _Batch, dtype: Any) -> Callable[[Array | int, int], Array]:
    """`(row, num_rows)` to the embedding of these rows, `[b, T, D]`."""

    def embed(row: Array | int, num_rows: int) -> Array:
        tokens, _, starts = batch.part(row, num_rows)
        return vocab_parallel.embed(params["embed"], tokens, dtype, starts)

    return embed


def _trunk(spec: StageSpec, schedule: Schedule) -> Array:
    """A zeroed buffer for the rows that are in the pipeline, `[R, T, D]`."""
    model = spec.config.model
    return jnp.zeros((schedule.num_rows, model.seq_len, model.d_model), spec.dtype)


def _slot_buffer_shape(schedule: Schedule) -> tuple[int, int] | None:
    """Rows and tokens of the buffer of all slots; None if there are no slots."""
    num_rows, num_tokens = schedule.longest_shape
    return (schedule.num_slots * num_rows, num_tokens) if schedule.num_slots else None


def _is_no_padding(targets_BT: Array) -> Array:
    """Whether a token of the same row, or this one, has a target that counts, from it on. What
    comes after the last such token of a row is padding.
    """
    return lax.cummax((targets_BT != IGNORE).astype(jnp.int32), axis=1, reverse=True) > 0


def _count(targets_BT: Array) -> Array:
    """Counts the targets of all data shards; 1 if there are none, so that their mean loss is 0."""
    return jnp.maximum(psum((targets_BT != IGNORE).sum(), "data"), 1)
