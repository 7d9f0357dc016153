"""The profiler: which slices it times, and what it makes of a clock whose readings are known."""

import dataclasses
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
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.latency import Deferral
from tpipe_jax.planning.schedule import IDLE, Item
from tpipe_jax.profiling import cache_key, profiler, programs
from tpipe_jax.profiling.profiler import MAX_TICKS, MIN_SECONDS, Profiler, Program
from tpipe_jax.profiling.shapes import TimedShape, shapes_to_time
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_state, state_bytes


class Clock:
    """Seconds that a program would take; some readings are disturbed."""

    def __init__(self) -> None:
        self.speed, self.readings = 1.0, 0

    @staticmethod
    def slice_seconds(shape: TimedShape, context: int) -> np.ndarray:
        work = shape.size * (1e-4 + 1e-6 * context)
        return np.array([work, 3 * work])

    def read(self, _: Any, run: Any, *tables: np.ndarray) -> float:
        self.readings += 1
        seconds = 0.5 + 0.01 * run.shape.size  # what a program takes without work
        for direction, table in enumerate(tables):
            assert table.shape[1] == 2
            assert (table == table[0, 0]).all()
            if table[0, 0] != IDLE:
                context = run.shape.contexts[table[0, 0]]
                seconds += len(table) * self.slice_seconds(run.shape, context)[direction]
        return seconds * self.speed + (0.7 if self.readings % 11 == 0 else 0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    def compile_(
        self: Profiler, shapes: list[TimedShape], advance: Any
    ) -> dict[TimedShape, Program]:
        programs = {}
        for shape in shapes:
            analysis = SimpleNamespace(
                temp_size_in_bytes=5000 + 70 * shape.size + shape.num_rows * 64 * KEPT,
                argument_size_in_bytes=0,
                output_size_in_bytes=0,
                alias_size_in_bytes=0,
            )
            run: Any = SimpleNamespace(shape=shape, memory_analysis=lambda a=analysis: a)
            programs[shape] = Program(run, self._num_ticks(shape))
            advance()
        return programs

    monkeypatch.setattr(Profiler, "_compile", compile_)
    monkeypatch.setattr(Profiler, "_seconds", lambda self, *args: clock.read(self, *args))
    monkeypatch.setattr(Profiler, "_time_transfer", lambda self, shapes: (1e-5, 1e-7))
    monkeypatch.setattr(
        Profiler,
        "_time_deferral",
        lambda self, shapes, programs, advance: [advance() for _ in shapes] and DEFERRAL,
    )
    outside = {}, 0.25, 10**6
    monkeypatch.setattr(profiler, "_time_outside", lambda spec: outside)
    return clock


DEFERRAL = Deferral(weights=(0.0, 1.5e-4), saved=(0.0, 1e-4))
KEPT = 4 * (8 * 16 + 64 + 2)  # bytes of a token, as `test_saved_bytes_are_those_of_the_buffers` has
LEFT = 4 * (5 * 16 + 64)  # of a token that waits for gradients of weights


@pytest.fixture
def mesh() -> Mesh:
    return make_mesh(CONFIG.mesh, jax.devices()[:2])


def test_slices_are_timed_for_as_long_as_idle_sweeps_take(clock: Clock, mesh: Mesh):
    """Or for as many ticks as there may be, since the difference of both is what is measured."""
    profiler_ = Profiler(make_spec(CONFIG, mesh))
    run: Any = SimpleNamespace(shape=TimedShape(1, 64, (0,)))
    table = np.full((1, 2), IDLE)
    idle_seconds = min(clock.read(profiler_, run, table, table) for _ in range(2))
    assert idle_seconds > MIN_SECONDS
    for num_tokens in (64, 16, 8):
        shape = TimedShape(1, num_tokens, (0,))
        for ticks, per_token in zip(
            profiler_._num_ticks(shape), profiler_._seconds_per_token, strict=True
        ):
            assert ticks == MAX_TICKS or ticks * per_token * num_tokens >= idle_seconds


def test_a_slice_takes_what_busy_ticks_take_longer(clock: Clock, mesh: Mesh):
    parts: list[tuple[int, int]] = []
    profile = Profiler(make_spec(CONFIG, mesh)).profile(
        lambda *part: parts.append(part), with_deferral=True
    )
    assert profile.deferral == DEFERRAL
    assert [done for done, _ in parts] == list(range(1, parts[0][1] + 1))
    assert (profile.batch_size, profile.seq_len, profile.key_block) == (4, 64, 64)
    assert profile.outside_seconds == 0.25
    shapes = shapes_to_time(4, 64, 8, 2)
    expected = [(*shape[:2], context) for shape in shapes for context in shape.contexts]
    assert [sample[:3] for sample in profile.samples] == expected
    for sample in profile.samples:
        shape = TimedShape(*sample[:2], (sample.context,))
        assert sample[3:5] == pytest.approx(clock.slice_seconds(shape, sample.context))
    assert profile.memory.working_bytes_per_token == 70
    assert profile.memory.fixed_bytes == 10**6
    assert profile.memory.activation_bytes(1, 1) == KEPT + 4 * 16
    assert profile.memory.activation_bytes(0, 0, 1) == LEFT
    assert Profiler(make_spec(CONFIG, mesh)).profile(lambda *_: None).deferral is None


def test_noise_larger_than_the_work_leaves_a_time(
    clock: Clock, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Clock, "slice_seconds", lambda *_: np.array([-1e-3, 0.0]))
    profile = Profiler(make_spec(CONFIG, mesh)).profile(lambda *_: None)
    assert all(t > 0 for sample in profile.samples for t in sample[3:5])
    profile.table(8)


def test_a_test_of_the_fit_that_is_fitted_to_is_none_any_more(clock: Clock, mesh: Mesh):
    timer = Profiler(make_spec(CONFIG, mesh))
    before = timer.profile(lambda *_: None)
    tested = next(sample[:2] for sample in before.samples if sample.is_test)
    after = timer.refine(before, [tested])
    assert not any(sample.is_test for sample in after.samples if sample[:2] == tested)
    assert any(sample.is_test for sample in after.samples)


def test_what_is_measured_later_is_as_if_measured_then(clock: Clock, mesh: Mesh):
    """The machine has become twice as slow, and the whole sequence, timed again, tells."""
    timer = Profiler(make_spec(CONFIG, mesh))
    before = timer.profile(lambda *_: None)
    clock.speed, clock.readings = 2.0, 0
    after = timer.refine(before, [(3, 16), (2, 48)])
    assert after.samples[: len(before.samples)] == before.samples
    added = after.samples[len(before.samples) :]
    assert [sample[:3] for sample in added] == [
        *((3, 16, context) for context in (0, 24, 48)),
        *((2, 48, context) for context in (0, 8, 16)),
    ]
    for sample in added:
        assert not sample.is_test
        shape = TimedShape(*sample[:2], (sample.context,))
        assert sample[3:5] == pytest.approx(clock.slice_seconds(shape, sample.context))


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


@pytest.mark.slow
def test_a_step_without_slices_sets_up_their_buffers(mesh: Mesh, monkeypatch: pytest.MonkeyPatch):
    """XLA could see that no slice is due, and leave out what a real step spends time on. What is
    kept of sequences is no part of the rest, however many of them there are at a time.
    """
    sizes: list[int] = []
    of_program = profiler.program_bytes
    monkeypatch.setattr(
        profiler, "program_bytes", lambda p: sizes.append(of_program(p)) or sizes[-1]
    )
    rest = []
    for schedule in ("terapipe", "1f1b"):
        plan, train = PlanConfig(schedule=schedule), TrainConfig(batch_size=64)
        config = dataclasses.replace(CONFIG, train=train, plan=plan)
        rest.append(profiler._time_outside(make_spec(config, mesh))[2])
    assert sizes[0] > KEPT * 64 * 64 > 5 * sizes[1]
    assert max(rest) < sizes[0] / 5


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
    optimizer = make_optimizer(config)
    resting = profiler._idle_step(make_spec(config, mesh), optimizer)
    assert resting.num_rows == num_rows
    assert sum(part.num_rows for part in resting.parts) == 64
    assert (resting.forward == IDLE).all()


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


def test_deferral_is_timed_for_sequences_that_fit(clock: Clock, mesh: Mesh):
    memory = MemoryConfig(limit_gib=2e6 / 2**30)
    config = dataclasses.replace(CONFIG, train=TrainConfig(batch_size=64), memory=memory)
    later = dataclasses.replace(config, plan=PlanConfig(schedule="1f1b-deferred"))
    most, more = (profiler._rows_that_fit(make_spec(c, mesh)) for c in (later, config))
    assert 1 < most < more
    shapes = [TimedShape(n, 64, (0,)) for n in (1, most - 1, most, most + 1)]
    assert Profiler(make_spec(config, mesh))._shapes_to_defer(shapes) == shapes[:3]


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
    ]
    whole = profile.samples[0]
    assert 0 < whole.forward_seconds < 1
    assert 0 < whole.backward_seconds < 1
    assert 0 < profile.outside_seconds < 1
    assert sum(profile.transfer) > 0
    assert profile.memory.working_bytes_per_token > 0
    assert profile.memory.fixed_bytes > 4 * transformer.num_params(config.model) / 2
