"""Large buffers that a compiled loop updates in place.

Every buffer has sequences on its first axis and tokens on its last but one, as `[B, T, D]` and
`[B, H, T, K]`. A slice reads and writes the part of it that starts at its `Position`.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
from jax import Array, lax

Carry = TypeVar("Carry")
ON_ALL = "on_all_devices"  # in the names of conditionals that all devices take alike


class Position(NamedTuple):
    """Where a slice lies, int32 scalars."""

    row: Array | int
    """Its first sequence in a buffer."""
    token: Array | int
    batch_row: Array | int = 0
    """Its first sequence in the batch, of which buffers may hold a part at a time."""
    slot_row: Array | int = 0
    """The first row of its slot in buffers of as many slots as slices wait."""


def in_shared_rows(at: Position, buffer: Array, num_rows: int) -> Position:
    """The position in a buffer of fewer rows than others have, `num_rows`: sequences take turns in
    it, so that it is in the first.
    """
    return at if buffer.shape[0] == num_rows else at._replace(row=0)


def read(buffer: Array, at: Position, num_rows: int, num_tokens: int) -> Array:
    """Returns `num_rows` sequences by `num_tokens` tokens of a buffer."""
    size = (num_rows, *buffer.shape[1:-2], num_tokens, buffer.shape[-1])
    return lax.dynamic_slice(buffer, _start(buffer, at), size)


def write(buffer: Array, value: Array, at: Position) -> Array:
    """Returns the buffer with one slice replaced, cast to the buffer's dtype."""
    return lax.dynamic_update_slice(buffer, value.astype(buffer.dtype), _start(buffer, at))


def run_on_all_if(
    condition: Array | bool, function: Callable[[Carry], Carry], carry: Carry
) -> Carry:
    """As `run_if`, for a condition that is the same on all devices: in the function they may
    exchange values, since all come to it, as the name tells `hlo.check_branches`.
    """
    with jax.named_scope(ON_ALL):
        return lax.cond(condition, function, lambda carry: carry, carry)


def run_if(condition: Array | bool, function: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """`function(carry)` where the condition holds, else the carry unchanged.

    XLA lets a conditional with a predicate update its operands in place, but copies those of a
    conditional with an index, which is what `lax.switch` makes: measured in docs/design.md.
    """
    return lax.cond(condition, function, lambda carry: carry, carry)


def _start(buffer: Array, at: Position) -> tuple[Array | int, ...]:
    return at.row, *(0,) * (buffer.ndim - 3), at.token, 0
