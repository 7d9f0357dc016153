"""cuDNN's flash attention as a fused kernel."""

import jax
import jax.numpy as jnp
from jax import Array

from tpipe_jax.attention.base import KVCache
from tpipe_jax.attention.fused import Kernel


def cudnn_kernel() -> Kernel:
    """Makes the kernel from cuDNN's flash attention, for float16 and bfloat16.

    jax's public function for it cannot compute gradients of a merged softmax: it returns the
    log-sum-exp, but does not accept one. So this function binds jax's primitives, as jax's own
    backward pass does. Tests check their parameters for each jax release.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    has_score_mod = jax.__version_info__ >= (0, 12)
    no_score_mod = {"score_mod_name": None, "score_mod_jaxpr": None} if has_score_mod else {}

    def call(primitive, q: Array, kv: KVCache, num_visible: Array | None, *results: Array, **more):
        B, L, _, K = q.shape
        none = jnp.zeros(0, q.dtype)  # no bias, packed sequences or paged caches
        if num_visible is None:
            mask, lengths = cudnn.MaskType.CAUSAL, (none, none)
        else:
            mask = cudnn.MaskType.PADDING
            lengths = jnp.full(B, L, jnp.int32), jnp.broadcast_to(num_visible, B).astype(jnp.int32)
        return primitive.bind(
            *(q, *kv, none, *lengths, none, none, none, none, *results),
            scale=K**-0.5,
            seed=0,
            dropout_rate=0.0,
            variadic_args=(False, False),  # neither bias nor its gradient
            mask_type=mask,
            layout=cudnn.AttentionLayout.BTNH.value,
            sliding_window_length=None,
            **no_score_mod,
            **more,
        )

    def forward(q: Array, kv: KVCache, num_visible: Array | None) -> tuple[Array, Array]:
        out, lse = call(cudnn._dot_product_attention_fwd_p, q, kv, num_visible, is_training=True)
        return out, lse.swapaxes(1, 2)

    def backward(
        q: Array, kv: KVCache, num_visible: Array | None, out: Array, lse: Array, d_out: Array
    ) -> tuple[Array, Array, Array]:
        results = lse.swapaxes(1, 2), out, d_out.astype(q.dtype)
        return tuple(call(cudnn._dot_product_attention_bwd_p, q, kv, num_visible, *results))

    # cuDNN has no backward pass for a single query (pytorch issue 138529), and older releases had
    # none for fewer than 64 queries (TransformerEngine issue 341).
    return Kernel(forward, backward, min_tokens=64)
