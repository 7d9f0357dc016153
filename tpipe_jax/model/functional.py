"""The block that a config names, as pure functions of the block's parameters."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from tpipe_jax.attention.base import Heads
from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.errors import UserError
from tpipe_jax.model.block import Params, Tape
from tpipe_jax.model.registry import block_class


class BlockFunctions(NamedTuple):
    """A block as pure functions of its parameters."""

    qkv: Callable[[Params, Array, Array, Tape], tuple[Array, Array, Array]]
    """`(params, x, positions, tape)`, as `Block.qkv`."""
    query: Callable[[Params, Array, Array, Tape], Array]
    """`(params, x, positions, tape)`, as `Block.query`."""
    finish: Callable[[Params, Array, Array, Tape], Array]
    """`(params, x, attention, tape)`, as `Block.finish`."""
    linears: Mapping[str, tuple[str, str]]
    """As `Block.linears`."""
    norms: Mapping[str, str]
    """As `Block.norms`."""
    router_logits: str
    """As `Block.router_logits`; empty if there is no router."""


def block_functions(
    config: ModelConfig, dtype: jnp.dtype, num_key_heads: int | None = None
) -> BlockFunctions:
    """Returns the pure functions of one block, which compute in `dtype`. If `num_key_heads` is a
    multiple of the block's heads of keys and values, each of these is returned as often.
    """
    own = block_class(config)
    graph, _ = nnx.split(nnx.eval_shape(lambda: own(config, dtype, nnx.Rngs(0))))

    def qkv(params: Params, x: Array, at: Array, tape: Tape) -> tuple[Array, Array, Array]:
        q, k, v = nnx.merge(graph, params).qkv(x, at, tape)
        if num_key_heads is None or num_key_heads == k.shape[2]:
            return q, k, v
        copies = num_key_heads // k.shape[2]
        return q, jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)

    return BlockFunctions(
        qkv=qkv,
        query=lambda params, x, at, tape: nnx.merge(graph, params).query(x, at, tape),
        finish=lambda params, x, attn, tape: nnx.merge(graph, params).finish(x, attn, tape),
        linears=own.linears,
        norms=own.norms,
        router_logits=own.router_logits or "",
    )


def init_block(config: ModelConfig, key: Array) -> Params:
    """Draws new float32 parameters for one layer."""
    block = block_class(config)(config, jnp.dtype(jnp.float32), nnx.Rngs(key))
    return nnx.to_pure_dict(nnx.state(block, nnx.Param))


@cache
def param_shapes(config: ModelConfig) -> Params:
    """The shapes and dtypes of the parameters of one layer, as a tree."""
    return jax.eval_shape(lambda: init_block(config, jax.random.key(0)))


@cache
def value_widths(config: ModelConfig) -> dict[str, int]:
    """The width of each value `[B, L, width]` that a block hands to the tape, by name."""
    return {name: a.shape[-1] for name, a in _shapes(config)[1].items()}


@cache
def heads(config: ModelConfig) -> Heads:
    """The numbers of heads of a block, and their width. Raises `UserError` if the shapes of
    queries, keys and values don't fit together.
    """
    (q, k, v), _ = _shapes(config)
    (_, _, num_queries, width), num_keys = q.shape, k.shape[2]
    expected = (2, 3, num_keys, width)
    if k.shape != expected or v.shape != expected or num_queries % num_keys:
        raise UserError(
            f"config.model.block={config.block} makes queries, keys and values of shapes {q.shape},"
            f" {k.shape} and {v.shape}: make them [B, L, G H, K] and twice [B, L, H, K]."
        )
    return Heads(num_queries, num_keys, width)


@cache
def _shapes(config: ModelConfig) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """Returns the shapes of queries, keys and values that a block makes from a few tokens, and of
    the values that it hands to the tape.

    Raises `UserError` if the pipeline cannot run a block of the user's own.
    """
    try:
        result = _traced(config, jnp.dtype(jnp.float32))
        _traced(config, jnp.dtype(jnp.bfloat16))
        _check_declared(config, result[1])
    except Exception as error:  # whatever a block's code raises is for its author to mend
        if not config.has_own_block:
            raise
        raise UserError(
            f"config.model.block={config.block} cannot be run ({type(error).__name__}: {error}): "
            "see tpipe_jax.Block for what it takes and gives."
        ) from error
    return result


def _traced(config: ModelConfig, dtype: jnp.dtype) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """As `_shapes`, computed in `dtype`. Raises what the block raises, or ValueError if it breaks
    the rules of `Block`.
    """

    def run(params: Params, x_BLD: Array) -> Any:
        block, values = block_functions(config, dtype), {}

        def tape(name: str, value: Array) -> Array:
            if name in values or name in ("x", "q", "lse"):
                raise ValueError(f"the name {name} is taken, so the tape can have it only once")
            if value.ndim != 3 or value.shape[:2] != x_BLD.shape[:2]:
                raise ValueError(f"{name} is {value.shape}, and not [B, L, width]")
            values[name] = value
            return value

        q, k, v = block.qkv(params, x_BLD, jnp.arange(3)[None], tape)
        return (q, k, v), values, block.finish(params, x_BLD, jnp.zeros_like(q), tape)

    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, dtype if a.ndim > 1 else a.dtype),
        param_shapes(config),
    )
    x_BLD = jax.ShapeDtypeStruct((2, 3, config.d_model), dtype)
    qkv, values, y_BLD = jax.eval_shape(run, params, x_BLD)
    if y_BLD.shape != x_BLD.shape:
        raise ValueError(f"it makes {y_BLD.shape} of {x_BLD.shape}, not a like shape")
    results = {"a query": qkv[0], "a key": qkv[1], "a value": qkv[2], "its output": y_BLD} | values
    for name, value in results.items():
        if value.dtype != dtype:
            raise ValueError(f"{name} is {value.dtype} where {dtype} is computed in")
    return qkv, values


def _check_declared(config: ModelConfig, values: dict[str, Any]) -> None:
    """Raises ValueError if `Block.linears`, `Block.norms` or `Block.specs` don't match the block's
    parameters and values.
    """
    own, params = block_class(config), param_shapes(config)
    if own.router_logits is not None:
        found = values[own.router_logits].shape[-1] if own.router_logits in values else None
        if found != config.num_experts:
            raise ValueError(
                f"router_logits has {own.router_logits}, which the tape must have with the width "
                f"config.model.num_experts={config.num_experts}"
            )
    for name, (source, target) in own.linears.items():
        if name not in params or not {"kernel"} <= set(params[name]) <= {"kernel", "bias"}:
            raise ValueError(f"linears has {name}, which is no layer of a kernel and a bias")
        if source not in values or target not in values:
            raise ValueError(f"linears has {source} and {target}, which the tape must have both")
        ends = values[source].shape[-1], values[target].shape[-1]
        if params[name]["kernel"].shape != ends:
            raise ValueError(f"{name} is not a product from {source} to {target}")
    for name, layer in own.norms.items():
        if name not in params or not {"scale"} <= set(params[name]) <= {"scale", "bias"}:
            raise ValueError(f"norms has {name}, which is no norm of a scale and a bias")
        if layer not in own.linears or ("bias" in params[name] and "bias" not in params[layer]):
            raise ValueError(f"norms has {layer}, which is no layer that {name} can be part of")
        if params[name]["scale"].shape != params[layer]["kernel"].shape[:1]:
            raise ValueError(f"{name} is not as wide as the input of {layer}")
    if (specs := own.specs_of(config)) is not None:
        structure = jax.tree.structure(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
        if structure != jax.tree.structure(params):
            raise ValueError("specs is not a tree like that of its parameters")
