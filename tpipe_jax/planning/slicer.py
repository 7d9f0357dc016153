"""The slicer: finds the provably fastest slicing of a batch from the time of every possible slice.

With all forward passes before all backward passes, a step on P equal stages takes (Li et al. 2021,
equation 5, once for each direction)

    sum_i (f_i + b_i)  +  (P - 1) (max_i f_i + max_i b_i)

over its slices i: the work, and the wait while the pipeline fills and drains. Cap the slowest
forward slice at F and the slowest backward slice at G. Under the caps, dynamic programming finds
the least work (their algorithm 1), over the tokens of a sequence and then over the sequences of the
batch. Branch and bound searches the two caps. The least work under wide caps is a lower bound of
the work under all narrower ones. So one solution rules out whole rectangles of caps, and none is
skipped.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ROUNDING = 1e-12  # relative change of a sum when its terms change order
MOST_SOLVES = 20_000  # dynamic programmes after which a search stops, even without a proof
MOST_WORK = 2**32  # times that the dynamic programmes of a search look at, in about half a minute
MOST_FACTORS = 4  # of unequal stages, for which a bound is searched


@dataclass(frozen=True)
class Slicing:
    """A slicing of a batch, and a lower bound for all slicings."""

    batch_slices: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    """The units where the sequences of each batch slice are cut, from 0 to the last."""
    seconds: float
    lower_bound_seconds: float
    """No slicing is faster than this."""
    num_solves: int

    @property
    def is_optimal(self) -> bool:
        return self.lower_bound_seconds >= self.seconds * (1 - ROUNDING)


def fastest_slicing(
    forward: np.ndarray,
    backward: np.ndarray,
    batch_size: int,
    stage_factors: Sequence[float],
    *,
    batch_slices: Sequence[int] | None = None,
    num_chunks: int = 1,
    max_solves: int | None = None,
) -> Slicing | None:
    """Plans batch slices and the token slices of each batch slice jointly, for the least step time.

    Args:
        forward: seconds `[b - 1, stop, start]` of the slice from unit `start` to unit `stop` of `b`
            sequences, infinite where it is not allowed; shape `[B, U + 1, U + 1]`.
        backward: the same for its backward pass.
        batch_size: sequences to divide into batch slices of at most B.
        stage_factors: the time of each stage, divided by the times given. With unequal factors a
            the formula is max(a) sum(f + b) + (sum(a) - max(a)) (max f + max b). The true time is
            never above this, and may be below.
        batch_slices: the sizes to keep to, or None to choose them.
        num_chunks: chunks of each stage. While the pipeline fills and drains, stages wait for
            passes through one chunk.
        max_solves: dynamic programmes after which the search stops, even without a proof; as many
            as `MOST_SOLVES` and `MOST_WORK` allow if left out.

    Returns:
        The slicing, or None where no allowed slices cover the batch.
    """
    times = _Times(np.stack([forward, backward]), batch_size, batch_slices)
    max_solves = max_solves or min(MOST_SOLVES, max(1, MOST_WORK // max(1, times.size)))
    slowest = max(stage_factors)
    weights = slowest, (sum(stage_factors) - slowest) / num_chunks
    best, lower_bound, num_solves = _search(times, weights, max_solves)
    if best is None:
        return None
    if min(stage_factors) < slowest:
        # The formula is no lower bound then. For each factor, a lower bound is the time if the
        # stages that take at least that factor took just that, and all others took no time.
        bounds = []
        factors = sorted(set(stage_factors))
        for factor in factors[:: -(-len(factors) // MOST_FACTORS)]:  # each gives a bound
            num_stages = sum(a >= factor for a in stage_factors)
            _, bound, more = _search(
                times, (factor, factor * (num_stages - 1) / num_chunks), max_solves
            )
            bounds.append(bound)
            num_solves += more
        lower_bound = max(bounds)
    seconds = best.seconds(weights)
    return Slicing(best.batch_slices, best.cuts, seconds, lower_bound, num_solves)


def least_longest(
    times: np.ndarray, batch_size: int, batch_slices: Sequence[int] | None = None
) -> float:
    """Returns the minimum over all slicings of the time of their longest slice.

    `times` has the form of `forward` in `fastest_slicing`; it may hold other figures than times.
    """
    return _Times(np.stack([times, times]), batch_size, batch_slices).least_longest()[0]


def least_work(
    forward: np.ndarray,
    backward: np.ndarray,
    batch_size: int,
    batch_slices: Sequence[int] | None = None,
) -> float:
    """Returns the shortest time that all slices of a slicing can take together, from times as in
    `fastest_slicing`; infinite where no slicing covers the batch.
    """
    times = _Times(np.stack([forward, backward]), batch_size, batch_slices)
    solution = times.least_work((np.inf, np.inf))
    return solution.work if solution else np.inf


class _Solution(NamedTuple):
    """The slicing of least work under a pair of caps."""

    work: float
    longest: tuple[float, float]
    """The longest forward and the longest backward time of a slice."""
    batch_slices: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]

    def seconds(self, weights: tuple[float, float]) -> float:
        return weights[0] * self.work + weights[1] * sum(self.longest)


class _Times:
    """The times of all slices, forward and backward, and the dynamic programmes over them."""

    def __init__(
        self, times: np.ndarray, batch_size: int, batch_slices: Sequence[int] | None
    ) -> None:
        sizes = range(1, times.shape[1] + 1)
        if batch_slices is not None:  # only times of these are looked at
            sizes = [b for b in sorted(set(batch_slices)) if b in sizes]
            times = times[:, [b - 1 for b in sizes]]
        self._index = {b: index for index, b in enumerate(sizes)}
        self._times = np.where(np.isfinite(times).all(0), times, np.inf)
        self._work = self._times.sum(0)
        self._batch_size, self._batch_slices = batch_size, batch_slices

    @property
    def size(self) -> int:
        """The number of times that a dynamic programme looks at, and of its steps over sequences,
        which take as long as a hundred.
        """
        return self._work.size + 100 * self._batch_size * (self._batch_slices is None)

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns all distinct forward and all distinct backward times, ascending."""
        forward, backward = (np.unique(t[np.isfinite(t)]) for t in self._times)
        return forward, backward

    def least_work(self, caps: tuple[float, float]) -> _Solution | None:
        """Returns the slicing of least work among those whose slices keep to both caps."""
        within = (self._times[0] <= caps[0]) & (self._times[1] <= caps[1])
        work, starts = _over_tokens(np.where(within, self._work, np.inf), np.add)
        total, batch_slices = self._over_batch(work, np.add)
        if not np.isfinite(total):
            return None
        cuts = {b: _trace(starts[self._index[b]]) for b in set(batch_slices)}
        slices = [
            (self._index[b], stop, start)
            for b in cuts
            for start, stop in itertools.pairwise(cuts[b])
        ]
        forward, backward = (max(float(t[s]) for s in slices) for t in self._times)
        return _Solution(
            total, (forward, backward), batch_slices, tuple(cuts[b] for b in batch_slices)
        )

    def least_longest(self) -> tuple[float, float]:
        """Returns the minimum of the function `least_longest`, for forward and backward times."""
        forward, backward = (
            self._over_batch(_over_tokens(t, np.maximum)[0], np.maximum)[0] for t in self._times
        )
        return forward, backward

    def _over_batch(self, cost: np.ndarray, join: np.ufunc) -> tuple[float, tuple[int, ...]]:
        """Returns the least joint cost of batch slices, and these batch slices.

        A batch slice of b sequences costs `cost[self._index[b]]`.
        """
        if self._batch_slices is not None:
            sizes = tuple(self._batch_slices)
            costs = [cost[self._index[b]] if b in self._index else np.inf for b in sizes]
            return float(join.reduce(costs)), sizes
        best, last = np.zeros(self._batch_size + 1), [0] * (self._batch_size + 1)
        for size in range(1, self._batch_size + 1):
            num_options = min(size, len(cost))
            joint = join(best[size - num_options : size][::-1], cost[:num_options])
            last[size] = 1 + int(joint.argmin())
            best[size] = joint[last[size] - 1]
        sizes, left = [], self._batch_size
        while left:
            sizes.append(last[left])
            left -= last[left]
        return float(best[-1]), tuple(sorted(sizes, reverse=True))


