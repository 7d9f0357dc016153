"""What one GPU makes of GPT3-1B: by slices, attention backend and what is saved; PyTorch beside it.

    python bench/gpu.py
    python bench/gpu.py --seq-len=8192 --backend=cudnn --remat=dots      # part of the table
    python bench/gpu.py --num-layers=1 --d-model=64 --num-heads=2 --seq-len=128 --batch-tokens=256

The last one is small enough for a CPU.
For each sequence length one table: step time (loss, gradients, AdamW; median over the rounds, in
which all programs take turns on one state), tokens/s, TFLOP/s, its share of what one large matrix
product reaches on this GPU (MFU; recomputation is not counted as work), throughput over that
without slices, and the memory of the program as XLA plans it. Programs that do not fit are named
with what they would take. PyTorch runs before, in a process of its own, if it is installed. The
latency model is then fitted on one layer, a stage of the paper's setting 1.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch has the GPU first

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.stages import Compiled

from tpipe_jax.backends import resolve_attention
from tpipe_jax.collectives import compile_checked
from tpipe_jax.config import (
    AttentionConfig,
    Config,
    MemoryConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
    UserError,
    resolved,
)
from tpipe_jax.flags import exit_status
from tpipe_jax.memory import GIB, limit_bytes, program_bytes
from tpipe_jax.mesh import make_mesh, put_rows
from tpipe_jax.model import num_params
from tpipe_jax.optim import make_optimizer
from tpipe_jax.plan import Plan, read_settings
from tpipe_jax.precision import compute_dtype, resolve_precision
from tpipe_jax.profiler import Profiler
from tpipe_jax.remat import POLICIES
from tpipe_jax.schedule import terapipe
from tpipe_jax.train_state import abstract_rows, abstract_state, init_state
from tpipe_jax.train_step import make_train_step

BACKENDS = ("xla", "cudnn")


class Program(NamedTuple):
    """A compiled training step, or what it would take of a memory that is too small."""

    name: str
    num_slices: int
    step: Compiled | None
    num_bytes: int


def main() -> None:
    args = parse_args()
    torch_figures = {} if args.no_torch else {n: run_torch(args, n) for n in args.seq_len}
    device = jax.devices()[0]
    mesh = make_mesh(Config().mesh, [device])
    config = resolve_precision(make_config(args, args.seq_len[0]), mesh)
    rate = product_rate(args.product, compute_dtype(config.precision, mesh))
    print(
        f"{num_params(config.model) / 1e9:.2f}e9 parameters, {args.num_layers} layers, d_model "
        f"{args.d_model}, {args.num_heads} heads, {args.batch_tokens} tokens a step, "
        f"{config.precision.compute}, {args.rounds} rounds"
    )
    print(
        f"{device.device_kind}, jax {jax.__version__}, "
        f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}: a product of {args.product}^3 runs at "
        f"{rate / 1e12:.4g} TFLOP/s"
    )
    for seq_len in args.seq_len:
        measure(args, seq_len, mesh, rate, torch_figures.get(seq_len))
    for seq_len in () if args.no_latency else args.seq_len:
        print(f"{seq_len} tokens: {fit_error(args, seq_len, mesh)}", flush=True)


def make_config(args: argparse.Namespace, seq_len: int) -> Config:
    model = ModelConfig(args.num_layers, args.d_model, args.num_heads, None, args.vocab_size)
    return resolved(
        Config(
            model=replace(model, seq_len=seq_len),
            train=TrainConfig(batch_size=max(args.batch_tokens // seq_len, 1)),
        )
    )


def product_rate(size: int, dtype: jnp.dtype) -> float:
    """Operations a second of one large matrix product."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in (0, 1))
    b, repeats = b / jnp.sqrt(size).astype(dtype), 8

    @jax.jit
    def products(a: jax.Array, b: jax.Array) -> jax.Array:
        for _ in range(repeats):
            a = a @ b
        return a

    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(products(a, b))
        seconds.append(time.perf_counter() - start)
    return repeats * 2 * size**3 / statistics.median(seconds[2:])


def measure(
    args: argparse.Namespace, seq_len: int, mesh: Mesh, rate: float, peer: dict | None
) -> None:
    """Compiles all programs of one sequence length, times them in turns and prints a table."""
    base = resolve_precision(make_config(args, seq_len), mesh)
    optimizer = make_optimizer(base.optim, base.train.num_steps)
    print()
    programs = []
    for backend in args.backend or BACKENDS:
        try:
            config = resolve_attention(replace(base, attention=AttentionConfig(backend)), mesh)
        except UserError as error:
            print(f"without {backend}: {error}")
            continue
        cases = [(remat, n) for remat in args.remat or POLICIES for n in args.slices]
        programs += [compile_program(config, mesh, optimizer, *case) for case in cases]

    state = init_state(base, mesh, optimizer)
    shape = base.train.batch_size, seq_len + 1
    tokens = np.random.default_rng(0).integers(0, args.vocab_size, shape)
    rows = put_rows(mesh, tokens.astype(np.int32))
    seconds: dict[Program, list[float]] = {p: [] for p in programs if p.step}
    for turn in range(args.rounds + 1):
        for program, own in seconds.items():
            assert program.step is not None
            start = time.perf_counter()
            state, values = program.step(state, rows)
            jax.block_until_ready((state, values))
            if turn > 0:  # the first one warms up
                own.append(time.perf_counter() - start)
    report(base, programs, {p: statistics.median(s) for p, s in seconds.items()}, rate, peer)


