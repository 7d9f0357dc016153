"""Batches read ahead of a loop."""

import threading
import time
from typing import Any

import pytest

from tpipe_jax.data import prefetch
from tpipe_jax.data.prefetch import NUM_BATCHES, NUM_READ, Prefetcher


def test_batches_come_in_their_order_and_few_are_read_ahead():
    numbers: list[int] = []
    all_read = threading.Event()

    def read(n: int) -> Any:
        numbers.append(n)
        if n == 2 + NUM_BATCHES:
            all_read.set()
        return 10 * n

    batches = Prefetcher(read, 3, 3 + 2 * NUM_BATCHES, lambda: None)
    assert batches.take() == 30
    assert all_read.wait(60)
    assert numbers == list(range(3, 3 + NUM_BATCHES))
    rest = [batches.take() for _ in range(2 * NUM_BATCHES - 1)]
    assert rest == [10 * n for n in range(4, 3 + 2 * NUM_BATCHES)]
    batches.raise_failure()
    batches.close()


def test_a_step_waits_until_those_after_it_are_there():
    numbers: list[int] = []

    def read(n: int) -> Any:
        time.sleep(0.02)
        numbers.append(n)
        return n

    batches = Prefetcher(read, 0, 20, lambda: None)
    for n in range(20):
        batches.take()
        assert len(numbers) >= min(n + NUM_READ, 20)
    batches.close()


def test_one_that_cannot_be_read_is_told_before_it_is_due(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefetch, "PACE_SECONDS", 0)
    told = threading.Event()
    numbers: list[int] = []

    def read(n: int) -> Any:
        numbers.append(n)
        if n >= 3:
            raise ZeroDivisionError(f"batch {n}")
        return n

    batches = Prefetcher(read, 0, 100, told.set)
    assert batches.take() == 0
    assert told.wait(60)
    assert [batches.take(), batches.take()] == [1, 2]
    for call in (batches.take, batches.raise_failure):
        with pytest.raises(ZeroDivisionError, match="batch 3"):
            call()
    batches.close()
    assert len(numbers) <= NUM_BATCHES
