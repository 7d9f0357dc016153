"""A model of the paper's cluster: how long a stage takes for a slice, and a step beside its stages.

Up to 48 hosts of eight V100 (Li et al. 2021, section 4): NVLink inside a host, 25 Gbit/s between
hosts. Operators are divided among neighbours in a host, stages follow one another, data shards come
last. A layer takes, on each of the N devices that share its operators, for n tokens after c others,

    forward   max(FLOOR, W / F, w / HBM)     W = (24 n D^2 + 4 D n (c + (n + 1) / 2)) / N
    backward  max(FLOOR, max(2 W / F, w / HBM) + 4 w / HBM)

with w the bytes of its weights in float16: read in either direction, and backward their gradients
are written, read again, and added to their sums, which are read and written. To these come four
all-reduces of n x D numbers over NVLink where N > 1; a stage receives and sends n x D numbers over
the network in each direction and waits for them; data shards add up float32 gradients over the
network after the last slice. Optimiser, embedding and head are left out.

FLOOR, HBM and the bound of F are published. F and the two bandwidths are fitted to the paper's
*unsliced* times and to nothing else. What cannot be fitted is assumed: that the floor holds for
either direction, that gradients are reduced in float32 (both explain the unsliced times better than
twice the floor and float16), and the four passes over the gradients, which whole sequences hardly
feel and short slices of the largest layers do.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from tpipe_jax.planning.latency import LatencyTable

UNIT_TOKENS = 8
# What a layer of GPT3-1B takes for any slice up to 256 tokens, as read off the paper's figure 3.
FLOOR_SECONDS = 1.45e-3
HBM_BYTES_PER_SECOND = 900e9  # NVIDIA's data sheet
PEAK_FLOPS_PER_SECOND = 112e12  # as the paper's authors count
FORMAT_BYTES, GRADIENT_BYTES = 2, 4
DEVICES_PER_HOST = 8


class Setting(NamedTuple):
    """A row of the paper's table 1, or of its longer sequences."""

    name: str
    num_layers: int
    d_model: int
    seq_len: int
    batch_size: int
    """Of one data shard."""
    num_shards: int
    num_stages: int
    num_operators: int
    """Devices that share each operator."""
    unsliced_seconds: float
    """Of a step as the paper measured it, with whole sequences one by one."""
    sliced_seconds: float
    """With the slices that it found."""
    token_slices: tuple[int, ...] | None = None
    """Which those are, of each sequence, where it says so."""


SETTINGS = [
    Setting("1 GPT3-1B", 24, 2048, 2048, 16, 8, 24, 1, 1.517, 1.254),
    Setting("2 GPT3-1B", 24, 2048, 2048, 36, 2, 12, 8, 1.03, 1.03, (2048,)),
    Setting("3 GPT3-1B", 24, 2048, 2048, 72, 1, 24, 8, 0.913, 0.913, (2048,)),
    Setting("4 GPT3-13B", 40, 5120, 2048, 16, 2, 20, 8, 2.6, 1.9),
    Setting("5 GPT3-13B", 40, 5120, 2048, 32, 1, 40, 8, 1.863, 1.328, (704, 688, 656)),
    Setting("6 GPT3-44B", 96, 6144, 2048, 2, 4, 96, 1, 13.319, 7.103),
    Setting("7 GPT3-44B", 96, 6144, 2048, 4, 2, 24, 8, 4.3, 2.8),
    Setting(
        *("8 GPT3-44B", 96, 6144, 2048, 8, 1, 48, 8, 2.662, 1.111),
        (384, 384, 368, 320, 296, 296),
    ),
    Setting(
        *("9 GPT3-175B", 96, 12288, 2048, 2, 1, 96, 4, 9.990, 1.481),
        (120,) * 4 + (112,) * 6 + (104,) * 8 + (64,),
    ),
    Setting("10 GPT3-175B", 96, 12288, 2048, 2, 1, 48, 8, 5.822, 1.160),
    Setting("5, 4096 tokens", 40, 5120, 4096, 8, 1, 40, 8, 2.526, 0.913),
    Setting("5, 6144 tokens", 40, 5120, 6144, 4, 1, 40, 8, 3.754, 0.756),
    Setting("5, 8192 tokens", 40, 5120, 8192, 2, 1, 40, 8, 4.978, 0.636),
]
# Seconds with so many equal slices, as the paper measured them.
UNIFORM = {
    "8 GPT3-44B": {1: 2.662, 4: 1.241, 8: 1.255, 16: 1.241},
    "9 GPT3-175B": {
        **{1: 9.990, 4: 2.902, 8: 1.892, 16: 1.547},
        **{32: 1.593, 64: 2.227, 128: 3.252},
    },
}


