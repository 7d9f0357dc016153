"""What only a GPU can tell: JAX_PLATFORMS=cuda,cpu python -m pytest -n 0 tests/test_gpu.py"""

import json
import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from support import reference, runs
from support.drawn_slices import TOLERANCE, draw, expect, rounded, run
from tpipe_jax.attention import flash
from tpipe_jax.attention.base import Attention
from tpipe_jax.attention.blockwise import blockwise
from tpipe_jax.attention.cudnn import cudnn_kernel
from tpipe_jax.attention.fused import grouped
from tpipe_jax.commands.compile import compile_for
from tpipe_jax.config.flags import CompileFlags
from tpipe_jax.config.settings import (
    AttentionConfig,
    Backend,
    Config,
    Format,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    PrecisionConfig,
    ScheduleName,
    TrainConfig,
)
from tpipe_jax.devices.hardware import facts_of
from tpipe_jax.devices.inplace import Position
from tpipe_jax.devices.mesh import make_mesh, put_rows
from tpipe_jax.devices.targets import ALLOWANCE_BYTES, GPUS
from tpipe_jax.model import transformer
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.pipeline.tick_program import read_tick
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.training.memory import compile_step, program_bytes
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import init_state
from tpipe_jax.training.step import make_loss_and_grads

if os.environ.get("JAX_PLATFORMS", "").startswith("cuda"):
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # so that a child has memory, too
    # Else most of the time goes into timing kernels, to choose among them.
    os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 {os.environ['XLA_FLAGS']}"
pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

IN_GROUPS = {group: grouped(cudnn_kernel(), group) for group in (64, 100, 256)}
SHORT = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])


@SHORT
@pytest.mark.parametrize("group", IN_GROUPS)
@pytest.mark.parametrize("L", [64, 65, 130, 300])
def test_cudnn_equals_float64_wherever_the_slice_lies(L: int, group: int, dtype: Any) -> None:
    """cuDNN rounds weights, gradients of scores and results to 2^-9 or 2^-12."""
    for i, context in enumerate([0, 1, 99, 100, 101, 300]):
        s = rounded(draw(Position(i % 3, context), L, seed=i, num_heads=3), dtype)
        got, want = run(s, IN_GROUPS[group], dtype), expect(s)
        reference.assert_close(got.lse, want.lse, 10 * TOLERANCE)
        reference.assert_close(got._replace(lse=want.lse), want, 2 * float(jnp.finfo(dtype).eps))


@SHORT
def test_cudnn_reads_nothing_that_comes_later(dtype: Any) -> None:
    s = rounded(draw(Position(1, 200), L=130), dtype)
    poisoned = jax.tree.map(lambda a: np.full_like(a, np.nan), s.cache)
    for clean, other in zip(s.cache, poisoned, strict=True):
        s.seen(other)[...] = s.seen(clean)
    for a, b in zip(
        jax.tree.leaves(run(s, IN_GROUPS[100], dtype)),
        jax.tree.leaves(run(s._replace(cache=poisoned), IN_GROUPS[100], dtype)),
        strict=True,
    ):
        reference.assert_close(b, a, float(jnp.finfo(dtype).eps))


def capability() -> tuple[int, int] | None:
    return facts_of(make_mesh(MeshConfig(), jax.devices()[:1])).capability


def flash_obstacle() -> str | None:
    """Why this GPU cannot run FlashAttention; None if it can."""
    found = capability()
    return flash.obstacle(found) if found else "needs a GPU of NVIDIA"


@cache
def flash_here() -> Attention:
    """Skips the test if this GPU cannot run it."""
    if why := flash_obstacle():
        pytest.skip(why)
    return flash.flash(flash.flash_kernels(capability()))


@SHORT
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("L", [1, 7, 64, 130, 300])
def test_flash_equals_float64_wherever_the_slice_lies(L: int, group: int, dtype: Any) -> None:
    """It rounds as cuDNN does."""
    for i, context in enumerate([0, 1, 127, 128, 129, 640 - L]):
        s = draw(Position(i % 3, context), L, seed=i, num_heads=3, group=group)
        s = rounded(s, dtype)
        got, want = run(s, flash_here(), dtype), expect(s)
        reference.assert_close(got.lse, want.lse, 10 * TOLERANCE)
        reference.assert_close(got._replace(lse=want.lse), want, 2 * float(jnp.finfo(dtype).eps))


