"""Llama, Mistral, Qwen2 and Qwen3 in a Hugging Face folder, and Mixtral and Qwen3-MoE (`mixtures`).

Weights are `[out, in]` there and `[in, out]` here. There queries, keys and values have weights of
their own, and so have gates and values of the feed-forward layer; here they lie together as
`model.llama.LlamaBlock` says.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from tpipe_jax.config.settings import ROPE_THETA, ModelConfig
from tpipe_jax.errors import UserError, shown
from tpipe_jax.interop import mixtures
from tpipe_jax.interop.hugging_face import Adapter, Settings, Weight, fixed
from tpipe_jax.model.llama import ff_groups

KINDS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
WITH_WINDOW = ("mistral", "mixtral")
# Names there, and the values that are meant if a folder leaves one out (for all kinds, or for one).
SIZES = {
    "num_layers": ("num_hidden_layers", 32),
    "d_model": ("hidden_size", 4096),
    "num_heads": ("num_attention_heads", 32),
    "num_kv_heads": ("num_key_value_heads", None),
    "head_width": ("head_dim", None),
    "d_ff": ("intermediate_size", 11008),
    "vocab_size": ("vocab_size", 32000),
    "seq_len": ("max_position_embeddings", 2048),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied_head": ("tie_word_embeddings", False),
}
_QWEN = {
    "vocab_size": 151936,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
}
MEANT: dict[str, Settings] = {
    "llama": {},
    "mistral": {
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    **mixtures.MEANT,
}
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, 1, None),
    "use_sliding_window": (False,),
    **mixtures.FIXED,
}


def read_model(settings: Settings) -> ModelConfig:
    """As `Adapter.read_model`."""
    kind = settings["model_type"]
    settings = MEANT[kind] | settings
    fixed(settings, FIXED)
    if layers := set(_list(settings, "layer_types")) - {_layer_type(kind, settings)}:
        raise UserError(
            f"layer_types has {shown(layers.pop())}, but all layers are of one type here, and "
            "would compute something else."
        )
    theta, scaling = _rope(settings)
    sizes = {name: settings.get(*there) for name, there in SIZES.items()}
    return ModelConfig(
        **(sizes | mixtures.read_experts(kind, settings)),
        family="llama",
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        sliding_window=settings.get("sliding_window") if kind in WITH_WINDOW else None,
    )


def settings_of(model: ModelConfig, before: Settings) -> Settings:
    """As `Adapter.settings_of`. Raises `UserError` if no class there computes the same."""
    settings = {there: getattr(model, name) for name, (there, _) in SIZES.items()}
    settings |= {"num_key_value_heads": model.num_key_heads, "head_dim": model.width_of_heads}
    kind = _kind(model, before)
    settings |= mixtures.experts_settings(kind, model, before)
    if kind in WITH_WINDOW:
        settings["sliding_window"] = model.sliding_window
    else:
        settings |= {"use_sliding_window": False} if kind != "llama" else {}
    settings |= {"hidden_act": "silu", "attention_dropout": 0.0, "model_type": kind}
    rope = _rope_settings(model)
    if "rope_parameters" in before or not before:
        settings["rope_parameters"] = {"rope_theta": model.theta, "rope_type": "default"} | rope
    else:
        settings |= {"rope_theta": model.theta, "rope_scaling": rope or None}
    return settings


def _kind(model: ModelConfig, before: Settings) -> str:
    """Returns the kind of model that computes what this one does; that of the folder that it comes
    from, if there are several.
    """
    has_window, has_experts = model.sliding_window is not None, bool(model.num_experts)
    fits = {
        "qwen2": (True, False, False, False),
        "qwen3": (False, True, False, False),
        "mistral": (False, False, has_window, False),
        "llama": (False, False, False, False),
        "mixtral": (False, False, has_window, model.norm_topk_prob),
        "qwen3_moe": (False, True, False, True),
    }
    has = model.qkv_bias, model.qk_norm, has_window, has_experts
    found = [kind for kind, features in fits.items() if features == has]
    if has[0] and model.width_of_heads * model.num_heads != model.d_model:
        found = []  # transformers' Qwen2 derives the width of heads
    if not found:
        raise UserError(
            "the model has config.model.qkv_bias, qk_norm, sliding_window and norm_topk_prob as no "
            "class of transformers has them together: it cannot be exported."
        )
    return before["model_type"] if before.get("model_type") in found else found[-1]


def _layer_type(kind: str, settings: Settings) -> str:
    has_window = kind in WITH_WINDOW and settings.get("sliding_window") is not None
    return "sliding_attention" if has_window else "full_attention"


def _list(settings: Settings, name: str) -> Sequence[Any]:
    value = settings.get(name) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{name}={shown(value)} is no list of names.")
    return value


def _rope(settings: Settings) -> tuple[float, str | None]:
    """Returns config.model.rope_theta and rope_scaling, from settings as transformers 4 or 5 write
    them.
    """
    found = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise UserError(f"rope_scaling={shown(found)} is no object.")
    theta = found.get("rope_theta", settings.get("rope_theta", ROPE_THETA))
    kind = found.get("rope_type", found.get("type", "default"))
    if not isinstance(theta, int | float) or isinstance(theta, bool):
        raise UserError(f"rope_theta={shown(theta)} is no number.")
    fixed(found, {"partial_rotary_factor": (1.0, 1, None), "truncate": (True,)})
    if any(isinstance(value, dict) for value in found.values()):
        raise UserError("it has other rotary positions for each type of layer.")
    if kind == "default":
        return float(theta), None
    names = {
        "linear": ("factor",),
        "llama3": (
            *("factor", "low_freq_factor", "high_freq_factor"),
            "original_max_position_embeddings",
        ),
        "yarn": ("factor", "original_max_position_embeddings"),
    }
    if kind not in names:
        raise UserError(
            f"its rotary positions are of type {shown(kind)}, but only default, linear, llama3 and "
            "yarn are built here."
        )
    default = {"original_max_position_embeddings": settings.get("max_position_embeddings")}
    numbers = [found.get(name, default.get(name)) for name in names[kind]]
    if kind == "yarn":
        numbers += _yarn(found, numbers[0])
    for number in numbers:
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise UserError(f"its rotary positions have {shown(number)} instead of a number.")
    return float(theta), f"{kind}:{','.join(f'{number:.17g}' for number in numbers)}"


def _yarn(found: Settings, factor: Any) -> list[Any]:
    """Returns the limits of YaRN, and the factor of queries and keys if it is not the usual."""
    limits = [found.get("beta_fast") or 32, found.get("beta_slow") or 1]
    attention = found.get("attention_factor")
    one, all_dims = found.get("mscale"), found.get("mscale_all_dim")
    if attention is None and one and all_dims:
        scale = lambda m: 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0  # noqa: E731
        attention = scale(one) / scale(all_dims)
    return limits if attention is None else [*limits, attention]


def _rope_settings(model: ModelConfig) -> Settings:
    """The inverse of `_rope`, without the theta; empty if there is no scaling."""
    if model.rope_scaling is None:
        return {}
    kind, _, text = model.rope_scaling.partition(":")
    names = {
        "linear": ("factor",),
        "llama3": (
            *("factor", "low_freq_factor", "high_freq_factor"),
            "original_max_position_embeddings",
        ),
        "yarn": (
            *("factor", "original_max_position_embeddings"),
            *("beta_fast", "beta_slow", "attention_factor"),
        ),
    }[kind]
    values = dict(zip(names, map(float, text.split(",")), strict=False))
    original = "original_max_position_embeddings"
    if original in values:
        values[original] = int(values[original])
    return {"rope_type": kind, **values}


def weights_of(model: ModelConfig) -> list[Weight]:
    """As `Adapter.weights_of`."""
    D, F, K = model.d_model, model.ff_width, model.width_of_heads
    N, H, S = model.num_heads, model.num_key_heads, ff_groups(model)
    attn, ff = "{}.self_attn.{}_proj.{}", "{}.mlp.{}_proj.weight"

    def norm(name: str, there: str, width: int = D) -> Weight:
        return Weight(f"{name}/scale", (width,), {f"{there}.weight": (width,)})

    def linear(name: str, there: str, size: tuple[int, int]) -> Weight:
        turned = lambda values: values[0].T  # noqa: E731
        return Weight(name, size, {there: size[::-1]}, turned, lambda value: [value.T])

    def feed_forward(model: ModelConfig, here: str, there: str) -> list[Weight]:
        gates = {ff.format(there, name): (F, D) for name in ("gate", "up")}
        return [
            Weight(
                *(f"{here}/ff_in/kernel", (D, 2 * F), gates),
                partial(_joined_gates, num_groups=S),
                partial(_split_gates, num_groups=S),
            ),
            linear(f"{here}/ff_out/kernel", ff.format(there, "down"), (F, D)),
        ]

    def layer(n: int) -> list[Weight]:
        here, there = f"blocks/{n}", f"layers.{n}"
        heads = {"q": N, "k": H, "v": H}
        parts = [
            Weight(
                f"{here}/attn_in/kernel",
                (D, (N + 2 * H) * K),
                {attn.format(there, a, "weight"): (n * K, D) for a, n in heads.items()},
                partial(_joined_heads, num_keys=H, width=K),
                partial(_split_heads, num_keys=H, width=K),
            )
        ]
        if model.qkv_bias:
            parts.append(
                Weight(
                    f"{here}/attn_in/bias",
                    ((N + 2 * H) * K,),
                    {attn.format(there, a, "bias"): (n * K,) for a, n in heads.items()},
                    partial(_joined_heads, num_keys=H, width=K),
                    partial(_split_heads, num_keys=H, width=K),
                )
            )
        if model.qk_norm:
            parts += [
                norm(f"{here}/{a}_norm", f"{there}.self_attn.{a}_norm", K) for a in ("q", "k")
            ]
        return [
            *parts,
            linear(f"{here}/attn_out/kernel", attn.format(there, "o", "weight"), (N * K, D)),
            *(mixtures.experts_weights if model.num_experts else feed_forward)(model, here, there),
            norm(f"{here}/norm_1", f"{there}.input_layernorm"),
            norm(f"{here}/norm_2", f"{there}.post_attention_layernorm"),
        ]

    shape = model.vocab_size, D
    weights = [Weight("embed/tokens", shape, {"embed_tokens.weight": shape})]
    weights += [weight for n in range(model.num_layers) for weight in layer(n)]
    return [*weights, norm("norm", "norm")]


def _joined_heads(values: Sequence[np.ndarray], num_keys: int, width: int) -> np.ndarray:
    """Joins queries, keys and values, `[heads K, D]` each, or `[heads K]`, by heads of keys."""
    parts = [value.reshape(num_keys, -1, width, *value.shape[1:]) for value in values]
    joined = np.concatenate(parts, 1)
    return joined.reshape(-1, *joined.shape[3:]).T


def _split_heads(value: np.ndarray, num_keys: int, width: int) -> list[np.ndarray]:
    """The inverse of `_joined_heads`."""
    turned = value.T
    parts = turned.reshape(num_keys, -1, width, *turned.shape[1:])
    sizes = parts.shape[1] - 2, parts.shape[1] - 1
    return [part.reshape(-1, *turned.shape[1:]) for part in np.split(parts, sizes, 1)]


def _joined_gates(values: Sequence[np.ndarray], num_groups: int) -> np.ndarray:
    """Joins gates and values of the feed-forward layer, `[F, D]` each, by groups."""
    F, D = values[0].shape
    return np.stack([value.reshape(num_groups, -1, D) for value in values], 1).reshape(2 * F, D).T


def _split_gates(value: np.ndarray, num_groups: int) -> list[np.ndarray]:
    """The inverse of `_joined_gates`."""
    D = value.shape[0]
    parts = value.T.reshape(num_groups, 2, -1, D)
    return [parts[:, n].reshape(-1, D) for n in range(2)]


ADAPTER = Adapter(
    "llama",
    KINDS,
    *("model.", "layers.", "embed_tokens.weight"),
    *(read_model, weights_of, settings_of),
    re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),  # in older files
)
