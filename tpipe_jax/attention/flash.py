"""FlashAttention for a slice and its context in one call (arXiv 2307.08691, 2407.08608).

The kernels take packed sequences: queries and keys of all sequences in a row, and the offsets at
which each begins, as run-time values. Their causal mask is aligned to the last key. So a slice of L
tokens after C others is a sequence of L queries and C + L keys. What a cache of T tokens has beyond
is a sequence of its own, without queries:

    queries  0, L, L, 2 L, 2 L, ...
    keys     0, C + L, T, T + C + L, 2 T, ...

The kernels multiply what lies beyond in the last tile of keys by zero, so it must be finite. In a
cache it is zero, or comes from a slice that was there before.
"""

from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tpipe_jax.attention.base import TOKENS_FIRST, Attention, KVCache, Slice
from tpipe_jax.config.settings import FLASH_PACKAGES
from tpipe_jax.devices.collectives import varying
from tpipe_jax.devices.inplace import Position, in_shared_rows, read

VERSION = "0.3.6"  # whose functions without a public name are called here
TILE = 128  # the kernels' keys in a tile, for most widths
_NO_WINDOW = (-1, -1)


class Kernels(NamedTuple):
    """Attention of packed sequences, `[tokens, heads, K]`. `starts` are the offsets of queries and
    of keys, int32 `[N + 1]` each; `longest` are the most queries and keys of a sequence.
    """

    forward: Callable[..., tuple[Array, Array]]
    """`(q, k, v, starts, longest, scale, is_causal, window)` to the output and the log-sum-exp."""
    backward: Callable[..., tuple[Array, Array, Array]]
    """`(d_out, q, k, v, out, lse, starts, longest, scale, is_causal, window)` to the gradients of
    q, k and v."""
    has_lse_of_sequences: bool
    """Whether the log-sum-exp is `[N, heads, longest]`, by sequence, else `[heads, tokens]`."""


def obstacle(capability: tuple[int, int]) -> str | None:
    """Returns why GPUs of this compute capability cannot run the kernels; None if they can."""
    if capability[0] not in (8, 9, 12):
        return "has kernels for compute capability 8, 9 and 12 alone"
    found = [name for name in FLASH_PACKAGES if _version(name)]
    if not found:
        return 'needs FlashAttention: pip install "tpipe_jax[flash12]", or flash13 with CUDA 13'
    if (version := _version(found[0])) != VERSION:
        return f"needs {found[0]} {VERSION}, which {version} is not"
    try:
        import_module("dew_flash_attn")
    except (ImportError, OSError) as error:
        return f"cannot load {found[0]} ({error})"
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def flash_kernels(capability: tuple[int, int] | None) -> Kernels:
    """Returns FlashAttention-3 for Hopper, else FlashAttention-2."""
    dew: Any = import_module("dew_flash_attn")
    if capability == (9, 0):
        return Kernels(dew._forward3, dew._backward3, has_lse_of_sequences=False)
    return Kernels(dew._packed_forward2, dew._packed_backward2, has_lse_of_sequences=True)


def flash(kernels: Kernels, window: int | None = None) -> Attention:
    """Makes an attention that calls the kernels once for a slice, forward and backward. A token
    sees `window` tokens, itself included, or all before it.
    """
    own = _Flash(kernels, window)
    return Attention(own.forward, own.backward, TILE, TILE, TOKENS_FIRST, window)


