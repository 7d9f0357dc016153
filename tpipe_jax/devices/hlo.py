"""Finds the collectives of a compiled program in its text, and those that would make it hang.

Stages take different branches, but within a stage all devices of 'model' take the same branch. So a
collective inside a branch must stay within one stage: any other would wait for devices that never
come. Branches that all devices take together (`inplace.run_on_all_if`) may have any collective.
GSPMD inserts collectives where operators are divided in ways that don't fit together, so every
program is checked before it runs.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled, Wrapped

from tpipe_jax.devices.inplace import ON_ALL
from tpipe_jax.errors import Infeasible

_KINDS = (
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
_OPERATION = re.compile(rf" ({'|'.join(_KINDS)})(?:-start)?\(")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_BRANCHES = re.compile(r"\b(?:branch|true|false)_computations?=(?:\{([^}]*)\}|%?([\w.-]+))")
_CONDITIONAL = re.compile(r"^ *(?:ROOT )?%?([\w.-]+) = .* conditional\(")
_TAKEN_BY_ALL = re.compile(rf'op_name="[^"]*/{ON_ALL}/cond"')
_CALLED = re.compile(
    r"\b(?:branch_computations|called_computations|calls|to_apply|body|condition"
    r"|(?:true|false)_computation)=(?:\{([^}]*)\}|%?([\w.-]+))"
)
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
    computations = dict(split_computations(text))
    assert computations, "this is not the text of a compiled program"
    called = {name: set(_names(_CALLED, body)) for name, body in computations.items()}
    reached: set[str] = set()
    new = {
        branch
        for body in computations.values()
        for line in body.splitlines()
        if not _TAKEN_BY_ALL.search(line)
        for branch in _names(_BRANCHES, line)
    }
    while new:
        reached |= new
        new = set().union(*(called.get(name, set()) for name in new)) - reached
    return [
        Collective(found[1], _name(line), _groups(line), name in reached)
        for name, body in computations.items()
        for line in body.splitlines()
        if (found := _OPERATION.search(line))
    ]


def compile_checked(function: Wrapped, mesh: Mesh, *args: Any) -> Compiled:
    """Compiles a function for these arguments. Raises `Infeasible` as `check_branches` does."""
    compiled = function.lower(*args).compile()
    check_branches(find_collectives(compiled.as_text() or ""), mesh)
    return compiled


def check_branches(collectives: list[Collective], mesh: Mesh) -> None:
    """Raises `Infeasible` if a branch has a collective that some of its devices may not reach. Only
    an all-reduce within a stage is accepted in a branch.
    """
    size = mesh.shape["model"]
    for collective in collectives:
        is_sum = collective.kind == "all-reduce"
        if collective.in_branch and not (is_sum and collective.stays_within(size)):
            raise Infeasible(
                f"with config.mesh.model={size}, XLA has put a collective ({collective.kind} for "
                f"{collective.name}) where not all devices come to it, and the step would hang: "
                "choose another config.mesh.model or another version of jax."
            )


def split_computations(text: str) -> Iterator[tuple[str, str]]:
    """Yields each computation of a compiled program: its name and the lines of its operations."""
    name, lines = "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, lines = header[1], []
        elif line.startswith("}"):
            yield name, "\n".join(lines)
        else:
            lines.append(line)


def conditionals(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each conditional of a compiled program: its name, and its branches as computations."""
    for line in text.splitlines():
        if (found := _CONDITIONAL.match(line)) and (branches := list(_names(_BRANCHES, line))):
            yield found[1], branches


def _names(pattern: re.Pattern[str], body: str) -> Iterator[str]:
    for several, one in pattern.findall(body):
        yield from (name.strip().lstrip("%") for name in (several or one).split(","))


def _name(line: str) -> str:
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1] if found else line.split("=")[0].strip()


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    """Reads the groups of a collective. XLA writes them as lists, as rows of a transposed range, or
    as axes of its own mesh.
    """
    if listed := _LISTED_GROUPS.search(line):
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return tuple(tuple(map(int, group.split(","))) for group in groups)
    if iota := _IOTA_GROUPS.search(line):
        shape, dims, order = map(_numbers, iota.groups())
        return _rows(_transposed_range(dims, order).reshape(shape))
    if found := _AXIS_GROUPS.search(line):
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
