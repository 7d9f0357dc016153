"""The executor and the stage together: loss and every gradient against the unpipelined model."""

import dataclasses
from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Compiled

from support import fake_cudnn, fake_flash, reference
from support.marks import slow
from support.quick_pipeline import QUICK, TOLERANCE, Params, draw_params
from tpipe_jax.attention import backends, flash
from tpipe_jax.config.settings import (
    IGNORE,
    AttentionConfig,
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    PrecisionConfig,
    ScheduleName,
    TrainConfig,
)
from tpipe_jax.devices import mesh
from tpipe_jax.devices.exchanges import check_branches, find_collectives
from tpipe_jax.devices.skips import skips_on
from tpipe_jax.model import sharding, transformer
from tpipe_jax.pipeline import build
from tpipe_jax.pipeline import spec as spec_module
from tpipe_jax.pipeline import stage as stage_module
from tpipe_jax.pipeline.footprint import activation_bytes_per_token
from tpipe_jax.pipeline.packing import Packing
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.training.step import make_loss, make_loss_and_grads


def open_mesh(config: MeshConfig) -> Mesh:
    return mesh.make_mesh(config, jax.devices()[: config.num_devices])


class Case(NamedTuple):
    """A mesh, a model and a plan for it; slices are of one data shard."""

    mesh: MeshConfig
    num_layers: int
    token_slices: str
    batch_slices: str
    batch_size: int
    schedule: ScheduleName = "terapipe"
    chunks: int | None = None

    @property
    def config(self) -> Config:
        return Config(
            model=ModelConfig(self.num_layers, 16, 2, 24, vocab_size=11, seq_len=12),
            mesh=self.mesh,
            plan=PlanConfig(
                self.token_slices,
                self.batch_slices,
                schedule=self.schedule,
                chunks=self.chunks,
            ),
            train=TrainConfig(batch_size=self.batch_size * self.mesh.data),
        )


def draw_rows(config: Config) -> np.ndarray:
    """The last target of the first sequence does not count, so the data shards' counts differ."""
    shape = config.train.batch_size, config.model.seq_len + 1
    rows = np.random.default_rng(2).integers(0, config.model.vocab_size, shape, np.int32)
    rows[0, -1] = IGNORE
    return rows


@cache
def unpipelined(config: ModelConfig, batch_size: int) -> tuple[Array, Params]:
    args = draw_params(config), draw_rows(Config(config, train=TrainConfig(batch_size=batch_size)))
    loss_and_grads = jax.jit(jax.value_and_grad(partial(reference.loss, config)))
    return loss_and_grads.lower(*args).compile(QUICK)(*args)


def compile_step(config: Config, make: Any = make_loss_and_grads) -> Compiled:
    """Loss, or loss and gradients, compiled for parameters and rows that lie where they should."""
    devices = open_mesh(config.mesh)
    num_chunks = config.plan.num_chunks
    params = jax.eval_shape(
        lambda: reference.to_stages(
            transformer.init(config.model, jax.random.key(0)), devices, num_chunks
        )
    )
    rows = jax.ShapeDtypeStruct((config.train.batch_size, config.model.seq_len + 1), jnp.int32)
    specs = sharding.param_specs(config.model, len(params["blocks"])), PartitionSpec("data")
    args = jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        (params, rows),
        mesh.shardings(devices, specs),
    )
    function = make(make_spec(config, devices), make_schedule(reference.plan_of(config)))
    return function.lower(*args).compile(QUICK)


def run_step(config: Config, make: Any = make_loss_and_grads) -> Any:
    """What the compiled step makes of the parameters and rows drawn above."""
    devices, step = open_mesh(config.mesh), compile_step(config, make)
    staged = reference.to_stages(draw_params(config.model), devices, config.plan.num_chunks)
    params = jax.device_get(staged)
    places = mesh.shardings(devices, sharding.param_specs(config.model, len(params["blocks"])))
    rows = mesh.put_rows(devices, draw_rows(config))
    return jax.device_get(step(jax.device_put(params, places), rows))


