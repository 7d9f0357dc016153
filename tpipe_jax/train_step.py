"""The compiled programs: a training step, its loss and gradients alone, evaluation, decoding."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped

from tpipe_jax import loss
from tpipe_jax.attention import KVCache
from tpipe_jax.block import Params
from tpipe_jax.buffers import empty_caches
from tpipe_jax.config import IGNORE, Config, UserError
from tpipe_jax.health import next_health
from tpipe_jax.inplace import Position
from tpipe_jax.mesh import manual_part, param_specs
from tpipe_jax.optim import clipped, global_norm
from tpipe_jax.pipeline import (
    StepWork,
    each_alone,
    execute,
    from_stage,
    needs_sums,
    psum,
    sweep,
    varying,
)
from tpipe_jax.precision import compute_dtype, compute_format, next_loss_scale
from tpipe_jax.schedule import IDLE, Item, Schedule
from tpipe_jax.stage_setup import (
    cache_shape,
    empty_caches_of,
    empty_gradients_of,
    empty_saved_of,
    for_compute,
    layers_per_stage,
    make_head,
    make_stage,
)
from tpipe_jax.train_state import TrainState, abstract_state


def make_train_step(
    config: Config, mesh: Mesh, schedule: Schedule, optimizer: optax.GradientTransformation
) -> Wrapped:
    """`(state, rows)` (`data.make_row`) to the next state and `loss`, `grad_norm`, for float16 also
    `loss_scale`, and the counts of `Health` as they are then.

    Where loss or gradients are not finite on any device, all keep their parameters and optimiser
    state. The old state is donated.
    """
    loss_and_grads = make_loss_and_grads(config, mesh, schedule)
    places = jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh, optimizer))
    is_scaled = compute_format(config.precision, mesh) == "float16"

    @partial(jax.jit, donate_argnums=0, out_shardings=(places, None))
    def train_step(state: TrainState, rows: Array) -> tuple[TrainState, dict[str, Array]]:
        scale = state.loss_scale
        value, grads = loss_and_grads(state.params, rows, scale.value if is_scaled else 1.0)
        metrics = {"loss": value, "grad_norm": global_norm(grads)}
        is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        grads = clipped(config.optim, grads, metrics["grad_norm"])
        state = apply_gradients(optimizer, state, grads, is_finite)
        is_lowering = jnp.bool(False)  # the loss scale, which is no sign of divergence
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
    """The state after a step; one that is not finite changes nothing but the number of steps."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = optax.apply_updates(state.params, updates), opt_state
    params, opt_state = jax.tree.map(
        partial(jnp.where, is_finite), new, (state.params, state.opt_state)
    )
    return state._replace(params=params, opt_state=opt_state, step=state.step + 1)


def make_loss_and_grads(config: Config, mesh: Mesh, schedule: Schedule) -> Wrapped:
    """`(params, rows, scale=1)` (`data.make_row`) to the mean loss in nats per token and its
    float32 gradients, which are computed as those of `scale` times the loss.
    """
    if config.memory.defer_weight_grads and len(schedule.parts) > 1:
        raise UserError(
            "config.memory.defer_weight_grads=true needs all of a batch at once, and the plan's "
            "schedule keeps a part at a time: set it to false, or plan with "
            "config.plan.schedule=terapipe."
        )
    V, dtype = config.model.vocab_size, compute_dtype(config.precision, mesh)

    def local(params: Params, rows: Array, scale: Array) -> tuple[Array, Params]:
        batch, params = _Batch.of(config, rows), for_compute(config, mesh, params)
        count = _count(batch.targets_BT)
        weight, head = scale / count, make_head(config, mesh, params)
        stage = make_stage(config, mesh, params, batch.starts_BT1)
        stage = stage._replace(
            takes_turns=schedule.num_gradient_rows < len(batch.tokens_BT),
            has_slots=schedule.slots is not None,
        )

        def turn(y_BTD: Array, row: Array | int, sums: loss.Sums) -> tuple[Array, loss.Sums]:
            targets = batch.part(row, len(y_BTD)).targets_BT
            sums, d_y_BTD = loss.add_cross_entropy_and_grads(sums, head, y_BTD, targets, V, weight)
            return d_y_BTD, sums

        def leave(d_x_BTD: Array, row: Array | int, sums: loss.Sums) -> loss.Sums:
            tokens, _, starts = batch.part(row, len(d_x_BTD))
            d_embed = loss.add_embed_grads(sums.d_embed, tokens, d_x_BTD, weight, starts)
            return sums._replace(d_embed=d_embed)

        work = StepWork(
            _embedding(params, batch, dtype),
            stage.forward,
            turn,
            stage.backward,
            stage.weight_gradients,
            leave,
        )
        saved, gradients, sums = execute(
            schedule,
            work,
            _trunk(config, schedule, dtype),
            empty_saved_of(config, mesh, schedule.num_rows),
            empty_gradients_of(config, mesh, schedule.num_gradient_rows, _waiting(schedule)),
            loss.no_sums(params["embed"], head.norm),
        )
        d_blocks = stage.param_gradients(saved, gradients)
        grads = {
            "embed": loss.embed_gradients(sums, weight),
            "blocks": [jax.tree.map(lambda g: g[None], layer) for layer in d_blocks],
            "norm": psum(sums.d_norm, "pipe"),
        }
        total, grads = psum((sums.loss, grads), "data")
        return total / count, jax.tree.map(lambda g: g / scale, grads)

    mapped = _over_mesh(config, mesh, local, lambda specs: (PartitionSpec(), specs), num_scalars=1)
    return jax.jit(lambda params, rows, scale=1.0: mapped(params, rows, jnp.float32(scale)))


