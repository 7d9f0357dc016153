"""The profiler: which slices it times, and what it makes of a clock whose readings are known."""

import dataclasses
import itertools
import threading
import time
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from support import reference
from support.profiled_config import CONFIG
from tpipe_jax.attention import backends
from tpipe_jax.config.settings import (
    AttentionConfig,
    Config,
    MemoryConfig,
    MeshConfig,
    PlanConfig,
    PrecisionConfig,
    TrainConfig,
)
from tpipe_jax.devices.mesh import make_mesh, put_rows
from tpipe_jax.model import transformer
from tpipe_jax.model.block import no_tape
from tpipe_jax.model.functional import block_functions
from tpipe_jax.model.reference import self_attention
from tpipe_jax.pipeline import footprint
from tpipe_jax.pipeline.spec import StageSpec, make_spec
from tpipe_jax.planning.schedule import IDLE, Item, Schedule
from tpipe_jax.profiling import cache_key, outside, profiler, programs
from tpipe_jax.profiling.profiler import MAX_TICKS, MIN_SECONDS, Profiler, Program, WithoutLayers
from tpipe_jax.profiling.shapes import TimedShape, shapes_to_time
from tpipe_jax.runtime.stop import Stopped
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_state, state_bytes


class Clock:
    """Seconds that programs would take; some readings are disturbed."""

    weights_share, outside_seconds = 1.5, 0.25

    def __init__(self) -> None:
        self.speed, self.readings = 1.0, 0

    @staticmethod
    def layer_seconds(shape: TimedShape, context: int) -> np.ndarray:
        """Of a slice, forward and backward."""
        work = shape.size * (1e-4 + 1e-6 * context)
        return np.array([work, 3 * work])

    @staticmethod
    def stage_seconds(shape: TimedShape) -> float:
        """Of a slice besides its layers, in either direction."""
        return 1e-4 + 1e-6 * shape.size

    def read(self, run: Any, params: Any, x: Any, *tables: np.ndarray) -> float:
        """What `seconds_of` returns, after checking that the stages have work at the same time."""
        assert params == PARAMS
        self.readings += 1
        shape, seconds = run.shape, 0.5 + 0.01 * run.shape.size  # what it takes without work
        for direction, table in enumerate(tables):
            rows = table.reshape(len(table), -1)
            assert (rows == rows[:, :1]).all()
            busy = rows[:, 0][rows[:, 0] != IDLE]
            assert len(set(busy.tolist())) <= 1
            assert (rows[: len(busy), 0] != IDLE).all()
            seconds += len(rows) * (1e-5 + 1e-7 * shape.size)  # hands slices on
            if len(busy):
                seconds += len(busy) * self._of_tick(run, direction, int(busy[0]))
        if self.readings % 11 == 0:
            seconds += 0.7
        return seconds * self.speed

    def _of_tick(self, run: Any, direction: int, item: int) -> float:
        of_layer = self.layer_seconds(run.shape, run.shape.contexts[item])[direction]
        of_stage = self.stage_seconds(run.shape)
        if run.kind == "no layers":
            return of_stage
        if run.kind == "weights":
            return self.weights_share * run.shape.size * 1e-4
        without = run.shape.size * 1e-4 if run.kind == "deferred" and direction else 0
        return float(of_layer + of_stage - without)


PARAMS = {"blocks": ["a layer"]}


