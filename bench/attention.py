"""Attention of one slice over its context: in blocks, by kernels, dense, and the products alone.

    python bench/attention.py
    python bench/attention.py --gpu

On one core in float32, or on a GPU in bfloat16. For each slice length and context it prints medians
in milliseconds, forward and backward, of what the pipeline uses, for several sizes of blocks or
groups, of FlashAttention if it is installed, of the dense form under autodiff, and of the matrix
products that attention cannot do without (half of the diagonal, since the other half is masked).
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

IS_GPU = "--gpu" in sys.argv[1:]
if not IS_GPU:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
from jax import Array

from tpipe_jax.attention.base import Attention, KVCache, Slice
from tpipe_jax.attention.blockwise import blockwise
from tpipe_jax.attention.cudnn import cudnn_kernel
from tpipe_jax.attention.flash import flash, flash_kernels, obstacle
from tpipe_jax.attention.fused import grouped
from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.devices.hardware import facts_of
from tpipe_jax.devices.inplace import Position
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.devices.startup import prepare_cpu

K = 128
ROUNDS = 15
Programs = dict[str, Callable[[], object]]


def cases() -> list[tuple[int, int]]:
    """Slices and their contexts."""
    if IS_GPU:
        return [(8192, 0), (2048, 6144), (512, 7680), (512, 1536)]
    return [(1024, 0), (256, 768), (512, 3584)]


def attentions() -> dict[str, Attention]:
    sizes = (256, 512, 1024) if IS_GPU else (64, 128, 256, 512)
    found = {f"blocks of {size}": blockwise(size) for size in sizes}
    if IS_GPU:
        kernel = cudnn_kernel()
        found |= {f"cudnn {size}": grouped(kernel, size) for size in (512, 1024, 2048, 4096)}
        capability = facts_of(make_mesh(MeshConfig(), jax.devices()[:1])).capability
        if capability and not obstacle(capability):
            found["flash"] = flash(flash_kernels(capability))
    return found


def dense(q: Array, k: Array, v: Array) -> Array:
    """Causal attention of the last tokens, with all scores in memory."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    visible = jnp.arange(num_queries)[:, None] + num_keys - num_queries >= jnp.arange(num_keys)
    score = jnp.einsum("bqhe,bkhe->bhqk", q, k, preferred_element_type=jnp.float32) * K**-0.5
    weight = jax.nn.softmax(jnp.where(visible, score, -1e30), -1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhe->bqhe", weight, v)


def medians(programs: Programs, repeats: int) -> dict[str, float]:
    """Milliseconds of each program, of several calls in a row; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(ROUNDS + 1):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready([run() for _ in range(repeats)])
            if turn > 0:
                seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def products(num_products: int, q: Array, num_keys: int) -> Callable[[], Array]:
    """As many operations as attention's products, in one large product per head."""
    a = q[0].swapaxes(0, 1)
    b = jax.random.normal(jax.random.key(1), (len(a), K, num_keys), q.dtype)
    run = jax.jit(
        lambda a, b: sum(jnp.einsum("hqe,hek->hqk", a + i, b) for i in range(num_products))
    )
    return lambda: run(a, b)


def measure(num_queries: int, context: int) -> None:
    H, dtype, repeats = (16, jnp.bfloat16, 10) if IS_GPU else (4, jnp.float32, 1)
    num_keys = context + num_queries
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(k, (1, num_queries, H, K), dtype) for k in keys[:2])
    k, v = (jax.random.normal(k, (1, num_keys, H, K), dtype) for k in keys[2:])
    visible_keys = context + num_queries // 2
    forward: Programs = {"products": products(2, q, visible_keys)}
    backward: Programs = {"products": products(5, q, visible_keys)}

    run_dense = jax.jit(dense)
    run_vjp = jax.jit(lambda q, k, v, d_out: jax.vjp(dense, q, k, v)[1](d_out))
    forward["dense"] = lambda: run_dense(q, k, v)
    backward["dense"] = lambda: run_vjp(q, k, v, d_out)
    for name, attention in attentions().items():
        run = jax.jit(attention.forward)
        run_backward = jax.jit(attention.backward, donate_argnums=4)
        cache = KVCache(*map(attention.layout.arranged, (k, v)))
        own = Slice(q, cache, Position(0, jnp.int32(context)))
        out, lse = run(own)

        def step(run_backward=run_backward, own=own, out=out, lse=lse) -> object:
            zeros = KVCache(*jnp.zeros((2, *own.cache.k.shape)))
            return run_backward(own, out, lse, d_out, zeros)

        forward[name], backward[name] = lambda run=run, own=own: run(own), step
    row = f"{num_queries:5} {context:5}"
    for direction, programs in (("forward", forward), ("backward", backward)):
        figures = medians(programs, repeats)
        print(f"{row}  {direction:8}", *(f"{figures[name]:14.3g}" for name in figures), flush=True)


def main() -> None:
    prepare_cpu(1)
    where = f"{jax.devices()[0].device_kind}, 16 heads" if IS_GPU else "one core, 4 heads"
    dtype = "bfloat16" if IS_GPU else "float32"
    print(f"{where} of {K}, {dtype}, jax {jax.__version__}, milliseconds")
    names = ["products", "dense", *attentions()]
    print("slice after           ", *(f"{name:>14}" for name in names))
    for num_queries, context in cases():
        measure(num_queries, context)


if __name__ == "__main__":
    main()
