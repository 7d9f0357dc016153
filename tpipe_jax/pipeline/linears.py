"""Gradients of the weights of linear layers."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from tpipe_jax.model.block import Params


def linear_gradients(
    linears: Mapping[str, tuple[str, str]],
    params: Params,
    inputs: dict[str, Array],
    d_outputs: dict[str, Array],
    has_biases: bool = True,
) -> Params:
    """Returns the gradients of the weights of a block's linear layers, float32, from the inputs of
    the layers and the gradients with respect to their outputs, `[B, L, ...]`. Without
    `has_biases`, those of biases are left out.
    """

    def of(layer: Params, source: str, target: str) -> Params:
        x, d_y = inputs[source], d_outputs[target]
        kernel = jnp.einsum("bli,blo->io", x, d_y, preferred_element_type=jnp.float32)
        if has_biases and "bias" in layer:
            return {"kernel": kernel, "bias": d_y.astype(jnp.float32).sum((0, 1))}
        return {"kernel": kernel}

    return {name: of(params[name], *ends) for name, ends in linears.items()}
