"""Attention in blocks, against float64."""

from functools import cache
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from support import reference
from support.drawn_slices import (
    ROWS,
    TOLERANCE,
    B,
    DrawnSlice,
    arguments,
    draw,
    expect,
    rounded,
    run,
)
from tpipe_jax.attention.base import Attention, KVCache
from tpipe_jax.attention.blockwise import blockwise
from tpipe_jax.devices.inplace import Position
from tpipe_jax.planning.context_blocks import BLOCK

LENGTHS = [1, 7, 96, 128, 130, 200, 257, 300]
CONTEXTS = [0, 1, 5, 127, 128, 129, 300]

BLOCKS_OF = cache(blockwise)
BLOCKS = BLOCKS_OF(BLOCK)
WHOLE = BLOCKS_OF(BLOCK, reads_whole=True)


@pytest.mark.parametrize("L", LENGTHS)
def test_equals_float64_wherever_the_slice_lies(L: int) -> None:
    for i, context in enumerate(CONTEXTS):
        s = draw(Position(i % (ROWS - B + 1), context), L, seed=i, num_heads=3)
        reference.assert_close(run(s, BLOCKS), expect(s), TOLERANCE)


@pytest.mark.parametrize("L", [1, 7, 128, 200, 300])  # one block of queries, and several
def test_equals_float64_if_sequences_are_read_whole(L: int) -> None:
    for i, context in enumerate([0, 1, 129, 640 - L]):
        s = draw(Position(i % 3, context), L, seed=i, num_heads=3, group=2)
        reference.assert_close(run(s, WHOLE), expect(s), TOLERANCE)


def test_loops_over_nothing_if_sequences_are_read_whole() -> None:
    own, d_out, d_cache = arguments(draw(Position(1, 5), L=7), WHOLE.layout)
    results = jax.eval_shape(WHOLE.forward, own)
    for program in (
        jax.make_jaxpr(WHOLE.forward)(own),
        jax.make_jaxpr(WHOLE.backward)(own, *results, d_out, d_cache),
    ):
        assert "while" not in str(program)


@pytest.mark.parametrize("L", [7, 200])
def test_documents_are_apart_if_sequences_are_read_whole(L: int) -> None:
    """As they are in blocks."""
    own, d_out, d_cache = arguments(draw(Position(1, 150), L), WHOLE.layout)
    tokens = np.arange(150, 150 + L)
    starts = [np.where(tokens < 153, 40, 153), np.maximum(tokens // 10 * 10, 150)]

    def both(attention: Attention) -> Any:
        of_documents = own._replace(starts_BL1=jnp.array(starts, jnp.int32)[..., None])
        results = jax.jit(attention.forward)(of_documents)
        d_q, d_kv, d_sums = jax.jit(attention.backward)(of_documents, *results, d_out, d_cache)
        return results, d_q, d_kv, d_sums

    apart, together = both(BLOCKS), run(draw(Position(1, 150), L), BLOCKS)
    assert reference.relative_error(together.lse[..., 0].swapaxes(1, 2), apart[0][1]) > 0.1
    reference.assert_close(both(WHOLE), apart, TOLERANCE)


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])  # compiles each: no shrinking
@given(
    L=st.integers(1, 24),
    contexts=st.lists(st.integers(0, 24), min_size=1, max_size=8),
    block=st.sampled_from([1, 4, 6]),
)
@example(L=23, contexts=[0, 3, 8, 24], block=4)  # a shorter block of queries comes last
def test_equals_float64_for_any_number_of_blocks(L: int, contexts: list[int], block: int) -> None:
    for context in contexts:
        s = draw(Position(1, context), L, T=48)
        reference.assert_close(run(s, BLOCKS_OF(block)), expect(s), TOLERANCE)


def test_cache_may_be_shorter_than_a_block() -> None:
    for context in range(5):
        s = draw(Position(0, context), L=3, T=7)
        reference.assert_close(run(s, BLOCKS), expect(s), TOLERANCE)


def test_cache_may_end_with_the_slice() -> None:
    s = draw(Position(2, 193), L=7, T=200)  # in the middle of a block
    reference.assert_close(run(s, BLOCKS), expect(s), TOLERANCE)


def test_scores_may_be_large() -> None:
    """Scores beyond 88, where float32's exp overflows; they are rounded to 2e-5 of a unit, and so
    are the logarithms of the weights.
    """
    s = draw(Position(1, 300), L=130, scale=60)
    assert np.abs(reference.attention(s.q, *map(s.seen, s.cache))[1]).max() > 88
    reference.assert_close(run(s, BLOCKS), expect(s), 1e-4)


