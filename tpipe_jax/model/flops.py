"""Floating-point operations of a training step, and how many a device can do."""

import math

import jax

from tpipe_jax.config.settings import Config, ModelConfig
from tpipe_jax.model.functional import heads, param_shapes


def forward_flops(config: ModelConfig, num_tokens: int, context: int) -> int:
    """Floating-point operations of one layer for one slice after `context` tokens, forward: those
    of its products with matrices, and of its attention.
    """
    matrices = sum(math.prod(a.shape) for a in jax.tree.leaves(param_shapes(config)) if a.ndim > 1)
    visible_pairs = num_tokens * context + num_tokens * (num_tokens + 1) // 2
    num_queries, _, width = heads(config)
    return 2 * num_tokens * matrices + 4 * num_queries * width * visible_pairs


def step_flops(config: Config) -> float:
    """Of a training step: layers and head forward, and twice that backward. What is computed again
    does not count, nor what the causal mask hides.
    """
    model = config.model
    layers = model.num_layers * forward_flops(model, model.seq_len, 0)
    head = 2 * model.seq_len * model.d_model * model.vocab_size
    return 3.0 * config.train.batch_size * (layers + head)
