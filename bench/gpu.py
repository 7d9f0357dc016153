"""What one GPU makes of GPT3-1B: by slices, attention backend and what is saved; PyTorch beside it.

    python bench/gpu.py --short
    python bench/gpu.py
    python bench/gpu.py --seq-len=8192 --backend=cudnn --remat=dots --slices=1 --slices=16
    python bench/gpu.py --seq-len=2048 --slices=1 --batch-slices=8
    python bench/gpu.py --num-layers=1 --d-model=64 --num-heads=2 --seq-len=128 --batch-tokens=256

The first takes less than 9 minutes on a machine that has compiled nothing yet: 12 layers, 2 x 8192
tokens, whole and in 8 and 16 slices. The second is the whole table, the third a part of it, the
fourth sends one sequence after another through the GPU under each schedule, the last one is small
enough for a CPU. For each sequence length
there is one table: step time (loss, gradients, AdamW; median over the rounds, in which all programs
take turns), tokens/s, TFLOP/s, its share of what one large matrix product reaches on this GPU (MFU;
what is computed again is not counted as work), the speed relative to one slice, and memory, as XLA
plans it and as PyTorch had allocated at most. Programs that do not fit or fail are named with the
reason. Of a step with most slices, and of one of the first program, it prints the kernels by kind.
All figures go to a file, too (--json). PyTorch runs first, in a process of its own, if it is
installed. The latency model is fitted to one layer, a stage of the paper's setting 1. Programs of
24 layers take minutes to compile: JAX_COMPILATION_CACHE_DIR keeps them for another run.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # jax reserves 0.75 by default

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from gpu_report import Program, Trace, figures, report, report_traces
from gpu_trace import kernel_times
from tpipe_jax.config.settings import (
    AttentionConfig,
    Backend,
    Config,
    MemoryConfig,
    ModelConfig,
    PlanConfig,
    ScheduleName,
    TrainConfig,
    resolved,
)
from tpipe_jax.devices.exchanges import compile_checked
from tpipe_jax.devices.hardware import facts_of
from tpipe_jax.devices.mesh import make_mesh, put_rows
from tpipe_jax.devices.precision import resolve_precision
from tpipe_jax.errors import UserError
from tpipe_jax.model.remat import POLICIES, saved_names
from tpipe_jax.model.transformer import num_params
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.planning.settings import read_settings
from tpipe_jax.profiling.profiler import Profiler
from tpipe_jax.runtime.exits import exit_status
from tpipe_jax.training.memory import GIB, limit_bytes, program_bytes
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_rows, abstract_state, init_state
from tpipe_jax.training.step import make_train_step

BACKENDS: tuple[Backend, ...] = ("flash", "cudnn", "xla")
SHORT = {
    "num_layers": 12,
    "rounds": 5,
    "seq_len": [8192],
    "slices": [1, 8, 16],
    "remat": ["dots"],
    "backend": ["flash", "cudnn"],
    "defer": True,
    "no_latency": True,
}
TORCH_GPT = Path(__file__).with_name("torch_gpt.py")
TORCH_TIMEOUT_SECONDS = 1800


def main() -> None:
    args = parse_args()
    check(args)
    peers = {} if args.no_torch else {n: run_torch(args, n) for n in args.seq_len}
    device = jax.devices()[0]
    mesh = make_mesh(Config().mesh, [device])
    config = make_spec(make_config(args, args.seq_len[0]), mesh).config
    rate = product_rate(args.product, jnp.dtype(config.precision.compute))
    limit = limit_bytes(make_spec(config, mesh))
    print(
        f"{num_params(config.model) / 1e9:.2f}e9 parameters, {args.num_layers} layers, d_model "
        f"{args.d_model}, {args.num_heads} heads, {args.batch_tokens} tokens a step, "
        f"{config.precision.compute}, {args.rounds} rounds"
    )
    print(
        f"{device.device_kind}{f', {limit / GIB:.1f} GiB' if limit else ''}, jax "
        f"{jax.__version__}, XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}: a product of "
        f"{args.product}^3 runs at {rate / 1e12:.4g} TFLOP/s",
        flush=True,
    )
    tables = []
    for seq_len in args.seq_len:
        base = resolve_precision(make_config(args, seq_len), facts_of(mesh))
        programs = compile_programs(args, base, mesh)
        traces = take_turns(args, base, mesh, programs)
        report(base, programs, rate, peers.get(seq_len))
        report_traces(traces)
        tables.append(figures(base, programs, rate, peers.get(seq_len), traces))
    if args.json:
        about = {
            "device": device.device_kind,
            "jax": jax.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "options": {name: value for name, value in vars(args).items() if name != "json"},
            "product_flops_per_second": rate,
            "tables": tables,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(about, indent=1) + "\n")
    if not args.no_latency:
        for seq_len in args.seq_len:
            print(f"{seq_len} tokens: {fit_error(args, seq_len, mesh)}", flush=True)


def check(args: argparse.Namespace) -> None:
    """Raises `UserError` for what would be found out late."""
    for remat in args.remat:
        saved_names(remat)
    for seq_len in args.seq_len:
        for num_slices in args.slices:
            plan_of(make_config(args, seq_len), Program("", num_slices, False, args.batch_slices))


def make_config(args: argparse.Namespace, seq_len: int) -> Config:
    model = ModelConfig(
        num_layers=args.num_layers,
        d_model=args.d_model,
        num_heads=args.num_heads,
        vocab_size=args.vocab_size,
        seq_len=seq_len,
    )
    train = TrainConfig(batch_size=max(args.batch_tokens // seq_len, 1))
    return resolved(Config(model=model, train=train))


def plan_of(config: Config, program: Program) -> Plan:
    """As many slices of each batch slice."""
    slices = f"uniform:{program.num_slices}", f"uniform:{program.batch_slices}"
    plan = read_settings(replace(config, plan=PlanConfig(*slices)))
    assert isinstance(plan, Plan)  # all slices are given
    return replace(plan, schedule=program.schedule)


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


def compile_programs(args: argparse.Namespace, base: Config, mesh: Mesh) -> list[Program]:
    """The training steps of one sequence length."""
    programs = []
    for backend in args.backend:
        attention = AttentionConfig(backend, args.block)
        try:
            config = make_spec(replace(base, attention=attention), mesh).config
        except UserError as error:
            print(f"without {backend}: {error}", flush=True)
            continue
        for remat in args.remat:
            for variant in variants(args):
                program = Program(f"{backend}, {remat}", *variant)
                memory = MemoryConfig(remat=remat, defer_weight_grads=program.is_deferred)
                start = time.perf_counter()
                compile_into(program, replace(config, memory=memory), mesh)
                seconds = time.perf_counter() - start
                print(
                    f"{program}: compiled in {seconds:.0f} s {program.failure}",
                    file=sys.stderr,
                    flush=True,
                )
                programs.append(program)
    return programs


def variants(args: argparse.Namespace) -> list[tuple[int, bool, int, ScheduleName]]:
    """Numbers of slices, whether gradients of weights are deferred until all are done, and batch
    slices with each schedule, of which deferring needs the first.
    """
    schedules: list[ScheduleName] = ["terapipe", "1f1b"] if args.batch_slices > 1 else ["terapipe"]
    return [
        (n, is_deferred, args.batch_slices, schedule)
        for n in args.slices
        for is_deferred in ((False, True) if args.defer and n > 1 else (False,))
        for schedule in (schedules[:1] if is_deferred else schedules)
    ]


def compile_into(program: Program, config: Config, mesh: Mesh) -> None:
    spec, optimizer = make_spec(config, mesh), make_optimizer(config)
    schedule = make_schedule(plan_of(config, program))
    try:
        step = compile_checked(
            make_train_step(spec, schedule, optimizer),
            mesh,
            abstract_state(spec, optimizer),
            abstract_rows(spec),
        )
    except jax.errors.JaxRuntimeError as error:
        program.failure = f"does not compile: {brief(error)}"
        return
    program.num_bytes = program_bytes(step)
    if program.num_bytes > (limit_bytes(spec) or math.inf):
        program.failure = f"does not fit: {program.num_bytes / GIB:.1f} GiB"
    else:
        program.step = step


def take_turns(
    args: argparse.Namespace, config: Config, mesh: Mesh, programs: list[Program]
) -> dict[str, Trace]:
    """Times the programs in rounds, on one state, which they all have alike. Returns the kernels of
    a traced step of the first program, and of the first with most slices.
    """
    optimizer = make_optimizer(config)
    shape = config.train.batch_size, config.model.seq_len + 1
    tokens = np.random.default_rng(0).integers(0, args.vocab_size, shape)
    rows, state = put_rows(mesh, tokens.astype(np.int32)), None
    for turn in range(args.rounds + 1):
        for program in programs:
            if program.step is None:
                continue
            try:
                if state is None:
                    state = jax.block_until_ready(init_state(make_spec(config, mesh), optimizer))
                start = time.perf_counter()
                state, values = program.step(state, rows)
                jax.block_until_ready((state, values))
            except jax.errors.JaxRuntimeError as error:
                program.step, program.failure = None, f"fails: {brief(error)}"
                state = None  # it may have been donated
                continue
            if turn > 0:  # the first one warms up
                program.times.append(time.perf_counter() - start)
    timed = [program for program in programs if program.step]
    if jax.devices()[0].platform != "gpu" or state is None or not timed:
        return {}
    traces, most = {}, max(timed, key=lambda program: program.num_slices)
    for program in dict.fromkeys((str(timed[0]), str(most))):
        step = next(p.step for p in timed if str(p) == program)
        assert step

        def run(step: Compiled = step) -> object:
            nonlocal state
            state, values = step(state, rows)
            return state, values

        traces[program] = kernel_times(run)
    return traces


def brief(error: Exception) -> str:
    return textwrap.shorten(str(error).partition("\n")[0], 100, placeholder=" ...")


def fit_error(args: argparse.Namespace, seq_len: int, mesh: Mesh) -> str:
    """How far the latency model is off for a stage of one layer."""
    config = make_config(args, seq_len)
    config = replace(config, model=replace(config.model, num_layers=1))
    spec = make_spec(config, mesh)
    profile = Profiler(spec).profile(lambda done, total: None)
    errors = []
    for name, model in zip(("forward", "backward"), profile.models(), strict=True):
        off = 100 * np.abs(model.relative_errors())
        errors.append(
            f"{name} {np.median(off):.1f}% (largest {off.max():.1f}%)" if len(off) else name
        )
    return (
        f"the latency model of one layer ({spec.config.attention.backend}) is off by, in the "
        f"median of slices kept out of its fit, {', '.join(errors)}"
    )


def run_torch(args: argparse.Namespace, seq_len: int) -> dict | None:
    """Figures of the PyTorch GPT of this shape; None, with the reason, if there are none."""
    config = make_config(args, seq_len)
    names = ("num_layers", "d_model", "num_heads", "vocab_size", "seq_len")
    options = {name: getattr(config.model, name) for name in names}
    options |= {"batch_size": config.train.batch_size, "rounds": args.rounds}
    command = [sys.executable, TORCH_GPT, *["--cpu"] * args.cpu]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TORCH_TIMEOUT_SECONDS, check=True
        )
        return json.loads(done.stdout.strip().rpartition("\n")[2])
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().rpartition("\n")[2] or f"status {error.returncode}"
    except (subprocess.TimeoutExpired, ValueError) as error:
        reason = str(error)
    print(f"without PyTorch, {seq_len} tokens: {reason}", flush=True)
    return None


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="what fits into 9 minutes")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--num-layers", type=int, default=24)
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--batch-tokens", type=int, default=16384, help="of a step")
    parser.add_argument("--seq-len", type=int, action="append", help="default 2048 and 8192")
    parser.add_argument("--slices", type=int, action="append", help="default 1, 4, 8 and 16")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default all")
    parser.add_argument("--block", type=int, help="config.attention.block")
    parser.add_argument("--remat", action="append", help=f"default {', '.join(POLICIES)}")
    parser.add_argument(
        "--defer", action="store_true", help="slices with config.memory.defer_weight_grads too"
    )
    parser.add_argument(
        "--batch-slices", type=int, default=1, help="of the sequences, under each schedule"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--product", type=int, default=8192, help="size of the product for MFU")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="run PyTorch on the CPU if need be")
    args = parser.parse_args(words)
    if args.short:
        for name, value in SHORT.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    args.seq_len = args.seq_len or [2048, 8192]
    args.slices = args.slices or [1, 4, 8, 16]
    args.backend, args.remat = args.backend or BACKENDS, args.remat or list(POLICIES)
    return args


if __name__ == "__main__":
    sys.exit(exit_status(main))
