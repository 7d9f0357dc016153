"""Finds the exchanges between devices in a compiled program, and those that would make it hang.

Stages take different branches, but within a stage all devices of 'model' take the same branch. So a
collective inside a branch must stay within one stage: any other would wait for devices that never
come. The same holds for loops of one turn or none, by which they skip work (`skips`). What all
devices take or skip together (`Skips.run_on_all_if`) may have any collective.
GSPMD inserts collectives where operators are divided in ways that don't fit together, so every
program is checked before it runs.
"""

import math
import re
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled, Wrapped

from tpipe_jax.devices.hlo import Operation, read
from tpipe_jax.devices.scopes import ON_ALL, PUT, SLICE
from tpipe_jax.errors import Infeasible

KINDS = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "send",
    "recv",
)
_IN_BRANCHES = ("all-reduce",)
# XLA divides an all-reduce on TPUs, and sums of norms with it: the same devices take part.
_IN_BRANCHES_ON_TPUS = ("all-reduce", "reduce-scatter", "all-gather")
_TAKEN_BY_SOME = f"/{SLICE}/while", f"/{PUT}/while"
_TAKEN_BY_ALL = re.compile(rf"/{ON_ALL}/cond$")
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS_GROUPS = re.compile(
    r"replica_groups=mesh\[([^]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)


class Collective(NamedTuple):
    """An exchange between devices in a compiled program."""

    kind: str
    """XLA's name for it: all-reduce, collective-permute and so on."""
    name: str
    """The operation of the program that it comes from, as far as XLA knows."""
    groups: tuple[tuple[int, ...], ...]
    """Groups of devices that exchange with each other, as positions in the mesh, counted along its
    axes; for a collective-permute, pairs of sender and receiver. Empty if XLA does not say, or
    means all devices."""
    in_branch: bool
    """Whether it is in a branch that only some devices may take."""

    def stays_within(self, group_size: int) -> bool:
        """Whether devices exchange only within blocks of `group_size` neighbouring devices."""
        return bool(self.groups) and all(
            len({position // group_size for position in group}) == 1 for group in self.groups
        )


def find_collectives(text: str) -> list[Collective]:
    """Returns all collectives in the text of a compiled program, `compiled.as_text()`, in order."""
    program = read(text)
    called = {
        name: {other for operation in body for other in operation.called}
        for name, body in program.computations.items()
    }
    reached: set[str] = set()
    new = {
        branch
        for operation in program.operations()
        if not _TAKEN_BY_ALL.search(operation.source)
        for branch in operation.branches
    } | {
        operation.body
        for operation in program.operations()
        if operation.opcode == "while" and operation.source.endswith(_TAKEN_BY_SOME)
    }
    while new:
        reached |= new
        new = set().union(*(called.get(name, set()) for name in new)) - reached
    return [
        Collective(
            kind, operation.source or operation.name, _groups(operation.attributes), name in reached
        )
        for name, body in program.computations.items()
        for operation in body
        if (kind := collective_kind(operation))
    ]


def collective_kind(operation: Operation) -> str | None:
    """Returns the kind of collective that an operation is or starts; None if it is none."""
    kind = operation.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def exchanges_nothing(operation: Operation) -> bool:
    """Whether each device is alone in its group of a collective, along an axis of one device."""
    groups = _groups(operation.attributes)
    return bool(groups) and all(len(group) == 1 for group in groups)


def compile_checked(function: Wrapped, mesh: Mesh, *args: Any) -> Compiled:
    """Compiles a function for these arguments. Raises `Infeasible` as `check_branches` does."""
    compiled = function.lower(*args).compile()
    check_branches(find_collectives(compiled.as_text() or ""), mesh)
    return compiled


def check_branches(collectives: list[Collective], mesh: Mesh) -> None:
    """Raises `Infeasible` if a branch has a collective that some of its devices may not reach. Only
    an all-reduce within a stage is accepted in a branch, and on TPUs the two halves of one.
    """
    size, platform = mesh.shape["model"], mesh.devices.flat[0].platform
    allowed = _IN_BRANCHES_ON_TPUS if platform == "tpu" else _IN_BRANCHES
    for collective in collectives:
        is_allowed = collective.kind in allowed and collective.stays_within(size)
        if collective.in_branch and not is_allowed:
            raise Infeasible(
                f"with config.mesh.model={size}, XLA has put a collective ({collective.kind} for "
                f"{collective.name}) where not all devices come to it, and the step would hang: "
                "choose another config.mesh.model or another version of jax."
            )


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Reads the groups of a collective. XLA writes them as lists, as rows of a transposed range, or
    as axes of its own mesh.
    """
    if listed := _LISTED_GROUPS.search(attributes):
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return tuple(tuple(map(int, group.split(","))) for group in groups)
    if iota := _IOTA_GROUPS.search(attributes):
        shape, dims, order = map(_numbers, iota.groups())
        return _rows(_transposed_range(dims, order).reshape(shape))
    if found := _AXIS_GROUPS.search(attributes):
        axes, dims, order, chosen = found.groups()
        sizes = dict(re.findall(r"('\w+')=(\d+)", axes))
        shape = [int(size) for size in sizes.values()]
        numbers = _transposed_range(_numbers(dims) or shape, _numbers(order)).reshape(shape)
        grouped = [list(sizes).index(name) for name in chosen.split(",") if name in sizes]
        if len(grouped) != len(chosen.split(",")):
            return ()  # parts of axes
        numbers = np.moveaxis(numbers, grouped, range(-len(grouped), 0))
        return _rows(numbers.reshape(-1, math.prod(shape[n] for n in grouped)))
    return ()


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []


def _transposed_range(dims: list[int], order: list[int]) -> np.ndarray:
    return np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims)))


def _rows(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, groups.tolist()))
