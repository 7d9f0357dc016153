"""The feed-forward layers of Mixtral and Qwen3-MoE in a Hugging Face folder.

There each expert has weights of its own; here those of all experts of a layer lie together, as
`model.experts` says. Mixtral and Qwen3-MoE name the same weights differently.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.errors import UserError, shown
from tpipe_jax.interop.hugging_face import Settings, Weight

# Names of sizes there, the newest first.
NUM_EXPERTS = ("num_local_experts", "num_experts")
CHOSEN, NORMED, EXPERT_WIDTH = "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size"


class _Names(NamedTuple):
    folder: str
    """In front of the names, after that of the layer."""
    gate: str
    value: str
    out: str


MIXTRAL = _Names("block_sparse_moe", "w1", "w3", "w2")
QWEN = _Names("mlp", "gate_proj", "up_proj", "down_proj")
# Values that are meant if a folder leaves one out.
MEANT: dict[str, Settings] = {
    "mixtral": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    "qwen3_moe": {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 24,
        "hidden_size": 2048,
        "num_key_value_heads": 4,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
}
# Settings that would make some layers, or the router, something else.
FIXED = {
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "router_jitter_noise": (0.0, 0, None),
}


def read_experts(kind: str, settings: Settings) -> Settings:
    """Returns the fields of `ModelConfig` that say what the experts are; none without experts."""
    if kind not in MEANT:
        return {}
    given = [settings[name] for name in NUM_EXPERTS if name in settings]
    for name, value in {NUM_EXPERTS[0]: given[0], CHOSEN: settings[CHOSEN]}.items():
        if value is None:
            raise UserError(f"{name}=None is no number.")
    fields = {
        "num_experts": given[0],
        "experts_per_token": settings[CHOSEN],
        "norm_topk_prob": True if kind == "mixtral" else settings[NORMED],
    }
    return fields | ({"d_ff": settings[EXPERT_WIDTH]} if kind == "qwen3_moe" else {})


def balance_weight(model: ModelConfig, settings: Settings) -> float | None:
    """Returns config.train.balance_weight as a folder names it; None if it names none."""
    weight = settings.get("router_aux_loss_coef") if model.num_experts else None
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and 0 <= weight < math.inf):
        raise UserError(f"router_aux_loss_coef={shown(weight)} is no number from 0 on.")
    return weight if weight is None else float(weight)


def experts_settings(kind: str, model: ModelConfig, before: Settings) -> Settings:
    """The inverse of `read_experts`."""
    if not model.num_experts:
        return {}
    usual = "num_local_experts" if kind == "mixtral" else "num_experts"
    name = next((name for name in NUM_EXPERTS if name in before), usual)
    settings = {name: model.num_experts, CHOSEN: model.experts_of_token}
    if kind == "mixtral":
        return settings
    # Their own width; that of layers without experts, of which there are none, stays as it was.
    settings |= {NORMED: model.norm_topk_prob, EXPERT_WIDTH: model.ff_width}
    width = before.get("intermediate_size", model.ff_width)
    return settings | {"intermediate_size": width, "decoder_sparse_step": 1, "mlp_only_layers": []}


def experts_weights(model: ModelConfig, here: str, there: str) -> list[Weight]:
    """Returns the weights of the router and the experts of a layer, which is `here` and `there`."""
    assert model.num_experts
    E, D, F = model.num_experts, model.d_model, model.ff_width
    names = QWEN if model.qk_norm else MIXTRAL
    of_expert = f"{there}.{names.folder}.experts.{{}}.{{}}.weight"
    gates = [of_expert.format(n, a) for n in range(E) for a in (names.gate, names.value)]
    router = Weight(
        *(f"{here}/router/kernel", (D, E), {f"{there}.{names.folder}.gate.weight": (E, D)}),
        lambda values: values[0].T,
        lambda value: [value.T],
    )
    return [
        router,
        Weight(
            *(f"{here}/experts/ff_in", (E, D, 2 * F), dict.fromkeys(gates, (F, D))),
            lambda values: _joined(values, 2),
            lambda value: _split(value, 2),
        ),
        Weight(
            *(f"{here}/experts/ff_out", (E, F, D)),
            {of_expert.format(n, names.out): (D, F) for n in range(E)},
            lambda values: _joined(values, 1),
            lambda value: _split(value, 1),
        ),
    ]


def _joined(values: Sequence[np.ndarray], num_parts: int) -> np.ndarray:
    """Joins weights `[out, in]`, of which an expert has several, to `[E, in, parts out]`."""
    out, width = values[0].shape
    return np.stack(values).reshape(-1, num_parts * out, width).swapaxes(1, 2)


def _split(value: np.ndarray, num_parts: int) -> list[np.ndarray]:
    """The inverse of `_joined`."""
    E, width, out = value.shape
    return list(value.swapaxes(1, 2).reshape(E * num_parts, out // num_parts, width))
