"""Which slices are timed."""

import itertools
from collections import Counter

import pytest

from tpipe_jax.profiling.shapes import shapes_to_time


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "unit", "num_stages"),
    [(8, 256, 8, 2), (1, 4096, 16, 2), (2, 2048, 8, 96), (5, 24, 8, 3), (2, 7, 7, 2), (3, 8, 1, 1)],
)
def test_shapes_to_time(batch_size: int, seq_len: int, unit: int, num_stages: int):
    shapes = shapes_to_time(batch_size, seq_len, unit, num_stages)
    assert shapes[0][:2] == (1, seq_len)
    assert max(Counter(shape[:2] for shape in shapes).values()) == 1
    for shape in shapes:
        assert 1 <= shape.num_rows <= batch_size
        assert shape.num_tokens % unit == 0
        assert 0 < shape.num_tokens <= seq_len
        assert shape.contexts[0] == 0
        for context in shape.contexts:
            assert context % unit == 0
            assert context + shape.num_tokens <= seq_len
    fitted = [shape for shape in shapes if not shape.is_test]
    assert {1, batch_size} <= {shape.num_rows for shape in fitted}
    lengths = sorted(shape.num_tokens for shape in fitted if shape.num_rows == 1)
    assert lengths[0] <= max(unit, seq_len / 16)
    # Nowhere further apart than a factor of 4 and a bit, so that lines between them are near.
    assert all(b <= 4 * a + 4 * unit for a, b in itertools.pairwise(lengths))
    # What equation 9's four coefficients need, where the sequence has room for it.
    if seq_len // unit >= 8:
        assert len([c for shape in fitted for c in shape.contexts if c > 0]) >= 6
