"""The optimiser: AdamW with linear warm-up, cosine decay and clipping by the global norm."""

import jax
import optax

from tpipe_jax.config import OptimConfig
from tpipe_jax.model import Params

FINAL_FRACTION = 0.1  # of the peak learning rate, at the end of the run, as GPT-3


def learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Step, from 0, to learning rate: linear to the peak, then a cosine to a tenth of it."""
    peak, warmup_steps = config.learning_rate, config.warmup_steps
    # The first step has peak / warmup_steps rather than 0, with which it would do nothing.
    warmup = optax.linear_schedule(peak / max(1, warmup_steps), peak, max(1, warmup_steps - 1))
    decay = optax.cosine_decay_schedule(peak, max(1, num_steps - warmup_steps), FINAL_FRACTION)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Optax chain over all parameters; the global norm is that of all shards together."""
    adamw = optax.adamw(
        learning_rate(config, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=_is_decayed,
    )
    # A chain in both cases, so that clipping can be switched in the middle of a run.
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    return optax.chain(clip, adamw)


def _is_decayed(params: Params) -> Params:
    """True for the matrices of linear layers; norms, biases and embeddings have no kernel."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
