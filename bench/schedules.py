"""Schedules side by side: what they keep, what they take, and whether the planner picks well.

    python bench/schedules.py memory
    python bench/schedules.py cores
    python bench/schedules.py emulated
    python bench/schedules.py choice

`memory` compiles the training step of two stages for 4 to 64 sequences and prints the temporary
bytes of XLA's memory analysis. `cores` times steps of 1, 4 and 16 sequences on two real cores
(`bench/pipeline.py`, all schedules in turns). `emulated` lets 8, 24 and 48 stages sleep through
the planned slices of each schedule (`bench/emulated.py`) and compares with the simulated
makespan. `choice` draws models, meshes and batches, lets the planner choose, and measures what it
chose and what it did not, asleep as well.
Each adds its part to `bench/results/schedules.json`.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results
from emulated import load_sleep, program
from tpipe_jax.config.settings import (
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    ScheduleName,
    TrainConfig,
)
from tpipe_jax.planning.estimator import predicted_timeline
from tpipe_jax.planning.plan import Plan, PlanRequest
from tpipe_jax.planning.planner import find_plan
from tpipe_jax.planning.schedule import SCHEDULES, make_schedule, slice_order
from tpipe_jax.planning.settings import read_settings
from v100 import SETTINGS, fit, latency_table

PARTS = ("memory", "cores", "emulated", "choice")
MOST_STAGES = 48
TICK_SECONDS = 0.1  # of a pass in the mean; the executor itself takes milliseconds


def main() -> None:
    args = parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={MOST_STAGES}"
    measure = {"memory": memory, "cores": cores, "emulated": emulated, "choice": choice}
    for part in args.parts:
        figures = measure[part](args)
        results.add("schedules", "parts", {part: figures}, PARTS, args.folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--batch-size", type=int, nargs="+", help="default 4 8 16 32 64, or 1 4 16")
    parser.add_argument("--stages", type=int, nargs="+", default=[8, 24, 48])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", type=int, default=10, help="that `choice` draws")
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="for the results")
    return parser.parse_args()


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Megabytes of temporaries by schedule and sequences."""
    import jax

    from tpipe_jax.devices.mesh import make_mesh
    from tpipe_jax.pipeline.spec import make_spec
    from tpipe_jax.training.memory import fitting_step
    from tpipe_jax.training.optimizer import make_optimizer

    megabytes: dict[str, dict[int, float]] = {name: {} for name in SCHEDULES}
    batch_sizes = args.batch_size or [4, 8, 16, 32, 64]
    print(f"{'temporaries, MB':16}" + "".join(f"{size:>4} sequences" for size in batch_sizes))
    for name in SCHEDULES:
        for batch_size in batch_sizes:
            config = Config(
                ModelConfig(num_layers=8, d_model=512, num_heads=4, seq_len=1024),
                MeshConfig(pipe=2),
                PlanConfig("uniform:4", "uniform:" + str(batch_size), schedule=name),
                TrainConfig(batch_size=batch_size),
                memory=MemoryConfig(remat="dots", limit_gib=1e3),
            )
            plan = read_settings(config)
            assert isinstance(plan, Plan)
            mesh = make_mesh(config.mesh, jax.devices()[:2])
            optimizer = make_optimizer(config)
            analysis = fitting_step(make_spec(config, mesh), plan, optimizer)[1].memory_analysis()
            assert analysis
            megabytes[name][batch_size] = analysis.temp_size_in_bytes / 1e6
        row = "".join(f"{size:14.1f}" for size in megabytes[name].values())
        print(f"{name:16}{row}", flush=True)
    return {"megabytes": megabytes}


