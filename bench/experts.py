"""A layer of experts: rounds of products, `lax.ragged_dot`, and the products alone.

    python bench/experts.py

On one core in float32, forward and backward. For each shape and each imbalance of the experts it
prints the medians of interleaved rounds as ratios to the products alone: the same matrix products
as for a token's own experts, in one product of all tokens with one expert that is as wide.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

import results
from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.devices.startup import prepare_cpu
from tpipe_jax.model.experts import Experts

# Tokens of a slice, experts, experts of a token, width, width of an expert.
SHAPES = ((64, 8, 2, 256, 256), (512, 8, 2, 256, 512), (512, 32, 4, 256, 128))
LEANS = {"even": 0.0, "uneven": 0.5}
Run = Callable[[Array, Array, Array, Array], Array]


def main() -> None:
    args = parse_args()
    prepare_cpu(1)
    rows = {}
    print(f"{'tokens x experts (of a token)':34}{'busiest':>8}{'rounds':>8}{'ragged_dot':>12}")
    for M, E, J, D, F in SHAPES:
        for name, lean in LEANS.items():
            found, busiest = ratios((M, E, J, D, F), lean, args.rounds)
            label = f"{M} x {E} ({J}), {D} x {F}, {name}"
            rows[label] = {"busiest": busiest, **found}
            print(f"{label:34}{busiest:8.2f}{found['rounds']:8.2f}{found['ragged_dot']:12.2f}")
    results.save("experts", {"shapes": rows}, args.folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=results.FOLDER)
    return parser.parse_args()


def ratios(shape: tuple[int, ...], lean: float, num_rounds: int) -> tuple[dict[str, float], float]:
    """Times relative to the products alone, and how many tokens the busiest expert has, relative to
    the mean.
    """
    M, E, J, D, F = shape
    model = ModelConfig(
        family="llama", num_layers=1, d_model=D, d_ff=F, num_experts=E, experts_per_token=J
    )
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (1, M, D))
    logits = jax.random.normal(keys[1], (1, M, E)) + lean * jnp.cos(jnp.arange(E))
    kernels = jax.random.normal(keys[2], (E, D, 2 * F)), jax.random.normal(keys[3], (E, F, D))
    graph, _ = nnx.split(nnx.eval_shape(lambda: Experts(model, jnp.dtype("float32"), nnx.Rngs(0))))

    def rounds(x: Array, logits: Array, ff_in: Array, ff_out: Array) -> Array:
        return nnx.merge(graph, {"ff_in": ff_in, "ff_out": ff_out})(x, logits)

    def ragged(x: Array, logits: Array, ff_in: Array, ff_out: Array) -> Array:
        weights, chosen = lax.top_k(jax.nn.softmax(logits[0]), J)
        order = jnp.argsort(chosen.reshape(-1))
        counts = jnp.bincount(chosen.reshape(-1), length=E)
        gate, value = jnp.split(lax.ragged_dot(x[0][order // J], ff_in, counts), 2, -1)
        y = lax.ragged_dot(nnx.silu(gate) * value, ff_out, counts)
        y = jnp.zeros_like(y).at[order].set(y).reshape(M, J, D)
        return (weights[..., None] / weights.sum(-1)[:, None, None] * y).sum(1)[None]

    def products(x: Array, logits: Array, ff_in: Array, ff_out: Array) -> Array:
        rows = jnp.broadcast_to(x[0], (J, M, D)).reshape(-1, D)
        gate, value = jnp.split(rows @ ff_in[0], 2, -1)
        return (nnx.silu(gate) * value) @ ff_out[0]

    chosen = lax.top_k(logits[0], J)[1]
    busiest = float(jnp.bincount(chosen.reshape(-1), length=E).max() / (M * J / E))
    runs = {"products": products, "rounds": rounds, "ragged_dot": ragged}
    programs = {name: step(run) for name, run in runs.items()}
    arguments = x, logits, *kernels
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for n in range(num_rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if n:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    of_products = seconds.pop("products")
    return {
        name: statistics.median(a / b for a, b in zip(own, of_products, strict=True))
        for name, own in seconds.items()
    }, busiest


def step(run: Run) -> Callable[..., tuple[Array, ...]]:
    """Forward and backward, with all gradients."""
    return jax.jit(jax.grad(lambda *given: (run(*given) ** 2).sum(), (0, 1, 2, 3)))


if __name__ == "__main__":
    main()