def check_gradients(config: Config) -> None:
    loss, grads = run_step(config)
    chex.assert_type(jax.tree.leaves(grads), jnp.float32)
    num_chunks = config.plan.num_chunks
    sizes = config.model.num_layers, config.model.vocab_size, num_chunks
    got = reference.from_stages(grads, *sizes)
    expected = unpipelined(config.model, config.train.batch_size)
    reference.assert_close((loss, got), expected, TOLERANCE)
    # Layers and tokens that are padding count in the global norm: their gradients are zeros.
    padded = reference.to_stages(got, open_mesh(config.mesh), num_chunks)
    chex.assert_trees_all_equal(grads, jax.device_get(padded))


def lists(total: int, max_slices: int) -> st.SearchStrategy[str]:
    """Lists of positive lengths that sum to the total."""
    cuts = st.sets(st.integers(1, total - 1), max_size=max_slices - 1) if total > 1 else st.just([])
    return cuts.map(lambda c: ",".join(map(str, np.diff([0, *sorted(c), total]))))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_stages = draw(st.integers(1, 4))
    # Layers of a stage are what takes time to compile.
    num_layers = draw(st.integers(1, min(5, 2 * num_stages)))
    batch_size = draw(st.integers(1, 4))
    batch_slices = draw(lists(batch_size, 3) | st.just("uniform:1"))
    has_several, has_chunks = "," in batch_slices, 1 < num_stages <= num_layers / 2
    schedules = ["terapipe"] + ["1f1b"] * has_several + ["interleaved"] * has_chunks
    schedules += ["1f1b-deferred"] * (has_several and num_stages > 1)
    return Case(
        MeshConfig(data=draw(st.integers(1, 2)), pipe=num_stages),
        num_layers,
        draw(lists(12, 3) | st.integers(1, 12).map("uniform:{}".format)),
        batch_slices,
        batch_size,
        draw(st.sampled_from(schedules)),
    )


# Shrinking would take minutes, since each example is compiled.
@pytest.mark.slow
@settings(max_examples=8, phases=[Phase.generate])
@given(cases())
def test_gradients_equal_those_of_the_unpipelined_model(case: Case) -> None:
    check_gradients(case.config)


