"""Step time with and without pipeline and token slices, on two processes of one core each.

    python bench/pipeline.py
    python bench/pipeline.py --seq-len=4096 --slices=uniform:1 --slices=uniform:8 --slices=auto
    python bench/pipeline.py --batch-size=2 --batch-slices=2 --slices=uniform:4 --layouts
    python bench/pipeline.py --slices=uniform:8 --remat=none --remat=full --deferred
    python bench/pipeline.py --batch-size=4 --batch-slices=4 --slices=uniform:4 --schedule=1f1b
    python bench/pipeline.py --cases 1x512 1x1024 4x1024

One run times whole training steps (loss, gradients, AdamW) of one model on one core without
pipeline and slices, and on two stages with each slicing; with --layouts also on two data shards and
on two devices that share each operator, unsliced; with --schedule also on two stages under another
schedule, and with --remat and --deferred with other policies of config.memory, for each slicing.
The programs take turns, and the figures are medians over the rounds, so that a machine whose speed
drifts disturbs all of them alike. Programs are compiled one after another, once, which is what
`compile` says.
Efficiency is T1 / (P T2). Its bound is the share of a step in which stages work: S / (S + P - 1)
with S slices on P stages, v S instead of S with v chunks a stage. One core without slices cannot
beat it unless slices make the work itself cheaper. For slices `auto` the stages are profiled before
the rounds, and all predicted step times are shown next to the measured ones.

With --cases, sequences x tokens, each compares an ordinary microbatch pipeline, one sequence at a
time and unsliced, with the automatic plan, and is added to `bench/results/pipeline.json`.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import results
from tpipe_jax.config.settings import (
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
)
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.settings import read_settings, settled

NUM_STAGES = 2
CASES = ("1x512", "1x1024", "1x2048", "1x4096", "1x8192", "2x1024", "4x1024", "8x1024")
TWO_STAGES = MeshConfig(pipe=NUM_STAGES)


def main() -> None:
    args = parse_args()
    if args.process_id is None:
        sys.exit(measure_cases(args) if args.cases else start_workers(sys.argv[1:]))
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[args.process_id]})
    from tpipe_jax.devices.startup import prepare_cpu

    prepare_cpu(1)
    work(args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--batch-slices", type=int, default=1, help="of all slices but auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layouts", action="store_true", help="time data=2 and model=2 as well")
    parser.add_argument("--schedule", action="append", default=[], help="one to time as well")
    parser.add_argument("--remat", action="append", default=[], help="a policy to time as well")
    parser.add_argument("--deferred", action="store_true", help="defer weight gradients as well")
    parser.add_argument(
        "--slices",
        action="append",
        help="token slices; default uniform:1, 2, 4, 8, 16, 32 and auto",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, help="instead of other slices")
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="for what they give")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--process-id", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    others = args.slices, args.schedule, args.remat, args.deferred, args.layouts
    if args.cases and any(others):
        parser.error("--cases has slices of its own: leave --slices and what is timed as well away")
    if args.layouts and args.batch_size % 2:
        parser.error("--layouts needs an even --batch-size, half of it for each data shard")
    args.slices = args.slices or [*(f"uniform:{n}" for n in (1, 2, 4, 8, 16, 32)), "auto"]
    return args


def measure_cases(args: argparse.Namespace) -> int:
    """Runs each case, adds what it gave to the results; returns the first exit status but 0."""
    for case in args.cases:
        batch_size, seq_len = case.split("x")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            command = [f"--batch-size={batch_size}", f"--seq-len={seq_len}", f"--json={path}"]
            command += [f"--batch-slices={batch_size}", "--slices=uniform:1", "--slices=auto"]
            if status := start_workers([*command, f"--rounds={args.rounds}"]):
                return status
            rows = json.loads(path.read_text())
        figures = {case: {"rounds": args.rounds, "programs": rows}}
        results.add("pipeline", "cases", figures, CASES, args.folder)
        draw(results.picture("pipeline", args.folder), results.load("pipeline", args.folder))
    return 0


def draw(path: Path, content: dict[str, Any]) -> None:
    """How fast each of the two cores works, compared with one core alone."""
    cases = content["cases"]
    _, *names = next(iter(cases.values()))["programs"]
    labels = dict(zip(names, ("whole sequences", "token slices"), strict=True))
    programs = [case["programs"] for case in cases.values()]
    series = {
        f"{label}, {how}": [100 * own[name][figure] for own in programs]
        for name, label in labels.items()
        for figure, how in (("bound", "computed bound"), ("efficiency", "measured"))
    }
    title = "measured: training steps of 8 layers of width 512, two stages on two cores"
    groups = [f"{case.replace('x', ' x ')}\ntokens" for case in cases]
    label = "speed of each core [% of one core alone]"
    colours = "0.75", "0.5", "lightskyblue", "tab:blue"
    results.draw_bars(path, groups, series, label, title, colours, decimals=0)


def start_workers(options: list[str]) -> int:
    """Runs this file once for each stage; returns the largest exit status."""
    if len(os.sched_getaffinity(0)) < NUM_STAGES:
        print(f"error: this needs {NUM_STAGES} cores.", file=sys.stderr)
        return 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, *options, f"--port={port}"]
    workers = [subprocess.Popen([*command, f"--process-id={i}"]) for i in range(NUM_STAGES)]
    return max(abs(worker.wait()) for worker in workers)


def work(args: argparse.Namespace) -> None:
    import jax
    from jax.experimental import multihost_utils

    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"127.0.0.1:{args.port}", NUM_STAGES, args.process_id)
    is_first = args.process_id == 0
    plans = make_plans(args)
    # In turns: process 0 alone on one core, then both together with each slicing.
    whole = Plan(1, (args.batch_size,), ((args.seq_len,),))
    programs = {"one core, no pipeline": Program(args, MeshConfig(), whole)}
    for slices, plan in plans.items():
        programs[f"two stages, {slices}"] = Program(args, TWO_STAGES, plan)
        for name in args.schedule:
            num_chunks = 2 if name == "interleaved" else 1
            other = replace(plan, schedule=name, num_chunks=num_chunks, prediction=None)
            programs[f"two stages, {slices}, {name}"] = Program(args, TWO_STAGES, other)
        for name, memory in policies(args).items():
            programs[f"two stages, {slices}, {name}"] = Program(args, TWO_STAGES, plan, memory)
    if args.layouts:
        halves = Plan(1, (args.batch_size // 2,), ((args.seq_len,),))
        programs["two data shards"] = Program(args, MeshConfig(data=2), halves)
        programs["two devices an operator"] = Program(args, MeshConfig(model=2), whole)

    # Who waits for the first exchange gives up after half a minute, and a step may take longer.
    multihost_utils.sync_global_devices("compiled")
    if not is_first:  # which has compiled it only to be as late as process 0 for what follows
        del programs["one core, no pipeline"]
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(args.rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program.run()
            if turn > 0:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    if is_first:
        report(args, programs, seconds)


def policies(args: argparse.Namespace) -> dict[str, MemoryConfig]:
    """What is timed beside the default."""
    deferred = {"deferred": MemoryConfig(defer_weight_grads=True)} if args.deferred else {}
    return {remat: MemoryConfig(remat=remat) for remat in args.remat} | deferred


def make_config(args: argparse.Namespace, mesh: MeshConfig, slices: str = "auto") -> Config:
    batch_slices = "auto" if slices == "auto" else f"uniform:{args.batch_slices}"
    return Config(
        model=ModelConfig(args.num_layers, args.d_model, args.num_heads, seq_len=args.seq_len),
        mesh=mesh,
        plan=PlanConfig(slices, batch_slices),
        train=TrainConfig(batch_size=args.batch_size),
    )


def make_plans(args: argparse.Namespace) -> dict[str, Plan]:
    """The plan of each slicing; with predictions, if one of them has to be measured for."""
    plans: dict[str, Any] = {
        slices: read_settings(make_config(args, TWO_STAGES, slices)) for slices in args.slices
    }
    if "auto" not in plans:
        return plans
    import jax

    from tpipe_jax.devices.mesh import make_mesh
    from tpipe_jax.pipeline.spec import make_spec
    from tpipe_jax.planning.planner import find_plan
    from tpipe_jax.planning.settings import work_factors
    from tpipe_jax.profiling.measured_plan import plan_slices
    from tpipe_jax.reporting.console import Console

    config, start = make_config(args, TWO_STAGES), time.perf_counter()
    mesh, request = make_mesh(config.mesh, jax.devices()), plans["auto"]
    with tempfile.TemporaryDirectory() as workdir:
        quiet = Console(is_quiet=True)
        table, planning = plan_slices(make_spec(config, mesh), request, Path(workdir), quiet)
    if args.process_id == 0 and table.profile:
        forward, backward = (100 * abs(m.relative_errors()) for m in table.profile.models())
        print(
            f"profiled in {time.perf_counter() - start:.0f} s; error on slices kept out of the "
            f"fit, median and largest: forward {statistics.median(forward):.1f}% and "
            f"{max(forward):.1f}%, backward {statistics.median(backward):.1f}% and "
            f"{max(backward):.1f}%"
        )
        print(f"auto: batch slices {planning.plan.batch_slices}, {planning.plan.token_slices[0]}")

    def with_prediction(plan: Plan) -> Plan:
        fixed = replace(
            request,
            batch_slices=plan.batch_slices,
            token_slices=plan.token_slices[0],
            schedule=plan.schedule,
        )
        return find_plan(table, fixed, work_factors(config)).plan

    return {
        slices: planning.plan if slices == "auto" else with_prediction(plan)
        for slices, plan in plans.items()
    }


class Program:
    """A compiled training step and its plan."""

    def __init__(
        self,
        args: argparse.Namespace,
        mesh_config: MeshConfig,
        plan: Plan,
        memory: MemoryConfig = MemoryConfig(),  # noqa: B008 - it is frozen
    ) -> None:
        import jax
        import numpy as np

        from tpipe_jax.devices.mesh import make_mesh, put_rows
        from tpipe_jax.pipeline.spec import make_spec
        from tpipe_jax.planning.schedule import make_schedule
        from tpipe_jax.training.optimizer import make_optimizer
        from tpipe_jax.training.state import init_state
        from tpipe_jax.training.step import make_train_step

        config = settled(replace(make_config(args, mesh_config), memory=memory), plan)
        devices = jax.devices() if config.mesh.num_devices > 1 else jax.local_devices()
        mesh = make_mesh(config.mesh, devices)
        self.plan = plan
        spec, optimizer = make_spec(config, mesh), make_optimizer(config)
        self._state = init_state(spec, optimizer)
        shape = args.batch_size, args.seq_len + 1
        rows = np.random.default_rng(0).integers(0, 256, shape).astype(np.int32)
        self._rows = put_rows(mesh, rows)
        step = make_train_step(spec, make_schedule(plan), optimizer)
        start = time.perf_counter()
        self._step = step.lower(self._state, self._rows).compile()
        self.compile_seconds = time.perf_counter() - start

    def run(self) -> None:
        """One training step, to its end."""
        import jax

        self._state, values = self._step(self._state, self._rows)
        jax.block_until_ready((self._state, values))


def busy_share(plan: Plan) -> float:
    """The share of a step in which stages work, for equal slices; if backward passes leave out the
    gradients of weights, these, what is left and a forward pass are taken to be as long.
    """
    num_slices = sum(map(len, plan.token_slices))
    num_parts = 3 if plan.schedule == "1f1b-deferred" else plan.num_chunks
    return num_parts * num_slices / (num_parts * num_slices + plan.num_stages - 1)


def report(args: argparse.Namespace, programs: dict[str, Program], seconds) -> None:
    import jax

    print(
        f"{args.num_layers} layers, d_model {args.d_model}, {args.batch_size} x {args.seq_len} "
        f"tokens, float32, {args.rounds} rounds, jax {jax.__version__}, {platform.machine()}"
    )
    print(
        f"{'':40} {'compile':>8} {'median':>8} {'min':>8} {'max':>8}  speed-up  efficiency / bound"
    )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    one_core, first, *_ = medians.values()
    rows = {}
    for name, times in seconds.items():
        plan, prediction = programs[name].plan, programs[name].plan.prediction
        figures = {"median": medians[name], "least": min(times), "most": max(times)}
        row = f"{name:40} {programs[name].compile_seconds:7.1f}s"
        row += "".join(f" {value:7.3f}s" for value in figures.values())
        if times is not seconds["one core, no pipeline"]:
            efficiency, bound = one_core / (2 * medians[name]), busy_share(plan)
            row += f"  {first / medians[name]:7.2f}x  {efficiency:.2f} / {bound:.2f}"
            row += f" = {efficiency / bound:.2f}"
            figures |= {"speedup": first / medians[name], "efficiency": efficiency, "bound": bound}
            figures |= {"schedule": plan.schedule, "num_chunks": plan.num_chunks}
            figures |= {"batch_slices": plan.batch_slices, "token_slices": plan.token_slices}
        if prediction:
            error = prediction.step_seconds / medians[name] - 1
            row += f"  predicted {prediction.step_seconds:.3f}s, {error:+.1%}"
            figures |= {"predicted": prediction.step_seconds}
        print(row)
        rows[name] = figures
    print("speed-up is over the first slicing of two stages", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
