"""Fresh parameters with which tokens attend to their neighbours."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support import runs
from tpipe_jax.config.settings import Config, MeshConfig, ModelConfig, TrainConfig
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.errors import UserError
from tpipe_jax.model.block import Params, no_tape
from tpipe_jax.model.functional import block_functions
from tpipe_jax.model.local_init import check_local_init
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import init_state

MODEL = ModelConfig(num_layers=4, d_model=64, num_heads=4, vocab_size=29, seq_len=256)


def fresh(init: str, mesh: MeshConfig = MeshConfig(), model: ModelConfig = MODEL) -> Params:  # noqa: B008
    config = Config(model, mesh, train=TrainConfig(init=init))  # pyrefly: ignore
    spec = make_spec(config, make_mesh(mesh, jax.devices()[: mesh.num_devices]))
    return init_state(spec, make_optimizer(spec.config)).params


def attention(params: Params) -> np.ndarray:
    """Probabilities `[T, T]` of the first layer's heads on random tokens, their mean."""
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (1, MODEL.seq_len))
    positions = jnp.arange(MODEL.seq_len)[None]
    x = params["embed"]["tokens"][tokens] + params["embed"]["positions"][positions]
    block = jax.tree.map(lambda a: a[0], params["blocks"][0])
    q, k, _ = block_functions(MODEL, jnp.dtype(jnp.float32)).qkv(block, x, positions, no_tape)
    logits = jnp.einsum("bqhk,bthk->bhqt", q, k) / np.sqrt(q.shape[-1])
    mask = np.tril(np.ones((MODEL.seq_len, MODEL.seq_len), bool))
    return np.asarray(jax.nn.softmax(jnp.where(mask, logits, -1e9)).mean((0, 1)))


def near(probability: np.ndarray) -> float:
    """Attention of the last 100 tokens to the 8 nearest, themselves among them."""
    rows = range(MODEL.seq_len - 100, MODEL.seq_len)
    return float(np.mean([probability[t, t - 7 : t + 1].sum() for t in rows]))


def test_tokens_attend_to_their_neighbours():
    assert near(attention(fresh("local"))) > 0.5
    assert near(attention(fresh("normal"))) < 0.1  # uniform would be 8 of about 200


def test_keys_are_queries_and_values_are_not():
    kernel = np.asarray(fresh("local")["blocks"][0]["attn_in"]["kernel"])[0].reshape(64, 4, 3, 16)
    np.testing.assert_array_equal(kernel[:, :, 0], kernel[:, :, 1])
    assert np.abs(kernel[:, :, 0] - kernel[:, :, 2]).min() > 0


def test_other_parameters_are_those_of_gpt2():
    local, gpt2 = fresh("local"), fresh("normal")
    for ours, theirs in zip(local["blocks"], gpt2["blocks"], strict=True):
        values = (
            np.asarray(b["attn_in"]["kernel"])[0].reshape(64, 4, 3, 16) for b in (ours, theirs)
        )
        np.testing.assert_array_equal(*(v[:, :, 2] for v in values))
        for name in ("attn_out", "ff_in", "ff_out", "norm_1", "norm_2"):
            chex.assert_trees_all_equal(ours[name], theirs[name])
    chex.assert_trees_all_equal(local["embed"]["tokens"], gpt2["embed"]["tokens"])


def test_they_depend_neither_on_the_mesh_nor_on_odd_sizes():
    model = ModelConfig(num_layers=4, d_model=30, num_heads=2, vocab_size=28, seq_len=9)
    one, many = fresh("local", model=model), fresh("local", MeshConfig(2, 2, 2), model)
    np.testing.assert_allclose(one["embed"]["positions"], many["embed"]["positions"], atol=1e-7)
    layers = [np.asarray(block["attn_in"]["kernel"][0]) for block in one["blocks"]]
    kernels = [np.asarray(block["attn_in"]["kernel"]) for block in many["blocks"]]
    for layer, kernel in enumerate(layers):
        np.testing.assert_allclose(kernel, kernels[layer % 2][layer // 2], rtol=1e-6)


def test_other_blocks_are_refused():
    with pytest.raises(UserError, match=r"is for the blocks of families, but .*block=a.py:B"):
        check_local_init(ModelConfig(block="a.py:B"))


def test_other_blocks_are_refused_by_the_library_too():
    block = f"{runs.ROOT / 'examples' / 'own_block.py'}:LlamaBlock"
    model = ModelConfig(num_layers=2, d_model=16, num_heads=2, seq_len=8, block=block)
    with pytest.raises(UserError, match=r"init=local is for the blocks of families"):
        fresh("local", model=model)


@pytest.mark.parametrize("num_keys", [4, 2])
def test_llamas_tokens_attend_to_their_neighbours(num_keys: int):
    """Scores of a query and equal keys, at growing distances. With a head of keys for each head of
    queries the token itself has the highest; with grouped queries the nearest have it on average.
    """
    sizes: dict[str, Any] = {"num_layers": 1, "d_model": 64, "num_heads": 4, "seq_len": 64}
    model = ModelConfig(**sizes, num_kv_heads=num_keys, family="llama")
    block = jax.tree.map(lambda a: a[0], fresh("local", model=model)["blocks"][0])
    x = jnp.tile(jax.random.normal(jax.random.key(0), (1, 1, 64)), (1, 64, 1))
    functions = block_functions(model, jnp.dtype(jnp.float32))
    q, k, _ = functions.qkv(block, x, jnp.arange(64)[None], no_tape)
    scores = jnp.einsum("hk,thk->ht", q[0, -1], jnp.repeat(k[0], 4 // num_keys, axis=1)) / 4
    if num_keys == 4:
        assert (scores.argmax(-1) == 63).all()
    assert (scores[:, -2:].mean(-1) > scores[:, :-2].mean(-1) + 2).all()
