"""A step of Llama's block, and of one with experts, beside that of GPT-2.

    python bench/families.py

Loss and gradients of 4 layers of width 768 and 1024 tokens, on one core in float32, with the whole
sequence and with 8 token slices. Llama's layers have as many parameters as GPT-2's; with experts, a
token goes through as many. Medians of interleaved rounds, relative to GPT-2 with the same slices.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import numpy as np

import results
from tpipe_jax.config.settings import Config, MeshConfig, ModelConfig, PlanConfig, TrainConfig
from tpipe_jax.devices.mesh import make_mesh, put_rows
from tpipe_jax.devices.startup import prepare_cpu
from tpipe_jax.model.flops import step_flops
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import init_state
from tpipe_jax.training.step import make_loss_and_grads

T, D, VOCAB_SIZE = 1024, 768, 512
GPT2 = ModelConfig(4, D, 12, vocab_size=VOCAB_SIZE, seq_len=T)
LLAMA = replace(GPT2, family="llama", d_ff=8 * D // 3)
MODELS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "llama, 3 heads of keys": replace(LLAMA, num_kv_heads=3),
    "llama, 8 experts": replace(LLAMA, num_experts=8, d_ff=4 * D // 3),
}


def main() -> None:
    args = parse_args()
    prepare_cpu(1)
    rows = {}
    print(f"{'':34}{'seconds':>9}{'of gpt2':>9}{'operations':>12}")
    for num_slices in (1, 8):
        programs = {name: program(model, num_slices) for name, model in MODELS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in MODELS}
        for turn in range(args.rounds + 1):
            for name, run in programs.items():
                start = time.perf_counter()
                run()
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
        for name, own in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(own, seconds["gpt2"], strict=True))
            flops = step_flops(Config(MODELS[name])) / step_flops(Config(GPT2))
            label = f"{name}, {num_slices} slices" if num_slices > 1 else name
            figures = {"seconds": statistics.median(own), "ratio": ratio, "operations": flops}
            rows[label] = figures
            print(f"{label:34}{figures['seconds']:9.3f}{ratio:9.2f}{flops:12.2f}", flush=True)
    results.save("families", {"rounds": args.rounds, "programs": rows}, args.folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=results.FOLDER)
    return parser.parse_args()


def program(model: ModelConfig, num_slices: int) -> Callable[[], object]:
    """The compiled loss and gradients of a sequence, with arguments that are ready."""
    plan = Plan(1, (1,), ((T // num_slices,) * num_slices,))
    config = Config(model, MeshConfig(), PlanConfig(), TrainConfig(batch_size=1))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    spec = make_spec(config, mesh)
    params = init_state(spec, make_optimizer(config)).params
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (1, T + 1), np.int32)
    rows = put_rows(mesh, tokens)
    step = make_loss_and_grads(spec, make_schedule(plan)).lower(params, rows).compile()
    return lambda: jax.block_until_ready(step(params, rows))


if __name__ == "__main__":
    main()
