"""Attention of one slice over its context, on one core: in blocks, dense, and the products alone.

    python bench/attention.py

For each slice length and context it prints medians in milliseconds, forward and backward, of the
blockwise form that the pipeline uses, for several block sizes, of the dense form under autodiff,
and of the matrix products that attention cannot do without (half of the diagonal, since the other
half is masked).
"""

import os
import statistics
import time
from collections.abc import Callable

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
from jax import Array

from tpipe_jax.attention import KVCache, blockwise
from tpipe_jax.inplace import Position
from tpipe_jax.mesh import prepare_cpu

H, K = 4, 128
CASES = ((1024, 0), (256, 768), (512, 3584))  # slice, context
BLOCKS = (64, 128, 256, 512)
ROUNDS = 15


def dense(q: Array, k: Array, v: Array) -> Array:
    """Causal attention of the last tokens, with all scores in memory."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    visible = jnp.arange(num_queries)[:, None] + num_keys - num_queries >= jnp.arange(num_keys)
    score = jnp.where(visible, jnp.einsum("bhqe,bhke->bhqk", q, k) * K**-0.5, -1e30)
    return jnp.einsum("bhqk,bhke->bhqe", jax.nn.softmax(score, -1), v)


def medians(programs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each program; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(ROUNDS + 1):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def products(num_products: int, num_queries: int, num_keys: int) -> Callable[[], Array]:
    """As many operations as attention's products, in one large product per head."""
    a = jnp.ones((H, num_queries, K))
    b = jnp.ones((H, K, num_keys))
    run = jax.jit(
        lambda a, b: sum(jnp.einsum("hqe,hek->hqk", a + i, b) for i in range(num_products))
    )
    return lambda: run(a, b)


def measure(num_queries: int, context: int) -> None:
    num_keys = context + num_queries
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(k, (1, H, num_queries, K)) for k in keys[:2])
    k, v = (jax.random.normal(k, (1, H, num_keys, K)) for k in keys[2:])
    cache, at = KVCache(k, v), Position(0, jnp.int32(context))
    visible_keys = context + num_queries // 2
    forward: dict[str, Callable[[], object]] = {"products": products(2, num_queries, visible_keys)}
    backward: dict[str, Callable[[], object]] = {"products": products(5, num_queries, visible_keys)}

    run_dense = jax.jit(dense)
    _, vjp = jax.vjp(dense, q, k, v)
    run_vjp = jax.jit(vjp)
    forward["dense"], backward["dense"] = lambda: run_dense(q, k, v), lambda: run_vjp(d_out)
    for size in BLOCKS:
        attention = blockwise(size)
        run = jax.jit(attention.forward)
        run_backward = jax.jit(attention.backward, donate_argnums=6)
        out, lse = run(q, cache, at)

        def step(run_backward=run_backward, out=out, lse=lse) -> object:
            zeros = KVCache(jnp.zeros_like(k), jnp.zeros_like(v))
            return run_backward(q, cache, at, out, lse, d_out, zeros)

        forward[f"blocks of {size}"] = lambda run=run: run(q, cache, at)
        backward[f"blocks of {size}"] = step
    row = f"{num_queries:5} {context:5}"
    for direction, programs in (("forward", forward), ("backward", backward)):
        figures = medians(programs)
        print(f"{row}  {direction:8}", *(f"{figures[name]:14.1f}" for name in figures), flush=True)


def main() -> None:
    prepare_cpu(1)
    print(f"one core, {H} heads of {K}, float32, jax {jax.__version__}, milliseconds")
    names = ["products", "dense", *(f"blocks of {size}" for size in BLOCKS)]
    print("slice after           ", *(f"{name:>14}" for name in names))
    for num_queries, context in CASES:
        measure(num_queries, context)


if __name__ == "__main__":
    main()