@pytest.mark.parametrize(
    "case",
    [
        slow(Case(MeshConfig(1, 4, 1), 2, "6,6", "1,2", 3)),  # two stages have no layer
        slow(Case(MeshConfig(2, 4, 1), 5, "7,5", "uniform:1", 1)),
        # Six sequences take turns in the rows of three.
        slow(Case(MeshConfig(1, 2, 1), 3, "5,4,3", "uniform:6", 6, "1f1b")),
        slow(Case(MeshConfig(1, 3, 1), 3, "7,5", "1,2,1,2,1,2", 9, "1f1b")),
        slow(Case(MeshConfig(), 2, "7,5", "1,2,1", 4, "1f1b")),
        Case(MeshConfig(2, 2, 2), 3, "7,5", "uniform:4", 4, "1f1b"),
        # Fewer slices than stages, which wait for the first to come round, and more, which wait.
        Case(MeshConfig(1, 3, 1), 7, "12", "2", 2, "interleaved"),
        slow(Case(MeshConfig(1, 2, 1), 7, "7,5", "1,2", 3, "interleaved")),  # the last has less
        slow(Case(MeshConfig(2, 2, 2), 6, "5,4,3", "uniform:1", 2, "interleaved", 3)),
        Case(MeshConfig(1, 2, 1), 3, "5,4,3", "uniform:5", 5, "1f1b-deferred"),
        slow(Case(MeshConfig(1, 3, 1), 3, "7,5", "1,2,1,2", 6, "1f1b-deferred")),
        slow(Case(MeshConfig(2, 2, 2), 3, "7,5", "uniform:4", 4, "1f1b-deferred")),
    ],
    ids=str,
)
def test_gradients_on_chosen_meshes(case: Case) -> None:
    check_gradients(case.config)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize(
    "case",
    [
        Case(MeshConfig(1, 2, 2), 3, "5,4,3", "1,2", 3),
        Case(MeshConfig(1, 2, 1), 2, "6,6", "1,1", 2),  # slices of one shape, and idle stages
        slow(Case(MeshConfig(1, 3, 1), 7, "7,5", "2", 2, "interleaved")),
        slow(Case(MeshConfig(2, 2, 2), 3, "7,5", "uniform:4", 4, "1f1b")),
        slow(Case(MeshConfig(1, 2, 1), 3, "5,4,3", "uniform:5", 5, "1f1b-deferred")),
    ],
    ids=str,
)
def test_gradients_where_work_is_skipped_otherwise(
    case: Case, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the loops that programs for other platforms have, here on CPUs."""
    skips = skips_on(platform)
    monkeypatch.setattr(spec_module, "skips_on", lambda _: skips)
    text = compile_step(case.config).as_text()
    has_one_shape = case.token_slices == "6,6"
    assert ("slice_body/while" in text) != (has_one_shape and platform == "gpu")
    assert ("on_all_devices/while" in text) == (platform == "tpu")
    in_sweeps = platform == "gpu" and "1f1b" not in case.schedule
    assert ("whole_batch" in text) == in_sweeps
    assert ("on_all_devices" in text) != in_sweeps
    check_gradients(case.config)


@pytest.mark.parametrize(
    ("divided", "schedule"),
    [
        slow(MeshConfig(2, 2, 2), "terapipe"),
        slow(MeshConfig(1, 2, 1), "terapipe"),
        slow(MeshConfig(1, 2, 1), "1f1b"),
    ],
    ids=str,
)
def test_gradients_with_a_fused_kernel(
    divided: MeshConfig, schedule: ScheduleName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that XLA cannot look into, on heads that 'model' divides; a slice is too short for it."""
    monkeypatch.setattr(backends, "_obstacle", lambda *_: None)
    fake_cudnn.register()
    num = {"terapipe": 2, "1f1b": 5}[schedule]  # with more sequences than rows
    slices = "uniform:1" if num == 2 else "uniform:5"
    config = Case(divided, 2, "80,10,64", slices, num, schedule).config
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_heads=4, seq_len=154),
        attention=AttentionConfig("cudnn", block=100),
    )
    check_gradients(config)
    check_branches(find_collectives(compile_step(config).as_text()), open_mesh(divided))


