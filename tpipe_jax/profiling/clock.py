"""How the profiler takes time, and how it prepares what it times."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.stages import Compiled

from tpipe_jax.runtime.jax_options import needed

REPEATS = 10  # for medians
POLL_SECONDS = 0.5  # between two looks at whether the user wants to stop

OnProgress = Callable[[int], None]
"""Called with the number of parts that are done since the last call, which may be 0. It raises an
exception where the user wants to stop."""
Job = Callable[[], Any]


def seconds_of(run: Compiled, *args: Any) -> float:
    """Runs a program, and returns how long that takes."""
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


def agreed(seconds: np.ndarray) -> np.ndarray:
    """Returns the longest times of all processes, since the slowest stage sets the pace."""
    if jax.process_count() == 1:
        return seconds
    return multihost_utils.process_allgather(seconds).max(0)


def at_usual_speed(rounds: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Returns the median seconds of each measurement, from its seconds in each round.

    All measurements take turns in a round. If most of them took longer in a round than they usually
    do, so did the machine, and their times are scaled. A measurement may leave later rounds out.
    """
    shapes = [own[0].shape for own in rounds]
    table = np.full((max(map(len, rounds)), sum(math.prod(shape) for shape in shapes)), np.nan)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    for own, shape, end in zip(rounds, shapes, ends, strict=True):
        table[: len(own), end - math.prod(shape) : end] = np.reshape(own, (len(own), -1))
    for _ in range(3):  # until neither the medians nor the speeds change much
        speed = np.nanmedian(table / np.nanmedian(table, 0), 1, keepdims=True)
        table /= np.where(speed > 0, speed, 1)
    medians = np.split(np.nanmedian(table, 0), ends[:-1])
    return [own.reshape(shape) for own, shape in zip(medians, shapes, strict=True)]


def prepared(jobs: Mapping[str, Sequence[Job]], on_progress: OnProgress) -> dict[str, list[Any]]:
    """Returns the results of jobs that compile programs, under the same names. A single process
    works on several jobs at once; several processes take one job after another, since they must
    agree.
    """
    if jax.process_count() > 1:
        return {name: [_done(job, on_progress) for job in own] for name, own in jobs.items()}
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 8))
    futures = {name: [pool.submit(needed()(job)) for job in own] for name, own in jobs.items()}
    pending = {future for own in futures.values() for future in own}
    try:
        while pending:
            done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                future.result()  # raises what the job has raised
            on_progress(len(done))
    finally:  # after an exception, what has begun goes on without anyone waiting for it
        pool.shutdown(wait=False, cancel_futures=True)
    return {name: [future.result() for future in own] for name, own in futures.items()}


def _done(job: Job, on_progress: OnProgress) -> Any:
    result = job()
    on_progress(1)
    return result
