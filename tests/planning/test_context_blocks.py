"""What a slice reads of its context, against a count of blocks one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpipe_jax.planning.context_blocks import context_read, query_block


@given(st.integers(1, 2000))
def test_query_blocks(num_queries: int):
    size = query_block(num_queries)
    assert 1 <= size <= min(num_queries, 192)
    if num_queries <= 192 and query_block(num_queries) == num_queries:
        return
    assert size > 64
    if any(num_queries % near == 0 for near in range(65, 193)):
        assert num_queries % size == 0


@pytest.mark.parametrize(
    ("num_queries", "size"), [(64, 64), (192, 96), (264, 132), (1024, 128), (1009, 128), (129, 129)]
)
def test_query_blocks_divide_a_slice_where_they_can(num_queries: int, size: int):
    assert query_block(num_queries) == size


def keys_read(num_tokens: int, context: int, key_block: int) -> int:
    """Of all queries together, before the diagonal."""
    size = query_block(num_tokens, key_block)
    total = 0
    for start in range(0, num_tokens, size):
        before = context + start
        while before > 0:
            total += min(size, num_tokens - start) * key_block
            before -= key_block
    return total


@given(st.integers(1, 600), st.integers(0, 600), st.sampled_from([16, 100, 128]))
def test_context_is_read_in_whole_blocks(num_tokens: int, context: int, key_block: int):
    more = keys_read(num_tokens, context, key_block) - keys_read(num_tokens, 0, key_block)
    read = context_read(np.array(num_tokens), np.array(context), key_block)
    assert read == pytest.approx(more / num_tokens)


def test_many_at_once():
    lengths, contexts = np.array([8, 192, 8, 500])[:, None], np.array([0, 8, 130])
    read = context_read(lengths, contexts, 128)
    assert read.shape == (4, 3)
    for i, j in np.ndindex(4, 3):
        assert read[i, j] == context_read(lengths[i], contexts[j], 128)


def test_no_slices_read_nothing():
    assert context_read(np.array([]), np.array([]), 128).shape == (0,)