def _over_tokens(cost: np.ndarray, join: np.ufunc) -> tuple[np.ndarray, np.ndarray]:
    """Runs algorithm 1 (see above) for all numbers of sequences b at once.

    Returns the least joint cost `[B]` of slices that cover the sequence, and `[B, U + 1]`: where
    the last slice of the best slicing up to each unit starts.
    """
    B, num_cuts, _ = cost.shape
    best, starts = np.full((B, num_cuts), np.inf), np.zeros((B, num_cuts), np.int64)
    best[:, 0] = 0
    rows = np.arange(B)
    for stop in range(1, num_cuts):
        joint = join(best[:, :stop], cost[:, stop, :stop])
        start = joint.argmin(1)
        best[:, stop], starts[:, stop] = joint[rows, start], start
    return best[:, -1], starts


def _trace(starts: np.ndarray) -> tuple[int, ...]:
    """Returns the cuts of the best slicing, traced back from the end of the sequence."""
    cuts = [len(starts) - 1]
    while cuts[-1]:
        cuts.append(int(starts[cuts[-1]]))
    return tuple(reversed(cuts))


Rectangle = tuple[range, range]  # slicings, by the ranks of their longest forward and backward time


def _search(
    times: _Times, weights: tuple[float, float], max_solves: int
) -> tuple[_Solution | None, float, int]:
    """Minimises `_Solution.seconds`. Returns the best, a lower bound of all, and the solves."""
    lowest = times.least_longest()
    if not np.isfinite(lowest).all():
        return None, np.inf, 0
    levels = times.levels()
    best, best_seconds, num_solves = None, np.inf, 0
    first, second = (
        range(int(np.searchsorted(values, low)), len(values))
        for values, low in zip(levels, lowest, strict=True)
    )
    order = itertools.count()  # decides between equal bounds
    open_rectangles = [(0.0, next(order), (first, second))]
    while open_rectangles and num_solves < max_solves:
        if open_rectangles[0][0] >= best_seconds * (1 - ROUNDING):
            break
        _, _, rectangle = heapq.heappop(open_rectangles)
        solution = times.least_work((levels[0][rectangle[0][-1]], levels[1][rectangle[1][-1]]))
        num_solves += 1
        if solution is None:
            continue
        if solution.seconds(weights) < best_seconds:
            best, best_seconds = solution, solution.seconds(weights)
        for part in _undecided(rectangle, solution, levels):
            wait = levels[0][part[0][0]] + levels[1][part[1][0]]
            bound = weights[0] * solution.work + weights[1] * wait
            if bound < best_seconds:
                heapq.heappush(open_rectangles, (bound, next(order), part))
    bound = open_rectangles[0][0] if open_rectangles else np.inf
    return best, float(min(best_seconds, bound)), num_solves


