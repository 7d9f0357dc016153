"""Step times beside those of `torch.distributed.pipelining`, on two processes of one core each.

    python bench/torch_peer.py
    python bench/torch_peer.py --cases 4x1024 --rounds=9

The loss of a GPT and the gradients of all its parameters, float32, for each case (sequences x
tokens): here in two stages with several slicings, there with every schedule of PyTorch that serves,
and both on one core, there whole sequences, here slices of up to 1024 tokens. Both pairs of
processes wait on the same two cores and take turns, program by program, in an order that changes
with the round; a ratio is one round's, its median and range are over the rounds. Ours is the
slicing, theirs the schedule with the least median.

The floor is what the matrix products of the model take on one core, the three of each linear layer,
and its causal attention in PyTorch's fused form, forward and backward.
Needs torch. Writes `bench/results/torch_peer.json` and `docs/torch_peer.png`.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import results
from tpipe_jax.config.settings import Config, MeshConfig, ModelConfig, ScheduleName, TrainConfig
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.settings import settled, uniform

TORCH_PIPELINE = Path(__file__).with_name("torch_pipeline.py")
VOCAB_SIZE = 256
CASES = ("1x1024", "2x1024", "4x1024", "8x1024", "1x4096")
# Sequences of a batch slice by token slices of a sequence, and the schedule.
PLANS: dict[str, list[tuple[int, int, ScheduleName]]] = {
    "1x1024": [(1, 4, "terapipe"), (1, 8, "terapipe"), (1, 4, "interleaved")],
    "2x1024": [(1, 4, "terapipe"), (1, 4, "interleaved"), (1, 4, "1f1b-deferred")],
    "4x1024": [(1, 2, "terapipe"), (1, 2, "interleaved"), (1, 2, "1f1b-deferred")],
    "8x1024": [(1, 2, "terapipe"), (1, 1, "interleaved"), (1, 2, "1f1b-deferred")],
    "1x4096": [(1, 8, "terapipe"), (1, 16, "terapipe"), (1, 8, "interleaved")],
}
MODEL = {"num-layers": 8, "d-model": 512, "num-heads": 4}


def main() -> None:
    args = parse_args()
    if args.process_id is not None:
        work(args)
        return
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("error: this needs 2 cores.")
    cases = {case: measure(case, args.rounds) for case in args.cases}
    results.add("torch_peer", "cases", cases, CASES, args.folder)
    draw(results.picture("torch_peer", args.folder), results.load("torch_peer", args.folder))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="for the results")
    parser.add_argument("--process-id", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


class Pair:
    """Two processes, each on a core, and the programs that they run together."""

    def __init__(self, *command: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._processes = [
            subprocess.Popen(
                [sys.executable, *command, f"--port={port}", f"--process-id={i}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        first, second = (self._read(i) for i in range(2))
        self.names = {name: 2 if name in second else 1 for name in first}
        """And how many of the processes each needs."""

    def _read(self, index: int) -> Any:
        stdout = self._processes[index].stdout
        assert stdout
        for line in stdout:
            # Gloo tells of each group that it connects, and may tear its lines.
            if line.strip() and "[Gloo] " not in line and "connected peer ranks is" not in line:
                return json.loads(line)
        sys.exit("error: a process of the comparison has ended.")

    def run(self, name: str) -> float:
        """Runs a program; returns the seconds of the process that took longer."""
        numbers = range(self.names[name])
        for i in numbers:
            stdin = self._processes[i].stdin
            assert stdin
            stdin.write(f"{name}\n")
            stdin.flush()
        return max(self._read(i) for i in numbers)

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin
            process.stdin.close()
        for process in self._processes:  # which end together
            process.wait()


def measure(case: str, rounds: int) -> dict[str, Any]:
    """Times all programs of a case in turns, prints and returns what they took."""
    batch_size, seq_len = map(int, case.split("x"))
    sizes = {**MODEL, "seq-len": seq_len, "batch-size": batch_size}
    theirs = Pair(str(TORCH_PIPELINE), *(f"--{name}={value}" for name, value in sizes.items()))
    ours = Pair(__file__, "--cases", case)
    programs: dict[str, Callable[[], float]] = {}
    for label, pair in (("torch", theirs), ("tpipe_jax", ours)):
        for name in pair.names:
            programs[f"{label}, {name}"] = lambda pair=pair, name=name: pair.run(name)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        order = list(programs)
        random.shuffle(order)
        for name in order:
            took = programs[name]()
            if turn:  # the first round warms up
                seconds[name].append(took)
    theirs.close()
    ours.close()
    return report(case, seconds)


def report(case: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"\n{case}{'':34}{'median':>9}{'least':>9}{'most':>9}")
    for name, times in seconds.items():
        print(f"{name:{len(case) + 32}}{medians[name]:8.3f}s{min(times):8.3f}s{max(times):8.3f}s")

    def best(label: str) -> str:
        two = (name for name in medians if name.startswith(label) and "one core" not in name)
        return min(two, key=lambda name: medians[name])

    def ratio(name: str, other: str) -> dict[str, Any]:
        ratios = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
        figures = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        print(
            f"{name} / {other}: {figures['median']:.2f} "
            f"({figures['least']:.2f} to {figures['most']:.2f})",
            flush=True,
        )
        return {"of": name, "to": other, **figures}

    ratios = {
        "two stages": ratio(best("tpipe_jax"), best("torch")),
        "one core": ratio("tpipe_jax, one core", "torch, one core"),
        "one core to the floor": ratio("tpipe_jax, one core", "torch, floor of one core"),
        "speed-up of two stages": ratio("tpipe_jax, one core", best("tpipe_jax")),
    }
    rounds, torch = len(seconds["torch, one core"]), metadata.version("torch")
    return {"torch": torch, "rounds": rounds, "median_seconds": medians, "ratios": ratios}


def draw(path: Path, content: dict[str, Any]) -> None:
    """Steps on two cores, of the best of each, and half of the floor of one core."""
    cases = content["cases"]
    ratios = [case["ratios"]["two stages"] for case in cases.values()]
    medians = [case["median_seconds"] for case in cases.values()]
    pairs = list(zip(medians, ratios, strict=True))
    series = {
        "torch.distributed.pipelining": [times[ratio["to"]] for times, ratio in pairs],
        "tpipe_jax": [times[ratio["of"]] for times, ratio in pairs],
        "products and attention alone, without waiting": [
            times["torch, floor of one core"] / 2 for times in medians
        ],
    }
    title = "measured: two stages on two cores, the fastest schedule of each"
    groups = [f"{case.replace('x', ' x ')} tokens" for case in cases]
    label = "time for loss and gradients [s]"
    results.draw_bars(path, groups, series, label, title, ("tab:orange", "tab:blue", "0.75"))


def work(args: argparse.Namespace) -> None:
    """What one of our two processes does: as `torch_pipeline.py`."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[args.process_id]})
    import jax

    from tpipe_jax.devices.startup import prepare_cpu

    prepare_cpu(1)
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"127.0.0.1:{args.port}", 2, args.process_id)
    [case] = args.cases
    batch_size, seq_len = map(int, case.split("x"))
    programs = {}
    for rows, parts, schedule in PLANS[case]:
        plan = Plan(
            2,
            (rows,) * (batch_size // rows),
            (uniform(seq_len, parts),) * (batch_size // rows),
            schedule=schedule,
            num_chunks=2 if schedule == "interleaved" else 1,
        )
        name = f"{batch_size // rows} x {parts} slices, {schedule}"
        programs[name] = make_program(plan)
    # Longer slices are slower on one core, too: the gradients of weights transpose their inputs.
    parts = uniform(seq_len, max(1, seq_len // 1024))
    whole = make_program(Plan(1, (1,) * batch_size, (parts,) * batch_size))
    if args.process_id == 0:  # the other has compiled it to be as late
        programs["one core"] = whole
    for run in programs.values():
        run()
    print(json.dumps(list(programs)), flush=True)
    for name in sys.stdin:
        start = time.perf_counter()
        programs[name.strip()]()
        print(time.perf_counter() - start, flush=True)


def make_program(plan: Plan) -> Callable[[], object]:
    """Loss and gradients of a plan, of one stage on this process's device alone."""
    import jax
    import numpy as np

    from tpipe_jax.devices.mesh import make_mesh, put_rows
    from tpipe_jax.pipeline.spec import make_spec
    from tpipe_jax.planning.schedule import make_schedule
    from tpipe_jax.training.optimizer import make_optimizer
    from tpipe_jax.training.state import init_state
    from tpipe_jax.training.step import make_loss_and_grads

    sizes: dict[str, Any] = {name.replace("-", "_"): value for name, value in MODEL.items()}
    config = Config(
        model=ModelConfig(**sizes, vocab_size=VOCAB_SIZE, seq_len=plan.seq_len),
        mesh=MeshConfig(pipe=plan.num_stages),
        train=TrainConfig(batch_size=plan.batch_size),
    )
    config = settled(config, plan)
    devices = jax.devices() if plan.num_stages > 1 else jax.local_devices()
    mesh = make_mesh(config.mesh, devices)
    spec = make_spec(config, mesh)
    params = init_state(spec, make_optimizer(config)).params
    shape = plan.batch_size, plan.seq_len + 1
    rows = put_rows(mesh, np.random.default_rng(0).integers(0, VOCAB_SIZE, shape, np.int32))
    program = make_loss_and_grads(spec, make_schedule(plan)).lower(params, rows).compile()
    return lambda: jax.block_until_ready(program(params, rows))


if __name__ == "__main__":
    main()
