"""What tests compare with: the same mathematics, simpler than the package."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from tpipe_jax import model
from tpipe_jax.config import Config, ModelConfig
from tpipe_jax.loss import IGNORE
from tpipe_jax.mesh import layer_counts, padded_vocab_size
from tpipe_jax.plans import Plan, read_settings

Params = Any  # nested dictionaries and lists of arrays


def attention(q_BHLK: Any, k_BHTK: Any, v_BHTK: Any) -> tuple[np.ndarray, np.ndarray]:
    """Causal attention of the last L of T tokens in float64; the output, and the log-sum-exp of
    each row of scores, `[B, H, L, 1]`.
    """
    q, k, v = _float64(q_BHLK, k_BHTK, v_BHTK)
    score = _scores(q, k)
    top = score.max(-1, keepdims=True)
    lse = top + np.log(np.exp(score - top).sum(-1, keepdims=True))
    return np.exp(score - lse) @ v, lse


def attention_gradients(
    q_BHLK: Any, k_BHTK: Any, v_BHTK: Any, d_out_BHLK: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `attention` with respect to q, k and v, by the chain rule in float64."""
    q, k, v, d_out = _float64(q_BHLK, k_BHTK, v_BHTK, d_out_BHLK)
    weight = np.exp(_scores(q, k) - attention(q, k, v)[1])
    d_weight = d_out @ v.swapaxes(-1, -2)
    d_score = weight * (d_weight - (weight * d_weight).sum(-1, keepdims=True))
    d_score *= q.shape[-1] ** -0.5
    return d_score @ k, d_score.swapaxes(-1, -2) @ q, weight.swapaxes(-1, -2) @ d_out


def loss(config: ModelConfig, params: Params, rows: Array) -> Array:
    """Mean cross-entropy of the unpipelined model over the targets of `[B, T + 1]` that count."""
    targets_BT = rows[:, 1:]
    log_probs_BTV = jax.nn.log_softmax(model.logits(config, params, rows[:, :-1]))
    found_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], -1)[..., 0]
    return -found_BT.mean(where=targets_BT != IGNORE)


def to_stages(params: Params, mesh: Mesh) -> Params:
    """The model's parameters as the mesh holds them (`mesh.param_specs`), made of whole ones."""
    num_stages = mesh.shape["pipe"]
    blocks, counts = params["blocks"], layer_counts(len(params["blocks"]), num_stages)
    start = np.cumsum([0, *counts])
    padding = jax.tree.map(jnp.zeros_like, blocks[0])
    slots = [
        [blocks[start[s] + n] if n < counts[s] else padding for s in range(num_stages)]
        for n in range(counts[0])
    ]
    table_VD = params["embed"]["tokens"]
    num_rows = padded_vocab_size(ModelConfig(vocab_size=len(table_VD)), mesh)
    fill = num_rows - len(table_VD)
    return params | {
        "embed": params["embed"] | {"tokens": jnp.pad(table_VD, ((0, fill), (0, 0)))},
        "blocks": [jax.tree.map(lambda *stages: jnp.stack(stages), *slot) for slot in slots],
    }


def from_stages(params: Params, num_layers: int, vocab_size: int) -> Params:
    """The inverse of `to_stages`."""
    num_stages = jax.tree.leaves(params["blocks"])[0].shape[0]
    counts = layer_counts(num_layers, num_stages)
    blocks = [
        jax.tree.map(lambda a, s=s: a[s], params["blocks"][n])
        for s in range(num_stages)
        for n in range(counts[s])
    ]
    tokens = params["embed"]["tokens"][:vocab_size]
    return params | {"embed": params["embed"] | {"tokens": tokens}, "blocks": blocks}


def plan_of(config: Config) -> Plan:
    """The plan that the settings spell out."""
    plan = read_settings(config)
    assert isinstance(plan, Plan)
    return plan


def relative_error(actual: Any, expected: Any) -> float:
    """The largest difference over the largest value, or over 1 where all values are 0; NaN where
    there is one.
    """
    actual, expected = _float64(actual, expected)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() or 1))


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Asserts that each array of a tree has a `relative_error` of at most `tolerance`."""
    actual_leaves, expected_leaves = (
        dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (actual, expected)
    )
    assert actual_leaves.keys() == expected_leaves.keys()
    for path, value in expected_leaves.items():
        error = relative_error(actual_leaves[path], value)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e} > {tolerance:.0e}"


def _scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Scores of the last queries with all keys, -inf where the key comes after the query."""
    L, T = q.shape[-2], k.shape[-2]
    score = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    return np.where(np.arange(T) <= np.arange(T - L, T)[:, None], score, -np.inf)


def _float64(*arrays: Any) -> Iterator[np.ndarray]:
    return (np.asarray(a).astype(np.float64) for a in arrays)