class Cluster(NamedTuple):
    """What is fitted."""

    flops_per_second: float
    """F, of one device."""
    network_bytes_per_second: float
    """Of one host."""
    nvlink_bytes_per_second: float
    """Of one device in an all-reduce."""


def fit(settings: list[Setting]) -> Cluster:
    """The cluster that predicts their unsliced times best: least squares of the log of ratios."""

    def errors(logs: np.ndarray) -> list[float]:
        cluster = Cluster(*np.exp(logs))
        return [
            np.log(step_seconds(s, cluster, (s.seq_len,)) / s.unsliced_seconds) for s in settings
        ]

    start, top = Cluster(50e12, 3e9, 50e9), Cluster(PEAK_FLOPS_PER_SECOND, 1e11, 1e12)
    found = least_squares(errors, np.log(start), bounds=(np.log(1e6), np.log(top)))
    return Cluster(*np.exp(found.x).tolist())


def slice_seconds(
    setting: Setting, cluster: Cluster, rows: Any, tokens: Any, context: Any
) -> tuple[Any, Any]:
    """Seconds of a stage, forward and backward, for `rows` sequences by `tokens`; broadcasts."""
    D, N = setting.d_model, setting.num_operators
    pairs = tokens * (context + (tokens + 1) / 2)
    flops = rows * (24 * tokens * D * D + 4 * D * pairs) / N
    weights = FORMAT_BYTES * 12 * D * D / N / HBM_BYTES_PER_SECOND
    compute = flops / cluster.flops_per_second
    forward = np.maximum(np.maximum(FLOOR_SECONDS, weights), compute)
    backward = np.maximum(FLOOR_SECONDS, np.maximum(2 * compute, weights) + 4 * weights)
    result_bytes = FORMAT_BYTES * rows * tokens * D
    all_reduce = 2 * (N - 1) / N * result_bytes / cluster.nvlink_bytes_per_second
    transfer = result_bytes / cluster.network_bytes_per_second
    layers = setting.num_layers / setting.num_stages
    return tuple(layers * (work + 2 * all_reduce) + transfer for work in (forward, backward))


def reduction_seconds(setting: Setting, cluster: Cluster) -> float:
    """Of the gradients over the data shards, by all stages of a host over its network."""
    params = 12 * setting.d_model**2 * setting.num_layers / setting.num_stages
    num_bytes = GRADIENT_BYTES * params * DEVICES_PER_HOST / setting.num_operators
    share = 2 * (setting.num_shards - 1) / setting.num_shards
    return share * num_bytes / cluster.network_bytes_per_second


def step_seconds(setting: Setting, cluster: Cluster, token_slices: tuple[int, ...]) -> float:
    """Of a step with these slices of each sequence, one sequence after the other (equation 5, with
    a maximum for each direction).
    """
    starts = np.cumsum((0, *token_slices[:-1]))
    times = slice_seconds(setting, cluster, 1, np.array(token_slices), starts)
    stage = setting.batch_size * sum(t.sum() for t in times)
    wait = (setting.num_stages - 1) * sum(t.max() for t in times)
    return float(stage + wait) + reduction_seconds(setting, cluster)


def deferred_seconds(
    setting: Setting, cluster: Cluster, rows: Any, tokens: Any, context: Any
) -> tuple[Any, Any]:
    """Seconds of a stage for a backward pass without gradients of weights, and for these; what a
    layer takes at least is halved between them.
    """
    D, N = setting.d_model, setting.num_operators
    weights = FORMAT_BYTES * 12 * D * D / N / HBM_BYTES_PER_SECOND
    products = rows * 24 * tokens * D * D / N / cluster.flops_per_second
    layers = setting.num_layers / setting.num_stages
    _, whole = slice_seconds(setting, cluster, rows, tokens, context)
    later = layers * np.maximum(FLOOR_SECONDS / 2, products + 4 * weights)
    return np.maximum(whole - later, layers * FLOOR_SECONDS / 2), later


def latency_table(setting: Setting, cluster: Cluster) -> LatencyTable:
    """Seconds of a stage for every slice in whole units, its transfers included."""
    num_units = setting.seq_len // UNIT_TOKENS
    b = np.arange(1, setting.batch_size + 1)[:, None, None]
    i = np.arange(1, num_units + 1)[None, :, None]
    j = np.arange(num_units)[None, None, :]
    slices = setting, cluster, b, i * UNIT_TOKENS, j * UNIT_TOKENS
    forward, backward, inputs, weights = (
        np.where(i + j <= num_units, t, np.inf)
        for t in (*slice_seconds(*slices), *deferred_seconds(*slices))
    )
    return LatencyTable(UNIT_TOKENS, forward, backward, deferred=(inputs, weights))
