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
    """Returns the shapes to time: lengths near a half, a quarter ... of the sequence, and a few
    numbers of sequences.

    Lengths are odd multiples of the unit, since powers of two are often faster or slower than the
    lengths around them. The whole sequence comes first. Several sequences are timed at three
    lengths. Some shapes between those of the grid are timed to tell the error of the latency model.
    Lengths so short that no plan for these stages needs them are left out.
    """
    num_units = seq_len // unit
    least = num_units // max(32, 2 * num_stages)
    halves = (num_units >> n for n in range(1, num_units.bit_length() + 1))
    units = {min(n | 1, num_units) for n in (num_units - 2, *halves) if n >= least}
    lengths = [n * unit for n in sorted(units)]
    some = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    sizes = [n for n in (2 << k for k in range(0, 32, 2)) if n < batch_size]
    sizes += [batch_size] if batch_size > 1 else []
    between = [(a + b) // 2 // unit * unit for a, b in itertools.pairwise(lengths)][::-1]

    shapes = [(1, seq_len), *((1, n) for n in lengths if n != seq_len)]
    shapes += [(b, n) for b in sizes for n in some]
    tests = zip((1, 3, 6, 4), between, strict=False)
    tests = dict.fromkeys((min(b, batch_size), n) for b, n in tests if n)
    return [TimedShape(b, n, contexts(seq_len, n, unit, (0, 0.5, 1))) for b, n in shapes] + [
        TimedShape(b, n, contexts(seq_len, n, unit, (0, 0.25, 0.75)), is_test=True)
        for b, n in tests
        if (b, n) not in shapes
    ]


def contexts(
    seq_len: int, num_tokens: int, unit: int, shares: tuple[float, ...]
) -> tuple[int, ...]:
    """Returns contexts in whole units. Each is one of the shares of the longest context that a
    slice of this length can have.
    """
    return tuple(sorted({int((seq_len - num_tokens) * share / unit) * unit for share in shares}))


def some_shapes(shapes: Sequence[TimedShape]) -> list[TimedShape]:
    """Returns the smallest shape, one of middle size, and the largest."""
    by_size = sorted(shapes, key=lambda shape: shape.size)
    return [by_size[0], by_size[len(by_size) // 2], by_size[-1]]