def fake_run(kind: str, shape: TimedShape) -> Any:
    """A compiled program, as far as the profiler looks at it."""
    analysis = SimpleNamespace(
        temp_size_in_bytes=5000 + 70 * shape.size + shape.num_rows * 64 * KEPT,
        argument_size_in_bytes=0,
        output_size_in_bytes=0,
        alias_size_in_bytes=0,
    )
    return SimpleNamespace(kind=kind, shape=shape, memory_analysis=lambda: analysis)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    def program(self: Profiler, of: StageSpec, shape: TimedShape) -> Program:
        kind = "deferred" if of.weight_grads == "some ticks later" else "slices"
        return Program(shape, self._num_ticks(shape), fake_run(kind, shape))

    def idle_step(spec: StageSpec, schedule: Schedule) -> Any:
        assert not schedule.has_passes
        layers = spec.layers_per_stage
        analysis = SimpleNamespace(
            temp_size_in_bytes=10**6 * layers,
            argument_size_in_bytes=10**5,
            output_size_in_bytes=0,
            alias_size_in_bytes=0,
        )
        compiled = SimpleNamespace(memory_analysis=lambda: analysis)
        return SimpleNamespace(spec=spec, compiled=compiled)

    def outside(steps: Any, on_progress: Any) -> list[float]:
        return [clock.outside_seconds * (1 + step.spec.layers_per_stage) for step in steps]

    def without_layers(self: Profiler, shape: TimedShape) -> WithoutLayers:
        return WithoutLayers(shape, *(fake_run("no layers", shape) for _ in range(2)))

    def compiled(self: Profiler, spec: StageSpec, work: Any, *tables: np.ndarray) -> Any:
        return fake_run("weights", work)

    monkeypatch.setattr(Profiler, "_program", program)
    monkeypatch.setattr(Profiler, "_without_layers", without_layers)
    monkeypatch.setattr(Profiler, "_compile", compiled)
    monkeypatch.setattr(profiler, "make_idle_step", idle_step)
    monkeypatch.setattr(profiler, "time_outside", outside)
    monkeypatch.setattr(profiler, "any_state", lambda spec: SimpleNamespace(params=PARAMS))
    monkeypatch.setattr(profiler, "seconds_of", clock.read)
    monkeypatch.setattr(
        profiler, "make_weights_work", lambda spec, item: TimedShape(*item.shape, (0,))
    )
    return clock


KEPT = 4 * (8 * 16 + 64 + 2)  # bytes of a token, as `test_saved_bytes_are_those_of_the_buffers` has
LEFT = 4 * (5 * 16 + 64)  # of a token that waits for gradients of weights
DEEP = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=6))


@pytest.fixture
def mesh() -> Mesh:
    return make_mesh(CONFIG.mesh, jax.devices()[:2])


