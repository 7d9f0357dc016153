"""The slicer against brute force, and on the cases where the original goes wrong."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import terapipe
from tpipe_jax.planning.simulate import simulate
from tpipe_jax.planning.slicer import Slicing, fastest_slicing

Costs = tuple[float, float, float]  # work, longest forward, longest backward


def compositions(total: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write `total` as a sum, as the cuts from 0 to `total`."""
    for inner in itertools.product([False, True], repeat=total - 1):
        yield (0, *(n for n, is_cut in enumerate(inner, 1) if is_cut), total)


def partitions(total: int, largest: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as a sum of parts up to `largest`, descending."""
    if total == 0:
        yield ()
    for part in range(min(total, largest), 0, -1):
        for rest in partitions(total - part, part):
            yield part, *rest


def undominated(costs: set[Costs]) -> set[Costs]:
    """Without those that another one is no worse than in all three."""
    kept: list[Costs] = []
    for cost in sorted(costs):  # ascending in work
        if not any(k[1] <= cost[1] and k[2] <= cost[2] for k in kept):
            kept.append(cost)
    return set(kept)


def brute_force(
    forward: np.ndarray,
    backward: np.ndarray,
    options: Iterable[tuple[int, ...]],
    num_stages: int,
) -> float:
    """The least time over these batch slices and all token slices of each of them."""
    num_sizes, num_cuts, _ = forward.shape
    of_size = {}
    for b in range(1, num_sizes + 1):
        costs = set()
        for cuts in compositions(num_cuts - 1):
            f, g = (
                [t[b - 1, stop, start] for start, stop in itertools.pairwise(cuts)]
                for t in (forward, backward)
            )
            if np.isfinite(f + g).all():
                costs.add((sum(f) + sum(g), max(f), max(g)))
        of_size[b] = undominated(costs)
    best = np.inf
    for sizes in options:
        joint = {(0.0, 0.0, 0.0)}
        for b in sizes:
            joint = undominated(
                {
                    (w1 + w2, max(f1, f2), max(g1, g2))
                    for (w1, f1, g1), (w2, f2, g2) in itertools.product(joint, of_size[b])
                }
            )
        for work, f, g in joint:
            best = min(best, work + (num_stages - 1) * (f + g))
    return best


def recompute(
    slicing: Slicing, forward: np.ndarray, backward: np.ndarray, num_stages: int
) -> float:
    """The time of the slices that were returned, by the formula."""
    f, g = (
        [
            t[b - 1, stop, start]
            for b, cuts in zip(slicing.batch_slices, slicing.cuts, strict=True)
            for start, stop in itertools.pairwise(cuts)
        ]
        for t in (forward, backward)
    )
    return sum(f) + sum(g) + (num_stages - 1) * (max(f) + max(g))


@st.composite
def grids(draw: st.DrawFn, max_units: int, max_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Forward and backward times: smooth, noisy, of few levels or of any, and partly impossible."""
    num_units, num_sizes = draw(st.integers(1, max_units)), draw(st.integers(1, max_size))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    b = np.arange(1, num_sizes + 1)[:, None, None]
    stop, start = np.arange(num_units + 1)[:, None], np.arange(num_units + 1)[None, :]
    length = stop - start
    shape = (num_sizes, num_units + 1, num_units + 1)
    kind = draw(st.sampled_from(["smooth", "noisy", "levels", "any"]))
    if kind == "any":
        times = random.uniform(0, 1, (2, *shape))
    elif kind == "levels":
        times = random.integers(0, 4, (2, *shape)).astype(float)
    else:
        floor = draw(st.floats(0, 5))
        smooth = np.maximum(b * length * (1 + 0.1 * start), floor) + draw(st.floats(0, 1))
        times = np.stack([smooth, draw(st.floats(0.5, 3)) * smooth])
        if kind == "noisy":
            times = times * random.uniform(0.7, 1.3, times.shape)
    share = draw(st.sampled_from([0.0, 0.0, 0.3, 0.7]))
    times[:, random.uniform(size=shape) < share] = np.inf
    times[:, np.broadcast_to(length <= 0, shape)] = np.inf
    return times[0], times[1]


def check(times: tuple[np.ndarray, np.ndarray], batch_size: int, num_stages: int) -> Slicing | None:
    expected = brute_force(*times, partitions(batch_size, len(times[0])), num_stages)
    slicing = fastest_slicing(*times, batch_size, [1.0] * num_stages)
    if slicing is None:
        assert expected == np.inf
        return None
    assert slicing.is_optimal
    assert slicing.seconds == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert recompute(slicing, *times, num_stages) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert sum(slicing.batch_slices) == batch_size
    assert all((cuts[0], cuts[-1]) == (0, times[0].shape[1] - 1) for cuts in slicing.cuts)
    return slicing


@settings(max_examples=300)
@given(grids(max_units=7, max_size=4), st.integers(1, 4), st.integers(1, 8))
def test_as_fast_as_the_fastest_of_all_slicings(
    times: tuple[np.ndarray, np.ndarray], batch_size: int, num_stages: int
):
    check(times, batch_size, num_stages)


@settings(max_examples=60)
@given(grids(max_units=12, max_size=4), st.integers(1, 4), st.integers(1, 8))
def test_as_fast_as_the_fastest_of_longer_sequences(
    times: tuple[np.ndarray, np.ndarray], batch_size: int, num_stages: int
):
    check(times, batch_size, num_stages)


def one_sequence(times: dict[tuple[int, int], float], num_units: int) -> np.ndarray:
    grid = np.full((1, num_units + 1, num_units + 1), np.inf)
    for (start, stop), seconds in times.items():
        grid[0, stop, start] = seconds
    return grid


def test_thresholds_that_nearly_coincide_are_told_apart():
    """The original keeps the smaller of two close thresholds, which no slicing keeps to: 19.0."""
    forward = one_sequence({(0, 1): 1.0, (1, 2): 1.000005, (0, 2): 1.9}, 2)
    slicing = fastest_slicing(forward, np.where(forward < 2, 0.0, np.inf), 1, [1.0] * 10)
    assert slicing is not None
    assert slicing.seconds == pytest.approx(11.00005, rel=1e-12)
    assert slicing.cuts == ((0, 1, 2),)


def test_batch_slices_have_times_and_token_slices_of_their_own():
    """The original reads the time of several sequences at the wrong index and cuts all alike.

    Two sequences together are fastest whole, one alone is fastest in two. With 3 sequences and 2
    stages: 2 + (1 + 1) of work, and the longest of 2 once more.
    """
    one = one_sequence({(0, 1): 1.0, (1, 2): 1.0, (0, 2): 3.0}, 2)
    two = one_sequence({(0, 1): 2.0, (1, 2): 2.0, (0, 2): 2.0}, 2)
    forward = np.concatenate([one, two])
    slicing = fastest_slicing(forward, np.where(np.isfinite(forward), 0.0, np.inf), 3, [1.0, 1.0])
    assert slicing is not None
    assert slicing.batch_slices == (2, 1)
    assert slicing.cuts == ((0, 2), (0, 1, 2))
    assert slicing.seconds == pytest.approx(2 + 1 + 1 + 2)


def test_forward_and_backward_have_a_longest_slice_each():
    """The longest forward and the longest backward time may be of different slices: both count."""
    forward = one_sequence({(0, 1): 3.0, (1, 2): 1.0, (0, 2): 3.5}, 2)
    backward = one_sequence({(0, 1): 1.0, (1, 2): 3.0, (0, 2): 3.0}, 2)
    # Whole: 6.5 of work and 9 times 6.5. Cut: 8 of work and 9 times 3 + 3, and not 9 times 4.
    slicing = fastest_slicing(forward, backward, 1, [1.0] * 10)
    assert slicing is not None
    assert slicing.cuts == ((0, 1, 2),)
    assert slicing.seconds == pytest.approx(8 + 9 * 6)


@given(grids(max_units=6, max_size=4), st.integers(1, 4), st.integers(1, 8), st.data())
def test_given_batch_slices_are_kept(
    times: tuple[np.ndarray, np.ndarray], batch_size: int, num_stages: int, data: st.DataObject
):
    num_sizes = len(times[0])
    sizes = data.draw(st.sampled_from(list(partitions(batch_size, num_sizes))))
    slicing = fastest_slicing(*times, batch_size, [1.0] * num_stages, batch_slices=sizes)
    expected = brute_force(*times, [sizes], num_stages)
    if slicing is None:
        assert expected == np.inf
    else:
        assert slicing.batch_slices == sizes
        assert slicing.seconds == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert recompute(slicing, *times, num_stages) == pytest.approx(expected, rel=1e-12)


factors = st.lists(st.sampled_from([0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=6)


def makespan(
    cuts: Sequence[int], forward: np.ndarray, backward: np.ndarray, stage_factors: Sequence[float]
) -> float:
    f, g = (
        [t[0, stop, start] for start, stop in itertools.pairwise(cuts)] for t in (forward, backward)
    )
    plan = Plan(len(stage_factors), (1,), ((1,) * len(f),))
    return simulate(terapipe(plan), f, g, chunk_factors=stage_factors).step_seconds


@given(grids(max_units=6, max_size=1), factors)
def test_stages_of_unequal_speed(times: tuple[np.ndarray, np.ndarray], stage_factors: list[float]):
    """The formula is least, bounds the true time from above, and the lower bound from below."""
    slicing = fastest_slicing(*times, 1, stage_factors)
    slowest = max(stage_factors)
    formulas, makespans = [], []
    for cuts in compositions(times[0].shape[1] - 1):
        f, g = ([t[0, stop, start] for start, stop in itertools.pairwise(cuts)] for t in times)
        if np.isfinite(f + g).all():
            wait = (sum(stage_factors) - slowest) * (max(f) + max(g))
            formulas.append(slowest * (sum(f) + sum(g)) + wait)
            makespans.append(makespan(cuts, *times, stage_factors))
            assert makespans[-1] <= formulas[-1] * (1 + 1e-12) + 1e-12
    if slicing is None:
        assert not formulas
        return
    assert slicing.seconds == pytest.approx(min(formulas), rel=1e-12, abs=1e-12)
    assert slicing.lower_bound_seconds <= min(makespans) * (1 + 1e-12) + 1e-12
    if len(set(stage_factors)) == 1:
        assert slicing.is_optimal


def test_without_the_time_to_finish_there_is_a_bound_and_no_proof():
    random = np.random.default_rng(0)
    forward = random.uniform(1, 2, (1, 41, 41))
    forward[:, np.triu_indices(41)[0], np.triu_indices(41)[1]] = np.inf
    args = forward, 2 * forward, 1, [1.0] * 20
    finished, stopped = fastest_slicing(*args), fastest_slicing(*args, max_solves=2)
    assert finished is not None
    assert stopped is not None
    assert finished.is_optimal
    assert not stopped.is_optimal
    assert stopped.num_solves == 2
    assert stopped.lower_bound_seconds <= finished.seconds < stopped.seconds


@given(grids(max_units=14, max_size=2), st.integers(1, 3), st.integers(2, 20), st.integers(1, 8))
def test_the_bound_holds_whenever_the_search_stops(
    times: tuple[np.ndarray, np.ndarray], batch_size: int, num_stages: int, max_solves: int
):
    """Against the least time under every pair of thresholds, each solved on its own."""
    slicing = fastest_slicing(*times, batch_size, [1.0] * num_stages, max_solves=max_solves)
    if slicing is None:
        return
    forward, backward = (np.unique(t[np.isfinite(t)]) for t in times)
    finished = fastest_slicing(*times, batch_size, [1.0] * num_stages)
    assert finished is not None
    assert slicing.lower_bound_seconds <= finished.seconds * (1 + 1e-12) + 1e-12
    for f in forward[:: max(1, len(forward) // 12)]:
        for b in backward[:: max(1, len(backward) // 12)]:
            work = least_work(times, batch_size, f, b)
            assert finished.seconds <= (work + (num_stages - 1) * (f + b)) * (1 + 1e-12) + 1e-12


def least_work(
    times: tuple[np.ndarray, np.ndarray], batch_size: int, max_f: float, max_b: float
) -> float:
    """Algorithm 1 of the paper, one value after the other."""
    num_sizes, num_cuts, _ = times[0].shape
    sizes = []
    for forward, backward in zip(*times, strict=True):
        best = [0.0]
        for stop in range(1, num_cuts):
            best.append(
                min(
                    best[start] + forward[stop, start] + backward[stop, start]
                    if forward[stop, start] <= max_f and backward[stop, start] <= max_b
                    else np.inf
                    for start in range(stop)
                )
            )
        sizes.append(best[-1])
    batch = [0.0]
    for n in range(1, batch_size + 1):
        batch.append(min(batch[n - b] + sizes[b - 1] for b in range(1, min(n, num_sizes) + 1)))
    return batch[-1]


def test_paper_setting_9_is_proven_with_few_solves():
    """256 units, batch 2, 96 stages: the search must not walk through all 32 896 thresholds."""
    stop, start = np.arange(257)[:, None], np.arange(257)[None, :]
    length = stop - start
    one = np.where(length > 0, np.maximum(length * (1 + start / 1500), 12) + 2, np.inf)
    forward = np.stack([one, 2 * one])
    slicing = fastest_slicing(forward, 2 * forward, 2, [1.0] * 96)
    assert slicing is not None
    assert slicing.is_optimal
    assert slicing.num_solves < 300


@pytest.mark.parametrize("num_chunks", [1, 2, 5])
def test_stages_of_chunks_wait_for_one_of_them(num_chunks: int):
    """sum(f + b) + (P - 1) / v (max f + max b), against all cuts of six units."""
    P, U = 7, 6
    stop, start = np.ogrid[: U + 1, : U + 1]
    forward = np.where(stop > start, 1.0 + (stop - start) * (1 + 0.1 * start), np.inf)[None]
    backward = 1.5 * forward
    slicing = fastest_slicing(forward, backward, 1, [1.0] * P, num_chunks=num_chunks)
    assert slicing is not None
    seconds = []
    for count in range(U):
        for inner in itertools.combinations(range(1, U), count):
            f = [float(forward[0, b, a]) for a, b in itertools.pairwise((0, *inner, U))]
            seconds.append(2.5 * (sum(f) + (P - 1) / num_chunks * max(f)))
    assert slicing.seconds == pytest.approx(min(seconds))
    assert slicing.is_optimal
