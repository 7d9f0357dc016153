"""The compiled programs: a training step, its loss and gradients alone, evaluation, next token."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped

from tpipe_jax import loss
from tpipe_jax.attention import KVCache
from tpipe_jax.config import Config
from tpipe_jax.mesh import layer_counts, manual_part, param_specs
from tpipe_jax.model import Params, block_functions
from tpipe_jax.pipeline import needs_sums, psum, sum_over, sweep, varying
from tpipe_jax.schedule import Item, Schedule
from tpipe_jax.stage import UNDIVIDED, Gradients, Saved, Stage, empty_caches, empty_saved
from tpipe_jax.train_state import TrainState, abstract_state


def make_train_step(
    config: Config, mesh: Mesh, schedule: Schedule, optimizer: optax.GradientTransformation
) -> Wrapped:
    """`(state, rows [B, T + 1])` to the next state and `loss` and `grad_norm`.

    The old state is donated.
    """
    loss_and_grads = make_loss_and_grads(config, mesh, schedule)
    places = jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh, optimizer))

    @partial(jax.jit, donate_argnums=0, out_shardings=(places, None))
    def train_step(state: TrainState, rows: Array) -> tuple[TrainState, dict[str, Array]]:
        value, grads = loss_and_grads(state.params, rows)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
        }

    return train_step


def make_loss_and_grads(config: Config, mesh: Mesh, schedule: Schedule) -> Wrapped:
    """`(params, rows [B, T + 1])` to the mean loss in nats per token and its float32 gradients."""
    num_stages, dtype = mesh.shape["pipe"], jnp.dtype(config.precision.compute)

    def local(params: Params, rows: Array) -> tuple[Array, Params]:
        tokens_BT, targets_BT = rows[:, :-1], rows[:, 1:]
        params = _for_compute(config, params)
        stage = _make_stage(config, params)

        x_BTD, embed_vjp = jax.vjp(partial(loss.embed, tokens_BT=tokens_BT), params["embed"])
        x_BTD = x_BTD.astype(dtype)
        saved = _empty_saved(config, mesh)
        y_BTD, saved = sweep(schedule.forward, schedule.items, stage.forward, x_BTD, saved)

        y_BTD = _from_stage(num_stages - 1, y_BTD)
        head = _make_head(config, params)
        total, d_head, d_y_BTD = loss.cross_entropy_and_grads(
            head, y_BTD, targets_BT, config.model.vocab_size
        )

        backward = partial(stage.backward, saved)
        gradients = _empty_gradients(config, mesh, stage)
        d_x_BTD, gradients = sweep(
            schedule.backward, schedule.items, backward, d_y_BTD, gradients, reverse=True
        )

        (d_embed,) = embed_vjp(_from_stage(0, d_x_BTD).astype(jnp.float32))
        d_embed["tokens"] = d_embed["tokens"] + d_head.table_VD
        grads = {
            "embed": d_embed,
            "blocks": [jax.tree.map(lambda g: g[None], layer.params) for layer in gradients],
            "norm": d_head.norm,
        }
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        total, grads = psum((total, grads), "data")
        count = _count(targets_BT)
        return total / count, jax.tree.map(lambda g: g / count, grads)

    return _over_mesh(config, mesh, local, lambda specs: (PartitionSpec(), specs))


def make_loss(config: Config, mesh: Mesh, schedule: Schedule) -> Wrapped:
    """`(params, rows [B, T + 1])` to the mean loss in nats per token."""

    def local(params: Params, rows: Array) -> Array:
        tokens_BT, targets_BT = rows[:, :-1], rows[:, 1:]
        params = _for_compute(config, params)
        head = _make_head(config, params)
        y_BTD = _infer(config, mesh, schedule, params, tokens_BT)
        total = loss.cross_entropy(head, y_BTD, targets_BT, config.model.vocab_size)
        return psum(total, "data") / _count(targets_BT)

    return _over_mesh(config, mesh, local, lambda _: PartitionSpec())


def make_next_token_logits(config: Config, mesh: Mesh, schedule: Schedule) -> Wrapped:
    """`(params, tokens [B, T], index)` to the logits `[B, V]` of the token after that index, on all
    devices.
    """

    def local(params: Params, tokens_BT: Array, index: Array) -> Array:
        params = _for_compute(config, params)
        head = _make_head(config, params)
        y_BTD = _infer(config, mesh, schedule, params, tokens_BT)
        return loss.logits(head, y_BTD[:, index], config.model.vocab_size)

    mapped = _over_mesh(config, mesh, local, lambda _: PartitionSpec("data", "pipe"), num_scalars=1)
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, PartitionSpec()))


def make_stage_work(config: Config, mesh: Mesh, items: Sequence[Item]) -> Wrapped:
    """`(params, x [B, T, D], forward table, backward table)` to a number that depends on all work.

    The stages' part of a training step with tables that are run-time values: what the profiler
    times.
    """
    dtype = jnp.dtype(config.precision.compute)

    def local(params: Params, x_BTD: Array, forward: Array, backward: Array) -> Array:
        stage = _make_stage(config, _for_compute(config, params))
        x_BTD = x_BTD.astype(dtype)
        y_BTD, saved = sweep(forward, items, stage.forward, x_BTD, _empty_saved(config, mesh))
        d_x_BTD, gradients = sweep(
            backward,
            items,
            partial(stage.backward, saved),
            x_BTD,
            _empty_gradients(config, mesh, stage),
            reverse=True,
        )
        total = sum(
            a.astype(jnp.float32).sum() for a in jax.tree.leaves((y_BTD, d_x_BTD, gradients))
        )
        return psum(jnp.asarray(total), ("data", "pipe"))

    return _over_mesh(config, mesh, local, lambda _: PartitionSpec(), num_scalars=2)


def make_transfer(config: Config, mesh: Mesh, item: Item) -> Wrapped:
    """`(params, x [B, T, D], table)` to a number: the ticks of a sweep whose stages do no work."""

    def local(params: Params, x_BTD: Array, table: Array) -> Array:
        x_BTD = x_BTD.astype(config.precision.compute)
        y_BTD, _ = sweep(table, [item], lambda x_BLD, at, state: (x_BLD, state), x_BTD, ())
        return psum(y_BTD.astype(jnp.float32).sum(), ("data", "pipe"))

    return _over_mesh(config, mesh, local, lambda _: PartitionSpec(), num_scalars=1)


def saved_bytes_per_token(config: Config, mesh: Mesh) -> int:
    """What the forward sweep keeps for the backward sweep, and the gradients of its caches."""
    saved, d_caches = (
        partial(_empty_saved, config, mesh),
        partial(_empty_caches, config, mesh, jnp.float32),
    )
    return sum(_bytes_per_token(config, mesh, buffers) for buffers in (saved, d_caches))


def cache_bytes_per_token(config: Config, mesh: Mesh) -> int:
    """Of `saved_bytes_per_token`, what are keys, values and their gradients."""
    return sum(
        _bytes_per_token(config, mesh, partial(_empty_caches, config, mesh, jnp.dtype(dtype)))
        for dtype in (config.precision.compute, jnp.float32)
    )


def _bytes_per_token(config: Config, mesh: Mesh, buffers: Callable[[], Any]) -> int:
    """Bytes of buffers as long as the batch of a data shard, for one token on one device."""
    num_bytes = 0
    for path, a in jax.tree.leaves_with_path(jax.eval_shape(buffers)):
        is_whole = path[-1] in map(jax.tree_util.DictKey, UNDIVIDED)
        num_bytes += a.size * a.dtype.itemsize // (1 if is_whole else mesh.shape["model"])
    batch_size, _, seq_len, _ = _cache_shape(config, mesh)
    return num_bytes // (batch_size * seq_len)


def _infer(
    config: Config, mesh: Mesh, schedule: Schedule, params: Params, tokens_BT: Array
) -> Array:
    stage = _make_stage(config, params)
    dtype = jnp.dtype(config.precision.compute)
    shape_BHTK = (tokens_BT.shape[0], *_cache_shape(config, mesh)[1:])
    caches = empty_caches(len(stage.params), shape_BHTK, dtype)
    y_BTD, _ = sweep(
        schedule.forward,
        schedule.items,
        stage.infer,
        loss.embed(params["embed"], tokens_BT).astype(dtype),
        caches,
    )
    return _from_stage(mesh.shape["pipe"] - 1, y_BTD)


def _over_mesh(
    config: Config,
    mesh: Mesh,
    local: Callable[..., Any],
    out_specs: Callable[[Any], Any],
    num_scalars: int = 0,
) -> Wrapped:
    """Compiles code of one device, with 'data' and 'pipe' manual and 'model' left to GSPMD."""
    specs = manual_part(param_specs(_layers_per_stage(config, mesh)))
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


def _for_compute(config: Config, params: Params) -> Params:
    """Parameters of this device, with the matrices of blocks in the format of matrix products.

    They are marked as different on the data shards, so that gradients are summed over those once,
    at the end, and not where they arise.
    """
    dtype = jnp.dtype(config.precision.compute)

    def own(a: Array) -> Array:
        return a[0].astype(dtype) if a.ndim > 2 else a[0]  # the first axis is that of the stages

    blocks = [jax.tree.map(own, block) for block in params["blocks"]]
    return varying(params | {"blocks": blocks}, ("data",))


def _make_head(config: Config, params: Params) -> loss.Head:
    table_VD = params["embed"]["tokens"].astype(config.precision.compute)
    return loss.Head(params["norm"], table_VD)


def _make_stage(config: Config, params: Params) -> Stage:
    counts = layer_counts(config.model.num_layers, lax.axis_size("pipe"))
    block = block_functions(config.model, jnp.dtype(config.precision.compute))
    return Stage(block, params["blocks"], jnp.array(counts)[lax.axis_index("pipe")], min(counts))


def _from_stage(stage: int, value: Array) -> Array:
    """The value that one stage has, on all stages."""
    return sum_over("pipe", jnp.where(lax.axis_index("pipe") == stage, value, 0))


def _count(targets_BT: Array) -> Array:
    return psum((targets_BT != loss.IGNORE).sum(), "data")


def _empty_saved(config: Config, mesh: Mesh) -> list[Saved]:
    num_layers, dtype = _layers_per_stage(config, mesh), jnp.dtype(config.precision.compute)
    return empty_saved(num_layers, _cache_shape(config, mesh), config.model.ff_width, dtype)


def _empty_caches(config: Config, mesh: Mesh, dtype: Any) -> list[KVCache]:
    return empty_caches(_layers_per_stage(config, mesh), _cache_shape(config, mesh), dtype)


def _empty_gradients(config: Config, mesh: Mesh, stage: Stage) -> list[Gradients]:
    d_caches = _empty_caches(config, mesh, jnp.float32)
    return [
        Gradients(d_cache, jax.tree.map(partial(jnp.zeros_like, dtype=jnp.float32), block))
        for d_cache, block in zip(d_caches, stage.params, strict=True)
    ]


def _layers_per_stage(config: Config, mesh: Mesh) -> int:
    """Of the stage that has most."""
    return max(layer_counts(config.model.num_layers, mesh.shape["pipe"]))


def _cache_shape(config: Config, mesh: Mesh) -> tuple[int, int, int, int]:
    model = config.model
    batch_size = config.train.batch_size // mesh.shape["data"]
    return batch_size, model.num_heads, model.seq_len, model.head_width