def make_loss(config: Config, mesh: Mesh, schedule: Schedule) -> Wrapped:
    """`(params, rows)` (`data.make_row`) to the mean loss in nats per token."""
    V, dtype = config.model.vocab_size, compute_dtype(config.precision, mesh)

    def local(params: Params, rows: Array) -> Array:
        batch, params = _Batch.of(config, rows), for_compute(config, mesh, params)
        head = make_head(config, mesh, params)
        stage = make_stage(config, mesh, params, batch.starts_BT1)

        def turn(y_BTD: Array, row: Array | int, total: Array) -> tuple[Array, Array]:
            targets = batch.part(row, len(y_BTD)).targets_BT
            return y_BTD, total + loss.cross_entropy(head, y_BTD, targets, V)

        _, _, total = execute(
            schedule,
            StepWork(_embedding(params, batch, dtype), stage.infer, turn),
            _trunk(config, schedule, dtype),
            empty_caches_of(config, mesh, dtype, schedule.num_rows),
            (),
            varying(jnp.float32(0), ("data",)),
        )
        return psum(total, "data") / _count(batch.targets_BT)

    return _over_mesh(config, mesh, local, lambda _: PartitionSpec())


def make_decode(config: Config, mesh: Mesh) -> Wrapped:
    """`(params, caches, tokens [B, L], first, index)` to the logits `[B, V]` of the token after
    `tokens[:, index]`, on all devices, and the caches, which are donated, with these tokens.

    The tokens are those from position `first` on of sequences whose earlier ones are in the caches.
    """

    def local(
        params: Params, caches: list[KVCache], tokens_BL: Array, first: Array, index: Array
    ) -> tuple[Array, list[KVCache]]:
        num_stages, (B, L) = lax.axis_size("pipe"), tokens_BL.shape
        params = for_compute(config, mesh, params)
        stage, head = make_stage(config, mesh, params), make_head(config, mesh, params)
        positions_LD = lax.dynamic_slice_in_dim(params["embed"]["positions"], first, L)
        embed = params["embed"] | {"positions": positions_LD}

        def work(
            chunk: int, x_BLD: Array, at: Position, caches: list[KVCache]
        ) -> tuple[Array, list[KVCache]]:
            return stage.infer(chunk, x_BLD, Position(at.row, first), caches)

        chunks = range(len(stage.chunks))
        y_BLD, caches = sweep(
            # One slice, from stage to stage, in each chunk.
            np.concatenate([np.where(np.eye(num_stages, dtype=bool), c, IDLE) for c in chunks]),
            [Item(0, 0, B, L, chunk=c) for c in chunks],
            work,
            loss.embed(embed, tokens_BL, compute_dtype(config.precision, mesh)),
            jax.tree.map(lambda a: a[0], caches),
        )
        y_BD = from_stage(-1, y_BLD[:, index])
        logits_BV = loss.logits(head, y_BD, config.model.vocab_size)
        return logits_BV, jax.tree.map(lambda a: a[None], caches)

    specs = manual_part(param_specs(config.model, layers_per_stage(config, mesh)))
    caches = PartitionSpec("pipe", "data")
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        axis_names={"data", "pipe"},
        in_specs=(specs, caches, PartitionSpec("data"), PartitionSpec(), PartitionSpec()),
        out_specs=(PartitionSpec("data", "pipe"), caches),
        check_vma=needs_sums(mesh),
    )
    out_shardings = NamedSharding(mesh, PartitionSpec()), _decode_sharding(mesh)
    return jax.jit(mapped, donate_argnums=1, out_shardings=out_shardings)


def empty_decode_caches(config: Config, mesh: Mesh) -> list[KVCache]:
    """Caches for `make_decode`, with one sequence a data shard, `[P, B, H, T, K]`."""
    shape = cache_shape(config, mesh.shape["data"])
    dtype, num_layers = compute_dtype(config.precision, mesh), layers_per_stage(config, mesh)

    @partial(jax.jit, out_shardings=_decode_sharding(mesh))
    def empty() -> list[KVCache]:
        return empty_caches(num_layers, (mesh.shape["pipe"], *shape), dtype)

    return empty()


def _decode_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("pipe", "data", "model"))


