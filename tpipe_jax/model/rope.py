"""Rotary positions: each pair of numbers of a query or key is turned by an angle that grows with
its position (RoFormer, Su et al. 2021, arXiv 2104.09864), in the order of pairs that Llama has.

`config.model.rope_scaling` stretches the wavelengths of a model for longer contexts. The formulas
are those of the models' makers: linear (arXiv 2306.15595), Llama 3.1's (arXiv 2407.21783) and YaRN
(arXiv 2309.00071).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.errors import UserError

_NUMBERS = {"linear": (1, 1), "llama3": (4, 4), "yarn": (2, 5)}  # the fewest and the most
_FORMS = (
    "linear:FACTOR, llama3:FACTOR,LOW,HIGH,ORIGINAL or yarn:FACTOR,ORIGINAL,BETA_FAST,BETA_SLOW,"
    "ATTENTION"
)


class Rotation(NamedTuple):
    """Angles of a model's rotary positions."""

    frequencies: tuple[float, ...]
    """Radians for each position, one for each pair."""
    factor: float
    """By which turned queries and keys are longer."""

    def turned(self, a_BLHK: Array, positions_BL: Array) -> Array:
        """Returns queries or keys, turned by their positions. Number n and n + K / 2 are a pair.

        Angles are float32, as in the programs in which models are trained.
        """
        angles = positions_BL[..., None, None] * jnp.array(self.frequencies, jnp.float32)
        cos, sin = self.factor * jnp.cos(angles), self.factor * jnp.sin(angles)
        a, b = jnp.split(a_BLHK.astype(jnp.float32), 2, -1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        return turned.astype(a_BLHK.dtype)


def rotation(config: ModelConfig) -> Rotation:
    """Returns the angles of a model. Raises `UserError` if config.model.rope_scaling is none."""
    K, base = config.width_of_heads, config.theta
    # In float32, whose rounding the models were trained with.
    exponents = np.arange(0, K, 2, dtype=np.float32) / K
    frequencies = (1 / np.float32(base) ** exponents).astype(np.float64)
    kind, numbers = _parsed(config.rope_scaling)
    factor = 1.0
    if kind == "linear":
        frequencies = frequencies / numbers[0]
    elif kind == "llama3":
        frequencies = _llama3(frequencies, *numbers)
    elif kind == "yarn":
        frequencies, factor = _yarn(frequencies, base, *numbers)
    return Rotation(tuple(frequencies.astype(np.float32).tolist()), factor)


def _parsed(setting: str | None) -> tuple[str, list[float]]:
    if setting is None:
        return "", []
    kind, _, text = setting.partition(":")
    try:
        numbers = [float(word) for word in text.split(",")]
        fewest, most = _NUMBERS[kind]
        is_sound = fewest <= len(numbers) <= most and all(0 < n < math.inf for n in numbers)
        if is_sound and not (kind == "llama3" and numbers[1] >= numbers[2]):
            return kind, numbers
    except (KeyError, ValueError):
        pass
    raise UserError(
        f"config.model.rope_scaling={setting} is none: give {_FORMS}, numbers above 0 with "
        "LOW below HIGH, as llama3:8,1,4,8192."
    )


def _llama3(
    frequencies: np.ndarray, factor: float, low: float, high: float, original: float
) -> np.ndarray:
    """Long wavelengths are stretched by the factor, short ones are kept, and those between are
    stretched in part.
    """
    turns = original * frequencies / (2 * math.pi)  # in the context of the first training
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def _yarn(
    frequencies: np.ndarray,
    base: float,
    factor: float,
    original: float,
    beta_fast: float = 32,
    beta_slow: float = 1,
    attention: float | None = None,
) -> tuple[np.ndarray, float]:
    """As `_llama3`, with limits in numbers of turns, and a ramp over the index of the pair. Scores
    grow by the square of the second result.
    """
    num_pairs = len(frequencies)

    def pair_of(turns: float) -> float:
        return num_pairs * math.log(original / (turns * 2 * math.pi)) / math.log(base)

    first = max(math.floor(pair_of(beta_fast)), 0)
    last = min(math.ceil(pair_of(beta_slow)), 2 * num_pairs - 1)
    stretched = np.clip((np.arange(num_pairs) - first) / max(last - first, 1e-3), 0, 1)
    if attention is None:
        attention = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return (1 - stretched) * frequencies + stretched * frequencies / factor, attention
