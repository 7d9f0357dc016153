"""Large buffers that a compiled loop updates in place.

Every buffer has sequences on its first axis and tokens on its last but one, as `[B, T, D]` and
`[B, H, T, K]`. A slice reads and writes the part of a buffer that starts at its `Position`. A
buffer may be in the memory of the host (`on_host`); then slices are copied from there and back.
"""

from typing import NamedTuple

import jax
from jax import Array, lax

_Space = jax.memory.Space


class Position(NamedTuple):
    """The place of a slice, as int32 scalars."""

    row: Array | int
    """The first sequence of the slice in a buffer."""
    token: Array | int
    batch_row: Array | int = 0
    """The first sequence of the slice in the batch; buffers may hold only a part of the batch."""
    slot_row: Array | int = 0
    """The first row of the slice's slot, in buffers with a slot for each slice whose gradients of
    weights are deferred."""


def in_shared_rows(at: Position, buffer: Array, num_rows: int) -> Position:
    """Returns where a slice lies in a buffer that may have fewer rows than the others (`num_rows`).

    If it has fewer, sequences use its first rows one after another, so the row is 0.
    """
    return at if buffer.shape[0] == num_rows else at._replace(row=0)


def read(buffer: Array, at: Position, num_rows: int, num_tokens: int) -> Array:
    """Returns `num_rows` sequences by `num_tokens` tokens of a buffer, from a position on."""
    size = (num_rows, *buffer.shape[1:-2], num_tokens, buffer.shape[-1])
    found = lax.dynamic_slice(buffer, _start(buffer, at), size)
    return jax.device_put(found, _Space.Device) if _is_on_host(buffer) else found


def write(buffer: Array, value: Array, at: Position) -> Array:
    """Returns the buffer with one slice replaced, cast to the buffer's dtype."""
    value = value.astype(buffer.dtype)
    if _is_on_host(buffer):
        value = on_host(value)
    return lax.dynamic_update_slice(buffer, value, _start(buffer, at))


def on_host(value: Array) -> Array:
    """Returns a value in the memory of the host. XLA makes a buffer there, not on the device."""
    return jax.device_put(value, _Space.Host)


def _is_on_host(buffer: Array) -> bool:
    return jax.typeof(buffer).memory_space == _Space.Host


def _start(buffer: Array, at: Position) -> tuple[Array | int, ...]:
    return at.row, *(0,) * (buffer.ndim - 3), at.token, 0
