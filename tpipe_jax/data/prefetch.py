"""Reads batches ahead, so that training need not wait and hears early of one that is unreadable."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice

from jax import Array

NUM_BATCHES = 8  # read or being read when one is taken
NUM_READ = 6  # how many of these are surely read by then, however short a step is
PACE_SECONDS = 0.5  # before each batch left after a failure: jax takes a second to spread a notice


class Prefetcher:
    """Batches `first`, `first` + 1, ... below `stop`, read one after another in a thread.

    If a batch cannot be read, `on_failure` is called once, while the batches before it are still to
    be taken.
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
        """Returns the next batch. Raises the error with which reading it failed."""
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
        """Raises the error of the first batch that could not be read, if there is one."""
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
