"""The tables of bench/gpu.py."""

import math
import statistics
from dataclasses import dataclass, field

import jax
from jax.stages import Compiled

from tpipe_jax.config.settings import Config, ScheduleName
from tpipe_jax.model.flops import step_flops
from tpipe_jax.model.transformer import num_params
from tpipe_jax.training.memory import GIB

AIMS = {8: 0.9, 16: 0.8}  # of the unsliced speed, for 2 x 8192 tokens, by slices
Trace = dict[str, tuple[int, float]]
"""Number and seconds of the kernels of each kind."""


@dataclass
class Program:
    """A training step and what came of it."""

    name: str
    num_slices: int
    is_deferred: bool = False
    batch_slices: int = 1
    schedule: ScheduleName = "terapipe"
    step: Compiled | None = None
    num_bytes: int = 0
    failure: str = ""
    """Why there is no time."""
    times: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name}, {self.slices} slices"

    @property
    def slices(self) -> str:
        """Of each batch slice."""
        more = [" defer"] if self.is_deferred else []
        more += [f" {self.schedule}"] if self.batch_slices > 1 else []
        return f"{self.num_slices}{''.join(more)}"

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


def report(config: Config, programs: list[Program], rate: float, peer: dict | None) -> None:
    """The table of one sequence length, and what it says of the aims."""
    tokens, flops = config.train.batch_size * config.model.seq_len, step_flops(config)
    print(f"\n{config.train.batch_size} x {config.model.seq_len} tokens")
    print(
        f"{'attention, saved':20} {'slices':>10} {'step ms':>9} {'tokens/s':>9} {'TFLOP/s':>8} "
        f"{'MFU':>6} {'of whole':>8} {'GiB':>6}"
    )

    def row(name: str, num_slices: str, own: float, of_whole: float, num_bytes: int) -> None:
        print(
            f"{name:20} {num_slices:>10} {1e3 * own:9.2f} {tokens / own:9.0f} "
            f"{flops / own / 1e12:8.4g} {flops / own / rate:6.1%} {of_whole:8.1%} "
            f"{num_bytes / GIB:6.1f}"
        )

    timed = [p for p in programs if p.step]
    whole = {(p.name, p.schedule): p.seconds for p in timed if p.num_slices == 1}
    for program in programs:
        if program.step:
            own = program.seconds
            of_whole = whole.get((program.name, program.schedule), math.nan) / own
            row(program.name, program.slices, own, of_whole, program.num_bytes)
        else:
            print(f"{program.name:20} {program.slices:>10} {program.failure}")
    if peer:
        expected = num_params(config.model)
        assert peer["num_params"] == expected, f"{peer['num_params']} parameters, not {expected}"
        row(f"PyTorch {peer['torch']}", "1", peer["seconds"], 1, peer["peak_bytes"])
    if whole:
        best = min(whole.values())
        print(f"unsliced, at best: MFU {flops / best / rate:.1%} (aim: 72%)", end="")
        print(f", {peer['seconds'] / best:.2f} of PyTorch's speed (aim: 1)" if peer else "")
        for number, aim in sorted(AIMS.items()):
            if sliced := [p.seconds for p in timed if p.num_slices == number]:
                kept = best / min(sliced)
                print(
                    f"{number} slices, at best: {kept:.1%} of the unsliced speed (aim: {aim:.0%})"
                )
    statistics = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        peak = statistics["peak_bytes_in_use"] / GIB
        print(f"at most {peak:.1f} GiB have been in use, of all programs so far", flush=True)


def report_traces(traces: dict[str, Trace]) -> None:
    """Kernels of traced steps by kind."""
    if not traces:
        return
    print(f"\n{'kernels of a traced step':26}", *(f"{name:>28}" for name in traces))
    for kind in dict.fromkeys(kind for trace in traces.values() for kind in trace):
        cells = (trace.get(kind, (0, 0.0)) for trace in traces.values())
        print(f"{kind:26}", *(f"{n:>16} {1e3 * seconds:8.2f} ms" for n, seconds in cells))


def figures(
    config: Config,
    programs: list[Program],
    rate: float,
    peer: dict | None,
    traces: dict[str, Trace],
) -> dict:
    """What the table of one sequence length has, for the file."""
    flops = step_flops(config)

    def row(program: Program) -> dict:
        known = {"name": program.name, "slices": program.slices, "bytes": program.num_bytes}
        if not program.step:
            return known | {"failure": program.failure}
        seconds = program.seconds
        return known | {"seconds": program.times, "median": seconds, "mfu": flops / seconds / rate}

    return {
        "batch_size": config.train.batch_size,
        "seq_len": config.model.seq_len,
        "programs": [row(program) for program in programs],
        "pytorch": peer,
        "traces": traces,
    }
