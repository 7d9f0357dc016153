"""What a device of a cluster would hold: compiles a paper's setting for its devices, runs nothing.

    python bench/scale.py
    python bench/scale.py --config=configs/gpt3_13b.py --slices=704,688,656

The training step is compiled for as many virtual CPU devices as the mesh has, from shapes alone. It
prints bytes a device: what the program is known to hold, and what XLA's memory analysis says of all
of it, against the memory of a V100. XLA compiles for CPUs here, where it computes bfloat16 products
in float32, which takes more than they take on a GPU; buffers of CUDA, NCCL and cuDNN come on top.
"""

import argparse
import os
import platform
import resource
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # machine code is not needed

import jax

from tpipe_jax.config.command_line import exit_status
from tpipe_jax.config.config_files import CONFIGS, load_config
from tpipe_jax.config.settings import PlanConfig, resolved
from tpipe_jax.devices.exchanges import find_collectives
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.model.transformer import num_params
from tpipe_jax.pipeline.footprint import activation_bytes_per_token, cache_bytes_per_token
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.planning.settings import read_settings
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_rows, abstract_state, state_bytes
from tpipe_jax.training.step import make_train_step

GIB = 2**30
# Found by the paper for its setting 9.
SLICES = ",".join(map(str, [120] * 4 + [112] * 6 + [104] * 8 + [64]))


def main() -> None:
    args = parse_args()
    config = load_config(args.config)
    single = f"uniform:{config.train.batch_size // config.mesh.data}"
    plan_config = PlanConfig(args.slices, args.batch_slices or single)
    precision = replace(config.precision, compute=args.compute)
    config = resolved(replace(config, plan=plan_config, precision=precision))
    jax.config.update("jax_num_cpu_devices", config.mesh.num_devices)
    mesh = make_mesh(config.mesh, jax.devices())
    plan = read_settings(config)
    assert isinstance(plan, Plan)  # all slices are given
    spec, optimizer = make_spec(config, mesh), make_optimizer(config)
    state = abstract_state(spec, optimizer)
    step = make_train_step(spec, make_schedule(plan), optimizer)
    start = time.perf_counter()
    compiled = step.lower(state, abstract_rows(spec)).compile()
    seconds = time.perf_counter() - start

    sizes = config.mesh
    print(
        f"{args.config.stem}: {num_params(config.model) / 1e9:.1f}e9 parameters, data {sizes.data} "
        f"x pipe {sizes.pipe} x model {sizes.model} = {sizes.num_devices} devices, "
        f"{config.train.batch_size} x {config.model.seq_len} tokens, {config.precision.compute}"
    )
    print(
        f"compiled in {seconds:.0f} s, peak memory of the compilation "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB, "
        f"jax {jax.__version__}, {platform.machine()}"
    )
    kinds = Counter((c.kind, c.in_branch) for c in find_collectives(compiled.as_text() or ""))
    for (kind, in_branch), count in sorted(kinds.items()):
        print(f"{count:6} {kind}{' in the bodies of slices' if in_branch else ''}")

    tokens = plan.batch_size * plan.seq_len
    params, opt_state = state_bytes(state)
    saved, caches = (
        tokens * sum(count(spec)) for count in (activation_bytes_per_token, cache_bytes_per_token)
    )
    analysis = compiled.memory_analysis()
    assert analysis is not None
    working = analysis.temp_size_in_bytes - params - saved
    total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    print("\nGiB a device")
    for name, num_bytes in {
        "parameters, float32": params,
        "optimiser state": opt_state,
        "gradients, float32": params,
        "attention caches and their gradients": caches,
        "other activations saved for the backward pass": saved - caches,
        "the rest: working memory, as XLA plans it for CPUs": working,
        "all, by XLA's memory analysis": total,
    }.items():
        print(f"{num_bytes / GIB:8.2f} {name}")
    verdict = "fits" if total <= args.limit_gib * GIB else "does not fit"
    print(f"{verdict} into {args.limit_gib:g} GiB")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIGS / "gpt3_175b.py")
    parser.add_argument("--slices", default=SLICES, help="token slices; those of setting 9")
    parser.add_argument("--batch-slices", help="one sequence each, if left out")
    parser.add_argument("--compute", default="bfloat16", help="format of products and activations")
    parser.add_argument("--limit-gib", type=float, default=16, help="of a device; a V100 has 16")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_status(main))