class _Flash(NamedTuple):
    kernels: Kernels
    window: int | None

    def forward(self, slice_: Slice) -> tuple[Array, Array]:
        """As `Attention.forward`, for sequences that are one document each."""
        assert slice_.starts_BL1 is None
        B, L, N, K = slice_.q_BLNK.shape
        results = self.kernels.forward(*_packed(slice_), *self._places(slice_))
        out, lse = _varying_as(slice_.q_BLNK, results)
        if self.kernels.has_lse_of_sequences:
            lse_BLN = lse[:: 1 + _has_gaps(slice_)].swapaxes(1, 2)
        else:
            lse_BLN = lse.reshape(N, B, L).transpose(1, 2, 0)
        return out.reshape(B, L, N, K), lse_BLN

    def backward(
        self,
        slice_: Slice,
        out_BLNK: Array,
        lse_BLN: Array,
        d_out_BLNK: Array,
        d_cache: KVCache,
    ) -> tuple[Array, KVCache, KVCache]:
        """As `Attention.backward`, for sequences that are one document each."""
        assert slice_.starts_BL1 is None
        q_BLNK, cache, at, _ = slice_
        (B, L, N, K), (R, T, W) = q_BLNK.shape, cache.k.shape
        if self.kernels.has_lse_of_sequences:
            lse = lse_BLN.swapaxes(1, 2)
            if _has_gaps(slice_):
                empty = jnp.zeros((2 * B - 1, N, L), lse.dtype)
                lse = empty.at[::2].set(lse)
        else:
            lse = lse_BLN.transpose(2, 0, 1).reshape(N, B * L)
        d_out, out = (a.astype(q_BLNK.dtype).reshape(-1, N, K) for a in (d_out_BLNK, out_BLNK))
        results = self.kernels.backward(d_out, *_packed(slice_), out, lse, *self._places(slice_))
        d_q, *d_kv = _varying_as(q_BLNK, results)
        d_kv = [d.reshape(R, T, W) for d in d_kv]

        d_at = in_shared_rows(at, d_cache.k, R)
        own = [TOKENS_FIRST.read(d, at, B, L, K) for d in d_kv]
        if T > L:
            d_cache = KVCache(
                *(
                    _with_context(d, more, d_at, at, B)
                    for d, more in zip(d_cache, d_kv, strict=True)
                )
            )
            sums = [TOKENS_FIRST.read(d, d_at, B, L, K) for d in d_cache]
            own = [(a + b).astype(b.dtype) for a, b in zip(sums, own, strict=True)]
        return d_q.reshape(B, L, N, K), KVCache(*own), d_cache

    def _places(self, slice_: Slice) -> tuple[Any, ...]:
        """The arguments of the kernels that say where each sequence is, and how it is attended."""
        (B, L, _, K), T, at = slice_.q_BLNK.shape, slice_.cache.k.shape[1], slice_.at
        if _has_gaps(slice_):
            row, is_gap = jnp.divmod(jnp.arange(2 * B, dtype=jnp.int32), 2)
            starts = (row + is_gap) * L, (at.row + row) * T + is_gap * (at.token + L)
        else:  # the last sequence ends before what follows it in the cache
            row = jnp.arange(B + 1, dtype=jnp.int32)
            ends = (at.row + row - 1) * T + at.token + L
            starts = row * L, jnp.where(row < B, (at.row + row) * T, ends)
        starts = tuple(a.astype(jnp.int32) for a in starts)
        # The kernels count the keys to the left of a query.
        window = _NO_WINDOW if self.window is None else (self.window - 1, 0)
        return starts, (L, T), float(K**-0.5), True, window


def _varying_as(a: Array, results: tuple[Array, ...]) -> tuple[Array, ...]:
    """Tells jax that results of a kernel differ between devices as its arguments do."""
    return varying(results, sorted(jax.typeof(a).manual_axis_type.varying))


def _with_context(sums: Array, more: Array, d_at: Position, at: Position, num_rows: int) -> Array:
    """Returns the sums with gradients of the context added. What is beyond is left out of `more`,
    where it may be anything.

    A scatter skips tokens whose place is outside of the sums, so that a slice with a short context
    takes little time.
    """
    R, T, W = sums.shape
    tokens = jnp.arange(num_rows * T, dtype=jnp.int32)
    places = jnp.where(tokens % T < at.token, d_at.row * T + tokens, R * T + tokens)
    found = read(more, at._replace(token=0), num_rows, T).reshape(-1, W).astype(sums.dtype)
    flat = sums.reshape(-1, W).at[places]
    return flat.add(found, mode="drop", unique_indices=True, wrap_negative_indices=False).reshape(
        R, T, W
    )


def _has_gaps(slice_: Slice) -> bool:
    """Whether the cache has anything between the keys of one sequence and those of the next."""
    return slice_.num_tokens < slice_.cache.k.shape[1] and len(slice_.q_BLNK) > 1


def _packed(slice_: Slice) -> tuple[Array, Array, Array]:
    """Returns queries, keys and values as `[tokens, heads, K]`."""
    _, _, N, K = slice_.q_BLNK.shape
    k, v = (a.reshape(-1, a.shape[-1] // K, K) for a in slice_.cache)
    return slice_.q_BLNK.reshape(-1, N, K), k, v
