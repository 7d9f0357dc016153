"""GPT-2 in a Hugging Face folder.

Weights are `[in, out]` there as here. There the outputs of `c_attn` are all queries, then all keys,
then all values; here query, key and value of a head lie together (`model.gpt2`).
"""

import re
from functools import partial
from typing import Any

import numpy as np

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.interop.hugging_face import Adapter, Settings, Weight, fixed

# Settings that are fixed in the model here, with the values that can be imported.
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
SIZES = {  # names there, and the value that is meant if a folder leaves one out
    "num_layers": ("n_layer", 12),
    "d_model": ("n_embd", 768),
    "num_heads": ("n_head", 12),
    "d_ff": ("n_inner", None),
    "vocab_size": ("vocab_size", 50257),
    "seq_len": ("n_positions", 1024),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tied_head": ("tie_word_embeddings", True),
}


def read_model(settings: Settings) -> ModelConfig:
    """As `Adapter.read_model`."""
    fixed(settings, FIXED)
    return ModelConfig(**{name: settings.get(*there) for name, there in SIZES.items()})


def settings_of(model: ModelConfig, before: Settings) -> Settings:
    """As `Adapter.settings_of`."""
    settings = {there: getattr(model, name) for name, (there, _) in SIZES.items()}
    settings |= {name: allowed[0] for name, allowed in FIXED.items()}
    settings |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return {"model_type": "gpt2"} | settings


def weights_of(model: ModelConfig) -> list[Weight]:
    """As `Adapter.weights_of`."""
    V, T, H = model.vocab_size, model.seq_len, model.num_heads
    D, F = model.d_model, model.ff_width

    def weight(name: str, there: str, shape: tuple[int, ...], num_heads: int = 0) -> Weight:
        if not num_heads:
            return Weight(name, shape, {there: shape})
        to_here, to_there = (
            partial(_swapped, order=order) for order in ((3, num_heads), (num_heads, 3))
        )
        return Weight(
            *(name, shape, {there: shape}),
            lambda values: to_here(values[0]),
            lambda value: [to_there(value)],
        )

    def norm(name: str, there: str) -> list[Weight]:
        parts = {"scale": "weight", "bias": "bias"}
        return [weight(f"{name}/{a}", f"{there}.{b}", (D,)) for a, b in parts.items()]

    def linear(name: str, there: str, size: tuple[int, int], num_heads: int = 0) -> list[Weight]:
        return [
            weight(f"{name}/kernel", f"{there}.weight", size, num_heads),
            weight(f"{name}/bias", f"{there}.bias", size[1:], num_heads),
        ]

    weights = [
        weight("embed/tokens", "wte.weight", (V, D)),
        weight("embed/positions", "wpe.weight", (T, D)),
    ]
    for i in range(model.num_layers):
        here, there = f"blocks/{i}", f"h.{i}"
        weights += norm(f"{here}/norm_1", f"{there}.ln_1")
        weights += linear(f"{here}/attn_in", f"{there}.attn.c_attn", (D, 3 * D), H)
        weights += linear(f"{here}/attn_out", f"{there}.attn.c_proj", (D, D))
        weights += norm(f"{here}/norm_2", f"{there}.ln_2")
        weights += linear(f"{here}/ff_in", f"{there}.mlp.c_fc", (D, F))
        weights += linear(f"{here}/ff_out", f"{there}.mlp.c_proj", (F, D))
    return weights + norm("norm", "ln_f")


def _swapped(value: np.ndarray, order: tuple[int, int]) -> np.ndarray:
    return value.reshape(*value.shape[:-1], *order, -1).swapaxes(-3, -2).reshape(value.shape)


ADAPTER = Adapter(
    "gpt2",
    {"gpt2": "GPT2LMHeadModel"},
    *("transformer.", "h.", "wte.weight"),
    *(read_model, weights_of, settings_of),
    re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),  # constant masks, in older files
)
