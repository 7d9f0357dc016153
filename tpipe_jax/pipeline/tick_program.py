"""What a tick of a compiled step does: kernels of a layer, copies, and exchanges between devices.

A program that follows a schedule has one loop over ticks (`executor.execute`). Its parts have names
in the compiled text (`devices.scopes`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tpipe_jax.devices.hlo import Operation, Program, read
from tpipe_jax.devices.scopes import BACKWARD, CONTEXT, FORWARD, ON_ALL, SLICE, WHOLE_BATCH
from tpipe_jax.devices.work import Work, work_of
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.planning.schedule import Schedule

Exchanges = dict[str, tuple[int, int]]
SMALL_BYTES = 4e6  # of copies in a tick, which take a GPU some microseconds


@dataclass(frozen=True)
class Kernels:
    """Kernels that one layer starts for one slice: of several lengths, for the one that needs most.
    Attention's loops over the context of the slice are apart: they turn as often as the context is
    long.
    """

    forward: int
    backward: int
    forward_context: int
    """In each turn of these loops; 0 if there are none."""
    backward_context: int


@dataclass(frozen=True)
class TickProgram:
    """What a device does in a tick, and in a step outside of its ticks."""

    kernels: Kernels
    copied_bytes: int
    """Bytes that a tick copies at most."""
    exchanges: Exchanges
    """Number and bytes of the collectives of each kind that a tick has, if the stage works on one
    slice forward and on one backward."""
    part_exchanges: Exchanges
    """The same for a tick with embedding and losses, beyond those of slices."""
    step_exchanges: Exchanges
    """The same for a step outside of its ticks: of gradients and of the optimiser."""


def read_tick(text: str, num_layers: int) -> TickProgram | None:
    """Reads a tick off the text of a compiled training step; None if it has no loop over ticks.

    `num_layers` is the most layers that a slice goes through in a tick.
    """
    program = read(text)
    return _of_one_loop(program, num_layers) or _of_two_loops(program, num_layers)


def _of_one_loop(program: Program, num_layers: int) -> TickProgram | None:
    """The tick of `executor.execute`, if it has both directions and all that belongs to parts."""
    loop = next(
        (
            operation
            for operation in program.operations()
            if operation.opcode == "while"
            and any(_is_skip(inner, ON_ALL) for inner in program.computations[operation.body])
        ),
        None,
    )
    if loop is None:
        return None
    lanes = {
        name: [
            operation
            for operation in program.computations[loop.body]
            if _is_skip(operation, ON_ALL) and f"/{name}/" in operation.source
        ]
        for name in (FORWARD, BACKWARD)
    }
    of_lanes = lanes[FORWARD] + lanes[BACKWARD]
    moving = sum((work_of(program, part) for lane in of_lanes for part in lane.parts), Work())
    rest = _work(program, loop.body, but=of_lanes)
    counts = [_kernels(program, lanes[name], num_layers) for name in (FORWARD, BACKWARD)]
    return TickProgram(
        Kernels(*(n for n, _ in counts), *(n for _, n in counts)),
        work_of(program, loop.body).copied_bytes,
        _exchanges(moving),
        _exchanges(rest),
        _exchanges(_work(program, program.entry, but=[loop])),
    )


def _of_two_loops(program: Program, num_layers: int) -> TickProgram | None:
    """The ticks of a program in sweeps: a loop forward and one backward."""
    loops = [operation for operation in program.operations() if operation.opcode == "while"]
    lanes = {
        name: [loop for loop in loops if loop.source.endswith(f"/{name}/while")]
        for name in (FORWARD, BACKWARD)
    }
    if not lanes[FORWARD]:
        return None
    of_lanes = lanes[FORWARD] + lanes[BACKWARD]
    of_parts = [
        operation
        for operation in program.computations[program.entry]
        if operation.opcode == "while" and f"/{WHOLE_BATCH}/" in operation.source
    ]
    moving = sum((work_of(program, loop.body) for loop in of_lanes), Work())
    rest = sum(
        (work_of(program, loop.body).times(loop.num_turns or 1) for loop in of_parts), Work()
    )
    counts = [_kernels(program, lanes[name], num_layers) for name in (FORWARD, BACKWARD)]
    return TickProgram(
        Kernels(*(n for n, _ in counts), *(n for _, n in counts)),
        (moving + rest).copied_bytes,
        _exchanges(moving),
        _exchanges(rest),
        _exchanges(_work(program, program.entry, but=[*of_lanes, *of_parts])),
    )


def large_copies(text: str, spec: StageSpec, schedule: Schedule) -> int:
    """Returns the bytes that a tick of a compiled training step copies, if they are more than they
    should be; else 0. Packets may be copied on their way to the next stage, in each direction.
    """
    tick = read_tick(text, layers_in_a_tick(spec))
    num_rows, num_tokens = schedule.longest_shape
    packet = num_rows * num_tokens * spec.config.model.d_model * spec.dtype.itemsize
    is_large = tick is not None and tick.copied_bytes > SMALL_BYTES + 4 * packet
    return tick.copied_bytes if tick and is_large else 0


def layers_in_a_tick(spec: StageSpec) -> int:
    """Returns the most layers that a slice goes through in a tick."""
    return max(max(chunk) for chunk in spec.chunk_layers)


def _kernels(program: Program, lanes: list[Operation], num_layers: int) -> tuple[int, int]:
    """Returns the kernels of a layer outside of loops over context, and in a turn of these."""
    outer = [name for lane in lanes for name in lane.parts]
    bodies = [
        part
        for name in outer
        for operation in program.computations[name]
        if _is_skip(operation, SLICE)
        for part in operation.parts
    ] or outer  # a stage that never idles, on slices of one length, has no skip
    found = [(0, 0)]
    for body in bodies:
        loops = [loop for loop in _loops(program, body) if f"/{CONTEXT}/" in loop.source]
        outside = _work(program, body, but=loops).kernels
        turns = sum(work_of(program, loop.body).kernels for loop in loops)
        found.append((round(outside / num_layers), round(turns / num_layers)))
    return max(found)


def _work(program: Program, computation: str, but: list[Operation]) -> Work:
    left_out = {operation.name for operation in but}
    return work_of(program, computation, lambda operation: operation.name not in left_out)


def _loops(program: Program, name: str) -> Iterator[Operation]:
    """Yields the loops of a computation and of all that it runs."""
    for operation in program.computations[name]:
        if operation.opcode == "while":
            yield operation
            yield from _loops(program, operation.body)
        elif operation.opcode in ("conditional", "call"):
            for called in operation.called:
                yield from _loops(program, called)


def _is_skip(operation: Operation, scope: str) -> bool:
    """Whether this is the conditional or the loop by which work of this name is skipped."""
    return bool(operation.parts) and operation.source.endswith(
        (f"/{scope}/cond", f"/{scope}/while")
    )


def _exchanges(work: Work) -> Exchanges:
    return {kind: (n, work.exchanged_bytes[kind]) for kind, n in sorted(work.exchanges.items())}
