"""What a step takes of a device: by slices, by what is saved, and by the length of sequences.

    python bench/memory.py
    python bench/memory.py --d-model=1024 --num-layers=16 --seq-len=2048 --seq-len=8192

Compiles training steps of a GPT on a pipeline of virtual devices and prints what XLA's memory
analysis says a device needs, in MB; nothing runs. The first table has one line for each length,
policy (config.memory.remat) and slicing of the sequences; `unsliced` is the microbatch pipeline,
one sequence at a time. The second has the same number of tokens in shorter sequences.
"""

import argparse
import os
import platform

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # machine code is not needed

import jax

from tpipe_jax.config.settings import (
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    PrecisionConfig,
    TrainConfig,
)
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.planning.settings import read_settings
from tpipe_jax.training.memory import budget, fitting_step, program_bytes
from tpipe_jax.training.optimizer import make_optimizer

SLICES = (1, 4, 16)
LIMIT_GIB = 1e6  # nothing runs here
POLICIES = {
    "none": MemoryConfig(LIMIT_GIB, "none"),
    "dots": MemoryConfig(LIMIT_GIB, "dots"),
    "dots, deferred weights": MemoryConfig(LIMIT_GIB, "dots", defer_weight_grads=True),
    "attn": MemoryConfig(LIMIT_GIB, "attn"),
    "full": MemoryConfig(LIMIT_GIB, "full"),
}


def main() -> None:
    args = parse_args()
    jax.config.update("jax_num_cpu_devices", args.num_stages)
    print(
        f"{args.num_layers} layers, d_model {args.d_model}, {args.num_stages} stages, "
        f"{args.compute}, {args.batch_size} sequences, jax {jax.__version__}, {platform.machine()}"
    )
    names = ("unsliced", *(f"{n} slices" for n in SLICES[1:]))
    print(f"{'tokens':>8} {'policy':24}" + "".join(f"{name:>11}" for name in names))
    for seq_len in args.seq_len:
        for policy, memory in POLICIES.items():
            sizes = [megabytes(args, args.batch_size, seq_len, n, memory) for n in SLICES]
            print(
                f"{seq_len:8} {policy:24}" + "".join(f"{size:11.0f}" for size in sizes), flush=True
            )

    seq_len, memory = max(args.seq_len), POLICIES["dots"]
    print(f"\n{args.batch_size * seq_len} tokens a batch, dots")
    while seq_len >= min(args.seq_len):
        batch_size = args.batch_size * max(args.seq_len) // seq_len
        sizes = [megabytes(args, batch_size, seq_len, n, memory) for n in SLICES]
        row = "".join(f"{size:11.0f}" for size in sizes)
        print(f"{batch_size:4} x {seq_len:6} {'':20}" + row, flush=True)
        seq_len //= 4

    config = make_config(args, args.batch_size, max(args.seq_len), SLICES[-1], memory)
    mesh = make_mesh(config.mesh, jax.devices())
    optimizer = make_optimizer(config)
    parts = budget(make_spec(config, mesh), make_schedule(plan_of(config)), optimizer)
    print(f"\nof the {args.batch_size} x {max(args.seq_len)} tokens in {SLICES[-1]} slices, dots")
    for name, num_bytes in parts.items():
        print(f"{num_bytes / 1e6:10.0f}  {name}")


def make_config(
    args: argparse.Namespace, batch_size: int, seq_len: int, num_slices: int, memory: MemoryConfig
) -> Config:
    return Config(
        model=ModelConfig(
            args.num_layers, args.d_model, args.d_model // 64, vocab_size=50257, seq_len=seq_len
        ),
        mesh=MeshConfig(pipe=args.num_stages),
        plan=PlanConfig(f"uniform:{num_slices}", f"uniform:{batch_size}"),
        train=TrainConfig(batch_size=batch_size),
        precision=PrecisionConfig(args.compute),
        memory=memory,
    )


def megabytes(
    args: argparse.Namespace, batch_size: int, seq_len: int, num_slices: int, memory: MemoryConfig
) -> float:
    config = make_config(args, batch_size, seq_len, num_slices, memory)
    mesh = make_mesh(config.mesh, jax.devices())
    optimizer = make_optimizer(config)
    return program_bytes(fitting_step(make_spec(config, mesh), plan_of(config), optimizer)[1]) / 1e6


def plan_of(config: Config) -> Plan:
    plan = read_settings(config)
    assert isinstance(plan, Plan)  # all slices are given
    return plan


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--num-layers", type=int, default=16)
    parser.add_argument("--num-stages", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--compute", default="bfloat16", help="format; CPUs compute it in float32")
    parser.add_argument("--seq-len", type=int, action="append", help="default 2048 and 8192")
    args = parser.parse_args()
    args.seq_len = args.seq_len or [2048, 8192]
    return args


if __name__ == "__main__":
    main()
