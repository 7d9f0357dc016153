"""FlashAttention over packed sequences, against float64, by what stands in for it on a CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from support import fake_flash, reference
from support.drawn_slices import (
    ROWS,
    TOLERANCE,
    DrawnSlice,
    arguments,
    draw,
    expect,
    raw,
    rounded,
    run,
)
from tpipe_jax.attention.base import Attention, KVCache, Slice
from tpipe_jax.attention.blockwise import blockwise
from tpipe_jax.attention.flash import Kernels, flash, flash_kernels, obstacle
from tpipe_jax.attention.fused import over_heads
from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.devices.inplace import Position
from tpipe_jax.devices.mesh import make_mesh

T = 200  # of the cache
KERNELS = {"flash 2": fake_flash.kernels(True), "flash 3": fake_flash.kernels(False)}
FLASH = {name: flash(kernels) for name, kernels in KERNELS.items()}
EACH = pytest.mark.parametrize("attention", FLASH.values(), ids=FLASH)
PLACES = pytest.mark.parametrize(
    "at", [Position(0, 0), Position(1, 5), Position(2, 63), Position(1, T - 64)], ids=str
)


@EACH
@pytest.mark.parametrize(("num_heads", "group"), [(1, 1), (3, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("L", [1, 7, 64, 130])
def test_equals_float64_wherever_the_slice_lies(
    L: int, num_heads: int, group: int, attention: Attention
) -> None:
    for i, context in enumerate([0, 1, 5, 63, 64, T - L]):
        at = Position(i % 3, context)
        s = draw(at, L, T, seed=i, num_heads=num_heads, group=group)
        reference.assert_close(run(s, attention), expect(s), TOLERANCE)


@EACH
@pytest.mark.parametrize("num_rows", [1, 3, ROWS])
def test_any_number_of_sequences(num_rows: int, attention: Attention) -> None:
    for row in range(ROWS - num_rows + 1):
        s = draw(Position(row, 50), 64, T, seed=row, num_rows=num_rows)
        reference.assert_close(run(s, attention), expect(s), TOLERANCE)


@EACH
@pytest.mark.parametrize("num_sums", [2, 3])
def test_gradients_may_have_fewer_rows_than_the_cache(num_sums: int, attention: Attention) -> None:
    for row in range(3):
        s = draw(Position(row, 50), 64, T, seed=row, num_sums=num_sums)
        reference.assert_close(run(s, attention), expect(s), TOLERANCE)


@EACH
@pytest.mark.parametrize("num_rows", [1, 2])
def test_whole_sequences(num_rows: int, attention: Attention) -> None:
    """No slice comes later, so there are no sums yet."""
    for row in range(3):
        s = draw(Position(row, 0), 70, 70, seed=row, num_rows=num_rows)
        s = s._replace(d_cache=jax.tree.map(np.zeros_like, s.d_cache))
        reference.assert_close(run(s, attention), expect(s), TOLERANCE)


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("window", [2, 7, 70, T])
def test_a_window_hides_what_is_before_it(window: int, kernels: Kernels) -> None:
    """As the other attention, which is told for each token where it begins to see."""

    def told(s: Slice) -> Slice:
        B, L, _, _ = s.q_BLNK.shape
        first = jnp.maximum(s.at.token + jnp.arange(L) - window + 1, 0)
        return s._replace(starts_BL1=jnp.broadcast_to(first[:, None], (B, L, 1)))

    own = blockwise(32)
    expected = own._replace(
        forward=lambda s: own.forward(told(s)),
        backward=lambda s, *more: own.backward(told(s), *more),
    )
    for at in (Position(1, 0), Position(0, 60), Position(2, T - 50)):
        s = draw(at, 50, T, seed=window, group=2)
        reference.assert_close(run(s, flash(kernels, window)), run(s, expected), TOLERANCE)


def test_scores_may_be_large() -> None:
    """As in test_blockwise, where their rounding is explained."""
    s = draw(Position(1, 60), 130, T, scale=60)
    reference.assert_close(run(s, FLASH["flash 3"]), expect(s), 1e-4)


@EACH
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("num_tokens", [T, 130])
def test_short_formats(num_tokens: int, dtype: Any, attention: Attention) -> None:
    """Results are rounded to 2^-9 or 2^-12, and so is the output that gradients come from."""
    s = rounded(draw(Position(1, num_tokens - 130), 130, num_tokens), dtype)
    got, want = run(s, attention, dtype), expect(s)
    assert all(a.dtype == dtype for a in (got.out, got.d_q, *got.d_kv))
    assert all(a.dtype == np.float32 for a in (got.lse, *got.d_cache))
    reference.assert_close(got.lse, want.lse, TOLERANCE)
    epsilon = float(jnp.finfo(dtype).eps)
    reference.assert_close(got._replace(lse=want.lse), want, 2 * epsilon)


def test_sums_are_float32_in_a_short_format() -> None:
    """Gradients are added to sums that bfloat16 would round; own ones are rounded last."""
    s = rounded(draw(Position(1, 60), 64, T), jnp.bfloat16)
    sums = draw(s.at, 64, T).d_cache
    nothing, got = (raw(a, FLASH["flash 3"], jnp.bfloat16) for a in (s, s._replace(d_cache=sums)))
    for before, after, added in zip(sums, got.d_cache, nothing.d_cache, strict=True):
        np.testing.assert_array_equal(s.context(after), s.context(before) + s.context(added))
    for before, own, added in zip(sums, got.d_kv, nothing.d_kv, strict=True):
        exact = s.itself(before) + added.astype(np.float32)
        np.testing.assert_array_equal(own, exact.astype(own.dtype))


def beyond(s: DrawnSlice, cache: KVCache, value: float) -> KVCache:
    """The cache with this value in all that the slice does not see."""
    filled = KVCache(*(np.full_like(a, value) for a in cache))
    for a, b in zip(filled, cache, strict=True):
        s.seen(a)[...] = s.seen(b)
    return filled


@EACH
@PLACES
def test_neither_later_tokens_nor_other_sequences_matter(
    at: Position, attention: Attention
) -> None:
    """What the kernels may read is finite; sums of gradients are not read at all."""
    s = draw(at, 64, T)
    clean = run(s, attention)
    for value in (1e9, -1e9):
        got = run(s._replace(cache=beyond(s, s.cache, value)), attention)
        jax.tree.map(np.testing.assert_array_equal, got, clean)
    got = run(s._replace(d_cache=beyond(s, s.d_cache, np.nan)), attention)
    want = clean._replace(d_cache=beyond(s, clean.d_cache, np.nan))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@EACH
@PLACES
@pytest.mark.parametrize("num_sums", [2, ROWS])
def test_adds_to_the_gradients_of_the_context_and_leaves_the_others(
    num_sums: int, at: Position, attention: Attention
) -> None:
    s = draw(at, 64, T, num_sums=num_sums)
    for before, after in zip(s.d_cache, raw(s, attention).d_cache, strict=True):
        changed = s.context(after) != s.context(before)
        assert changed.all()
        assert changed.size == 2 * 2 * at.token * 16
        kept = after.copy()
        s.context(kept)[...] = s.context(before)
        assert kept.tobytes() == before.tobytes()


@EACH
def test_a_whole_sequence_changes_no_sums(attention: Attention) -> None:
    s = draw(Position(1, 0), 70, 70)
    for before, after in zip(s.d_cache, raw(s, attention).d_cache, strict=True):
        assert after.tobytes() == before.tobytes()


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("num_tokens", [T, 64])
def test_calls_the_kernels_once(num_tokens: int, num_rows: int, kernels: Kernels) -> None:
    """Each call once a run, so outside loops and branches; without empty sequences where nothing
    lies between two.
    """
    calls: list[tuple[str, int]] = []

    def counted(name: str, kernel: Any, starts_at: int) -> Any:
        def call(*args: Any) -> Any:
            calls.append((name, len(args[starts_at][0]) - 1))
            return kernel(*args)

        return call

    forward, backward, has_lse_of_sequences = kernels
    attention = flash(
        Kernels(
            counted("forward", forward, 3), counted("backward", backward, 6), has_lse_of_sequences
        )
    )
    s = draw(Position(1, num_tokens - 64), 64, num_tokens, num_rows=num_rows)
    own, d_out, d_cache = arguments(s, attention.layout)
    num_sequences = num_rows if num_tokens == 64 else 2 * num_rows - 1
    program = jax.make_jaxpr(attention.forward)(own)
    assert calls == [("forward", num_sequences)]
    results = jax.eval_shape(attention.forward, own)
    calls.clear()
    program_back = jax.make_jaxpr(attention.backward)(own, *results, d_out, d_cache)
    assert calls == [("backward", num_sequences)]
    for text in map(str, (program, program_back)):
        assert not any(f"{name}[" in text for name in ("while", "scan", "cond"))


@EACH
def test_devices_share_heads(attention: Attention) -> None:
    own, d_out, d_cache = arguments(
        draw(Position(1, 50), 64, T, num_heads=2, group=2), attention.layout
    )

    def both(attention: Attention) -> Any:
        results = jax.jit(attention.forward)(own)
        return results, jax.jit(attention.backward)(own, *results, d_out, d_cache)

    want = both(attention)
    with jax.set_mesh(make_mesh(MeshConfig(model=2), jax.devices()[:2])):
        reference.assert_close(both(over_heads(attention)), want, TOLERANCE)


@pytest.mark.parametrize(
    ("capability", "package", "sentence"),
    [
        ((8, 0), "dew-flash-attn-cu12", None),
        ((8, 6), "dew-flash-attn-cu13", None),
        ((8, 9), "dew-flash-attn-cu12", None),
        ((9, 0), "dew-flash-attn-cu13", None),
        ((12, 0), "dew-flash-attn-cu12", None),
        ((7, 5), "dew-flash-attn-cu12", "has kernels for compute capability 8, 9"),
        ((10, 0), "dew-flash-attn-cu12", "has kernels for compute capability 8, 9"),
        ((9, 0), None, 'pip install "tpipe_jax[flash12]", or flash13 with CUDA 13'),
    ],
)
def test_where_it_runs(
    capability: tuple[int, int],
    package: str | None,
    sentence: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_flash.install(monkeypatch, package)
    found = obstacle(capability)
    assert sentence in found if found and sentence else found == sentence, found


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since functions without a public name are called."""
    fake_flash.install(monkeypatch, "dew-flash-attn-cu13", version="0.4.0")
    assert obstacle((9, 0)) == "needs dew-flash-attn-cu13 0.3.6, which 0.4.0 is not"


