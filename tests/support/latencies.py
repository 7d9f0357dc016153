"""A latency model whose times are known by a formula."""

from typing import Any

import numpy as np

from tpipe_jax.planning.context_blocks import context_read
from tpipe_jax.planning.latency import (
    Memory,
    Profile,
    Sample,
)

BLOCK = 16
LENGTHS = {8: 1.0, 24: 2.0, 56: 5.0, 120: 14.0}
COEFFICIENTS = 0.3, 0.002, 0.004, 0.0005


def bare_seconds(b: int, i: int) -> float:
    """Each further sequence takes 0.05 s per token, and the slice's own keys their share."""
    line = float(np.interp(i, list(LENGTHS), list(LENGTHS.values()))) + 0.05 * i * (b - 1)
    return line + COEFFICIENTS[3] * b * i * i / 2


def seconds(b: int, i: int, j: int) -> float:
    """Equation 9, with a context that is read in blocks of 16."""
    a0, a1, a2, a3 = COEFFICIENTS
    read = float(context_read(np.array(i), np.array(j), BLOCK))
    return bare_seconds(b, i) + (j > 0) * (a0 + (a1 * i + a2 * read + a3 * i * read) * b)


def sample(b: int, i: int, j: int, is_test: bool = False) -> Sample:
    return Sample(b, i, j, seconds(b, i, j), 2 * seconds(b, i, j), is_test)


def samples() -> tuple[Sample, ...]:
    fitted = [sample(1, i, j) for i in LENGTHS for j in (0, 8, 64)]
    fitted += [sample(b, i, j) for b in (2, 4) for i in (24, 120) for j in (0, 32)]
    return *fitted, sample(3, 40, 48, True), sample(1, 16, 0, True)


def profile(**changes: Any) -> Profile:
    fields: dict[str, Any] = {
        "batch_size": 4,
        "seq_len": 128,
        "key_block": BLOCK,
        "samples": samples(),
        "transfer": (0.5, 0.25),
        "outside_seconds": 7.0,
        "memory": Memory(1000, 7, 100, 3),
        "key": {"jax": "1"},
    }
    return Profile(**fields | changes)