def cores(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of `bench/pipeline.py` by batch."""
    figures = {}
    for batch_size in args.batch_size or [1, 4, 16]:
        others = [name for name in SCHEDULES if name != "terapipe"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            command = [sys.executable, str(Path(__file__).with_name("pipeline.py"))]
            command += ["--seq-len=512", "--slices=uniform:4", f"--rounds={args.rounds}"]
            command += [f"--batch-size={batch_size}", f"--batch-slices={batch_size}"]
            environment = os.environ | {"XLA_FLAGS": ""}
            names = others if batch_size > 1 else ["interleaved"]
            more = [f"--schedule={name}" for name in names]
            subprocess.run([*command, *more, f"--json={path}"], check=True, env=environment)
            figures[batch_size] = json.loads(path.read_text())
    return {"rounds": args.rounds, "programs": figures}


def emulated(args: argparse.Namespace) -> dict[str, Any]:
    """Simulated and measured makespans by stages and schedule, and bubbles."""
    load_sleep()
    print(
        f"{'stages':>6} {'schedule':14}{'slices':>8}{'simulated':>12}{'measured':>10}{'ratio':>8}"
    )
    figures: dict[int, Any] = {}
    for num_stages in args.stages:
        request = request_of(num_stages, 16, 2048)
        figures[num_stages] = {}
        for name, plan in plans_of(request, "8 GPT3-44B").items():
            found = asleep(plan, args.rounds)
            figures[num_stages][name] = found
            print(
                f"{num_stages:6} {name:14}{found['items']:8}{found['simulated']:11.3f}s"
                f"{found['measured']:9.3f}s{found['measured'] / found['simulated']:8.3f}"
                f"   bubble {found['bubble']:.1%}, {found['rows']} sequences kept",
                flush=True,
            )
    return {"rounds": args.rounds, "stages": figures}


def choice(args: argparse.Namespace) -> dict[str, Any]:
    """Of drawn cases, how much longer than the fastest measured schedule the chosen one takes."""
    load_sleep()
    draw, cases = random.Random(0), []
    for _ in range(args.cases):
        num_stages = draw.choice([2, 4, 8, 16])
        batch_size = draw.choice([2, 3, 4, 6, 8, 12])
        seq_len = draw.choice([512, 1024, 2048])
        name = draw.choice(["1 GPT3-1B", "5 GPT3-13B", "8 GPT3-44B"])
        layers_per_stage = draw.choice([1, 2, 4])
        request = request_of(num_stages, batch_size, seq_len, layers_per_stage)
        chosen = planned(request, name).plan.schedule
        seconds = {
            schedule: asleep(plan, args.rounds)["measured"]
            for schedule, plan in plans_of(request, name).items()
        }
        loss = seconds[chosen] / min(seconds.values()) - 1
        of_stage = f"{num_stages:3} stages x {layers_per_stage} layers"
        print(
            f"{name:12}{of_stage},{batch_size:3} x {seq_len:5}: {chosen:13} taken, "
            + ", ".join(f"{own} {time_:.3f} s" for own, time_ in seconds.items())
            + f": {loss:+.1%}",
            flush=True,
        )
        case = {"stages": num_stages, "batch": batch_size, "tokens": seq_len, "model": name}
        case |= {"layers_per_stage": layers_per_stage}
        cases.append(case | {"chosen": chosen, "seconds": seconds, "loss": loss})
    good = sum(case["loss"] <= 0.03 for case in cases)
    print(f"{good} of {len(cases)} within 3% of the fastest")
    return {"cases": cases}


def request_of(
    num_stages: int, batch_size: int, seq_len: int, layers_per_stage: int = 4
) -> PlanRequest:
    """Of stages with so many layers each, and as many chunks at most."""
    return PlanRequest(num_stages, batch_size, seq_len, num_layers=layers_per_stage * num_stages)


def planned(request: PlanRequest, setting_name: str) -> Any:
    """What the planner makes of the request, with layers of a setting of the paper."""
    [setting] = [s for s in SETTINGS if s.name == setting_name]
    setting = setting._replace(
        num_layers=request.num_layers or setting.num_layers,
        num_stages=request.num_stages,
        batch_size=request.batch_size,
        seq_len=request.seq_len,
    )
    table = latency_table(setting, fit(SETTINGS))
    return find_plan(table, request, [1.0] * request.num_stages)


def plans_of(request: PlanRequest, setting_name: str) -> dict[ScheduleName, Plan]:
    """The best plan under each schedule."""
    options = planned(request, setting_name).options
    return {option.plan.schedule: option.plan for option in options}


def asleep(plan: Plan, rounds: int) -> dict[str, Any]:
    """Runs a plan with stages that sleep; seconds as simulated and measured, not slowed down."""
    import jax

    assert plan.prediction
    schedule, num_chunks = make_schedule(plan), plan.num_chunks
    timeline = predicted_timeline(plan, [1 / num_chunks] * (num_chunks * plan.num_stages))
    order = slice_order(schedule, plan)
    prediction = plan.prediction
    nested = [prediction.slice_forward_seconds, prediction.slice_backward_seconds]
    nested += [prediction.slice_weight_seconds] if prediction.slice_weight_seconds else []
    times = [
        {
            (item.row, item.token): own[m][n]
            for item, (m, n) in zip(schedule.items, order, strict=True)
        }
        for own in nested
    ]
    mean = statistics.mean(seconds for own in times for seconds in own.values())
    slowdown = TICK_SECONDS / (mean / num_chunks)
    run = program(plan, times, slowdown)
    measured = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        measured.append((time.perf_counter() - start) / slowdown)
    return {
        "items": len(schedule.items),
        "rows": schedule.num_rows,
        "chunks": num_chunks,
        "bubble": timeline.bubble,
        "simulated": timeline.step_seconds,
        "measured": statistics.median(measured),
        "least": min(measured),
        "most": max(measured),
    }


if __name__ == "__main__":
    main()
