"""Counts what a part of a compiled program does: kernels, copies, and exchanges between devices.

The counts are read off the text, so nothing has to run. A loop counts as often as it turns, or once
where only a run can tell. A conditional counts as its larger branch. Of the conditionals for slices
of different lengths, one is taken.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tpipe_jax.devices.exchanges import collective_kind, exchanges_nothing
from tpipe_jax.devices.hlo import Operation, Program, array_bytes
from tpipe_jax.devices.scopes import SLICE

# Operations for which a device has nothing to start. The others are one kernel each, or a copy.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "add-dependency",
    "while",
    "conditional",
    "call",
}
_VMEM = "S(1)"  # in the layout of an array in a TPU core's own memory


@dataclass(frozen=True)
class Work:
    """What a device does in a part of a program."""

    kernels: int = 0
    """Operations that it starts, to compute or to exchange."""
    copies: int = 0
    """Arrays that it copies from one place of its memory to another."""
    copied_bytes: int = 0
    exchanges: Counter[str] = field(default_factory=Counter)
    """Number of collectives by kind."""
    exchanged_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes of their results by kind."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.kernels + other.kernels,
            self.copies + other.copies,
            self.copied_bytes + other.copied_bytes,
            self.exchanges + other.exchanges,
            self.exchanged_bytes + other.exchanged_bytes,
        )

    def times(self, number: int) -> "Work":
        """Returns the work done several times."""
        return Work(
            number * self.kernels,
            number * self.copies,
            number * self.copied_bytes,
            Counter({kind: number * n for kind, n in self.exchanges.items()}),
            Counter({kind: number * n for kind, n in self.exchanged_bytes.items()}),
        )

    def or_more(self, other: "Work") -> "Work":
        """Returns the larger of each count."""
        return Work(
            max(self.kernels, other.kernels),
            max(self.copies, other.copies),
            max(self.copied_bytes, other.copied_bytes),
            self.exchanges | other.exchanges,
            self.exchanged_bytes | other.exchanged_bytes,
        )


def work_of(
    program: Program, name: str, is_counted: Callable[[Operation], bool] = lambda _: True
) -> Work:
    """Returns the work of a computation and of all that it runs. Loops and conditionals for which
    `is_counted` is false are left out.
    """
    total, bodies = Work(), []
    for operation in program.computations[name]:
        if operation.parts:
            if not is_counted(operation):
                continue
            choices = [work_of(program, part, is_counted) for part in operation.parts]
            if operation.source.endswith((f"/{SLICE}/cond", f"/{SLICE}/while")):
                bodies.append(choices if operation.opcode == "conditional" else [Work(), *choices])
            elif operation.opcode == "while" and operation.num_turns is not None:
                total += choices[0].times(operation.num_turns)
            else:
                total += _larger(choices)
        elif operation.opcode == "call":
            for called in operation.called:
                total += work_of(program, called, is_counted)
        else:
            total += _own_work(program, name, operation)
    return total + _one_due(bodies)


def _one_due(bodies: list[list[Work]]) -> Work:
    """Returns the most work of conditionals, for slices of different kinds, of which one or none is
    due.
    """
    idle = [min(choices, key=lambda work: work.kernels) for choices in bodies]
    due = [max(choices, key=lambda work: work.kernels) for choices in bodies]
    with_one = [sum([*idle[:n], own, *idle[n + 1 :]], Work()) for n, own in enumerate(due)]
    return _larger([*with_one, sum(idle, Work())])


def _larger(choices: list[Work]) -> Work:
    found = Work()
    for work in choices:
        found = found.or_more(work)
    return found


def starts_nothing(operation: Operation) -> bool:
    """Whether a device has nothing to start for an operation."""
    return operation.opcode in _FREE or operation.opcode.endswith(("-done", "-update"))


def _own_work(program: Program, computation: str, operation: Operation) -> Work:
    if starts_nothing(operation):
        return Work()
    if (kind := collective_kind(operation)) and not exchanges_nothing(operation):
        num_bytes = sum(_results(operation))
        return Work(1, exchanges=Counter({kind: 1}), exchanged_bytes=Counter({kind: num_bytes}))
    if operation.opcode in ("copy", "copy-start"):
        own = {other.name: other for other in program.computations[computation]}
        sources = [own[name] for name in operation.operands if name in own]
        if any(_is_fill(program, source) for source in sources):
            return Work(1)
        # A TPU loads arrays into the memory of its core, where kernels read them.
        is_load = any(_VMEM in shape for shape in [operation.shape, *(s.shape for s in sources)])
        return Work() if is_load else Work(copies=1, copied_bytes=array_bytes(operation.shape)[0])
    if operation.opcode == "fusion":
        work = _fused(program, operation)
        if work and all(inner.opcode == "copy" for inner in work):
            return Work(copies=len(work), copied_bytes=operation.num_bytes)
    return Work(1)


def _is_fill(program: Program, operation: Operation) -> bool:
    """Whether an operation only writes a constant everywhere, as zeros into several buffers."""
    own = _fused(program, operation) if operation.opcode == "fusion" else [operation]
    opcodes = {inner.opcode for inner in own}
    return "broadcast" in opcodes and opcodes <= {"broadcast", "copy"}


def _fused(program: Program, fusion: Operation) -> list[Operation]:
    """Returns the operations of a fusion that do something."""
    [body] = [program.computations[name] for name in fusion.called]
    return [inner for inner in body if inner.opcode not in _FREE]


def _results(operation: Operation) -> list[int]:
    """Returns the bytes of each result of a collective."""
    sizes, num = array_bytes(operation.shape), len(operation.operands)
    # Most that are begun and ended apart have their operands before their results; an all-reduce
    # has them since jax 0.12.
    has_operands = operation.opcode.endswith("-start") and len(sizes) >= 2 * num
    return sizes[num : 2 * num] if has_operands else sizes