@pytest.mark.parametrize("lengths", [(300, 200, 7, 96), (1, 130, 130, 7, 257)])
def test_slices_in_descending_order_sum_to_the_gradient_of_the_sequence(
    lengths: tuple[int, ...],
) -> None:
    num_tokens, starts = sum(lengths), np.cumsum([0, *lengths])
    whole = draw(Position(1, 0), num_tokens)
    d_cache = jax.tree.map(np.zeros_like, whole.d_cache)
    want = expect(whole._replace(d_cache=d_cache))
    for start, L in reversed(list(zip(starts, lengths, strict=False))):
        part = slice(start, start + L)
        q, d_out = whole.q[:, :, part], whole.d_out[:, :, part]
        got = run(DrawnSlice(Position(1, start), q, whole.cache, d_out, d_cache), BLOCKS)
        d_cache = got.d_cache
        for name in ("out", "lse", "d_q"):
            wanted = getattr(want, name)
            difference = np.abs(getattr(got, name) - wanted[:, :, part]).max()
            assert difference <= TOLERANCE * np.abs(wanted).max(), (name, start)
        # Complete for the tokens of this slice: those of earlier slices don't see them.
        for d, wanted in zip(got.d_kv, want.d_kv, strict=True):
            difference = np.abs(d - wanted[:, :, part]).max()
            assert difference <= TOLERANCE * np.abs(wanted).max(), start
    reference.assert_close(d_cache, want.d_cache, TOLERANCE)


@pytest.mark.parametrize("at", [Position(0, 0), Position(1, 5), Position(2, 129), Position(1, 300)])
@pytest.mark.parametrize("L", [7, 200])
def test_neither_later_tokens_nor_other_sequences_matter(at: Position, L: int) -> None:
    """The first block is read in full even if the slice ends in it: what follows is finite in a
    cache. Nothing else after the slice is read, so that time follows the context, and no other
    sequence.
    """
    s = draw(at, L)

    def poison(a: np.ndarray) -> np.ndarray:
        poisoned = np.full_like(a, np.nan)
        poisoned[at.row : at.row + B, :, :BLOCK] = 1e9
        s.seen(poisoned)[...] = s.seen(a)
        return poisoned

    clean, poisoned = run(s, BLOCKS), run(s._replace(cache=KVCache(*map(poison, s.cache))), BLOCKS)
    chex.assert_trees_all_equal(poisoned, clean)


@pytest.mark.parametrize("at", [Position(0, 0), Position(1, 5), Position(1, 300)])
@pytest.mark.parametrize("L", [7, 200])
def test_no_other_sequence_matters_if_sequences_are_read_whole(at: Position, L: int) -> None:
    """Nor do later tokens, which are finite."""
    s = draw(at, L)

    def poison(a: np.ndarray) -> np.ndarray:
        poisoned = np.full_like(a, np.nan)
        poisoned[at.row : at.row + B] = 1e9
        s.seen(poisoned)[...] = s.seen(a)
        return poisoned

    clean, poisoned = run(s, WHOLE), run(s._replace(cache=KVCache(*map(poison, s.cache))), WHOLE)
    chex.assert_trees_all_equal(poisoned, clean)


@pytest.mark.parametrize("at", [Position(0, 0), Position(1, 5), Position(2, 129), Position(1, 300)])
@pytest.mark.parametrize("L", [7, 200])
@pytest.mark.parametrize("attention", [BLOCKS, WHOLE], ids=["blocks", "whole"])
def test_adds_to_the_gradients_of_what_the_slice_sees_and_leaves_the_others(
    attention: Attention, at: Position, L: int
) -> None:
    s = draw(at, L)
    got = run(s, attention)
    for before, after, own in zip(s.d_cache, got.d_cache, got.d_kv, strict=True):
        changed = s.context(after) != s.context(before), own != s.itself(before)
        assert all(part.mean() > 0.99 for part in changed if part.size)
        kept = after.copy()
        s.seen(kept)[...] = s.seen(before)
        np.testing.assert_array_equal(kept, before)


def test_bfloat16() -> None:
    """Scores, sums and the log-sum-exp are float32: bfloat16 (2^-9) rounds weights, the gradients
    of scores and results only, and the errors of the many terms of a sum cancel in part.
    """
    s = rounded(draw(Position(1, 300), L=200), jnp.bfloat16)
    got, want = run(s, BLOCKS, jnp.bfloat16), expect(s)
    chex.assert_type([got.out, got.d_q, *got.d_kv], jnp.bfloat16)
    chex.assert_type([got.lse, *got.d_cache], jnp.float32)
    reference.assert_close(got.lse, want.lse, TOLERANCE)
    reference.assert_close(got._replace(lse=want.lse), want, 2**-7)