def make_stage_work(config: Config, mesh: Mesh, items: Sequence[Item]) -> Wrapped:
    """`(params, x [B, T, D], forward table, backward table)` to a number that depends on all work.

    The stages' part of a training step with tables that are run-time values: what the profiler
    times.
    """
    dtype = compute_dtype(config.precision, mesh)
    num_rows = max(item.row + item.num_rows for item in items)

    def local(params: Params, x_BTD: Array, forward: Array, backward: Array) -> Array:
        stage = make_stage(config, mesh, for_compute(config, mesh, params))
        x_BTD = x_BTD.astype(dtype)
        saved = empty_saved_of(config, mesh, num_rows)
        y_BTD, saved = sweep(forward, items, stage.forward, x_BTD, saved)
        d_x_BTD, gradients = sweep(
            backward,
            items,
            partial(stage.backward, saved),
            x_BTD,
            empty_gradients_of(config, mesh, num_rows),
            reverse=True,
        )
        total = sum(
            a.astype(jnp.float32).sum() for a in jax.tree.leaves((y_BTD, d_x_BTD, gradients))
        )
        return psum(jnp.asarray(total), ("data", "pipe"))

    return _over_mesh(config, mesh, local, lambda _: PartitionSpec(), num_scalars=2)


def make_weights_work(config: Config, mesh: Mesh, item: Item) -> Wrapped:
    """`(params, x [B, T, D], table [tick, stage, 1])` to a number: the gradients of weights alone
    of the item, whose values are not those of x, but zeros.
    """

    def local(params: Params, x_BTD: Array, table: Array) -> Array:
        stage = make_stage(config, mesh, for_compute(config, mesh, params))
        rows = item.num_rows
        saved, gradients = lax.optimization_barrier(  # lest products with zeros be left out
            varying(
                (
                    empty_saved_of(config, mesh, rows),
                    empty_gradients_of(config, mesh, rows),
                )
            )
        )
        gradients = stage.weight_gradients(partial(each_alone, table, [item]), saved, gradients)
        total = sum(a.sum() for a in jax.tree.leaves([d.params for d in gradients]))
        return psum(jnp.asarray(total), ("data", "pipe"))

    return _over_mesh(config, mesh, local, lambda _: PartitionSpec(), num_scalars=1)


def make_transfer(config: Config, mesh: Mesh, item: Item) -> Wrapped:
    """`(params, x [B, T, D], table)` to a number: the ticks of a sweep whose stages do no work."""

    def local(params: Params, x_BTD: Array, table: Array) -> Array:
        x_BTD = jnp.where(lax.axis_index("pipe") == 0, x_BTD, 0)
        x_BTD = x_BTD.astype(compute_dtype(config.precision, mesh))
        y_BTD, _ = sweep(table, [item], lambda chunk, x_BLD, at, state: (x_BLD, state), x_BTD, ())
        return psum(y_BTD.astype(jnp.float32).sum(), ("data", "pipe"))

    return _over_mesh(config, mesh, local, lambda _: PartitionSpec(), num_scalars=1)


class _Batch(NamedTuple):
    """The rows of a data shard."""

    tokens_BT: Array
    targets_BT: Array
    starts_BT1: Array | None
    """Of documents, where these do not see each other."""

    @classmethod
    def of(cls, config: Config, rows: Array) -> "_Batch":
        """From what `data.make_row` has made."""
        if not config.data.marks_documents:
            return cls(rows[:, :-1], rows[:, 1:], None)
        tokens_BT, targets_BT, starts_BT = rows.swapaxes(0, 1)
        see_others = config.data.cross_document_attention
        return cls(tokens_BT, targets_BT, None if see_others else starts_BT[..., None])

    def part(self, row: Array | int, num_rows: int) -> "_Batch":
        """Some of the rows."""
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, row, num_rows), self)


def _embedding(params: Params, batch: _Batch, dtype: Any) -> Callable[[Array | int, int], Array]:
    """The embedding of some rows of the batch."""

    def embed(row: Array | int, num_rows: int) -> Array:
        tokens, _, starts = batch.part(row, num_rows)
        return loss.embed(params["embed"], tokens, dtype, starts)

    return embed


def _trunk(config: Config, schedule: Schedule, dtype: Any) -> Array:
    """Room for the rows that are in the pipeline."""
    return jnp.zeros((schedule.num_rows, config.model.seq_len, config.model.d_model), dtype)


def _waiting(schedule: Schedule) -> tuple[int, int] | None:
    """Rows and tokens of all slots."""
    num_rows, num_tokens = schedule.longest_shape
    return (schedule.num_slots * num_rows, num_tokens) if schedule.num_slots else None


def _over_mesh(
    config: Config,
    mesh: Mesh,
    local: Callable[..., Any],
    out_specs: Callable[[Any], Any],
    num_scalars: int = 0,
) -> Wrapped:
    """Compiles code of one device, with 'data' and 'pipe' manual and 'model' left to GSPMD."""
    specs = manual_part(param_specs(config.model, layers_per_stage(config, mesh)))
    in_specs = specs, PartitionSpec("data"), *(PartitionSpec(),) * num_scalars
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        axis_names={"data", "pipe"},
        in_specs=in_specs,
        out_specs=out_specs(specs),
        check_vma=needs_sums(mesh),
    )
    return jax.jit(mapped)


def _count(targets_BT: Array) -> Array:
    """Targets of all data shards; 1 where there are none, whose loss is 0."""
    return jnp.maximum(psum((targets_BT != IGNORE).sum(), "data"), 1)
