"""Step time with and without pipeline and token slices, on two processes of one core each.

    python bench/pipeline.py
    python bench/pipeline.py --seq-len=4096 --slices=uniform:1 --slices=uniform:8

One run times whole training steps (loss, gradients, AdamW) of one model on one core without
pipeline and slices, and on two stages with each slicing. The programs take turns, and the figures
are medians over the rounds, so that a machine whose speed drifts disturbs all of them alike.
Efficiency is T1 / (P T2); its bound is S / (S + P - 1) with S slices on P stages, which one core
without slices cannot beat unless slices make the work itself cheaper.
"""

import argparse
import os
import platform
import socket
import statistics
import subprocess
import sys
import time

NUM_STAGES = 2


def main() -> None:
    args = parse_args()
    if args.process_id is None:
        sys.exit(start_workers())
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[args.process_id]})
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
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
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--slices", action="append", help="token slices; default uniform:1 and 288,264,248,224"
    )
    parser.add_argument("--process-id", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.slices = args.slices or ["uniform:1", "288,264,248,224"]
    return args


def start_workers() -> int:
    """Runs this file once for each stage; returns the largest exit status."""
    if len(os.sched_getaffinity(0)) < NUM_STAGES:
        print(f"error: this needs {NUM_STAGES} cores.", file=sys.stderr)
        return 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *sys.argv, f"--port={port}"]
    workers = [subprocess.Popen([*command, f"--process-id={i}"]) for i in range(NUM_STAGES)]
    return max(abs(worker.wait()) for worker in workers)


def work(args: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"127.0.0.1:{args.port}", NUM_STAGES, args.process_id)
    is_first = args.process_id == 0
    # In turns: process 0 alone on one core, then both together with each slicing.
    programs = {}
    if is_first:
        programs["one core, no pipeline"] = make_program(args, jax.local_devices(), "uniform:1")
    for slices in args.slices:
        programs[f"two stages, {slices}"] = make_program(args, jax.devices(), slices)

    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(args.rounds + 1):
        for name, run in programs.items():
            start = time.perf_counter()
            run()
            if turn > 0:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    if is_first:
        report(args, seconds)


def make_program(args: argparse.Namespace, devices, slices: str):
    """A function that runs one training step and waits for it."""
    import jax
    import numpy as np

    from tpipe_jax.config import Config, MeshConfig, ModelConfig, PlanConfig, TrainConfig
    from tpipe_jax.mesh import make_mesh, put_rows
    from tpipe_jax.optim import make_optimizer
    from tpipe_jax.plan import make_plan
    from tpipe_jax.schedule import terapipe
    from tpipe_jax.train_state import init_state
    from tpipe_jax.train_step import make_train_step

    config = Config(
        model=ModelConfig(args.num_layers, args.d_model, args.num_heads, seq_len=args.seq_len),
        mesh=MeshConfig(pipe=len(devices)),
        plan=PlanConfig(token_slices=slices),
        train=TrainConfig(batch_size=args.batch_size),
    )
    mesh = make_mesh(config.mesh, devices)
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    state = init_state(config, mesh, optimizer)
    shape = args.batch_size, args.seq_len + 1
    rows = put_rows(mesh, np.random.default_rng(0).integers(0, 256, shape).astype(np.int32))
    schedule = terapipe(make_plan(config))
    step = make_train_step(config, mesh, schedule, optimizer).lower(state, rows).compile()

    def run() -> None:
        nonlocal state
        state, values = step(state, rows)
        jax.block_until_ready((state, values))

    return run


def report(args: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    import jax

    from tpipe_jax.plan import parse_slices

    print(
        f"{args.num_layers} layers, d_model {args.d_model}, {args.batch_size} x {args.seq_len} "
        f"tokens, float32, {args.rounds} rounds, jax {jax.__version__}, {platform.machine()}"
    )
    print(f"{'':40} {'median':>8} {'min':>8} {'max':>8}  speed-up  efficiency / bound")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    names = list(medians)
    for name, times in seconds.items():
        row = f"{name:40} {medians[name]:7.3f}s {min(times):7.3f}s {max(times):7.3f}s"
        if name != names[0]:
            slices = name.removeprefix("two stages, ")
            num_slices = len(parse_slices(slices, args.seq_len, "--slices", "--seq-len"))
            efficiency = medians[names[0]] / (NUM_STAGES * medians[name])
            bound = num_slices / (num_slices + NUM_STAGES - 1)
            row += f"  {medians[names[1]] / medians[name]:7.2f}x  {efficiency:.2f} / {bound:.2f}"
            row += f" = {efficiency / bound:.2f}"
        print(row)
    print("speed-up is over the first slicing of two stages")


if __name__ == "__main__":
    main()
