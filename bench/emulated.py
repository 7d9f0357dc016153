"""The executor with the stages of the paper's clusters, on any two cores: it sleeps, not computes.

    python bench/emulated.py
    python bench/emulated.py --settings 9 --tick-ms=50

The program is that of training: tables of the schedule, which `executor.execute` follows, a branch
and a ppermute in each tick. Only the work, which `execute` is given, is another: stages sleep for
the time that the model of the cluster (`bench/v100.py`) gives the slice, so that all overlap as
they would on devices of their own, and nothing is embedded and no loss taken. Measured makespans,
unsliced and with the slices that the planner finds, are compared with the formula that the planner
minimises.

What the executor itself takes for a tick of 40 to 96 stages on two cores counts as well, some
milliseconds, so all times of a plan are slowed down by the factor that makes its mean tick last
100 ms, and what is measured is divided by it. Devices of one process exchange results all at once,
so that a tick lasts as long as its longest slice, which the formula does not know of; the slices
that are planned take nearly the same time each.
Needs a C++ compiler, for `bench/sleep.cc`. Writes
`bench/results/emulated.json` and `docs/emulated.png`.
"""

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

import results
from tpipe_jax.planning.plan import Plan, PlanRequest
from tpipe_jax.planning.planner import find_plan
from tpipe_jax.planning.schedule import make_schedule
from v100 import SETTINGS, Cluster, Setting, fit, latency_table, slice_seconds

Times = dict[tuple[int, int], float]  # seconds of a slice, by its first sequence and token
NAMES = ("5", "8", "9", "10")  # of the paper's settings with most stages


def main() -> None:
    args = parse_args()
    if not shutil.which("c++"):
        sys.exit("error: this needs a C++ compiler, c++.")
    cluster = fit(SETTINGS)
    chosen = {s.name.split()[0]: s for s in SETTINGS if " GPT3" in s.name}
    most = max(chosen[name].num_stages for name in args.settings)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={most}"
    load_sleep()
    print(
        f"{'':14}{'stages':>7}{'items':>7}{'formula':>10}{'measured':>10}{'ratio':>8}"
        f"{'speed-up, formula':>20}{'measured':>10}"
    )
    content = {}
    for name in args.settings:
        setting = chosen[name]
        found = {}
        for label, plan in plans(setting, cluster).items():
            times = slice_times(setting, cluster, plan)
            found[label] = emulate(plan, times, args.tick_ms / 1e3, args.rounds)
        report(setting, found)
        content[setting.name] = found
    order = [chosen[name].name for name in NAMES]
    results.add("emulated", "settings", content, order, args.folder)
    draw(results.picture("emulated", args.folder), results.load("emulated", args.folder))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--tick-ms", type=float, default=100.0, help="slow down to such a mean")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="for the results")
    return parser.parse_args()


def plans(setting: Setting, cluster: Cluster) -> dict[str, Plan]:
    """One sequence after another, whole, and as the planner finds best."""
    shape = setting.num_stages, setting.batch_size, setting.seq_len
    table = latency_table(setting, cluster)
    sliced = find_plan(
        table, PlanRequest(*shape, schedule="terapipe"), [1.0] * setting.num_stages
    ).plan
    whole = ((setting.seq_len,),) * setting.batch_size
    return {
        "unsliced": Plan(setting.num_stages, (1,) * setting.batch_size, whole),
        "sliced": sliced,
    }


def slice_times(setting: Setting, cluster: Cluster, plan: Plan) -> list[Times]:
    """Seconds of a stage for each slice, forward and backward."""
    times: list[Times] = [{}, {}]
    for item in make_schedule(plan).items:
        both = slice_seconds(setting, cluster, item.num_rows, item.num_tokens, item.token)
        for direction, seconds in zip(times, both, strict=True):
            direction[item.row, item.token] = float(seconds)
    return times


def emulate(plan: Plan, times: list[Times], tick_seconds: float, rounds: int) -> dict[str, float]:
    """Seconds of a step by the formula (equation 5, with a maximum for each direction) and as
    measured, both without the slowdown.
    """
    import jax

    formula = sum(sum(t.values()) + (plan.num_stages - 1) * max(t.values()) for t in times)
    num_ticks = 2 * (len(times[0]) + plan.num_stages - 1)
    slowdown = tick_seconds * num_ticks / formula
    run = program(plan, times, slowdown)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append((time.perf_counter() - start) / slowdown)
    return {
        "stages": plan.num_stages,
        "items": len(times[0]),
        "slowdown": slowdown,
        "formula_seconds": formula,
        "measured_seconds": statistics.median(seconds),
        "least_seconds": min(seconds),
        "most_seconds": max(seconds),
    }


