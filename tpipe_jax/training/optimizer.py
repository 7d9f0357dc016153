"""The optimiser: AdamW with linear warm-up, cosine decay and clipping by the global norm."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tpipe_jax.config.settings import Config, OptimConfig
from tpipe_jax.model.block import Params

FINAL_FRACTION = 0.1  # of the peak learning rate, reached at the end of the run, as in GPT-3


def learning_rate(config: Config) -> optax.Schedule:
    """Returns a function from the step, counted from 0, to the learning rate: linear to the peak,
    then a cosine to a tenth of the peak.
    """
    peak, warmup_steps = config.optim.learning_rate, config.optim.warmup_steps
    num_steps = config.train.num_steps
    # The first step has peak / warmup_steps, since a rate of 0 would change nothing.
    warmup = optax.linear_schedule(peak / max(1, warmup_steps), peak, max(1, warmup_steps - 1))
    decay = optax.cosine_decay_schedule(peak, max(1, num_steps - warmup_steps), FINAL_FRACTION)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def learning_rate_at(config: Config, step: int) -> float:
    """Returns what `learning_rate` is at a step, computed without the devices: they would compute
    it only after the step that they are at.
    """
    peak, warmup_steps = config.optim.learning_rate, config.optim.warmup_steps
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    share = min(1.0, (step - warmup_steps) / max(1, config.train.num_steps - warmup_steps))
    return peak * (FINAL_FRACTION + (1 - FINAL_FRACTION) * (1 + math.cos(math.pi * share)) / 2)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns AdamW over all parameters. It expects gradients that are `clipped`."""
    adamw = optax.adamw(
        learning_rate(config),
        b1=config.optim.beta1,
        b2=config.optim.beta2,
        weight_decay=config.optim.weight_decay,
        mask=_is_decayed,
    )
    # A chain, since checkpoints name the optimiser state by its place in a chain.
    return optax.chain(optax.identity(), adamw)


def global_norm(grads: Params) -> Array:
    """Returns the norm of all gradients, which stay where they lie on the mesh.

    Each stage adds up its own squares. So stages exchange one number in all, and not one for each
    array as with `optax.tree.norm`.
    """
    num_stages = jax.tree.leaves(grads["blocks"])[0].shape[0]
    embed = {**grads["embed"]}
    tables = [embed.pop("tokens"), *jax.tree.leaves(grads.get("head"))]
    divided = grads["blocks"], [a.reshape(num_stages, -1, a.shape[-1]) for a in tables]
    whole = embed, grads["norm"]

    def squares(tree: Any, first_axis: int) -> Array:
        leaves = jax.tree.leaves(tree)
        return jnp.stack([jnp.square(a).sum(range(first_axis, a.ndim)) for a in leaves]).sum(0)

    return jnp.sqrt(squares(divided, 1).sum() + squares(whole, 0))


def clipped(config: OptimConfig, grads: Params, norm: Array) -> Params:
    """Scales down gradients of this norm, so that it is at most `grad_clip` (0: no limit)."""
    if not config.grad_clip:
        return grads
    factor = jnp.minimum(1, config.grad_clip / norm)
    return jax.tree.map(lambda a: factor * a, grads)


def _is_decayed(params: Params) -> Params:
    """Returns True for the matrices of blocks. Norms, biases and tables of the vocabulary are not
    decayed.
    """

    def is_matrix(path: tuple[Any, ...], a: Any) -> bool:
        # A user's block may name a matrix differently. The first axis of blocks is the stages.
        return path[-1].key == "kernel" or (path[0].key == "blocks" and a.ndim > 2)

    return jax.tree_util.tree_map_with_path(is_matrix, params)
