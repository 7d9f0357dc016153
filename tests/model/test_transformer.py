"""The model beside the one in transformers, and its fresh parameters."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.model import reference as plain_model
from tpipe_jax.model import transformer

Params = Any  # nested dictionaries and lists of arrays


class Case(NamedTuple):
    config: ModelConfig
    batch_size: int
    num_tokens: int


CASES = {
    "shorter than seq_len": Case(
        ModelConfig(num_layers=1, d_model=32, num_heads=4, vocab_size=61, seq_len=16), 3, 7
    ),
    "narrow feed-forward": Case(
        ModelConfig(num_layers=3, d_model=48, num_heads=3, d_ff=80, vocab_size=101, seq_len=130),
        2,
        130,
    ),
    "one token": Case(
        ModelConfig(num_layers=2, d_model=24, num_heads=2, d_ff=40, vocab_size=50, seq_len=1), 2, 1
    ),
    "one head, blocks of keys and queries": Case(
        ModelConfig(num_layers=2, d_model=20, num_heads=1, vocab_size=37, seq_len=389), 1, 389
    ),
}


class Outcome(NamedTuple):
    """Logits `[B, T, V]`, and the gradients of the mean cross-entropy by parameter."""

    logits: np.ndarray
    gradients: Mapping[str, np.ndarray]


def from_gpt2(values: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """All parameters of a GPT2LMHeadModel, or their gradients, as this package's tree."""
    left = dict(values)

    def norm(name: str) -> Params:
        return {"scale": left.pop(f"{name}.weight"), "bias": left.pop(f"{name}.bias")}

    def linear(name: str) -> Params:
        return {"kernel": left.pop(f"{name}.weight"), "bias": left.pop(f"{name}.bias")}

    def heads_first(x: np.ndarray) -> np.ndarray:
        """Orders outputs by head, then query, key and value; GPT-2's are ordered the other way."""
        parts = x.reshape(*x.shape[:-1], 3, config.num_heads, config.d_model // config.num_heads)
        return parts.swapaxes(-3, -2).reshape(x.shape)

    def block(name: str) -> Params:
        return {
            "norm_1": norm(f"{name}.ln_1"),
            "attn_in": {key: heads_first(x) for key, x in linear(f"{name}.attn.c_attn").items()},
            "attn_out": linear(f"{name}.attn.c_proj"),
            "norm_2": norm(f"{name}.ln_2"),
            "ff_in": linear(f"{name}.mlp.c_fc"),
            "ff_out": linear(f"{name}.mlp.c_proj"),
        }

    params = {
        "embed": {
            "tokens": left.pop("transformer.wte.weight"),
            "positions": left.pop("transformer.wpe.weight"),
        },
        "blocks": [block(f"transformer.h.{i}") for i in range(config.num_layers)],
        "norm": norm("transformer.ln_f"),
    }
    assert not left
    return params


def by_path(tree: Params) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def gpt2_outcome(case: Case, tokens: np.ndarray, targets: np.ndarray) -> tuple[Outcome, Params]:
    """A GPT2LMHeadModel in float64, and its parameters, norms and biases randomised too."""
    reason = 'needs torch and transformers: pip install -e ".[interop]"'
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    config = case.config
    gpt2_config = transformers.GPT2Config(
        n_layer=config.num_layers,
        n_embd=config.d_model,
        n_head=config.num_heads,
        n_inner=config.d_ff,
        vocab_size=config.vocab_size,
        n_positions=config.seq_len,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(gpt2_config)
    for parameter in gpt2.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    gpt2 = gpt2.double()
    logits = gpt2(torch.from_numpy(tokens), use_cache=False).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).flatten()
    ).backward()
    parameters = {
        name: x.detach().numpy().astype(np.float32) for name, x in gpt2.named_parameters()
    }
    gradients = {name: x.grad.numpy() for name, x in gpt2.named_parameters()}
    outcome = Outcome(logits.detach().numpy(), by_path(from_gpt2(gradients, config)))
    return outcome, from_gpt2(parameters, config)


def outcome(
    config: ModelConfig, params: Params, tokens: np.ndarray, targets: np.ndarray
) -> Outcome:
    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradients_and_logits(params: Params) -> tuple[Array, Array]:
        logits = plain_model.logits(config, params, jnp.asarray(tokens))
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), logits

    gradients, logits = gradients_and_logits(params)
    return Outcome(np.asarray(logits), by_path(gradients))


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def outcomes(request: pytest.FixtureRequest) -> tuple[Outcome, Outcome]:
    """This package's model and GPT-2, with the same parameters on the same tokens."""
    case = request.param
    shape = case.batch_size, case.num_tokens + 1
    tokens = np.random.default_rng(0).integers(case.config.vocab_size, size=shape)
    expected, params = gpt2_outcome(case, tokens[:, :-1], tokens[:, 1:])
    initial = jax.eval_shape(partial(transformer.init, case.config), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, initial)
    return outcome(case.config, params, tokens[:, :-1], tokens[:, 1:]), expected


