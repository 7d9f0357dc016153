"""How fast the slicer proves its plans, for the settings of the TeraPipe paper.

    python bench/slicer.py

Each setting is planned in a process of its own on one core, in units of 8 tokens, with an analytic
latency model of a V100 cluster (the functions below say what it is). `solves` counts the dynamic
programmes, `search` their time with everything the search does besides, `gap` is what the best of
all uniform batch and token slices takes longer than the plan, `peak` the memory of the process.
"""

import math
import multiprocessing
import os
import platform
import resource
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from tpipe_jax.latency import LatencyTable
from tpipe_jax.plan import PlanRequest
from tpipe_jax.planner import Planning, find_plan

UNIT_TOKENS = 8

# A layer of GPT3-1B on a V100 takes 1.45 ms for up to 256 tokens and 2.7 ms for 1024, as read off
# the paper's figure 3: a floor, and then 40 TFLOP/s. NVLink and network as the hardware has them,
# at half their peak.
FLOOR_SECONDS, FLOPS_PER_SECOND = 1.45e-3, 40e12
NVLINK_BYTES_PER_SECOND, NETWORK_BYTES_PER_SECOND = 75e9, 1.5e9


class Setting(NamedTuple):
    """A row of the paper's table 1, or of its longer sequences."""

    name: str
    num_layers: int
    d_model: int
    seq_len: int
    batch_size: int
    """Of one data shard."""
    num_stages: int
    num_operators: int
    """Devices that share each operator."""


SETTINGS = [
    Setting("1  GPT3-1B", 24, 2048, 2048, 16, 24, 1),
    Setting("2  GPT3-1B", 24, 2048, 2048, 36, 12, 8),
    Setting("3  GPT3-1B", 24, 2048, 2048, 72, 24, 8),
    Setting("4  GPT3-13B", 40, 5120, 2048, 16, 20, 8),
    Setting("5  GPT3-13B", 40, 5120, 2048, 32, 40, 8),
    Setting("6  GPT3-44B", 96, 6144, 2048, 2, 96, 1),
    Setting("7  GPT3-44B", 96, 6144, 2048, 4, 24, 8),
    Setting("8  GPT3-44B", 96, 6144, 2048, 8, 48, 8),
    Setting("9  GPT3-175B", 96, 12288, 2048, 2, 96, 4),
    Setting("10 GPT3-175B", 96, 12288, 2048, 2, 48, 8),
    Setting("5  4096 tokens", 40, 5120, 4096, 8, 40, 8),
    Setting("5  6144 tokens", 40, 5120, 6144, 4, 40, 8),
    Setting("5  8192 tokens", 40, 5120, 8192, 2, 40, 8),
]


def main() -> None:
    print(f"{platform.machine()}, numpy {np.__version__}, one core")
    print(f"{'':16}{'units':>6}{'batch':>6}{'stages':>7}  solves  search   peak", end="")
    print(f"{'step':>10}{'unsliced':>10}{'uniform':>10}{'gap':>8}  proven")
    context = multiprocessing.get_context("spawn")
    for setting in SETTINGS:
        with ProcessPoolExecutor(1, context) as pool:
            planning, peak_bytes = pool.submit(plan, setting).result()
        report(setting, planning, peak_bytes)


def plan(setting: Setting) -> tuple[Planning, int]:
    """Plans on one core; returns the memory that took, too."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    request = PlanRequest(setting.num_stages, setting.batch_size, setting.seq_len)
    planning = find_plan(latencies(setting), request, [1.0] * setting.num_stages)
    return planning, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def latencies(setting: Setting) -> LatencyTable:
    """Seconds of a stage for every slice, its transfer included."""
    D, num_units = setting.d_model, setting.seq_len // UNIT_TOKENS
    b = np.arange(1, setting.batch_size + 1)[:, None, None]
    i = np.arange(1, num_units + 1)[None, :, None]
    j = np.arange(num_units)[None, None, :]
    rows, tokens, context = b, i * UNIT_TOKENS, j * UNIT_TOKENS
    pairs = tokens * context + tokens * (tokens + 1) / 2
    flops = rows * (24 * tokens * D * D + 4 * D * pairs) / setting.num_operators
    compute = np.maximum(flops / FLOPS_PER_SECOND, FLOOR_SECONDS)
    result_bytes = 2 * rows * tokens * D
    if setting.num_operators > 1:
        compute = compute + 2 * result_bytes / NVLINK_BYTES_PER_SECOND
    layers = math.ceil(setting.num_layers / setting.num_stages)
    transfer = result_bytes / NETWORK_BYTES_PER_SECOND
    possible = i + j <= num_units
    forward, backward = (
        np.where(possible, layers * factor * compute + transfer, np.inf) for factor in (1, 2)
    )
    return LatencyTable(UNIT_TOKENS, forward, backward)


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
