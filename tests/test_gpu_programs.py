"""The training step as XLA compiles it for GPUs that are not here.

Every schedule, with slices of one length and of several: no tick copies a buffer, no stage waits in
a branch for a device of another, and the memory is what the budget says. It needs a compiler, but
no GPU: pip install -e ".[compile]".
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from support.compilers import (
    WITHOUT_COMPILER,
    WITHOUT_FLASH,
    compilers_without_devices,
    has_flash,
    has_gpu_compiler,
    has_tpu_compiler,
)
from tpipe_jax.commands.compile import CompiledFor, compile_for
from tpipe_jax.config.flags import CompileFlags
from tpipe_jax.config.settings import (
    AttentionConfig,
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    ScheduleName,
    TrainConfig,
)
from tpipe_jax.devices.exchanges import find_collectives
from tpipe_jax.training.memory import budget, host_bytes, program_bytes
from tpipe_jax.training.optimizer import make_optimizer

ROWS, T, D = 2, 1024, 256
EQUAL, UNEQUAL = "uniform:4", "384,320,320"
BUFFER_BYTES = ROWS * T * D * 2  # a stage's inputs; saved values and sums of gradients are larger
# XLA's plan may exceed the budget, which leaves out what a stage needs while it works on a slice:
TOLERANCE = 1.4  # by so much, with a model as small as this one,
SCORE_BLOCKS = 4  # and by a few blocks of scores, where attention computes in blocks.


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_gpu_compiler(), reason=WITHOUT_COMPILER),
]


compilers = pytest.fixture(autouse=True, scope="module")(compilers_without_devices)


def config(schedule: ScheduleName, slices: str, mesh: MeshConfig, backend: Any) -> Config:
    num_layers = 2 * mesh.pipe if schedule == "interleaved" else mesh.pipe
    return Config(
        model=ModelConfig(num_layers, D, 4, vocab_size=512, seq_len=T),
        mesh=mesh,
        plan=PlanConfig(slices, "1,1", schedule=schedule),
        train=TrainConfig(batch_size=ROWS * mesh.data),
        attention=AttentionConfig(backend),
    )


Case = tuple[str, ScheduleName, str, MeshConfig, str]


def cases() -> Iterator[Case]:
    """Every GPU with every schedule and both kinds of slices. In turn these have each pair of mesh
    and backend: each schedule has all pairs, and so has each kind of slices. ALL_PROGRAMS=1 has
    every combination.
    """
    schedules: list[ScheduleName] = [s for s in get_args(ScheduleName) if s != "auto"]
    meshes = MeshConfig(1, 2, 1), MeshConfig(2, 2, 2)
    for gpu, (s, schedule), (n, slices) in itertools.product(
        ("v100", "a100", "h100"), enumerate(schedules), enumerate((EQUAL, UNEQUAL))
    ):
        backends = ("xla",) if gpu == "v100" else ("xla", "cudnn", "flash")
        pairs = list(itertools.product(meshes, backends))
        if "ALL_PROGRAMS" not in os.environ:
            pairs = [pairs[(2 * s + n + 3 * (gpu == "h100")) % len(pairs)]]
        for mesh, backend in pairs:
            yield gpu, schedule, slices, mesh, backend


def working_bytes(compiled: CompiledFor) -> int:
    config, (num_rows, num_tokens) = compiled.spec.config, compiled.schedule.longest_shape
    num_heads = config.model.num_heads // config.mesh.model
    if config.attention.backend != "xla":
        return 0
    return SCORE_BLOCKS * num_rows * num_heads * num_tokens * T * 4


def most_copied_bytes(compiled: CompiledFor) -> int:
    """Two packets in each direction, and half a buffer for all that is small."""
    num_rows, num_tokens = compiled.schedule.longest_shape
    return 4 * num_rows * num_tokens * D * 2 + BUFFER_BYTES // 2


def check(compiled: CompiledFor) -> None:
    assert compiled.tick
    assert compiled.tick.copied_bytes < most_copied_bytes(compiled)
    in_branches = {c.kind for c in find_collectives(compiled.step.as_text()) if c.in_branch}
    assert in_branches <= {"all-reduce"}  # compiling has checked that it is of one stage
    known = sum(
        budget(compiled.spec, compiled.schedule, make_optimizer(compiled.spec.config)).values()
    )
    assert program_bytes(compiled.step) < TOLERANCE * known + working_bytes(compiled)
    kernels = compiled.tick.kernels
    assert 12 < kernels.forward < 40
    assert kernels.forward < kernels.backward < 90
    if compiled.spec.config.attention.backend == "cudnn":
        assert 3 < kernels.forward_context < 20
        assert 3 < kernels.backward_context < 30
    else:
        assert kernels.forward_context == kernels.backward_context == 0
    assert compiled.tick.exchanges["collective-permute"][0] == 2


@pytest.mark.parametrize(("gpu", "schedule", "slices", "mesh", "backend"), list(cases()))
def test_no_copies_and_no_foreign_exchanges(
    gpu: Any, schedule: ScheduleName, slices: str, mesh: MeshConfig, backend: str
) -> None:
    if backend == "flash" and not has_flash():
        pytest.skip(WITHOUT_FLASH)
    flags = CompileFlags(config(schedule, slices, mesh, backend), Path("run"), gpu=gpu)
    check(compile_for(flags))


@pytest.mark.parametrize(
    ("gpu", "backend", "seq_len", "forward", "backward"),
    [
        ("h100", "flash", 8192, 16, 30),
        ("a100", "flash", 8192, 16, 30),
        ("v100", "xla", 4096, 26, 50),
    ],
)
def test_a_layer_starts_few_kernels_for_a_slice(
    gpu: Any, backend: Any, seq_len: int, forward: int, backward: int
) -> None:
    """Of GPT3-1B, in 16 slices, and none for each part of the context."""
    if backend == "flash" and not has_flash():
        pytest.skip(WITHOUT_FLASH)
    asked = Config(
        model=ModelConfig(2, 2048, 16, vocab_size=50257, seq_len=seq_len),
        plan=PlanConfig("uniform:16", "2"),
        train=TrainConfig(batch_size=2),
        attention=AttentionConfig(backend),
        memory=MemoryConfig(remat="dots"),
    )
    compiled = compile_for(CompileFlags(asked, Path("run"), gpu=gpu))
    assert compiled.tick
    kernels = compiled.tick.kernels
    assert kernels.forward <= forward
    assert kernels.backward <= backward
    assert kernels.forward_context == kernels.backward_context == 0


@pytest.mark.parametrize(
    ("gpu", "compute", "backend"),
    [
        ("v100", "float16", "xla"),
        ("b200", "bfloat16", "cudnn"),
        ("h100", "bfloat16", "flash" if has_flash() else "cudnn"),
    ],
)
def test_what_a_gpu_chooses(gpu: Any, compute: str, backend: str) -> None:
    asked = config("terapipe", EQUAL, MeshConfig(1, 2, 1), "auto")
    chosen = compile_for(CompileFlags(asked, Path("run"), gpu=gpu)).spec.config
    assert (chosen.precision.compute, chosen.attention.backend) == (compute, backend)


def test_stages_of_unequal_depth_skip_layers_without_copies() -> None:
    asked = config("terapipe", UNEQUAL, MeshConfig(1, 2, 1), "auto")
    model = ModelConfig(3, D, 4, vocab_size=512, seq_len=T)
    flags = CompileFlags(Config(**(vars(asked) | {"model": model})), Path("run"), gpu="h100")
    compiled = compile_for(flags)
    assert compiled.tick.copied_bytes < most_copied_bytes(compiled)


@pytest.mark.parametrize("mesh", [MeshConfig(1, 2, 1), MeshConfig(1, 2, 2)], ids=str)
def test_experts_copy_nothing_and_sum_in_the_short_format(mesh: MeshConfig) -> None:
    model = ModelConfig(
        *(2, D, 4), vocab_size=512, seq_len=T, family="llama", num_experts=8, d_ff=D
    )
    asked = replace(config("terapipe", EQUAL, mesh, "auto"), model=model)
    compiled = compile_for(CompileFlags(asked, Path("run"), gpu="h100"))
    assert compiled.tick
    assert compiled.tick.copied_bytes < most_copied_bytes(compiled)
    assert compiled.tick.kernels.forward <= 70
    assert compiled.tick.kernels.backward <= 110
    # Attention and experts, forward, and their inputs, backward; weights of experts are small.
    of_slice = T // 4 * D * 2
    _, summed = compiled.tick.exchanges.get("all-reduce", (0, 0))
    assert summed <= (4.3 * of_slice if mesh.model > 1 else 0)


@pytest.mark.parametrize(
    ("gpu", "schedule", "slices"),
    [
        ("h100", "terapipe", EQUAL),
        ("h100", "1f1b", UNEQUAL),
        ("a100", "interleaved", EQUAL),
        ("v100", "1f1b-deferred", EQUAL),
    ],
)
def test_saved_values_are_on_the_host(gpu: Any, schedule: ScheduleName, slices: str) -> None:
    """Their bytes are missing on the device, and slices of them go to and fro, not the buffers."""
    asked = config(schedule, slices, MeshConfig(1, 2, 1), "auto")
    here, there = (
        compile_for(
            CompileFlags(
                replace(asked, memory=MemoryConfig(remat="dots", offload=is_there)),
                Path("run"),
                gpu=gpu,
            )
        )
        for is_there in (False, True)
    )
    offloaded = host_bytes(there.spec, there.schedule)
    assert offloaded > 4 * BUFFER_BYTES
    assert host_bytes(here.spec, here.schedule) == 0
    moved = program_bytes(here.step) - program_bytes(there.step)
    # Slices that are on their way are on the device, for each length.
    of_slice = offloaded * there.schedule.longest_shape[1] / (there.schedule.num_rows * T)
    assert moved > offloaded - (2 if slices == EQUAL else 4) * of_slice
    assert there.step.memory_analysis().host_temp_size_in_bytes >= offloaded
    assert there.tick.copied_bytes < most_copied_bytes(there)
    assert there.tick.kernels.forward <= here.tick.kernels.forward + 8


@pytest.mark.skipif(not has_tpu_compiler(), reason="needs libtpu")
@pytest.mark.parametrize("slices", [EQUAL, UNEQUAL])
def test_tpus_copy_nothing_and_exchange_within_stages(slices: str) -> None:
    asked = config("terapipe", slices, MeshConfig(1, 2, 2), "auto")
    compiled = compile_for(CompileFlags(asked, Path("run"), tpu="v5e:2x2"))
    assert compiled.tick.copied_bytes < most_copied_bytes(compiled)
    in_branches = {c.kind for c in find_collectives(compiled.step.as_text()) if c.in_branch}
    assert in_branches <= {"all-reduce", "all-gather", "reduce-scatter"}
