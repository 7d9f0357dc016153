"""Continues a text with the trained model, through the same pipeline."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from tpipe_jax.collectives import compile_checked
from tpipe_jax.config import Config
from tpipe_jax.mesh import put_rows
from tpipe_jax.model import Params
from tpipe_jax.plan import Plan
from tpipe_jax.schedule import terapipe
from tpipe_jax.train_step import make_next_token_logits

TEMPERATURE = 0.7


def sample(
    config: Config,
    mesh: Mesh,
    plan: Plan,
    params: Params,
    prompt: np.ndarray,
    num_tokens: int,
    is_stopped: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Draws `num_tokens` tokens after the prompt, `[num_tokens]`, from a seed of the config, or
    fewer where `is_stopped` says so.

    Each token takes a forward pass over the last `seq_len` tokens: right on any mesh, and slow.
    """
    seq_len = config.model.seq_len
    schedule = terapipe(Plan(plan.num_stages, (1,), plan.token_slices[:1]))
    rows = np.zeros((config.mesh.data, seq_len), np.int32)
    next_token_logits = compile_checked(
        make_next_token_logits(config, mesh, schedule),
        mesh,
        params,
        put_rows(mesh, rows),
        np.int32(0),
    )
    random = np.random.default_rng(config.train.seed)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + num_tokens and not is_stopped():
        context = tokens[-seq_len:]
        rows = np.zeros_like(rows)
        rows[:, : len(context)] = context
        logits = next_token_logits(params, put_rows(mesh, rows), np.int32(len(context) - 1))
        logits_V = np.asarray(jax.device_get(logits))[0, : config.model.vocab_size]
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        noise = random.gumbel(size=logits_V.shape)
        tokens.append(int(np.argmax(logits_V / TEMPERATURE + noise)))
    return np.array(tokens[len(prompt) :], np.int32)