def compile_program(
    config: Config,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    remat: str,
    num_slices: int,
) -> Program:
    """A training step whose slices have all sequences of the batch."""
    config = replace(
        config,
        memory=MemoryConfig(remat=remat),
        plan=PlanConfig(f"uniform:{num_slices}", "uniform:1"),
    )
    plan = read_settings(config)
    assert isinstance(plan, Plan)  # all slices are given
    start = time.perf_counter()
    step = compile_checked(
        make_train_step(config, mesh, terapipe(plan), optimizer),
        mesh,
        abstract_state(config, mesh, optimizer),
        abstract_rows(config, mesh),
    )
    name, num_bytes = f"{config.attention.backend}, {remat}", program_bytes(step)
    seconds = time.perf_counter() - start
    print(f"compiled {name}, {num_slices} slices in {seconds:.0f} s", file=sys.stderr, flush=True)
    fits = num_bytes <= (limit_bytes(config, mesh) or math.inf)
    return Program(name, num_slices, step if fits else None, num_bytes)


def report(
    config: Config,
    programs: list[Program],
    seconds: dict[Program, float],
    rate: float,
    peer: dict | None,
) -> None:
    """The table, and what it says of the aims."""
    tokens, flops = config.train.batch_size * config.model.seq_len, step_flops(config)
    print(f"{config.train.batch_size} x {config.model.seq_len} tokens")
    print(
        f"{'attention, saved':20} {'slices':>6} {'step ms':>9} {'tokens/s':>9} {'TFLOP/s':>8} "
        f"{'MFU':>6} {'of whole':>8} {'GiB':>6}"
    )

    def row(name: str, num_slices: int, own: float, of_whole: float, num_bytes: int) -> None:
        print(
            f"{name:20} {num_slices:6} {1e3 * own:9.1f} {tokens / own:9.0f} "
            f"{flops / own / 1e12:8.4g} {flops / own / rate:6.1%} {of_whole:8.1%} "
            f"{num_bytes / GIB:6.1f}"
        )

    whole = {p.name: own for p, own in seconds.items() if p.num_slices == 1}
    kept = {p: whole.get(p.name, math.nan) / own for p, own in seconds.items()}
    for program in programs:
        if program in seconds:
            name, num_slices, _, num_bytes = program
            row(name, num_slices, seconds[program], kept[program], num_bytes)
        else:
            print(
                f"{program.name:20} {program.num_slices:6} does not fit: it takes "
                f"{program.num_bytes / GIB:.1f} GiB"
            )
    if peer:
        expected = num_params(config.model)
        assert peer["num_params"] == expected, f"{peer['num_params']} parameters, not {expected}"
        row(f"PyTorch {peer['torch']}", 1, peer["seconds"], 1, peer["peak_bytes"])
    if whole:
        best = min(whole.values())
        print(f"unsliced, at best: MFU {flops / best / rate:.1%} (aim: 50%)", end="")
        print(f", {peer['seconds'] / best:.2f} of PyTorch's speed (aim: 1)" if peer else "")
        most = max(p.num_slices for p in seconds)
        sliced = min(own for p, own in seconds.items() if p.num_slices == most)
        print(f"{most} slices, at best: {best / sliced:.1%} of the unsliced speed (aim: 95%)")


def step_flops(config: Config) -> float:
    """Of a training step: layers and head forward, and twice that backward."""
    model = config.model
    layers = model.num_layers * model.forward_flops(model.seq_len, 0)
    head = 2 * model.seq_len * model.d_model * model.vocab_size
    return 3.0 * config.train.batch_size * (layers + head)


def fit_error(args: argparse.Namespace, seq_len: int, mesh: Mesh) -> str:
    """How far the latency model is off for a stage of one layer."""
    config = make_config(args, seq_len)
    config = replace(config, model=replace(config.model, num_layers=1))
    config = resolve_attention(resolve_precision(config, mesh), mesh)
    profile = Profiler(config, mesh).profile(lambda done, total: None)
    errors = []
    for name, model in zip(("forward", "backward"), profile.models(), strict=True):
        off = 100 * np.abs(model.relative_errors())
        errors.append(
            f"{name} {np.median(off):.1f}% (largest {off.max():.1f}%)" if len(off) else name
        )
    return (
        f"the latency model of one layer ({config.attention.backend}) is off by, in the median of "
        f"slices kept out of its fit, {', '.join(errors)}"
    )


def run_torch(args: argparse.Namespace, seq_len: int) -> dict | None:
    """Figures of the PyTorch GPT of this shape; None, with the reason, if it cannot run."""
    config = make_config(args, seq_len)
    model = config.model
    options = {
        **{name: getattr(model, name) for name in ("num_layers", "d_model", "num_heads")},
        **{name: getattr(model, name) for name in ("vocab_size", "seq_len")},
        "batch_size": config.train.batch_size,
        "rounds": args.rounds,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    script = Path(__file__).with_name("torch_gpt.py")
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    if done.returncode:
        print(f"without PyTorch, {seq_len} tokens: {done.stderr.strip().splitlines()[-1]}")
        return None
    return json.loads(done.stdout)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-layers", type=int, default=24)
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--batch-tokens", type=int, default=16384, help="of a step")
    parser.add_argument("--seq-len", type=int, action="append", help="default 2048 and 8192")
    parser.add_argument("--slices", type=int, action="append", help="default 1, 4, 8 and 16")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default all")
    parser.add_argument("--remat", action="append", help=f"default {', '.join(POLICIES)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--product", type=int, default=8192, help="size of the product for MFU")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--no-latency", action="store_true")
    args = parser.parse_args()
    args.seq_len = args.seq_len or [2048, 8192]
    args.slices = args.slices or [1, 4, 8, 16]
    return args


if __name__ == "__main__":
    sys.exit(exit_status(main))
