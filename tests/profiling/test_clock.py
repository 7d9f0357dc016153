"""How times are taken from a machine whose speed changes."""

import threading
from collections.abc import Callable

import numpy as np
import pytest

from tpipe_jax.profiling.clock import at_usual_speed, prepared


def test_a_slow_machine_does_not_lengthen_what_is_timed():
    """In more than half of the rounds the machine is 1.5 to 3 times as slow as usual, but never in
    the first round of the last program, which has no other.
    """
    speeds = np.array([1, 1.5, 3, 1, 2, 1, 1.7, 1])
    usual = [np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[10.0, 30.0]]), np.array([[5.0, 7.0]])]
    rounds = [
        [s * own for s in speeds[:count]] for own, count in zip(usual, (8, 8, 1), strict=True)
    ]
    for got, own in zip(at_usual_speed(rounds), usual, strict=True):
        np.testing.assert_allclose(got / got.ravel()[0], own / own.ravel()[0])
    scale = at_usual_speed(rounds)[0][0, 0]
    assert 1 <= scale <= 1.5
    for got, own in zip(at_usual_speed(rounds), usual, strict=True):
        np.testing.assert_allclose(got, scale * own)


def test_noise_of_single_times_is_left_out():
    random = np.random.default_rng(0)
    usual = [np.array([1.0, 2.0]), np.array([4.0, 8.0])]
    rounds = [[own * random.choice([1, 1, 1, 5], 2) for _ in range(9)] for own in usual]
    for got, own in zip(at_usual_speed(rounds), usual, strict=True):
        np.testing.assert_allclose(got, own)


def test_jobs_run_at_once_and_their_results_keep_their_places():
    meeting, done = threading.Barrier(2), []  # each of the first two jobs waits for the other

    def job(result: int) -> Callable[[], int]:
        def work() -> int:
            if result < 2:
                meeting.wait(30)
            return result

        return work

    jobs = {"some": [job(0), job(1)], "none": [], "more": [job(5)]}
    assert prepared(jobs, done.append) == {"some": [0, 1], "none": [], "more": [5]}
    assert sum(done) == 3


def test_what_a_job_raises_ends_all():
    def broken() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        prepared({"jobs": [broken, lambda: 1]}, lambda _: None)
