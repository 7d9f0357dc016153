"""Reads the text of a compiled program, XLA's HLO: its computations and their operations."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"^ +(?:ROOT )?%?([\w.-]+) = ")
_OPCODE = re.compile(r" ?([\w-]+)\(")
_NAME = re.compile(r"%([\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_BRANCHES = re.compile(r"\b(?:branch|true|false)_computations?=(?:\{([^}]*)\}|%?([\w.-]+))")
_CALLED = re.compile(
    r"\b(?:branch_computations|called_computations|calls|to_apply|body|condition"
    r"|(?:true|false)_computation)=(?:\{([^}]*)\}|%?([\w.-]+))"
)
_BITS = re.compile(r"[a-z]+(\d+)")


class Operation(NamedTuple):
    """One operation of a computation."""

    name: str
    shape: str
    """Format and size of the result with its layout; of all results, in parentheses, if there are
    several."""
    opcode: str
    """Kind of the operation, such as fusion, copy or while."""
    operands: tuple[str, ...]
    """Names of the operations whose results it reads."""
    attributes: str
    """The rest of the line."""

    @property
    def source(self) -> str:
        """What it comes from in the traced function, as far as XLA knows: names and scopes."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def num_bytes(self) -> int:
        """Bytes of all results."""
        return sum(array_bytes(self.shape))

    @property
    def branches(self) -> list[str]:
        """The computations of which a conditional runs one; empty for other operations."""
        return list(_names(_BRANCHES, self.attributes)) if self.opcode == "conditional" else []

    @property
    def called(self) -> list[str]:
        """All computations that it runs, or that describe it, as those of a fusion do."""
        return list(_names(_CALLED, self.attributes))

    @property
    def body(self) -> str:
        """The computation that a loop repeats."""
        found = re.search(r"\bbody=%?([\w.-]+)", self.attributes)
        assert found, f"{self.name} is no loop"
        return found[1]

    @property
    def parts(self) -> list[str]:
        """The computations that a conditional or loop runs; empty for other operations."""
        return [self.body] if self.opcode == "while" else self.branches

    @property
    def num_turns(self) -> int | None:
        """Turns of a loop; None where they are known only when it runs."""
        found = re.search(r'known_trip_count"?:\{"n":"?(\d+)', self.attributes)
        return int(found[1]) if found else None


class Program(NamedTuple):
    """A compiled program."""

    computations: dict[str, list[Operation]]
    """The operations of each computation, by its name."""
    entry: str
    """The computation that is run."""

    def operations(self) -> Iterator[Operation]:
        """Yields the operations of all computations."""
        for body in self.computations.values():
            yield from body


def read(text: str) -> Program:
    """Reads the text of a compiled program, `compiled.as_text()`."""
    computations: dict[str, list[Operation]] = {}
    entry, own = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            own = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            own = None
        elif own is not None and (operation := _operation(line)):
            own.append(operation)
    assert entry, "this is not the text of a compiled program"
    return Program(computations, entry)


def array_bytes(shape: str) -> list[int]:
    """Returns the bytes of each array in the text of a shape. Tokens have none."""
    return [
        math.prod(map(int, filter(None, dims.split(",")))) * _bits(dtype) // 8
        for dtype, dims in _ARRAY.findall(shape)
    ]


def array_dims(shape: str) -> list[list[int]]:
    """Returns the dimensions of each array in the text of a shape."""
    return [[int(n) for n in dims.split(",") if n] for _, dims in _ARRAY.findall(shape)]


def _operation(line: str) -> Operation | None:
    start = _OPERATION.match(line)
    if not start:
        return None
    end = start.end()
    end = _after_parentheses(line, end) if line.startswith("(", end) else line.find(" ", end)
    opcode = _OPCODE.match(line, end)
    if end < 0 or not opcode:
        return None
    stop = _after_parentheses(line, opcode.end() - 1)
    operands = tuple(_NAME.findall(line[opcode.end() : stop]))
    shape = line[start.end() : end]
    return Operation(start[1], shape, opcode[1], operands, line[stop:])


def _after_parentheses(line: str, start: int) -> int:
    """Returns the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(line)


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    if dtype in ("token", "opaque"):
        return 0
    found = _BITS.match(dtype)
    assert found, f"unknown format {dtype}"
    return int(found[1])


def _names(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    for several, one in pattern.findall(text):
        yield from (name.strip().lstrip("%") for name in (several or one).split(","))
