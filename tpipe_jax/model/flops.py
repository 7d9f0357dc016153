"""Floating-point operations of a layer and of a training step."""

import math

import jax

from tpipe_jax.config.settings import Config, ModelConfig
from tpipe_jax.model.block import Params
from tpipe_jax.model.functional import heads, param_shapes


def forward_flops(config: ModelConfig, num_tokens: int, context: int) -> int:
    """Floating-point operations of the forward pass of one layer for a slice with `context` tokens
    before it. Counts products with matrices, and attention to the tokens that are seen.
    """
    matrices = num_active(config)
    visible_pairs = _pairs(config, context + num_tokens) - _pairs(config, context)
    num_queries, _, width = heads(config)
    return 2 * num_tokens * matrices + 4 * num_queries * width * visible_pairs


def num_active(config: ModelConfig) -> int:
    """Counts the elements of the matrices of a layer that a token is multiplied with."""

    def of(shapes: Params) -> int:
        return sum(math.prod(a.shape) for a in jax.tree.leaves(shapes) if a.ndim > 1)

    shapes = param_shapes(config)
    if not config.num_experts or config.has_own_block:
        return of(shapes)
    experts = of(shapes["experts"])
    return of(shapes) - experts + experts * config.experts_of_token // config.num_experts


def _pairs(config: ModelConfig, num_tokens: int) -> int:
    """Counts the pairs of a token and one that it sees, of the first tokens of a sequence."""
    window = min(config.window or num_tokens, num_tokens)
    return window * (window + 1) // 2 + (num_tokens - window) * window


def step_flops(config: Config) -> float:
    """Floating-point operations of a training step: layers and head forward, and twice as many
    backward. Rematerialisation does not count, nor do scores that the causal mask hides.
    """
    model = config.model
    layers = model.num_layers * forward_flops(model, model.seq_len, 0)
    head = 2 * model.seq_len * model.d_model * model.vocab_size
    return 3.0 * config.train.batch_size * (layers + head)
