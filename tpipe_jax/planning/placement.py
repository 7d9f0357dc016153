"""Which stage has which layer. No jax.

Without chunks, each of the P stages has consecutive layers. With v chunks per stage, the layers are
divided as if there were v P stages, and stage s has the pieces s, P + s, 2 P + s and so on.
"""

from collections.abc import Sequence

import numpy as np


def layer_counts(num_layers: int, num_stages: int) -> list[int]:
    """Returns the layers of each stage, as equal as possible; earlier stages may have one more."""
    return [num_layers // num_stages + (s < num_layers % num_stages) for s in range(num_stages)]


def chunk_counts(num_layers: int, num_stages: int, num_chunks: int) -> list[list[int]]:
    """Returns the number of layers of each chunk of each stage, `[chunk][stage]`."""
    counts = layer_counts(num_layers, num_chunks * num_stages)
    return [counts[c * num_stages : (c + 1) * num_stages] for c in range(num_chunks)]


def chunk_places(counts: Sequence[Sequence[int]]) -> list[range]:
    """Returns the places of each chunk's layers in a stage, from `counts[chunk][stage]`.

    All stages have equally many places for a chunk: as many as its largest number of layers on any
    stage.
    """
    stops = np.cumsum([max(own) for own in counts]).tolist()
    return [range(stop - max(own), stop) for own, stop in zip(counts, stops, strict=True)]


def stage_layers(num_layers: int, num_stages: int, num_chunks: int = 1) -> np.ndarray:
    """Returns the layer in the nth place of each stage, `[n, stage]`; -1 where there is none."""
    rows, first = [], 0
    for own in chunk_counts(num_layers, num_stages, num_chunks):
        starts, n = first + np.cumsum([0, *own])[:-1], np.arange(max(own))[:, None]
        rows.append(np.where(n < own, starts + n, -1))
        first += sum(own)
    return np.concatenate(rows)


def chunk_factors(num_layers: int, num_stages: int, num_chunks: int = 1) -> list[float]:
    """Returns the layers of each chunk, divided by the layers of the largest stage.

    Chunk c of stage s is at index c P + s.
    """
    most = max(layer_counts(num_layers, num_stages))
    return [n / most for n in layer_counts(num_layers, num_chunks * num_stages)]
