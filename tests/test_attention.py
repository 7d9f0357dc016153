from functools import cache, partial
from typing import Any, NamedTuple
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from jax.stages import Compiled

import reference
from tpipe_jax import attention
from tpipe_jax.attention import KVCache
from tpipe_jax.inplace import Position

B, H, K = 2, 2, 16  # of a slice
ROWS, T = 4, 640  # of the cache
LENGTHS = [1, 7, 96, 128, 130, 200, 257, 300]
CONTEXTS = [0, 1, 5, 127, 128, 129, 300]

# Float32 rounds to 6e-8. Scores of a few units carry a few times that into each weight, and sums
# over up to 640 tokens add little: 1e-6 is seen.
TOLERANCE = 5e-6


class Slice(NamedTuple):
    """A slice, its cache and what comes back to it; all but `at` are arrays of `[B, H, L, K]` or
    `[ROWS, H, T, K]`.
    """

    at: Position
    q: np.ndarray
    cache: KVCache
    d_out: np.ndarray
    d_cache: KVCache

    def own(self, a: np.ndarray) -> np.ndarray:
        """What the slice may read of a cache, and of its gradient what it may change."""
        row, token = self.at
        return a[row : row + B, :, : token + self.q.shape[2]]


class Result(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    d_q: np.ndarray
    d_cache: KVCache


def draw(at: Position, L: int, T: int = T, scale: float = 1.0, seed: int = 0) -> Slice:
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    cache, d_cache = (KVCache(*normal(2, ROWS, H, T, K)) for _ in range(2))
    return Slice(at, scale * normal(B, H, L, K), cache, normal(B, H, L, K), d_cache)


@cache
def compiled(L: int, T: int, block: int, dtype: Any) -> tuple[Compiled, Compiled]:
    """Both functions ahead of time, so that a position can only be a run-time value."""
    array = jax.ShapeDtypeStruct
    q, lse = array((B, H, L, K), dtype), array((B, H, L, 1), jnp.float32)
    kv, d_kv = (array((ROWS, H, T, K), d) for d in (dtype, jnp.float32))
    at = Position(array((), jnp.int32), array((), jnp.int32))
    args = q, KVCache(kv, kv), at
    with mock.patch.object(attention, "BLOCK", block):
        forward = jax.jit(attention.attend).lower(*args)
        backward = jax.jit(attention.attend_backward).lower(*args, q, lse, q, KVCache(d_kv, d_kv))
    return forward.compile(), backward.compile()


def run(s: Slice, block: int = attention.BLOCK, dtype: Any = jnp.float32) -> Result:
    forward, backward = compiled(s.q.shape[2], s.cache.k.shape[2], block, jnp.dtype(dtype))
    cast = partial(jax.tree.map, lambda a: jnp.asarray(a, dtype))
    at = Position(jnp.int32(s.at.row), jnp.int32(s.at.token))
    q, kv = cast(s.q), cast(s.cache)
    out, lse = forward(q, kv, at)
    d_q, d_cache = backward(q, kv, at, out, lse, cast(s.d_out), s.d_cache)
    return jax.tree.map(np.asarray, Result(out, lse, d_q, d_cache))


def expect(s: Slice) -> Result:
    """The float64 reference, with gradients added to the part of `d_cache` that the slice sees."""
    k, v = map(s.own, s.cache)
    out, lse = reference.attention(s.q, k, v)
    d_q, *d_kv = reference.attention_gradients(s.q, k, v, s.d_out)
    d_cache = KVCache(*(np.float64(d) for d in s.d_cache))
    for total, d in zip(d_cache, d_kv, strict=True):
        s.own(total)[...] += d
    return Result(out, lse, d_q, d_cache)


@pytest.mark.parametrize("L", LENGTHS)
def test_equals_float64_wherever_the_slice_lies(L: int) -> None:
    for i, context in enumerate(CONTEXTS):
        s = draw(Position(i % (ROWS - B + 1), context), L, seed=i)
        reference.assert_close(run(s), expect(s), TOLERANCE)


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
        reference.assert_close(run(s, block), expect(s), TOLERANCE)


def test_cache_may_be_shorter_than_a_block() -> None:
    for context in range(5):
        s = draw(Position(0, context), L=3, T=7)
        reference.assert_close(run(s), expect(s), TOLERANCE)


def test_cache_may_end_with_the_slice() -> None:
    s = draw(Position(2, 193), L=7, T=200)  # in the middle of a block
    reference.assert_close(run(s), expect(s), TOLERANCE)


def test_scores_may_be_large() -> None:
    """Scores beyond 88, where float32's exp overflows; they are rounded to 2e-5 of a unit, and so
    are the logarithms of the weights.
    """
    s = draw(Position(1, 300), L=130, scale=60)
    assert np.abs(reference.attention(s.q, *map(s.own, s.cache))[1]).max() > 88
    reference.assert_close(run(s), expect(s), 1e-4)


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
        got = run(Slice(Position(1, start), q, whole.cache, d_out, d_cache))
        d_cache = got.d_cache
        for name in ("out", "lse", "d_q"):
            wanted = getattr(want, name)
            difference = np.abs(getattr(got, name) - wanted[:, :, part]).max()
            assert difference <= TOLERANCE * np.abs(wanted).max(), (name, start)
        # Complete for the tokens of this slice: those of earlier slices don't see them.
        for d, wanted in zip(d_cache, want.d_cache, strict=True):
            difference = np.abs(d[1 : 1 + B, :, part] - wanted[1 : 1 + B, :, part]).max()
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
        poisoned[at.row : at.row + B, :, : attention.BLOCK] = 1e9
        s.own(poisoned)[...] = s.own(a)
        return poisoned

    clean, poisoned = run(s), run(s._replace(cache=KVCache(*map(poison, s.cache))))
    chex.assert_trees_all_equal(poisoned, clean)


@pytest.mark.parametrize("at", [Position(0, 0), Position(1, 5), Position(2, 129), Position(1, 300)])
@pytest.mark.parametrize("L", [7, 200])
def test_adds_to_the_gradients_of_what_the_slice_sees_and_leaves_the_others(
    at: Position, L: int
) -> None:
    s = draw(at, L)
    for before, after in zip(s.d_cache, run(s).d_cache, strict=True):
        assert (s.own(after) != s.own(before)).mean() > 0.99
        kept = after.copy()
        s.own(kept)[...] = s.own(before)
        np.testing.assert_array_equal(kept, before)


def test_bfloat16() -> None:
    """Scores, sums and the log-sum-exp are float32: bfloat16 (2^-9) rounds weights, the gradients
    of scores and results only, and the errors of the many terms of a sum cancel in part.
    """
    s = draw(Position(1, 300), L=200)
    rounded = jax.tree.map(lambda a: np.asarray(jnp.bfloat16(a), np.float32), (s.q, s.cache))
    s = s._replace(q=rounded[0], cache=rounded[1], d_out=np.float32(jnp.bfloat16(s.d_out)))
    s = s._replace(d_cache=jax.tree.map(np.zeros_like, s.d_cache))
    got, want = run(s, dtype=jnp.bfloat16), expect(s)
    assert got.out.dtype == got.d_q.dtype == jnp.bfloat16
    chex.assert_type([got.lse, *got.d_cache], jnp.float32)
    reference.assert_close(got.lse, want.lse, TOLERANCE)
    reference.assert_close(got._replace(lse=want.lse), want, 2**-7)