def test_what_cannot_be_loaded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flash.install(monkeypatch, has_module=False)
    assert (obstacle((9, 0)) or "").startswith("cannot load dew-flash-attn-cu12 (")


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "flash 2"), ((9, 0), "flash 3"), ((12, 0), "flash 2")]
)
def test_hopper_has_its_own_kernels(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_flash.install(monkeypatch)
    s = draw(Position(1, 50), 64, T)
    got = flash_kernels(capability)
    assert got.has_lse_of_sequences == KERNELS[name].has_lse_of_sequences
    reference.assert_close(run(s, flash(got)), expect(s), TOLERANCE)


def test_the_stand_in_is_as_flash_attention() -> None:
    """Two queries see the first two and all three keys of their sequence, and one its only key;
    gradients of keys are 0 in the sequence without queries, and not written in none.
    """
    starts = jnp.array([0, 2, 2, 3], jnp.int32), jnp.array([1, 4, 6, 7], jnp.int32)
    where = starts, (2, 3), 1.0, True, (-1, -1)
    q = jnp.zeros((3, 2, 8))
    v = jnp.arange(8.0)[:, None, None] * jnp.ones((1, 8))
    means, numbers = np.array([1.5, 2, 6]), np.array([2, 3, 1])

    def check(kernels: Kernels, lse: Array) -> None:
        out, got = kernels.forward(q, v, v, *where)
        np.testing.assert_allclose(out, np.broadcast_to(means[:, None, None], q.shape), rtol=1e-6)
        np.testing.assert_allclose(got, lse, rtol=1e-6)
        d_q, d_k, d_v = kernels.backward(jnp.ones_like(q), q, v, v, out, got, *where)
        deviations = np.array([0.25, 2 / 3, 0]) * 8  # of the keys, which are the values
        np.testing.assert_allclose(d_q[:, 0, 0], deviations, rtol=1e-5)
        of_values = np.array([np.nan, 5 / 6, 5 / 6, 1 / 3, 0, 0, 1, np.nan]) * 2  # of two heads
        np.testing.assert_allclose(d_v[:, 0, 0], of_values, rtol=1e-6)
        np.testing.assert_array_equal(d_k[:, 0, 0], of_values * 0)

    logs = jnp.broadcast_to(jnp.log(numbers.astype(np.float32)), (2, 3))
    check(KERNELS["flash 3"], logs)
    none = jnp.full(2, jnp.nan)
    of_sequences = [logs[:, :2], jnp.stack([none, none], 1), jnp.stack([logs[:, 2], none], 1)]
    check(KERNELS["flash 2"], jnp.stack(of_sequences))