@SHORT
@pytest.mark.parametrize("num_rows", [1, 2])
def test_flash_equals_float64_on_whole_sequences(num_rows: int, dtype: Any) -> None:
    s = rounded(draw(Position(1, 0), 300, 300, num_rows=num_rows), dtype)
    got, want = run(s, flash_here(), dtype), expect(s)
    reference.assert_close(got.lse, want.lse, 10 * TOLERANCE)
    reference.assert_close(got._replace(lse=want.lse), want, 2 * float(jnp.finfo(dtype).eps))


@SHORT
def test_what_comes_later_changes_nothing_in_flash(dtype: Any) -> None:
    """It is finite in a cache, since the last tile of keys is read in full."""
    s = rounded(draw(Position(1, 200), L=130), dtype)
    poisoned = jax.tree.map(lambda a: np.full_like(a, 1e3), s.cache)
    for clean, other in zip(s.cache, poisoned, strict=True):
        s.seen(other)[...] = s.seen(clean)
    for a, b in zip(
        jax.tree.leaves(run(s, flash_here(), dtype)),
        jax.tree.leaves(run(s._replace(cache=poisoned), flash_here(), dtype)),
        strict=True,
    ):
        reference.assert_close(b, a, float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("L", [7, 130, 300])
def test_blocks_equal_float64(L: int) -> None:
    """With products in float32, which GPUs round to 2^-11 unless they are told."""
    with jax.default_matmul_precision("highest"):
        for i, context in enumerate([0, 1, 127, 128, 300]):
            s = draw(Position(i % 3, context), L, seed=i)
            reference.assert_close(run(s, blockwise(128)), expect(s), TOLERANCE)
            whole = blockwise(128, reads_whole=True)
            reference.assert_close(run(s, whole), expect(s), TOLERANCE)


def config_of(
    token_slices: str, compute: Format, backend: Backend, schedule: ScheduleName = "terapipe"
) -> Config:
    return Config(
        model=ModelConfig(2, 128, 2, 256, vocab_size=50, seq_len=384),
        plan=PlanConfig(token_slices, "1,1,1", schedule=schedule),
        train=TrainConfig(batch_size=3),
        precision=PrecisionConfig(compute=compute),
        attention=AttentionConfig(backend, None if backend == "flash" else 128),
    )


@cache
def inputs() -> tuple[Any, np.ndarray]:
    config = config_of("384", "float32", "xla")
    rows = np.random.default_rng(0).integers(0, 50, (3, 385), np.int32)
    return jax.device_get(transformer.init(config.model, jax.random.key(0))), rows


@cache
def expected() -> Any:
    """Loss and gradients of the unpipelined model, in float32 on the CPU."""
    config, (params, rows) = config_of("384", "float32", "xla"), inputs()
    with jax.default_device(jax.devices("cpu")[0]):
        function = jax.value_and_grad(partial(reference.loss, config.model))
        return jax.device_get(jax.jit(function)(params, jnp.asarray(rows)))


@pytest.mark.parametrize(
    ("token_slices", "schedule"),
    [("384", "terapipe"), ("30,354", "terapipe"), ("128,100,92,64", "1f1b")],
)
@pytest.mark.parametrize(
    ("compute", "backend", "tolerance"),
    [
        ("float32", "xla", 1e-5),
        ("bfloat16", "xla", 2**-5),  # of the largest of each array; errors of 2^-9 add up
        ("bfloat16", "cudnn", 2**-5),
        ("float16", "cudnn", 2**-8),
        ("bfloat16", "flash", 2**-5),
        ("float16", "flash", 2**-8),
    ],
)
def test_loss_and_gradients_equal_the_unpipelined_models(
    token_slices: str,
    schedule: ScheduleName,
    compute: Format,
    backend: Backend,
    tolerance: float,
) -> None:
    if backend == "flash" and (why := flash_obstacle()):
        pytest.skip(why)
    config, (params, rows) = config_of(token_slices, compute, backend, schedule), inputs()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    step = make_loss_and_grads(make_spec(config, mesh), make_schedule(reference.plan_of(config)))
    with jax.default_matmul_precision("highest"):
        loss, grads = step(reference.to_stages(params, mesh), rows, 2.0**10)
    got = loss, reference.from_stages(grads, 2, 50)
    reference.assert_close(got, expected(), tolerance)


def test_a_run_learns(tmp_path: Path) -> None:
    """The quick start, on one GPU in the format that it has by default."""
    settings = {
        "mesh.pipe": 1,
        "transformer.d-model": 256,  # heads of 64 tokens
        "train.num-steps": 300,
        "train.sample-tokens": 20,
        "plan.token-slices": "64,192",
        "plan.batch-slices": "uniform:2",
    }
    args = [f"--config.{name}={value}" for name, value in settings.items()]
    child = runs.launch(*args, f"--workdir={tmp_path}")
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attention"]["backend"] == ("cudnn" if flash_obstacle() else "flash")
    assert runs.metrics(tmp_path)[-1]["eval_loss"] < 3, out  # guessing costs 5.5


def target_of_this_gpu() -> str:
    """The name of this GPU for `tpipe compile`; skips the test if it has none."""
    kind, stats = jax.devices()[0].device_kind, jax.devices()[0].memory_stats()
    for name, gpu in GPUS.items():
        if gpu.kind.split("-")[0] in kind or kind in gpu.kind:
            size = stats["bytes_limit"] / gpu.memory_bytes
            if 0.5 < size <= 1:  # jax takes three quarters
                return name
    pytest.skip(f"{kind} is not among {', '.join(GPUS)}")


@cache
def layers_of_gpt3() -> tuple[Config, Any]:
    """Two layers of GPT3-1B in 8 slices, compiled on this GPU."""
    config = Config(
        model=ModelConfig(2, 2048, 16, vocab_size=50257, seq_len=2048),
        plan=PlanConfig("uniform:8", "2", schedule="terapipe"),
        train=TrainConfig(batch_size=2),
        memory=MemoryConfig(remat="dots"),
    )
    spec = make_spec(config, make_mesh(config.mesh, jax.devices()[:1]))
    schedule = make_schedule(reference.plan_of(spec.config))
    return config, compile_step(spec, schedule, make_optimizer(spec.config))


def test_memory_is_as_compiled_elsewhere() -> None:
    """But for what `ALLOWANCE_BYTES` is for."""
    config, here = layers_of_gpt3()
    flags = CompileFlags(config, Path("run"), gpu=target_of_this_gpu())
    elsewhere = program_bytes(compile_for(flags).step)
    assert elsewhere * 0.9 < program_bytes(here) < elsewhere + ALLOWANCE_BYTES


def test_kernels_are_as_read_off_the_text(tmp_path: Path) -> None:
    """A traced step, against kernels of a layer for a slice and of its loops over context. The rest
    are kernels of embedding, loss and optimiser, and those of cuDNN beyond one a call.
    """
    config, step = layers_of_gpt3()
    spec = make_spec(config, make_mesh(config.mesh, jax.devices()[:1]))
    state = init_state(spec, make_optimizer(spec.config))
    rows = np.random.default_rng(0).integers(0, 50257, (2, 2049), np.int32)
    rows = put_rows(spec.mesh, rows)
    state, _ = jax.block_until_ready(step(state, rows))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(step(state, rows))
    [path] = tmp_path.rglob("*.xplane.pb")
    kernels = sum(
        "memcpy" not in event.name.lower() and "memset" not in event.name.lower()
        for plane in ProfileData.from_file(str(path)).planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    )
    counted = read_tick(step.as_text(), num_layers=2)
    assert counted
    of = counted.kernels
    turns = sum(-(-context // 1024) for context in range(0, 2048, 256))
    expected = 2 * (
        8 * (of.forward + of.backward) + turns * (of.forward_context + of.backward_context)
    )
    assert expected < kernels < 2 * expected