def program(plan: Plan, times: list[Times], slowdown: float) -> Callable[[], Any]:
    """The pipeline of a training step, compiled, with stages that sleep for the times of forward
    and backward passes and, if there are three, for gradients of weights; the chunks of a stage
    share them.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, PartitionSpec

    from tpipe_jax.devices.collectives import varying
    from tpipe_jax.devices.inplace import Position
    from tpipe_jax.pipeline.executor import StepWork, execute

    schedule, T = make_schedule(plan), plan.seq_len
    sleep = jax.ffi.ffi_call("sleep", jax.ShapeDtypeStruct((), jnp.float32))

    def asleep(own: Times) -> Callable[[jax.Array, Position], jax.Array]:
        seconds_BT = np.zeros((plan.batch_size, T), np.float32)
        for position, seconds in own.items():
            seconds_BT[position] = slowdown * seconds / plan.num_chunks

        def work(x: jax.Array, at: Position) -> jax.Array:
            duration = jnp.asarray(seconds_BT)[at.batch_row, at.token]
            return x + sleep(x.ravel()[0], duration)

        return work

    forward, backward, *weights = map(asleep, times)

    def backward_pass(saved: Any, chunk: int, d_BLD: jax.Array, at: Position, slept: jax.Array):
        d_BLD = backward(d_BLD, at)
        return d_BLD, slept + d_BLD[0, 0]  # since gradients of weights wait for it

    def step(x_BTD: jax.Array) -> jax.Array:
        work = StepWork(
            embed=lambda row, num_rows: jax.lax.dynamic_slice_in_dim(x_BTD, row, num_rows),
            forward=lambda chunk, x_BLD, at, saved: (forward(x_BLD, at), saved),
            losses=lambda y_BTD, row, sums: (y_BTD, sums),
            backward=backward_pass,
            weights=lambda each, saved, slept: each(
                lambda chunk, shape, at, slept: weights[0](slept, at), slept
            ),
            embed_grads=lambda d_x_BTD, row, sums: sums + d_x_BTD.sum(),
        )
        trunk_RTD = jnp.zeros((schedule.num_rows, T, 1))
        _, slept, sums = execute(schedule, work, trunk_RTD, (), jnp.zeros(1), varying(jnp.zeros(1)))
        return slept + sums

    devices = jax.devices()[: plan.num_stages]
    types = (AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, plan.num_stages, 1), ("data", "pipe", "model"), types, devices=devices)
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(("data", "pipe")),
    )
    x_BTD = jnp.zeros((plan.batch_size, plan.seq_len, 1))
    return partial(jax.jit(mapped).lower(x_BTD).compile(), x_BTD)


@cache
def load_sleep() -> None:
    """Makes `sleep.cc` known to XLA. A callback of Python would take 0.3 ms a stage and tick, one
    stage after another.
    """
    import jax

    source = Path(__file__).with_name("sleep.cc")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "sleep.so"
        command = [
            "c++",
            "-std=c++17",
            "-O2",
            "-shared",
            "-fPIC",
            "-w",
            f"-I{jax.ffi.include_dir()}",
        ]
        subprocess.run([*command, source, "-o", library], check=True)
        handler = ctypes.cdll.LoadLibrary(str(library)).Sleep
    jax.ffi.register_ffi_target("sleep", jax.ffi.pycapsule(handler), platform="cpu")


def report(setting: Setting, found: dict[str, dict[str, float]]) -> None:
    for label, figures in found.items():
        formula, measured = figures["formula_seconds"], figures["measured_seconds"]
        name = setting.name if label == "unsliced" else ""
        row = f"{name:14}{figures['stages']:7}{figures['items']:7}{formula:9.3f}s{measured:9.3f}s"
        row += f"{measured / formula:8.3f}"
        if label == "sliced":
            whole = found["unsliced"]
            row += f"{whole['formula_seconds'] / formula:19.2f}x"
            row += f"{whole['measured_seconds'] / measured:9.2f}x"
        print(row, flush=True)


def draw(path: Path, content: dict[str, Any]) -> None:
    settings = content["settings"]
    series = {
        f"{what}, {how}": [rows[label][f"{kind}_seconds"] for rows in settings.values()]
        for label, what in (("unsliced", "whole sequences"), ("sliced", "token slices"))
        for kind, how in (("formula", "computed"), ("measured", "emulated"))
    }
    groups = [
        f"setting {name.replace(' ', ': ')}\n{rows['sliced']['stages']} stages"
        for name, rows in settings.items()
    ]
    title = "emulated: the real program on two cores, settings of the paper, stages that only wait"
    colours = "0.75", "0.5", "lightskyblue", "tab:blue"
    results.draw_bars(path, groups, series, "time of a step [s]", title, colours)


if __name__ == "__main__":
    main()