def test_slices_are_timed_for_as_long_as_idle_sweeps_take(clock: Clock, mesh: Mesh):
    """Or for as many ticks as there may be, since the difference of both is what is measured."""
    profiler_ = Profiler(make_spec(CONFIG, mesh))
    profiler_.profile(lambda *_: None)
    least = profiler_._least_seconds
    assert least > MIN_SECONDS
    for num_tokens in (64, 16, 8):
        shape = TimedShape(1, num_tokens, (0,))
        program = Program(shape, profiler_._num_ticks(shape), fake_run("slices", shape))
        assert program.num_ticks == min(4 * 64 // num_tokens, MAX_TICKS)
        for ticks, per_token in zip(
            profiler_._num_busy(program), profiler_._seconds_per_token, strict=True
        ):
            assert ticks == program.num_ticks or ticks * per_token * num_tokens >= least


@pytest.mark.parametrize("config", [CONFIG, DEEP], ids=["1 layer", "3 layers"])
def test_a_slice_takes_what_busy_ticks_take_longer(clock: Clock, mesh: Mesh, config: Config):
    """On stages of three layers it takes three times what one layer takes, and once what a stage
    does besides.
    """
    layers = config.model.num_layers // 2
    parts: list[tuple[int, int]] = []
    profile = Profiler(make_spec(config, mesh)).profile(
        lambda *part: parts.append(part), with_deferral=True
    )
    assert parts[-1][0] == parts[-1][1]
    assert all(a <= b for (a, _), (b, _) in itertools.pairwise(parts))
    assert (profile.batch_size, profile.seq_len, profile.key_block) == (4, 64, 64)
    assert profile.outside_seconds == pytest.approx(0.25 * (1 + layers))
    assert profile.memory.fixed_bytes == 10**6 * layers + 10**5
    shapes = shapes_to_time(4, 64, 8, 2)
    expected = [(*shape[:2], context) for shape in shapes for context in shape.contexts]
    assert [sample[:3] for sample in profile.samples] == expected
    for sample in profile.samples:
        shape = TimedShape(*sample[:2], (sample.context,))
        seconds = layers * clock.layer_seconds(shape, sample.context) + clock.stage_seconds(shape)
        assert sample[3:5] == pytest.approx(seconds)
    assert profile.stage_seconds == pytest.approx((1e-4, 1e-6))
    assert profile.transfer == pytest.approx((1e-5, 1e-7))
    assert profile.memory.working_bytes_per_token == 70
    assert profile.memory.activation_bytes(1, 1) == layers * KEPT + 4 * 16
    assert profile.memory.activation_bytes(0, 0, 1) == layers * LEFT
    assert profile.deferral is not None
    assert profile.deferral.weights == pytest.approx((0, layers * 1.5e-4), abs=1e-8)
    assert profile.deferral.saved == pytest.approx((0, layers * 1e-4), abs=1e-8)
    assert Profiler(make_spec(config, mesh)).profile(lambda *_: None).deferral is None


def test_noise_larger_than_the_work_leaves_a_time(
    clock: Clock, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Clock, "layer_seconds", lambda *_: np.array([-1e-2, 0.0]))
    profile = Profiler(make_spec(DEEP, mesh)).profile(lambda *_: None)
    assert all(t > 0 for sample in profile.samples for t in sample[3:5])
    profile.table(8)


def test_a_test_of_the_fit_that_is_fitted_to_is_none_any_more(clock: Clock, mesh: Mesh):
    timer = Profiler(make_spec(CONFIG, mesh))
    before = timer.profile(lambda *_: None)
    tested = next(sample[:2] for sample in before.samples if sample.is_test)
    after = timer.refine(before, [tested], lambda *_: None)
    assert not any(sample.is_test for sample in after.samples if sample[:2] == tested)
    assert any(sample.is_test for sample in after.samples)


@pytest.mark.parametrize("is_other", [False, True])
def test_what_is_measured_later_is_as_if_measured_then(clock: Clock, mesh: Mesh, is_other: bool):
    """The machine has become twice as slow, and the whole sequence, timed again, tells. A profiler
    that has measured nothing yet does the same.
    """
    timer = Profiler(make_spec(DEEP, mesh))
    before = timer.profile(lambda *_: None)
    clock.speed, clock.readings = 2.0, 0
    timer = Profiler(make_spec(DEEP, mesh)) if is_other else timer
    after = timer.refine(before, [(3, 24), (2, 48)], lambda *_: None)
    assert after.samples[: len(before.samples)] == before.samples
    added = after.samples[len(before.samples) :]
    assert [sample[:3] for sample in added] == [
        *((3, 24, context) for context in (0, 16, 40)),
        *((2, 48, context) for context in (0, 8, 16)),
    ]
    for sample in added:
        assert not sample.is_test
        shape = TimedShape(*sample[:2], (sample.context,))
        seconds = 3 * clock.layer_seconds(shape, sample.context) + clock.stage_seconds(shape)
        assert sample[3:5] == pytest.approx(seconds, rel=0.01)


def test_a_stop_ends_the_measurements_while_programs_compile(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
):
    """What compiles then goes on in its thread, and nobody waits for it."""
    started, let_go = threading.Event(), threading.Event()

    def slow(*_: Any) -> None:
        started.set()
        let_go.wait(60)

    def stop(*_: Any) -> None:
        if started.is_set():
            raise Stopped

    monkeypatch.setattr(Profiler, "_program", slow)
    monkeypatch.setattr(profiler, "make_idle_step", slow)
    begin = time.monotonic()
    with pytest.raises(Stopped):
        Profiler(make_spec(CONFIG, mesh)).profile(stop)
    assert time.monotonic() - begin < 30
    let_go.set()


def test_products_of_gpus_are_timed_in_tiles(mesh: Mesh):
    model = dataclasses.replace(CONFIG.model, seq_len=8192)
    plan = PlanConfig(token_slices="auto", unit_tokens=32)
    spec = make_spec(dataclasses.replace(CONFIG, model=model, plan=plan), mesh)
    assert Profiler(spec)._tile_tokens == 1
    gpu = dataclasses.replace(spec.device, platform="gpu")
    timer = Profiler(spec)
    timer._spec = dataclasses.replace(spec, device=gpu)
    assert timer._tile_tokens == 128
    assert all(shape.num_tokens % 128 == 0 for shape in timer._shapes())
    short = dataclasses.replace(model, seq_len=1024)  # 8 tiles are too few to choose from
    timer = Profiler(make_spec(dataclasses.replace(CONFIG, model=short, plan=plan), mesh))
    timer._spec = dataclasses.replace(timer._spec, device=gpu)
    assert timer._tile_tokens == 1


def test_key_tells_what_measurements_depend_on(mesh: Mesh, monkeypatch: pytest.MonkeyPatch):
    obstacle = backends._obstacle  # as if the devices could run cuDNN, where it is asked for
    monkeypatch.setattr(
        backends,
        "_obstacle",
        lambda backend, config, *more: (
            None if config.attention.backend == "cudnn" else obstacle(backend, config, *more)
        ),
    )
    key = cache_key.profile_key(make_spec(CONFIG, mesh))
    same = dataclasses.replace(
        CONFIG,
        train=TrainConfig(num_steps=7, batch_size=4),
        memory=MemoryConfig(limit_gib=3, remat="dots"),  # which is what auto tries first
        precision=PrecisionConfig("float32"),  # which is what auto means on a CPU
        attention=AttentionConfig("xla"),  # likewise
    )
    assert cache_key.profile_key(make_spec(same, mesh)) == key
    for changes in (
        {"model": dataclasses.replace(CONFIG.model, d_ff=40)},
        {"mesh": MeshConfig(pipe=1, model=2)},
        {"train": TrainConfig(batch_size=8)},
        {"precision": dataclasses.replace(CONFIG.precision, compute="bfloat16")},
        {"memory": dataclasses.replace(CONFIG.memory, remat="full")},
        {"memory": dataclasses.replace(CONFIG.memory, defer_weight_grads=True)},
        {"attention": AttentionConfig("cudnn")},
        {"attention": AttentionConfig(block=64)},
        {"optim": dataclasses.replace(CONFIG.optim, shard_state=True)},
    ):
        other = dataclasses.replace(CONFIG, **changes)
        assert cache_key.profile_key(make_spec(other, mesh)) != key
    spec = make_spec(CONFIG, mesh)  # with another default than that of an earlier version
    other = dataclasses.replace(spec, attention=spec.attention._replace(key_block=1))
    assert cache_key.profile_key(other) != key
    assert key["jax"] == jax.__version__
    assert "2 x cpu" in key["devices"]


def test_saved_bytes_are_those_of_the_buffers(mesh: Mesh):
    """x, middle, q, k, v, attention and the gradients of k and v: 8 D; hidden: F; lse: H."""
    D, F, H, layers = 16, 64, 2, 1
    expected = 4 * layers * (8 * D + F + H)
    assert sum(footprint.activation_bytes_per_token(make_spec(CONFIG, mesh))) == expected
    assert footprint.cache_bytes_per_token(make_spec(CONFIG, mesh)) == (4 * layers * 2 * D,) * 2


@pytest.mark.parametrize(
    ("memory", "numbers"),
    [
        (MemoryConfig(remat="full"), "x k v"),
        (MemoryConfig(remat="attn"), "x k v attn lse"),
        (MemoryConfig(remat="none"), "x k v q attn lse middle hidden norm norm gelu"),
        (
            MemoryConfig(defer_weight_grads=True),
            "x k v q attn lse middle hidden " + "q k v x x hidden",
        ),
    ],
    ids=str,
)
def test_policies_save_what_they_name(mesh: Mesh, memory: MemoryConfig, numbers: str):
    """And, deferred, the gradients with respect to what linear layers give."""
    config = dataclasses.replace(CONFIG, memory=memory)
    sizes = {"hidden": 64, "gelu": 64, "lse": 2}
    expected = 4 * (2 * 16 + sum(sizes.get(name, 16) for name in numbers.split()))
    assert sum(footprint.activation_bytes_per_token(make_spec(config, mesh))) == expected


def test_devices_of_an_operator_divide_what_is_saved_but_for_x_and_middle():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(pipe=2, model=2))
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    D, F, H, layers = 16, 64, 2, 1
    expected = 4 * layers * (2 * D + (6 * D + F + H) // 2)
    assert sum(footprint.activation_bytes_per_token(make_spec(config, mesh))) == expected
    # Nor the outputs of norms, nor gradients with respect to middle and to what leaves the layer.
    config = dataclasses.replace(config, memory=MemoryConfig(remat="none", defer_weight_grads=True))
    expected += 4 * layers * (4 * D + (F + 3 * D + F) // 2)
    assert sum(footprint.activation_bytes_per_token(make_spec(config, mesh))) == expected


def test_stages_work_on_the_slices_that_the_tables_name(mesh: Mesh):
    """What is timed is the stages' work: the sum of what both stages make of two slices, when the
    backward sweep is idle, is that of the plain blocks.
    """
    random = np.random.default_rng(0)
    x = random.normal(size=(4, 64, 16)).astype(np.float32)
    params = transformer.init(CONFIG.model, jax.random.key(0))
    items = [Item(1, 0, 2, 24), Item(1, 24, 2, 8)]
    work = programs.make_stage_work(make_spec(CONFIG, mesh), items)
    table = np.array([[0, IDLE], [1, 0], [IDLE, 1]], np.int32)
    idle = np.full((2, 2), IDLE, np.int32)
    got = work(reference.to_stages(params, mesh), put_rows(mesh, x), table, idle)

    # Both stages hold x, also for the backward sweep, but for what the forward sweep has put there.
    block, y = block_functions(CONFIG.model, np.dtype("float32")), x[1:3, :32]
    expected = 4 * x.sum(dtype=np.float64) - 2 * y.sum(dtype=np.float64)
    for own in params["blocks"]:
        attn = self_attention(*block.qkv(own, y, np.arange(32)[None], no_tape))
        y = block.finish(own, y, attn, no_tape)
        expected += float(np.asarray(y, np.float64).sum())
    assert float(got) == pytest.approx(expected, rel=1e-4)
    busy = work(reference.to_stages(params, mesh), put_rows(mesh, x), table, table[::-1][:2])
    assert float(busy) != pytest.approx(expected, rel=1e-2)


def test_handing_over_moves_slices_from_stage_to_stage(mesh: Mesh):
    x = np.random.default_rng(0).normal(size=(4, 64, 16)).astype(np.float32)
    params = reference.to_stages(transformer.init(CONFIG.model, jax.random.key(0)), mesh)
    run = programs.make_transfer(make_spec(CONFIG, mesh), Item(0, 8, 3, 16))
    both = float(run(params, put_rows(mesh, x), np.array([[0, IDLE], [IDLE, 0]], np.int32)))
    assert both == pytest.approx(x.sum() + x[:3, 8:24].sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "limit_gib", "num_rows"),
    [("auto", None, 64), ("auto", 1e-3, 3), ("terapipe", 1e-3, 64), ("1f1b", None, 3)],
)
def test_where_the_batch_does_not_fit_one_sequence_comes_after_another(
    mesh: Mesh, schedule: Any, limit_gib: float | None, num_rows: int
):
    config = dataclasses.replace(
        CONFIG,
        train=TrainConfig(batch_size=64),
        plan=PlanConfig(schedule=schedule),
        memory=MemoryConfig(limit_gib=limit_gib),
    )
    resting = outside.idle_step_schedule(make_spec(config, mesh))
    assert resting.num_rows == num_rows
    assert sum(part.num_rows for part in resting.parts) == 64
    assert not resting.has_passes


@pytest.mark.parametrize(
    ("schedule", "to_the_end", "per_token"),
    [
        ("auto", False, KEPT),
        ("terapipe", True, KEPT + LEFT),
        ("1f1b-deferred", False, KEPT + LEFT),
    ],
)
def test_only_sequences_that_fit_are_timed(
    mesh: Mesh, schedule: Any, to_the_end: bool, per_token: int
):
    """A limit of 2 MB leaves room for a few of 64 tokens."""
    config = dataclasses.replace(
        CONFIG,
        train=TrainConfig(batch_size=64),
        plan=PlanConfig(schedule=schedule),
        memory=MemoryConfig(limit_gib=2e6 / 2**30, defer_weight_grads=to_the_end),
    )
    num_rows = profiler._rows_that_fit(make_spec(config, mesh))
    params, opt_state = state_bytes(abstract_state(make_spec(config, mesh), make_optimizer(config)))
    assert 2 * params + opt_state + num_rows * 64 * per_token <= 2e6
    assert 2 * params + opt_state + (num_rows + 1) * 64 * per_token > 2e6
    assert profiler._rows_that_fit(make_spec(CONFIG, mesh)) > 1000


def test_a_real_profile_is_of_this_machine(mesh: Mesh):
    """Nothing is known of its figures but that work takes time."""
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, seq_len=16),
        train=TrainConfig(batch_size=2),
    )
    profile = Profiler(make_spec(config, mesh)).profile(lambda *_: None)
    assert [sample[:3] for sample in profile.samples] == [
        (1, 16, 0),
        *((1, 8, context) for context in (0, 8)),
        *((2, 8, context) for context in (0, 8)),
        (2, 16, 0),
    ]
    whole = profile.samples[0]
    assert 0 < whole.forward_seconds < 1
    assert 0 < whole.backward_seconds < 1
    assert 0 < profile.outside_seconds < 1
    assert sum(profile.transfer) > 0
    assert profile.memory.working_bytes_per_token > 0
    assert profile.memory.fixed_bytes > 4 * transformer.num_params(config.model) / 2
