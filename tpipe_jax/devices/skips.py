"""Work that a device skips at run time, without a copy of the buffers that the work would change.

A conditional hands its buffers on either changed or unchanged. XLA often copies them to do so: that
depends on the platform, and on the number of conditionals in a row. A loop of one turn or none
changes them in place, but a GPU takes longer to begin it (docs/design.md has the measurements).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from tpipe_jax.devices.scopes import ON_ALL

Carry = TypeVar("Carry")


class Skips(NamedTuple):
    """How a program skips work."""

    most_conditionals: float
    """The most conditionals in a row; where more pieces of work follow each other, each is a loop
    of one turn or none."""
    reads_first: bool = True
    """Whether values that work overwrites are read once, at its beginning."""
    in_sweeps: bool = False
    """Whether a schedule that has the whole batch at once runs as a loop forward and a loop
    backward, of which no tick skips anything on all devices: on GPUs each skip waits for the
    host."""

    def read_first(self, value: Carry) -> Carry:
        """Returns a value that work reads from a buffer and then overwrites, or buffers that it has
        just written.

        XLA may compute the value once more where it is used again, from a copy of the buffer as it
        was before (seen in programs for V100s). A barrier prevents that.
        """
        return lax.optimization_barrier(value) if self.reads_first else value

    def run_if(
        self,
        condition: Array | bool,
        function: Callable[[Carry], Carry],
        carry: Carry,
        num_pieces: int = 1,
    ) -> Carry:
        """Returns `function(carry)` if the condition holds, otherwise the carry unchanged.
        `num_pieces` pieces of work like this one follow each other.

        XLA updates the operands of a conditional with a predicate in place. It copies the operands
        of a conditional with an index, which `lax.switch` makes (measured in docs/design.md).
        """
        if num_pieces <= self.most_conditionals:
            return lax.cond(condition, function, lambda carry: carry, carry)
        num_turns = jnp.asarray(condition).astype(jnp.int32)
        return lax.fori_loop(0, num_turns, lambda _, carry: function(carry), carry)

    def run_on_all_if(
        self, condition: Array | bool, function: Callable[[Carry], Carry], carry: Carry
    ) -> Carry:
        """As `run_if`, for a condition that is the same on all devices.

        Either all devices call the function or none does, so they may exchange values in it.
        `exchanges.find_collectives` recognises such a skip by its name.
        """
        with jax.named_scope(ON_ALL):
            return self.run_if(condition, function, carry)


CONDITIONALS = Skips(float("inf"), reads_first=False)
_OF_PLATFORM = {"cpu": CONDITIONALS, "gpu": Skips(1, in_sweeps=True), "tpu": Skips(0)}


def skips_on(platform: Any) -> Skips:
    """Returns how programs for a platform skip work."""
    return _OF_PLATFORM.get(platform, CONDITIONALS)
