"""Which stage has which layer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpipe_jax.planning.placement import (
    chunk_counts,
    chunk_factors,
    chunk_places,
    layer_counts,
    stage_layers,
)


@given(st.integers(1, 100), st.integers(1, 100))
def test_layers_are_spread_evenly_and_earlier_stages_have_more(num_layers: int, num_stages: int):
    counts = layer_counts(num_layers, num_stages)
    assert len(counts) == num_stages
    assert sum(counts) == num_layers
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


def test_layers_of_two_stages_with_two_chunks():
    """Five layers: 0 1 | 2 | 3 | 4, of which the first stage has the first and the third part."""
    assert stage_layers(5, 2, 2).tolist() == [[0, 2], [1, -1], [3, 4]]
    assert chunk_places(chunk_counts(5, 2, 2)) == [range(2), range(2, 3)]
    assert chunk_factors(5, 2, 2) == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3])


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5))
def test_every_layer_has_one_place(num_layers: int, num_stages: int, num_chunks: int):
    """In the order in which a slice goes through chunks, stages and their places."""
    counts = chunk_counts(num_layers, num_stages, num_chunks)
    places, slots = stage_layers(num_layers, num_stages, num_chunks), chunk_places(counts)
    assert len(places) == slots[-1].stop
    seen = []
    for own, in_chunk in zip(slots, counts, strict=True):
        for stage in range(num_stages):
            column = places[own, stage] if len(own) else np.array([], int)
            assert (column[in_chunk[stage] :] == -1).all()
            seen += column[: in_chunk[stage]].tolist()
    assert seen == list(range(num_layers))
    whole = np.reshape(chunk_factors(num_layers, num_stages, num_chunks), (num_chunks, -1)).sum(0)
    assert whole.sum() == pytest.approx(num_layers / max(layer_counts(num_layers, num_stages)))
