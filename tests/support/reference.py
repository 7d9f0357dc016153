"""What tests compare with: the same mathematics, simpler than the package."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from tpipe_jax.config.settings import IGNORE, Config, ModelConfig
from tpipe_jax.model import reference as plain_model
from tpipe_jax.model.functional import block_functions
from tpipe_jax.model.sharding import padded_vocab_size
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.settings import read_settings

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
    log_probs_BTV = jax.nn.log_softmax(plain_model.logits(config, params, rows[:, :-1]))
    found_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], -1)[..., 0]
    return -found_BT.mean(where=targets_BT != IGNORE)


def losses(config: ModelConfig, params: Params, rows: Array) -> tuple[Array, Array]:
    """The loss of the plain model, and the balance loss by its formula, from all layers at once.
    What has no target from it on is padding.
    """
    block, logits = block_functions(config, jnp.dtype(jnp.float32)), []

    def tape(name: str, value: Array) -> Array:
        logits.extend([value] * (name == "router"))
        return value

    x, positions = params["embed"]["tokens"][rows[:, :-1]], jnp.arange(rows.shape[1] - 1)[None]
    for own in params["blocks"]:
        attn = plain_model.self_attention(*block.qkv(own, x, positions, tape), config.window)
        x = block.finish(own, x, attn, tape)
    is_target = np.asarray(rows[:, 1:] != IGNORE)
    is_token = np.flip(np.logical_or.accumulate(np.flip(is_target, 1), 1), 1)
    probabilities = jnp.stack([jax.nn.softmax(a[is_token], -1) for a in logits])
    chosen = jax.lax.top_k(probabilities, config.experts_of_token)[1]
    often = jax.nn.one_hot(chosen, config.num_experts).sum(-2).mean((0, 1))
    balance = logits[0].shape[-1] * (often * probabilities.mean((0, 1))).sum()
    return loss(config, params, rows), balance


def to_stages(params: Params, mesh: Mesh, num_chunks: int = 1) -> Params:
    """The model's parameters as the mesh holds them (`sharding.param_specs`)."""
    num_stages, blocks = mesh.shape["pipe"], params["blocks"]
    padding = jax.tree.map(jnp.zeros_like, blocks[0])
    slots = [
        [padding if layer is None else blocks[layer] for layer in slot]
        for slot in _places(len(blocks), num_stages, num_chunks)
    ]
    num_tokens = len(params["embed"]["tokens"])
    fill = padded_vocab_size(ModelConfig(vocab_size=num_tokens), mesh) - num_tokens
    blocks = [jax.tree.map(lambda *stages: jnp.stack(stages), *slot) for slot in slots]
    padded = _with_tables(params, lambda a: jnp.pad(a, ((0, fill), (0, 0))))
    return padded | {"blocks": blocks}


def from_stages(params: Params, num_layers: int, vocab_size: int, num_chunks: int = 1) -> Params:
    """The inverse of `to_stages`."""
    num_stages = jax.tree.leaves(params["blocks"])[0].shape[0]
    places = {
        layer: (n, stage)
        for n, slot in enumerate(_places(num_layers, num_stages, num_chunks))
        for stage, layer in enumerate(slot)
    }
    blocks = [
        jax.tree.map(lambda a, s=stage: a[s], params["blocks"][n])
        for n, stage in (places[layer] for layer in range(num_layers))
    ]
    return _with_tables(params, lambda a: a[:vocab_size]) | {"blocks": blocks}


def _with_tables(params: Params, change: Callable[[Any], Any]) -> Params:
    """The parameters with the tables of the vocabulary changed."""
    embed = params["embed"] | {"tokens": change(params["embed"]["tokens"])}
    head = {"head": {"table": change(params["head"]["table"])}} if "head" in params else {}
    return params | {"embed": embed} | head


def _places(num_layers: int, num_stages: int, num_chunks: int) -> list[list[int | None]]:
    """Which layer is in the nth place of each stage: the layers in order, as evenly as they go over
    chunks, of which stages have one after another.
    """
    parts = np.array_split(np.arange(num_layers), num_chunks * num_stages)
    slots = []
    for first in range(0, len(parts), num_stages):
        own = [part.tolist() for part in parts[first : first + num_stages]]
        longest = max(map(len, own))
        padded = [part + [None] * (longest - len(part)) for part in own]
        slots += map(list, zip(*padded, strict=True))
    return slots


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
