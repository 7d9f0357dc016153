"""How long a part of a compiled program for a GPU should take, read off its text (Williams et al.
2009).

Each kernel takes the longer of two times: its operations at the rate of large products, and its
bytes at the bandwidth of the memory. To these come a time for each kernel, and a longer one for
each loop or conditional whose course the host has to ask for. Exchanges between devices take their
bytes at the bandwidth of the link, and a latency. Values that come back from the host's memory are
on their way while a layer works, as XLA orders them; values that go there come after all work.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

from tpipe_jax.devices.exchanges import collective_kind, exchanges_nothing
from tpipe_jax.devices.hlo import Operation, Program, array_bytes, array_dims
from tpipe_jax.devices.scopes import CONTEXT
from tpipe_jax.devices.speeds import Link, Speed
from tpipe_jax.devices.work import starts_nothing

_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)"?([\d",]*)')
ON_HOST = "S(5)"  # in the layout of an array in the memory of the host
SCALAR_BYTES = 8
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


class Seen(NamedTuple):
    """What the queries of a slice see."""

    num_rows: int
    num_tokens: int
    """Tokens of the slice."""
    context: float
    """Tokens before it."""
    group: int
    """Keys that a turn of a loop over the context reads, at most."""

    @property
    def turns(self) -> int:
        """Turns of a loop over the context."""
        return -(-int(self.context) // self.group)


@dataclass(frozen=True)
class Cost:
    """Seconds of a part of a program, by the kind of work, and its numbers of kernels and of
    questions to the host.
    """

    products: float = 0.0
    attention: float = 0.0
    other: float = 0.0
    exchanges: float = 0.0
    kernels: float = 0.0
    questions: float = 0.0
    from_host: float = 0.0
    to_host: float = 0.0

    def __add__(self, more: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(more, f.name) for f in fields(Cost)))

    def times(self, number: float) -> "Cost":
        """Returns the cost of doing it several times."""
        return Cost(*(number * getattr(self, f.name) for f in fields(Cost)))

    def seconds(self, speed: Speed) -> float:
        """Returns the time that all of it takes."""
        work = self.products + self.attention + self.other + self.exchanges
        starts = speed.kernel_seconds * self.kernels + speed.question_seconds * self.questions
        return max(work + starts, self.from_host) + self.to_host


@dataclass(frozen=True)
class Roofline:
    """A program, and the GPU that is to run it."""

    program: Program
    speed: Speed
    link: Link
    """Between devices that share operators."""
    seen: Seen

    def cost(self, computation: str, but: frozenset[str] = frozenset()) -> Cost:
        """Returns the cost of a computation and of all that it runs, except for operations with the
        names in `but`. A conditional counts as its larger branch.
        """
        total = Cost()
        own = {operation.name: operation for operation in self.program.computations[computation]}
        for operation in own.values():
            if operation.name not in but:
                total += self._cost_of(operation, own)
        return total

    def _cost_of(self, operation: Operation, own: dict[str, Operation]) -> Cost:
        if operation.opcode == "while":
            known = operation.num_turns
            turns = self._turns(operation) if known is None else known
            asked = Cost(questions=turns + 1) if known is None else Cost()
            return self.cost(operation.body).times(turns) + asked
        if operation.opcode == "conditional":
            branches = [self.cost(branch) for branch in operation.branches]
            return max(branches, key=lambda c: c.seconds(self.speed)) + Cost(questions=1)
        if operation.opcode == "call":
            return sum((self.cost(called) for called in operation.called), Cost())
        if starts_nothing(operation):
            return Cost()
        if operation.opcode.endswith("-start") and ON_HOST in operation.shape:
            return self._host_transfer(operation)
        if (kind := collective_kind(operation)) and not exchanges_nothing(operation):
            return self._exchange(kind, operation)
        if operation.opcode == "custom-call":
            return self._custom_call(operation, own)
        return self._kernel(operation, own)

    def _turns(self, loop: Operation) -> float:
        """Returns the turns of a loop that are known only when it runs: over the context of the
        slice, or one.
        """
        if f"/{CONTEXT}/" in loop.source or loop.source.endswith(f"/{CONTEXT}"):
            return self.seen.turns
        return 1.0

    def _exchange(self, kind: str, operation: Operation) -> Cost:
        num_bytes = max(array_bytes(operation.shape), default=0)
        # An all-reduce sends and receives everything about twice, in a ring.
        share = 2.0 if kind == "all-reduce" else 1.0
        seconds = share * num_bytes / self.link.bytes_per_second + self.link.latency_seconds
        return Cost(exchanges=seconds, kernels=1)

    def _host_transfer(self, operation: Operation) -> Cost:
        """Returns the cost to read or write a slice of a buffer in the host's memory. The slice is
        the smallest array of the operation.
        """
        sizes = [n for n in array_bytes(operation.shape) if n > SCALAR_BYTES]
        num_bytes = min(sizes, default=0)
        seconds = num_bytes / self.speed.pcie_bytes_per_second
        is_write = "update" in operation.name
        return Cost(
            kernels=1, to_host=seconds if is_write else 0, from_host=0 if is_write else seconds
        )

    def _custom_call(self, operation: Operation, own: dict[str, Operation]) -> Cost:
        found = _TARGET.search(operation.attributes)
        target = found[1] if found else ""
        if "flash" in target or "fmha" in target:
            is_backward = "bwd" in target or "ackward" in target
            seconds = self._attention(operation, own, is_backward)
            # FlashAttention prepares its work, and converts its results, in kernels of their own.
            return Cost(attention=seconds, kernels=4 if "flash" in target else 1)
        return self._kernel(operation, own)

    def _attention(
        self, operation: Operation, own: dict[str, Operation], is_backward: bool
    ) -> float:
        """Returns the seconds of a fused attention kernel. Its first array of results is as large
        as the queries; a call whose keys are as many as its queries sees only the slice itself.
        """
        num_queries, context = self.seen.num_tokens, self.seen.context
        size = math.prod(array_dims(operation.shape)[0])
        keys = context + num_queries / 2
        if "fmha" in operation.attributes:
            of_queries, of_keys = (
                array_dims(own[name].shape)[0] for name in operation.operands[:2]
            )
            more = [n for n, m in zip(of_keys, of_queries, strict=True) if n != m]
            keys = context / max(-(-context // more[0]), 1) if more else num_queries / 2
        rate = self.speed.backward_attention if is_backward else self.speed.forward_attention
        products = 10 if is_backward else 4  # operations for each number of a query and each key
        written = (
            _result_bytes(operation) if "fmha" in operation.attributes else operation.num_bytes
        )
        compute = products * size * keys / (rate * self.speed.product_flops)
        return compute + written / self.speed.bytes_per_second

    def _kernel(self, operation: Operation, own: dict[str, Operation]) -> Cost:
        flops, moved = self._work_of(operation, own)
        memory = moved / self.speed.bytes_per_second
        if flops:
            return Cost(products=max(flops / self.speed.product_flops, memory), kernels=1)
        return Cost(other=memory, kernels=1)

    def _work_of(self, operation: Operation, own: dict[str, Operation]) -> tuple[float, float]:
        """Returns the operations of the products in a kernel, and the bytes that it moves."""
        if operation.opcode == "fusion":
            [body] = [self.program.computations[name] for name in operation.called]
            return _of_fusion(body, operation, self._share_of_scatter(body))
        operands = [own[name] for name in operation.operands if name in own]
        if operation.opcode == "dynamic-update-slice":
            return 0, 2 * operands[1].num_bytes
        if operation.opcode == "dynamic-slice":
            return 0, 2 * operation.num_bytes
        moved = sum(operand.num_bytes for operand in operands) + _result_bytes(operation)
        return _product_flops(operation, {other.name: other for other in operands}), moved

    def _share_of_scatter(self, body: list[Operation]) -> float:
        """A scatter into the sums of the context skips what lies beyond the context."""
        scatters = [
            operation
            for operation in body
            if operation.opcode == "scatter" and not operation.shape.startswith("s32")
        ]
        if not scatters:
            return 1.0
        rows = array_dims(scatters[0].shape)[0][0]
        return min(1.0, self.seen.num_rows * self.seen.context / rows)


def _of_fusion(
    body: list[Operation], fusion: Operation, share_of_scatter: float
) -> tuple[float, float]:
    """Returns operations and bytes of a fusion. Slices that it reads or writes in place count, not
    the buffers that they are part of.
    """
    inner = {operation.name: operation for operation in body}
    users: dict[str, list[Operation]] = {}
    for operation in body:
        for name in operation.operands:
            users.setdefault(name, []).append(operation)
    flops = sum(_product_flops(operation, inner) for operation in body)
    updates = [operation for operation in body if operation.opcode == "dynamic-update-slice"]
    moved = float(sum(inner[update.operands[1]].num_bytes for update in updates))
    moved += 0 if updates else fusion.num_bytes
    for operation in body:
        if operation.opcode == "parameter":
            moved += _bytes_read(operation, users)
    return flops, share_of_scatter * moved


def _bytes_read(parameter: Operation, users: dict[str, list[Operation]]) -> int:
    """Returns the bytes that a fusion reads of a parameter: its slices, if nothing else is read.
    Nothing is read of what is only written into.
    """
    num_bytes = 0
    for value, user in _uses(parameter, users):
        if user.opcode == "dynamic-slice" and user.operands[0] == value:
            num_bytes += user.num_bytes
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != value:
            return parameter.num_bytes
    return num_bytes


def _uses(value: Operation, users: dict[str, list[Operation]]) -> Iterator[tuple[str, Operation]]:
    """Yields each use of a value, also after it was only seen in another shape: the name under
    which it is used, and what uses it.
    """
    for user in users.get(value.name, []):
        if user.opcode == "bitcast":
            yield from _uses(user, users)
        else:
            yield value.name, user


def _product_flops(operation: Operation, operands: dict[str, Operation]) -> float:
    """Returns the operations of a product; 0 for anything else."""
    is_library = "gemm" in operation.attributes or "matmul" in operation.attributes
    if operation.opcode != "dot" and not (operation.opcode == "custom-call" and is_library):
        return 0.0
    contracted = _CONTRACTED.search(operation.attributes)
    left = operands.get(operation.operands[0]) if operation.operands else None
    if contracted is None or left is None:
        return 0.0
    dims = array_dims(left.shape)[0]
    axes = [int(n) for n in re.findall(r"\d+", contracted[1])]
    return 2.0 * math.prod(array_dims(operation.shape)[0]) * math.prod(dims[n] for n in axes)


def _result_bytes(operation: Operation) -> int:
    """Returns the bytes of the results without the scratch memory of a library's product."""
    sizes = array_bytes(operation.shape)
    return sizes[0] if operation.opcode == "custom-call" and len(sizes) > 1 else sum(sizes)