def _undecided(
    rectangle: Rectangle, solution: _Solution, levels: tuple[np.ndarray, np.ndarray]
) -> Iterator[Rectangle]:
    """Yields the parts of a rectangle that may hold a faster slicing than the solution at its top.

    No slicing in the rectangle has less work than the solution. So in a faster one the longest
    forward or the longest backward time is shorter. Both parts are halved, so that the lower half
    soon gets a closer bound.
    """
    (f, b), (forward, backward) = (
        rectangle,
        (
            int(np.searchsorted(values, longest))
            for values, longest in zip(levels, solution.longest, strict=True)
        ),
    )
    shorter_f, rest_f = range(f.start, min(f.stop, forward)), range(max(f.start, forward), f.stop)
    for part in ((shorter_f, b), (rest_f, range(b.start, min(b.stop, backward)))):
        if part[0] and part[1]:
            yield from _halves(part, levels)


def _halves(rectangle: Rectangle, levels: tuple[np.ndarray, np.ndarray]) -> Iterator[Rectangle]:
    """Yields the halves of a rectangle, cut in the middle of its wider side, or the point it is."""
    widths = [
        values[ranks[-1]] - values[ranks[0]]
        for values, ranks in zip(levels, rectangle, strict=True)
    ]
    axis = int(widths[1] > widths[0])
    ranks, values = rectangle[axis], levels[axis]
    if len(ranks) == 1:
        yield rectangle
        return
    middle = values[ranks[0]] + widths[axis] / 2
    cut = max(1, int(np.searchsorted(values[ranks.start : ranks.stop - 1], middle)))
    for half in (ranks[:cut], ranks[cut:]):
        yield (half, rectangle[1]) if axis == 0 else (rectangle[0], half)
