"""What runs in place of cuDNN's attention on a CPU: the same calls by dense products."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src.cudnn.fused_attention_stablehlo import (
    MaskType,
    _dot_product_attention_bwd_p,
    _dot_product_attention_fwd_p,
)
from jax.interpreters import mlir


def _scores(q: Array, k: Array, lengths: Array, scale: float, mask_type: MaskType) -> Array:
    """Scores in float32; what is masked is -inf."""
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k, preferred_element_type=jnp.float32) * scale
    num_queries, num_keys = scores.shape[2:]
    query, key = jnp.arange(num_queries)[:, None], jnp.arange(num_keys)
    if mask_type == MaskType.CAUSAL:  # from the top left corner
        visible = (key <= query)[None, None]
    else:
        assert mask_type == MaskType.PADDING
        visible = (key < lengths[:, None])[:, None, None]
    return jnp.where(visible, scores, -jnp.inf)


def forward(*args: Array, **params: Any) -> tuple[Array, Array]:
    """`_dot_product_attention_fwd_p`."""
    assert params["layout"] == 0
    assert params["dropout_rate"] == 0
    assert params["is_training"]
    assert len(args) == 10
    q, k, v, lengths = *args[:3], args[5]
    scores = _scores(q, k, lengths, params["scale"], params["mask_type"])
    top = scores.max(-1, keepdims=True)
    total = jnp.exp(scores - top).sum(-1, keepdims=True)
    weight = jnp.exp(scores - top) / total
    out = jnp.einsum("bhqs,bshk->bqhk", weight, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype), (top + jnp.log(total))[..., 0]


def backward(*args: Array, **params: Any) -> tuple[Array, Array, Array]:
    """`_dot_product_attention_bwd_p`: from the log-sum-exp and the output that it is given.

    cuDNN leaves gradients of masked keys and values as its memory was (openxla/xla 44867).
    """
    q, k, v, lengths = *args[:3], args[5]
    lse, out, d_out = args[10:]
    scores = _scores(q, k, lengths, params["scale"], params["mask_type"])
    weight = jnp.exp(scores - lse[..., None])
    d_out, out = d_out.astype(jnp.float32), out.astype(jnp.float32)
    delta = (d_out * out).sum(-1).swapaxes(1, 2)[..., None]
    d_score = weight * (jnp.einsum("bqhk,bshk->bhqs", d_out, v) - delta) * params["scale"]
    d_q = jnp.einsum("bhqs,bshk->bqhk", d_score, k)
    d_k = jnp.einsum("bhqs,bqhk->bshk", d_score, q)
    d_v = jnp.einsum("bhqs,bqhk->bshk", weight, d_out)
    if params["mask_type"] == MaskType.PADDING:
        is_padding = (jnp.arange(k.shape[1]) >= lengths[:, None])[..., None, None]
        d_k, d_v = (jnp.where(is_padding, jnp.nan, d) for d in (d_k, d_v))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


def register() -> None:
    """Has jax run these on CPUs, where it has nothing for the primitives."""
    functions = {_dot_product_attention_fwd_p: forward, _dot_product_attention_bwd_p: backward}
    for primitive, function in functions.items():
        lowering = mlir.lower_fun(function, multiple_results=True)
        mlir.register_lowering(primitive, lowering, platform="cpu")
