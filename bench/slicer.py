"""How fast the slicer proves its plans, for the settings of the TeraPipe paper.

    python bench/slicer.py

Each setting is planned in a process of its own on one core, in units of 8 tokens, with an analytic
latency model of a V100 cluster (`bench/v100.py`). `solves` counts the dynamic programmes, `search`
their time with everything the search does besides, `gap` is what the best of all uniform batch and
token slices takes longer than the plan, `peak` the memory of the process.
"""

import multiprocessing
import os
import platform
import resource
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from tpipe_jax.planning.plan import PlanRequest
from tpipe_jax.planning.planner import Planning, find_plan
from v100 import SETTINGS, UNIT_TOKENS, Cluster, Setting, fit, latency_table


def main() -> None:
    print(f"{platform.machine()}, numpy {np.__version__}, one core")
    print(f"{'':16}{'units':>6}{'batch':>6}{'stages':>7}  solves  search   peak", end="")
    print(f"{'step':>10}{'unsliced':>10}{'uniform':>10}{'gap':>8}  proven")
    cluster = fit(SETTINGS)
    context = multiprocessing.get_context("spawn")
    for setting in SETTINGS:
        with ProcessPoolExecutor(1, context) as pool:
            planning, peak_bytes = pool.submit(plan, setting, cluster).result()
        report(setting, planning, peak_bytes)


def plan(setting: Setting, cluster: Cluster) -> tuple[Planning, int]:
    """Plans on one core; returns the memory that took, too."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    shape = setting.num_stages, setting.batch_size, setting.seq_len
    request = PlanRequest(*shape, schedule="terapipe")  # the paper's
    planning = find_plan(latency_table(setting, cluster), request, [1.0] * setting.num_stages)
    return planning, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def report(setting: Setting, planning: Planning, peak_bytes: int) -> None:
    prediction, best, unsliced = planning.plan.prediction, planning.best_uniform, planning.unsliced
    assert prediction
    assert best
    assert unsliced
    print(
        f"{setting.name:16}{setting.seq_len // UNIT_TOKENS:6}{setting.batch_size:6}"
        f"{setting.num_stages:7}{planning.num_solves:8}{planning.search_seconds:7.2f}s"
        f"{peak_bytes / 2**20:6.0f}M{prediction.step_seconds:9.3f}s{unsliced.step_seconds:9.3f}s"
        f"{best.step_seconds:9.3f}s{best.step_seconds / prediction.step_seconds - 1:8.2%}  "
        f"{'yes' if prediction.is_optimal else 'no'}"
    )


if __name__ == "__main__":
    main()
