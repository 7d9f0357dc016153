"""The scale and bias of a norm as parts of the linear layer that reads the norm.

    (x scale + bias) W + b = x (scale W) + (bias W + b)

A step folds them once, before its slices, and unfolds the gradients once, after them. So no slice
sums gradients of a scale or a bias over its tokens.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from tpipe_jax.model.block import Params


def fold(norms: Mapping[str, str], params: Params) -> Params:
    """Returns the parameters of a block, float32, with each norm folded into its linear layer
    (`Block.norms`). The norms have a scale of 1 and a bias of 0.
    """
    folded = dict(params)
    for name, layer in norms.items():
        norm, linear = params[name], params[layer]
        folded[layer] = linear | {"kernel": norm["scale"][:, None] * linear["kernel"]}
        if "bias" in norm:
            product = jnp.matmul(norm["bias"], linear["kernel"], precision="highest")
            folded[layer] |= {"bias": linear["bias"] + product}
        folded[name] = {kind: _neutral(kind, a) for kind, a in norm.items()}
    return folded


def unfold_gradients(norms: Mapping[str, str], params: Params, gradients: Params) -> Params:
    """Returns the gradients of the parameters of a block, from the gradients of the folded ones.
    These have no norms that are folded.
    """

    def changed(params: Params) -> Params:
        folded = fold(norms, params)
        return {name: folded[name] for name in gradients}

    [found] = jax.vjp(changed, params)[1](gradients)
    return found


def _neutral(kind: str, a: Array) -> Array:
    return jnp.ones_like(a) if kind == "scale" else jnp.zeros_like(a)
