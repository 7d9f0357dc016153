"""What runs in place of FlashAttention on a CPU: the same calls by dense products, in float32."""

import sys
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest
from jax import Array

from tpipe_jax.attention import flash
from tpipe_jax.attention.flash import Kernels
from tpipe_jax.config.settings import FLASH_PACKAGES


class _Places(NamedTuple):
    """Where tokens of packed sequences lie."""

    sequence: Array
    """The sequence of each token, -1 for tokens in none."""
    first: Array
    """Tokens of the sequence before this one."""
    last: Array
    """The same less the length of the sequence: -1 is the last token."""


def _places(starts: Array, num_tokens: int) -> _Places:
    token = jnp.arange(num_tokens)
    sequence = (token[:, None] >= starts[1:]).sum(1)
    is_inside = (token >= starts[0]) & (token < starts[-1])
    first, last = token - starts[sequence], token - starts[sequence + 1]
    return _Places(jnp.where(is_inside, sequence, -1), first, last)


class _Call:
    """What both directions compute: scores of all queries with all keys `[N, Q, S]`."""

    def __init__(self, q: Array, k: Array, v: Array, starts: Any, longest: Any, *how: Any) -> None:
        scale, is_causal, (left, right) = how
        assert is_causal
        assert (left, right) == (-1, -1) or (left >= 0 and right == 0)
        (Q, N, K), (S, H, _) = q.shape, k.shape
        assert k.shape == v.shape == (S, H, K)
        assert q.dtype == k.dtype == v.dtype
        assert N % H == 0
        for bounds in starts:
            assert bounds.dtype == jnp.int32
            assert bounds.shape == starts[0].shape
        self.dtype, self.num_keys, self.scale = q.dtype, H, scale
        self.queries, self.keys = _places(starts[0], Q), _places(starts[1], S)
        self.starts, self.longest = starts, longest
        lengths = (jnp.diff(bounds) for bounds in starts)
        fits = [(n <= most).all() for n, most in zip(lengths, longest, strict=True)]
        self.fits = fits[0] & fits[1]  # more tokens than the longest sequence has are left out
        self.q = q.astype(jnp.float32)
        self.k, self.v = (jnp.repeat(a.astype(jnp.float32), N // H, 1) for a in (k, v))
        is_own = self.queries.sequence[:, None] == self.keys.sequence
        is_past = self.keys.last <= self.queries.last[:, None]
        is_near = (left < 0) | (self.keys.last >= self.queries.last[:, None] - left)
        self.visible = is_own & is_past & is_near & (self.keys.sequence >= 0)
        scores = jnp.einsum("qnk,snk->nqs", self.q, self.k) * scale
        self.scores = jnp.where(self.visible, scores, -jnp.inf)

    def result(self, a: Array) -> Array:
        return jnp.where(self.fits, a, jnp.nan).astype(self.dtype)

    def of_keys(self, d: Array) -> Array:
        """Gradients of keys, whose heads have several of queries. Memory is as it was where no
        sequence is.
        """
        S, N, K = d.shape
        d = d.reshape(S, self.num_keys, N // self.num_keys, K).sum(2)
        return self.result(jnp.where(self.keys.sequence[:, None, None] < 0, jnp.nan, d))


def _forward(has_lse_of_sequences: bool, *args: Any) -> tuple[Array, Array]:
    call = _Call(*args)
    top = call.scores.max(-1, keepdims=True)
    lse = top + jnp.log(jnp.exp(call.scores - top).sum(-1, keepdims=True))
    out = jnp.einsum("nqs,snk->qnk", jnp.exp(call.scores - lse), call.v)
    lse = lse[..., 0]
    if has_lse_of_sequences:
        place = jnp.arange(call.longest[0])
        token = call.starts[0][:-1, None] + place
        is_inside = place < jnp.diff(call.starts[0])[:, None]
        own = lse[:, jnp.minimum(token, lse.shape[1] - 1)].swapaxes(0, 1)
        lse = jnp.where(is_inside[:, None], own, jnp.nan)
    return call.result(out), lse


def _backward(
    has_lse_of_sequences: bool, d_out: Array, q: Array, k: Array, v: Array, *more: Any
) -> tuple[Array, Array, Array]:
    """From the log-sum-exp and the output that it is given."""
    out, lse, *where = more
    call = _Call(q, k, v, *where)
    assert out.shape == d_out.shape == q.shape
    assert out.dtype == d_out.dtype == q.dtype
    assert lse.dtype == jnp.float32
    num_queries, num_heads, _ = q.shape
    if has_lse_of_sequences:
        assert lse.shape == (len(call.starts[0]) - 1, num_heads, call.longest[0])
        lse = lse[call.queries.sequence, :, call.queries.first].T
    assert lse.shape == (num_heads, num_queries)
    d_out, out = d_out.astype(jnp.float32), out.astype(jnp.float32)
    weight = jnp.where(call.visible, jnp.exp(call.scores - lse[..., None]), 0)
    delta = (d_out * out).sum(-1).T[..., None]
    d_score = weight * (jnp.einsum("qnk,snk->nqs", d_out, call.v) - delta) * call.scale
    d_q = jnp.einsum("nqs,snk->qnk", d_score, call.k)
    d_k = jnp.einsum("nqs,qnk->snk", d_score, call.q)
    d_v = jnp.einsum("nqs,qnk->snk", weight, d_out)
    return call.result(d_q), call.of_keys(d_k), call.of_keys(d_v)


def kernels(has_lse_of_sequences: bool) -> Kernels:
    """FlashAttention-2 has the log-sum-exp of sequences, FlashAttention-3 of tokens."""
    functions = (partial(f, has_lse_of_sequences) for f in (_forward, _backward))
    return Kernels(*functions, has_lse_of_sequences)


def install(
    monkeypatch: pytest.MonkeyPatch,
    package: str | None = FLASH_PACKAGES[0],
    version: str = flash.VERSION,
    has_module: bool = True,
) -> None:
    """As if FlashAttention were installed, or not if `package` is None."""
    of_others = metadata.version

    def version_of(name: str) -> str:
        if name == package:
            return version
        if name in FLASH_PACKAGES:
            raise metadata.PackageNotFoundError(name)
        return of_others(name)

    module: Any = ModuleType("dew_flash_attn")
    module._packed_forward2, module._packed_backward2, _ = kernels(True)
    module._forward3, module._backward3, _ = kernels(False)
    monkeypatch.setattr(metadata, "version", version_of)
    monkeypatch.setitem(sys.modules, "dew_flash_attn", module if has_module else None)
