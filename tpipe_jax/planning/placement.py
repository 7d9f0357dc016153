"""Which stage has which layer. No jax.

Stages of a pipeline have layers one after another; those of v chunks have as many pieces of that,
as if there were v P stages, of which stage s has the sth, the (P + s)th, the (2 P + s)th and so on.
"""

from collections.abc import Sequence

import numpy as np


def layer_counts(num_layers: int, num_stages: int) -> list[int]:
    """Layers of each stage, as even as they go; earlier stages have one more."""
    return [num_layers // num_stages + (s < num_layers % num_stages) for s in range(num_stages)]


def chunk_counts(num_layers: int, num_stages: int, num_chunks: int) -> list[list[int]]:
    """Layers of each chunk of each stage, `[chunk][stage]`."""
    counts = layer_counts(num_layers, num_chunks * num_stages)
    return [counts[c * num_stages : (c + 1) * num_stages] for c in range(num_chunks)]


def chunk_places(counts: Sequence[Sequence[int]]) -> list[range]:
    """The places of each chunk's layers in a stage, where all stages have as many."""
    stops = np.cumsum([max(own) for own in counts]).tolist()
    return [range(stop - max(own), stop) for own, stop in zip(counts, stops, strict=True)]


def stage_layers(num_layers: int, num_stages: int, num_chunks: int = 1) -> np.ndarray:
    """Which layer is in the nth place of each stage, `[n, stage]`; -1 where there is none."""
    rows, first = [], 0
    for own in chunk_counts(num_layers, num_stages, num_chunks):
        starts, n = first + np.cumsum([0, *own])[:-1], np.arange(max(own))[:, None]
        rows.append(np.where(n < own, starts + n, -1))
        first += sum(own)
    return np.concatenate(rows)


def chunk_factors(num_layers: int, num_stages: int, num_chunks: int = 1) -> list[float]:
    """The work of each chunk, chunk c of stage s at c P + s, over that of the stage with most
    layers.
    """
    most = max(layer_counts(num_layers, num_stages))
    return [n / most for n in layer_counts(num_layers, num_chunks * num_stages)]
