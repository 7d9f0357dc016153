"""The optimiser: AdamW with linear warm-up, cosine decay and clipping by the global norm."""

import jax
import optax

from tpipe_jax.config import OptimConfig
from tpipe_jax.model import Params

FINAL_FRACTION = 0.1  # of the peak learning rate, at the end of the run, as GPT-3


def learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Step, from 0, to learning rate: linear to the peak, then a cosine to a tenth of it."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    decay_steps = max(1, num_steps - config.warmup_steps)
    decay = optax.cosine_decay_schedule(config.learning_rate, decay_steps, FINAL_FRACTION)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Optax chain over all parameters; the global norm is that of all shards together."""
    adamw = optax.adamw(
        learning_rate(config, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=_is_decayed,
    )
    if config.grad_clip == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), adamw)


def _is_decayed(params: Params) -> Params:
    """True for the matrices of linear layers; norms, biases and embeddings have no kernel."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
