"""Chooses which slices to time, as few as the latency model needs. No jax."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class TimedShape(NamedTuple):
    """Slices to time: they have one shape and come after several contexts, in tokens."""

    num_rows: int
    num_tokens: int
    contexts: tuple[int, ...]
    is_test: bool = False

    @property
    def size(self) -> int:
        return self.num_rows * self.num_tokens


def shapes_to_time(batch_size: int, seq_len: int, unit: int, num_stages: int) -> list[TimedShape]:
    """Returns the shapes to time: a whole sequence, slices near a half of it, and ever shorter ones
    by a factor of about four; and the shortest and the longest of several sequences.

    Lengths are odd multiples of the unit, since powers of two are often faster or slower than the
    lengths around them. The whole sequence comes first. One shape or two between those of the grid
    are timed to tell the error of the latency model. Lengths so short that no plan for these stages
    needs them are left out.
    """
    num_units = seq_len // unit
    least = max(1, num_units // max(32, 2 * num_stages))
    units, n = [num_units], num_units // 2
    while n >= 2 * least:
        units.append(n | 1)
        n //= 4
    units.append(least | 1)
    lengths = [unit * n for n in sorted({min(n, num_units) for n in units})]
    root = round(batch_size**0.5)
    sizes = sorted({batch_size, root} - {1}) if batch_size > 4 else [batch_size]
    ends = dict.fromkeys((lengths[0], lengths[-1]))
    shapes = [(1, seq_len), *((1, n) for n in lengths if n != seq_len)]
    shapes += [(b, n) for b in sizes if b > 1 for n in ends]
    middles = [round((a * b) ** 0.5) // unit * unit for a, b in itertools.pairwise(lengths)]
    short = middles[:-1] if len(middles) > 2 else middles  # most plans have short slices
    rows = (1, min(3, batch_size)) if batch_size > 1 else (1,)
    tests = zip(rows, short[::-1], strict=False)
    tests = [(b, n) for b, n in tests if n and (b, n) not in shapes]
    return [TimedShape(b, n, contexts(seq_len, n, unit, (0, 0.5, 1))) for b, n in shapes] + [
        TimedShape(b, n, contexts(seq_len, n, unit, (0, 0.25, 0.75)), is_test=True)
        for b, n in tests
    ]


def contexts(
    seq_len: int, num_tokens: int, unit: int, shares: tuple[float, ...]
) -> tuple[int, ...]:
    """Returns contexts in whole units. Each is one of the shares of the longest context that a
    slice of this length can have.
    """
    return tuple(sorted({int((seq_len - num_tokens) * share / unit) * unit for share in shares}))


def smallest_and_largest(shapes: Sequence[TimedShape]) -> list[TimedShape]:
    """Returns the smallest and the largest shape; one if they are the same."""
    by_size = sorted(shapes, key=lambda shape: shape.size)
    return by_size[:1] + by_size[1:][-1:]