def test_logits_are_those_of_gpt2(outcomes: tuple[Outcome, Outcome]) -> None:
    ours, expected = outcomes
    assert ours.logits.dtype == np.float32
    assert 0.5 < expected.logits.std() < 5  # 1e-4 is then some hundred roundings of float32
    np.testing.assert_allclose(ours.logits, expected.logits, rtol=0, atol=1e-4)


def test_every_gradient_is_that_of_gpt2(outcomes: tuple[Outcome, Outcome]) -> None:
    ours, expected = outcomes
    assert ours.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        scale = np.abs(gradient).max()
        assert scale > 1e-4, f"{name}: too small a gradient to compare"
        np.testing.assert_allclose(
            ours.gradients[name], gradient, rtol=0, atol=1e-4 * scale, err_msg=name
        )


@pytest.mark.parametrize(
    ("shape", "billions", "tolerance"),
    [
        ((12, 768, 12, 1024), 0.124439808, 0),  # GPT-2 small
        ((24, 2048, 16, 2048), 1.3, 0.02),  # GPT-3 XL, which the paper calls 1B
        ((40, 5120, 40, 2048), 13, 0.02),
        ((96, 6144, 48, 2048), 44, 0.02),
        ((96, 12288, 96, 2048), 175, 0.02),
    ],
    ids=["GPT-2", "GPT-3 1B", "GPT-3 13B", "GPT-3 44B", "GPT-3 175B"],
)
def test_number_of_parameters(
    shape: tuple[int, int, int, int], billions: float, tolerance: float
) -> None:
    N, D, H, T = shape
    V = 50257
    config = ModelConfig(num_layers=N, d_model=D, num_heads=H, vocab_size=V, seq_len=T)
    count = transformer.num_params(config)
    assert count == V * D + T * D + N * (12 * D * D + 13 * D) + 2 * D
    assert count == pytest.approx(billions * 1e9, rel=tolerance, abs=0)


def test_number_of_parameters_counts_the_feed_forward_width() -> None:
    narrow, wide = (ModelConfig(num_layers=3, d_model=16, d_ff=F) for F in (20, 21))
    assert transformer.num_params(wide) - transformer.num_params(narrow) == 3 * (2 * 16 + 1)


def test_initialisation_is_that_of_gpt2() -> None:
    config = ModelConfig(num_layers=3, d_model=64, num_heads=4, vocab_size=300, seq_len=200)
    params = by_path(jax.jit(partial(transformer.init, config))(jax.random.key(0)))
    drawn = {}
    for name, x in params.items():
        if name.endswith("['scale']"):
            np.testing.assert_array_equal(x, 1, err_msg=name)
        elif name.endswith("['bias']"):
            np.testing.assert_array_equal(x, 0, err_msg=name)
        else:
            drawn[name] = np.asarray(x)
    assert len(drawn) == 2 + 4 * config.num_layers
    for name, x in drawn.items():
        residual = "attn_out" in name or "ff_out" in name
        std = 0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02
        # five standard errors of a normal distribution's mean, spread and fourth moment
        assert abs(x.mean()) < 5 * std / math.sqrt(x.size), name
        assert x.std() == pytest.approx(std, rel=5 / math.sqrt(2 * x.size)), name
        assert np.mean((x / std) ** 4) == pytest.approx(3, abs=5 * math.sqrt(96 / x.size)), name
    firsts = [x.ravel()[:8] / x.std() for x in drawn.values()]
    for i, first in enumerate(firsts):
        assert all(np.abs(first - other).max() > 0.01 for other in firsts[:i])


def test_initialisation_follows_the_key() -> None:
    config = ModelConfig(num_layers=2, d_model=8, num_heads=2, vocab_size=11, seq_len=5)
    first, again, other = (
        by_path(transformer.init(config, jax.random.key(seed))) for seed in (7, 7, 8)
    )
    for name, x in first.items():
        np.testing.assert_array_equal(x, again[name], err_msg=name)
        if not name.endswith(("['scale']", "['bias']")):
            assert np.all(x != other[name]), name
