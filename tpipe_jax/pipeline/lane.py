"""One direction through the stages: each stage works on its own item and hands the result on.

This is code of one device inside `shard_map`, with the axis 'pipe' manual. Items of the same shape
share one compiled body, since their position is a run-time value.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tpipe_jax.devices.collectives import handed_on
from tpipe_jax.devices.inplace import Position, read, write
from tpipe_jax.devices.scopes import PUT, SLICE
from tpipe_jax.devices.skips import CONDITIONALS, Skips
from tpipe_jax.planning.schedule import IDLE, Item

State = TypeVar("State")
Carry = tuple[State, Array, Array]  # state, trunk, and the packet that goes round the stages
ItemWork = Callable[[int, Array, Position, State], tuple[Array, State]]
ItemShape = tuple[int, int]


class Lane:
    """One direction through the stages."""

    def __init__(
        self,
        items: Sequence[Item],
        buffer_rows: Sequence[int],
        num_stages: int,
        reverse: bool = False,
        slot_rows: np.ndarray | None = None,
        skips: Skips = CONDITIONALS,
        may_idle: bool = True,
    ) -> None:
        """`buffer_rows[item]` is the first row of an item in the buffers. `slot_rows[item, stage]`
        is the first row of its slot, if gradients of weights are deferred. Unless it `may_idle`,
        each stage has an item in each tick.
        """
        ends, step = ((num_stages - 1, 0), -1) if reverse else ((0, num_stages - 1), 1)
        self._entry, self._exit = ends
        self._is_ring = any(item.chunk for item in items)
        pairs = [(s, s + step) for s in range(num_stages) if s != self._exit]
        self._neighbours = pairs + [(self._exit, self._entry)] * self._is_ring
        self._items, self._skips, self._may_idle = items, skips, may_idle
        self._places = jnp.array(
            [(first, item.token, item.row) for first, item in zip(buffer_rows, items, strict=True)]
        )
        self._slot_rows = None if slot_rows is None else jnp.asarray(slot_rows)

    def empty_packet(self, width: int, dtype: Any) -> Array:
        """Returns a zeroed packet, the buffer that goes from stage to stage. It holds any item."""
        shapes = [item.shape for item in self._items]
        longest = max(B for B, _ in shapes), max(L for _, L in shapes)
        return jnp.zeros((*longest, width), dtype)

    def tick(self, work: ItemWork, row: Array, carry: Carry) -> Carry:
        """Runs one tick: each stage works on its item in `row` `[P]` and hands the result on."""
        stage = lax.axis_index("pipe")

        def run(kind: tuple[int, ItemShape], at: Position, carry: Carry) -> Carry:
            (chunk, (B, L)), (state, trunk, packet_BLD) = kind, carry
            x_BLD = jnp.where(stage == self._entry, read(trunk, at, B, L), packet_BLD[:B, :L])
            x_BLD = self._skips.read_first(x_BLD)
            y_BLD, state = work(chunk, x_BLD, at, state)
            return state, write(trunk, y_BLD, at), write(packet_BLD, y_BLD, Position(0, 0))

        kinds = [(item.chunk, item.shape) for item in self._items]
        state, trunk, packet_BLD = self._by_kind(kinds, row[stage], run, carry)
        if self._neighbours:
            packet_BLD = handed_on(packet_BLD, self._neighbours)
        if self._is_ring:  # the result waits in the trunk of the first stage for the next chunk

            def put(shape: ItemShape, at: Position, trunk: Array) -> Array:
                B, L = shape
                return write(trunk, packet_BLD[:B, :L], at)

            index = jnp.where(stage == self._entry, row[self._exit], IDLE)
            trunk = self._by_kind([item.shape for item in self._items], index, put, trunk, PUT)
        return state, trunk, packet_BLD

    def each_alone(
        self, row: Array, function: Callable[[int, ItemShape, Position, State], State], state: State
    ) -> State:
        """Calls `function(chunk, (B, L), position, state)` for each item of this stage in `row`
        `[P, n]`, and hands no result to other stages. Returns the state.
        """
        own = row[lax.axis_index("pipe")]

        def run(kind: tuple[int, ItemShape], at: Position, state: State) -> State:
            return function(*kind, at, state)

        def one(n: Array, state: State) -> State:
            kinds = [(item.chunk, item.shape) for item in self._items]
            return self._by_kind(kinds, own[n], run, state)

        return lax.fori_loop(0, len(own), one, state)

    def _by_kind(
        self,
        kinds: Sequence[Any],
        index: Array,
        function: Callable[[Any, Position, State], State],
        state: State,
        scope: str = SLICE,
    ) -> State:
        """Calls `function(kind, position, state)` for the item with this index. Returns the state,
        unchanged for IDLE. `kinds` are the kinds of all items, known when the program is compiled;
        the function is compiled once for each distinct kind, and has the name `scope` in it.
        """
        distinct, at = sorted(set(kinds)), Position(*self._places[index])
        if self._slot_rows is not None:
            at = at._replace(slot_row=self._slot_rows[index, lax.axis_index("pipe")])
        kind_of = jnp.array([distinct.index(kind) for kind in kinds])
        for n, kind in enumerate(distinct):
            is_due = (index != IDLE) & (kind_of[index] == n)
            with jax.named_scope(scope):
                run = partial(function, kind, at)
                if len(distinct) == 1 and not self._may_idle:
                    return run(state)
                state = self._skips.run_if(is_due, run, state, num_pieces=len(distinct))
        return state
