"""Batches read ahead, so that none is waited for, and one that cannot be read is known early."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice

from jax import Array

NUM_BATCHES = 8  # that are read or being read when one is taken
NUM_READ = 6  # of those, that are there for certain, however short a step is
PACE_SECONDS = 0.5  # for each of those left once one has failed: jax takes a second for a notice


class ReadAhead:
    """Batches `first` to `stop`, one after another, read in a thread.

    `on_failure` is called, once, when one cannot be read, while those before it are still to come.
    """

    def __init__(
        self, read: Callable[[int], Array], first: int, stop: int, on_failure: Callable[[], None]
    ) -> None:
        self._read, self._on_failure = read, on_failure
        self._numbers = iter(range(first, stop))
        self._batches: deque[Future[Array]] = deque()
        self._pool = ThreadPoolExecutor(1, "reader")
        self._failure: BaseException | None = None

    def take(self) -> Array:
        """The next batch. Raises what reading it has raised."""
        while self._failure is None and len(self._batches) < NUM_BATCHES:
            number = next(self._numbers, None)
            if number is None:
                break
            self._batches.append(self._pool.submit(self._read_one, number))
        wait(islice(self._batches, NUM_READ))
        if self._failure:
            time.sleep(PACE_SECONDS)
        return self._batches.popleft().result()

    def raise_failure(self) -> None:
        """Raises what reading a batch has raised, if one has failed."""
        if self._failure:
            raise self._failure

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _read_one(self, number: int) -> Array:
        try:
            return self._read(number)
        except BaseException as error:
            if self._failure is None:
                self._failure = error
                self._on_failure()
            raise