@pytest.mark.parametrize(
    ("case", "num_heads"),
    [
        (Case(MeshConfig(1, 2, 1), 2, "5,4,3", "uniform:5", 5, "1f1b"), 4),
        slow(Case(MeshConfig(2, 2, 2), 2, "7,5", "1,2", 3), 4),
        slow(Case(MeshConfig(1, 2, 1), 2, "12", "1,2", 3), 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_lse_of_sequences", [slow(True), False])
def test_gradients_with_flash_attention(
    case: Case, num_heads: int, has_lse_of_sequences: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what stands in for its kernels, in programs that have values side by side, too."""
    monkeypatch.setattr(backends, "_obstacle", lambda *_: None)
    kernels = fake_flash.kernels(has_lse_of_sequences)
    monkeypatch.setattr(flash, "flash_kernels", lambda _: kernels)
    monkeypatch.setattr(spec_module.StageSpec, "joins_arrays", case.mesh.model == 1)
    config = case.config
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_heads=num_heads),
        attention=AttentionConfig("flash"),
    )
    check_gradients(config)
    check_branches(find_collectives(compile_step(config).as_text()), open_mesh(case.mesh))


@pytest.mark.parametrize(
    ("case", "memory"),
    [
        slow(Case(MeshConfig(2, 2, 1), 3, "7,5", "1,2", 3), MemoryConfig()),
        slow(
            Case(MeshConfig(1, 2, 1), 3, "5,4,3", "uniform:6", 6, "1f1b"),
            MemoryConfig(remat="full"),
        ),
        slow(
            Case(MeshConfig(1, 2, 1), 3, "7,5", "uniform:3", 3, "1f1b-deferred"),
            MemoryConfig(remat="none"),
        ),
        slow(
            Case(MeshConfig(1, 2, 1), 3, "5,4,3", "1,2", 3), MemoryConfig(defer_weight_grads=True)
        ),
        slow(Case(MeshConfig(1, 3, 1), 7, "12", "2", 2, "interleaved"), MemoryConfig()),
    ],
    ids=str,
)
def test_gradients_with_values_side_by_side(
    case: Case, memory: MemoryConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As programs for GPUs have them, here on CPUs."""
    monkeypatch.setattr(spec_module.StageSpec, "joins_arrays", True)
    joined = []
    pack = Packing.pack

    def noted(self: Packing, values: Any) -> dict[str, Array]:
        joined.append(len(self.groups) < len(self.widths))
        return pack(self, values)

    monkeypatch.setattr(Packing, "pack", noted)
    check_gradients(dataclasses.replace(case.config, memory=memory))
    assert set(joined) == {"," in case.token_slices and memory.remat != "full"}


@pytest.mark.slow
def test_slices_change_nothing() -> None:
    whole, *sliced = (
        Case(MeshConfig(pipe=2), 3, token_slices, batch_slices, 3).config
        for token_slices, batch_slices in [
            ("12", "3"),
            ("uniform:12", "uniform:1"),
            ("6,3,3", "1,2"),
            ("uniform:3", "uniform:3"),
        ]
    )
    expected = run_step(whole)
    for config in sliced:
        reference.assert_close(run_step(config), expected, TOLERANCE)


@pytest.mark.parametrize(
    "memory",
    [
        slow(MemoryConfig(remat="none")),
        slow(MemoryConfig(remat="full")),
        slow(MemoryConfig(remat="attn,hidden,norm_1")),
        slow(MemoryConfig(defer_weight_grads=True)),
    ],
    ids=str,
)
def test_what_is_saved_changes_nothing(memory: MemoryConfig) -> None:
    """With a stage that has a layer less, and operators divided."""
    config = Case(MeshConfig(pipe=2, model=2), 3, "7,5", "1,2", 3).config
    check_gradients(dataclasses.replace(config, memory=memory))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "hidden", "none"])
def test_gradients_of_weights_come_later_whatever_is_saved(remat: str) -> None:
    config = Case(MeshConfig(pipe=2), 3, "7,5", "uniform:3", 3, "1f1b-deferred").config
    check_gradients(dataclasses.replace(config, memory=MemoryConfig(remat=remat)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "seq_len", "batch_slices", "tokens", "part"),
    [
        (MeshConfig(pipe=2), 12, "1,2", 4, (1, 4)),
        slow(MeshConfig(pipe=2), 11, "1,2", 4, (1, 11)),  # which has no divisor
        slow(MeshConfig(pipe=2), 12, "1,3", 24, (2, 12)),
        slow(MeshConfig(pipe=2, model=2), 12, "1,2", 4, (1, 4)),
    ],
)
def test_deferred_products_go_part_by_part(
    mesh: MeshConfig,
    seq_len: int,
    batch_slices: str,
    tokens: int,
    part: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes, of_part = set(), stage_module.linear_gradients

    def noted(*args: Any) -> Params:
        shapes.update(value.shape[:2] for value in args[-1].values())
        return of_part(*args)

    monkeypatch.setattr(stage_module, "linear_gradients", noted)
    monkeypatch.setitem(build.DEFERRED_TOKENS, "cpu", tokens)
    batch_size = sum(map(int, batch_slices.split(",")))
    config = Case(mesh, 3, f"7,{seq_len - 7}", batch_slices, batch_size).config
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, seq_len=seq_len),
        memory=MemoryConfig(defer_weight_grads=True),
    )
    check_gradients(config)
    assert shapes == {part}


@pytest.mark.parametrize(
    "schedule", ["terapipe", "1f1b", slow("interleaved"), slow("1f1b-deferred")]
)
def test_loss_alone_equals_the_loss_with_gradients(schedule: ScheduleName) -> None:
    config = Case(MeshConfig(data=2, pipe=2), 4, "5,5,2", "1,1,1,1", 4, schedule).config
    expected, _ = unpipelined(config.model, config.train.batch_size)
    reference.assert_close(run_step(config, make_loss), expected, TOLERANCE)


@pytest.mark.slow
def test_bfloat16_is_near_float32() -> None:
    """Activations are rounded to 2^-9 some twenty times on the way through 3 layers and back: up to
    4% of the largest gradient is seen. The loss is an average over tokens, and so is their error.
    """
    config = Case(MeshConfig(data=2, pipe=2), 3, "7,5", "1,1", 2).config
    config = dataclasses.replace(config, precision=PrecisionConfig("bfloat16"))
    loss, grads = run_step(config)
    chex.assert_type(jax.tree.leaves((loss, grads)), jnp.float32)
    got = reference.from_stages(grads, config.model.num_layers, config.model.vocab_size)
    expected_loss, expected_grads = unpipelined(config.model, config.train.batch_size)
    reference.assert_close(loss, expected_loss, 2e-3)
    reference.assert_close(got, expected_grads, 0.08)
    assert reference.relative_error(got["norm"]["scale"], expected_grads["norm"]["scale"]) > 1e-4


def long_config(num_slices: int, batch_slices: tuple[int, ...] = (2,), model: int = 1) -> Config:
    """Of a step in which saved activations outweigh all else."""
    return Config(
        model=ModelConfig(2, 64, 4, vocab_size=16, seq_len=512),
        mesh=MeshConfig(pipe=2, model=model),
        plan=PlanConfig(f"uniform:{num_slices}", ",".join(map(str, batch_slices))),
        train=TrainConfig(batch_size=sum(batch_slices)),
    )


def temporary_bytes(config: Config) -> int:
    return compile_step(config).memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_the_slices() -> None:
    """Temporaries of one slice shrink with its length, which would hide that something is kept for
    each of a few slices; from 8 to 16 slices that no longer counts.
    """
    one, eight, sixteen = (temporary_bytes(long_config(n)) for n in (1, 8, 16))
    assert eight <= 1.1 * one
    assert sixteen <= 1.1 * eight


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "1f1b-deferred"])
def test_memory_does_not_grow_with_the_batch_under_1f1b(schedule: ScheduleName) -> None:
    """But for the tokens of the batch, which are 1% of it here."""
    few, many = (
        temporary_bytes(dataclasses.replace(config, plan=plan))
        for config in (long_config(4, (1,) * 4), long_config(4, (1,) * 32))
        for plan in [dataclasses.replace(config.plan, schedule=schedule)]
    )
    assert few <= many <= 1.05 * few
    whole = 8 if schedule == "1f1b-deferred" else 4  # for it has slices that wait as well
    assert few < temporary_bytes(long_config(4, (1,) * whole))


@pytest.mark.slow
def test_devices_of_an_operator_save_what_the_estimate_says() -> None:
    """Other buffers that grow with the batch are the same however many devices share operators, so
    they cancel out.
    """

    def per_token(num_operator_devices: int) -> tuple[float, int]:
        """Bytes that a token more takes, and those that the estimate says are saved."""
        few, many = (long_config(8, (1,) * b, num_operator_devices) for b in (4, 8))
        taken = (temporary_bytes(many) - temporary_bytes(few)) / (4 * 512)
        return taken, sum(activation_bytes_per_token(make_spec(few, open_mesh(few.mesh))))

    (alone, alone_saved), (shared, shared_saved) = per_token(1), per_token(2)
    assert alone - shared == pytest.approx(alone_saved - shared_saved, rel=0.03)
