"""Large buffers that a compiled loop updates in place.

Every buffer has sequences on its first axis and tokens on its last but one: `[B, T, D]`, `[B, H, T,
K]`. A slice reads and writes the part of it that starts at its `Position`.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array, lax

Carry = TypeVar("Carry")


class Position(NamedTuple):
    """Where a slice lies in the batch: its first sequence and its first token, int32 scalars."""

    row: Array | int
    token: Array | int


def read(buffer: Array, at: Position, num_rows: int, num_tokens: int) -> Array:
    """Returns `num_rows` sequences by `num_tokens` tokens of a buffer."""
    size = (num_rows, *buffer.shape[1:-2], num_tokens, buffer.shape[-1])
    return lax.dynamic_slice(buffer, _start(buffer, at), size)


def write(buffer: Array, value: Array, at: Position) -> Array:
    """Returns the buffer with one slice replaced, cast to the buffer's dtype."""
    return lax.dynamic_update_slice(buffer, value.astype(buffer.dtype), _start(buffer, at))


def run_if(
    condition: Array | bool,
    function: Callable[[Position, Carry], Carry],
    at: Position,
    carry: Carry,
) -> Carry:
    """`function(at, carry)` where the condition holds, else the carry unchanged.

    A loop of one turn or none: XLA updates the state of a loop in place, whereas a conditional
    copies what its branches change. The position is tied to the turn, which keeps the work in the
    loop; reads at a position from outside would be moved out together with all that follows from
    them, and then run whatever the condition.
    """

    def turn(i: Array, carry: Carry) -> Carry:
        return function(Position(at.row + i, at.token + i), carry)  # i is 0

    return lax.fori_loop(0, jnp.int32(condition), turn, carry)


def _start(buffer: Array, at: Position) -> tuple[Array | int, ...]:
    return at.row, *(0,) * (buffer.ndim - 3), at.token, 0
