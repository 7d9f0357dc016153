"""The profiler: times the stages of a model on its mesh, for as few slices as the latency model
needs.

Layers are alike, so what is timed are stages of one layer, and the times are multiplied, except for
what a stage takes besides its layers. Stages without layers tell that.

A sweep goes in one direction. In each of its ticks all stages work at once on slices of one shape,
with the passes of a real step, and then hand on the results. The tables are run-time values, so one
compiled program serves every context. The time of a slice is the difference between a sweep with
some busy ticks and a sweep of idle ticks, divided by the number of busy ticks: dispatch, the set-up
of a step and transfers are in both sweeps and cancel out.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Literal, NamedTuple

import numpy as np
from jax import Array
from jax.stages import Compiled, Wrapped

from tpipe_jax.config.settings import ScheduleName
from tpipe_jax.devices.exchanges import compile_checked
from tpipe_jax.devices.mesh import put_rows
from tpipe_jax.model.block import Params
from tpipe_jax.pipeline.footprint import (
    activation_bytes_per_token,
    deferred_bytes_per_token,
    trunk_bytes_per_token,
)
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.planning.latency import Deferral, Memory, Profile, Sample
from tpipe_jax.planning.schedule import IDLE, Item
from tpipe_jax.planning.settings import unit_tokens
from tpipe_jax.profiling.cache_key import profile_key
from tpipe_jax.profiling.clock import (
    REPEATS,
    Job,
    OnProgress,
    agreed,
    at_usual_speed,
    prepared,
    seconds_of,
)
from tpipe_jax.profiling.outside import (
    IdleStep,
    any_state,
    idle_step_schedule,
    make_idle_step,
    of_layers,
    time_outside,
)
from tpipe_jax.profiling.programs import make_stage_work, make_transfer, make_weights_work
from tpipe_jax.profiling.shapes import TimedShape, contexts, shapes_to_time, smallest_and_largest
from tpipe_jax.training.memory import limit_bytes, program_bytes
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_state, state_bytes

MAX_TICKS = 24
MIN_SECONDS = 0.008  # least time of the busy ticks of a sweep; more if an idle sweep takes longer
PROGRAM_SECONDS = 3.0  # a program runs until its rounds add up to this, 4 to REPEATS times
NUM_DEFERRED = 5  # times that gradients of weights are timed, for a median
TILE_TOKENS = {"gpu": 128}  # of the products of a platform; 1 where it is not named

# Schedules, and the schedule under which slices are timed instead: stages work on all their chunks,
# and backward passes take gradients of weights. The times under the former are computed from these.
WHOLE: dict[str, ScheduleName] = {"interleaved": "terapipe", "1f1b-deferred": "1f1b"}


class Program(NamedTuple):
    """A program that times slices of one shape."""

    shape: TimedShape
    num_ticks: int
    """Ticks of its forward and of its backward sweep."""
    compiled: Compiled


class WithoutLayers(NamedTuple):
    """Programs that only hand slices of one shape on, in few ticks and in many."""

    shape: TimedShape
    few: Compiled
    many: Compiled


class DeferredPrograms(NamedTuple):
    """The programs that time deferred gradients of weights of one shape of slices."""

    whole: Program
    """Backward passes with gradients of weights."""
    without: Program
    """Backward passes without them."""
    alone: Compiled
    """These gradients alone, in as many ticks."""


class Profiler:
    """Times slices of a model on a mesh. All processes of a run must make the same calls."""

    def __init__(self, spec: StageSpec) -> None:
        self._key = profile_key(spec)
        schedule = spec.config.plan.schedule
        self._spec = spec = _with_schedule(spec, WHOLE.get(schedule, schedule))
        config = spec.config
        self._batch_size = config.train.batch_size // config.mesh.data
        self._seq_len, self._num_layers = config.model.seq_len, spec.layers_per_stage
        # A whole sequence tells how many ticks other slices need, and how the speed drifts.
        self._whole = TimedShape(1, self._seq_len, (0,))
        self._seconds_per_token, self._least_seconds = np.full(2, np.inf), MIN_SECONDS
        self._programs: dict[TimedShape, Program] = {}
        self._params: Params = None  # of one layer on each stage, once there are some
        x_shape = config.train.batch_size, self._seq_len, config.model.d_model
        x_BTD = np.random.default_rng(0).normal(size=x_shape).astype(np.float32)
        self._x_BTD = put_rows(spec.mesh, x_BTD)

    def profile(
        self, on_progress: Callable[[int, int], None], with_deferral: bool = False
    ) -> Profile:
        """Measures what the latency model needs, and `with_deferral` also the times of deferred
        gradients of weights. Calls `on_progress(done, all)` in between, several times a second if
        there is one process; it may raise an exception to end this.
        """
        shapes = self._shapes()
        ends = smallest_and_largest(shapes)
        depths = [1, 2] if self._num_layers > 2 else [self._num_layers]
        specs, schedule = [self._with_layers(n) for n in depths], idle_step_schedule(self._spec)
        jobs: dict[str, list[Job]] = {
            "idle steps": [partial(make_idle_step, spec, schedule) for spec in specs],
            "slices": [partial(self._program, self._spec, shape) for shape in shapes],
            "no layers": [partial(self._without_layers, shape) for shape in ends],
            "deferred": [partial(self._deferred, shape) for shape in self._shapes_to_defer(shapes)]
            * with_deferral,
        }
        advance = _Progress(on_progress, sum(map(len, jobs.values())) + REPEATS)
        made = prepared(jobs, advance)
        outside_seconds, fixed_bytes = self._outside(made["idle steps"], advance)
        programs: list[Program] = made["slices"]
        self._programs |= zip(shapes, programs, strict=True)
        times = self._time(programs, advance)
        transfer, stage_seconds = self._time_without_layers(made["no layers"])
        return Profile(
            batch_size=self._batch_size,
            seq_len=self._seq_len,
            key_block=min(self._spec.attention.key_block, self._seq_len),
            samples=self._samples(shapes, times, stage_seconds),
            transfer=transfer,
            outside_seconds=outside_seconds,
            memory=self._memory(fixed_bytes, programs),
            key=self._key,
            deferral=self._time_deferral(made["deferred"]) if with_deferral else None,
            tile_tokens=self._tile_tokens,
            stage_seconds=stage_seconds,
        )

    def refine(
        self,
        profile: Profile,
        wanted: Iterable[tuple[int, int]],
        on_progress: Callable[[int, int], None],
    ) -> Profile:
        """Measures more slices, `wanted` as (sequences, tokens), and returns the profile with them.

        A whole sequence is timed with them. Their times are scaled by it, since the machine's speed
        may have changed.
        """
        unit = unit_tokens(self._spec.config)
        new = [TimedShape(b, n, contexts(self._seq_len, n, unit, (0, 0.5, 1))) for b, n in wanted]
        shapes = [self._whole, *new]
        missing = [shape for shape in shapes if shape not in self._programs]
        jobs: dict[str, list[Job]] = {
            "slices": [partial(self._program, self._spec, shape) for shape in missing]
        }
        if self._params is None:
            jobs["states"] = [partial(any_state, self._with_layers(1))]
        advance = _Progress(on_progress, sum(map(len, jobs.values())) + REPEATS)
        made = prepared(jobs, advance)
        self._programs |= zip(missing, made["slices"], strict=True)
        for state in made.get("states", ()):
            self._params = state.params
        times = self._time([self._programs[shape] for shape in shapes], advance)
        [now], *samples = (
            self._samples([shape], [of_shape], profile.stage_seconds)
            for shape, of_shape in zip(shapes, times, strict=True)
        )
        before = next(s for s in profile.samples if s[:3] == (1, self._seq_len, 0))
        drift = sum(before[3:5]) / sum(now[3:5])
        added = (
            s._replace(forward_seconds=s[3] * drift, backward_seconds=s[4] * drift)
            for own in samples
            for s in own
        )
        measured = {shape[:2] for shape in new}  # no longer kept out of the fit
        kept = (s for s in profile.samples if not (s.is_test and s[:2] in measured))
        return dataclasses.replace(profile, samples=(*kept, *added))

    def _shapes(self) -> list[TimedShape]:
        """Returns the shapes to time, in tiles where the products of the device have tiles."""
        most_rows = min(self._batch_size, _rows_that_fit(self._spec))
        unit = math.lcm(unit_tokens(self._spec.config), self._tile_tokens)
        return shapes_to_time(most_rows, self._seq_len, unit, self._spec.num_stages)

    @property
    def _tile_tokens(self) -> int:
        """Tokens of a tile; 1 where sequences are so short that few tiles would be left."""
        tile = TILE_TOKENS.get(self._spec.device.platform, 1)
        unit = math.lcm(unit_tokens(self._spec.config), tile)
        return tile if self._seq_len % unit == 0 and self._seq_len >= 16 * unit else 1

    def _shapes_to_defer(self, shapes: list[TimedShape]) -> list[TimedShape]:
        """Returns the shapes whose gradients of weights are timed: the shortest slice and the
        longest. These gradients don't depend on how many sequences the tokens belong to.
        """
        return smallest_and_largest([shape for shape in shapes if shape.num_rows == 1])

    def _with_layers(self, num_layers: int, spec: StageSpec | None = None) -> StageSpec:
        """Returns a spec, or that of the profiler, with so many layers on each stage."""
        spec = spec or self._spec
        model = spec.config.model
        model = dataclasses.replace(model, num_layers=num_layers * spec.num_stages)
        return spec.with_config(dataclasses.replace(spec.config, model=model))

    @property
    def _inputs(self) -> tuple[Params, Array]:
        """The parameters of stages of one layer, and the input of the stages."""
        assert self._params is not None
        return self._params, self._x_BTD

    @cached_property
    def _params_like(self) -> Params:
        """Shapes of the parameters of stages of one layer. No setting of the schedule changes
        them.
        """
        spec = self._with_layers(1)
        return abstract_state(spec, make_optimizer(spec.config)).params

    def _compile(self, spec: StageSpec, work: Wrapped, *tables: np.ndarray) -> Compiled:
        """Compiles work of the stages of a spec."""
        return compile_checked(work, spec.mesh, self._params_like, self._x_BTD, *tables)

    def _program(self, of: StageSpec, shape: TimedShape) -> Program:
        """Returns the program of a shape."""
        spec, num_ticks = self._with_layers(1, of), self._num_ticks(shape)
        items = [Item(0, context, *shape[:2]) for context in shape.contexts]
        table = self._table(IDLE, num_ticks)
        compiled = self._compile(spec, make_stage_work(spec, items), table, table)
        return Program(shape, num_ticks, compiled)

    def _num_ticks(self, shape: TimedShape) -> int:
        """Returns the ticks of the sweeps of a shape: more for small slices, which take less."""
        return min(max(4 * self._seq_len // shape.size, 1), MAX_TICKS)

    def _num_busy(self, program: Program) -> tuple[int, int]:
        """Returns the busy ticks of a forward and of a backward sweep."""
        seconds = self._seconds_per_token * program.shape.size
        ticks = np.ceil(self._least_seconds / seconds)
        forward, backward = np.clip(ticks, 1, program.num_ticks).astype(int).tolist()
        return forward, backward

    def _outside(self, steps: Sequence[IdleStep], advance: OnProgress) -> tuple[float, int]:
        """Times a step outside of its slices; returns its seconds and its bytes."""
        depths = [step.spec.layers_per_stage for step in steps]
        taken, fixed_bytes = (
            of_layers(self._num_layers, list(zip(depths, figures, strict=True)))
            for figures in (
                time_outside(steps, advance),
                [program_bytes(step.compiled) for step in steps],
            )
        )
        self._params = any_state(self._with_layers(1)).params
        return taken, round(fixed_bytes)

    def _time(self, programs: Sequence[Program], advance: OnProgress) -> list[np.ndarray]:
        """Returns for each program the seconds of a slice, `[context, direction]`.

        The programs take turns, so that a drift of the machine's speed affects all of them alike.
        """
        if not np.isfinite(self._seconds_per_token).all():
            self._learn_speed()
        rounds: list[list[np.ndarray]] = [[] for _ in programs]
        durations, num_rounds = np.zeros(len(programs)), np.ones(len(programs), int)
        for n in range(REPEATS):
            for i, program in enumerate(programs):
                if n < num_rounds[i]:
                    start = time.perf_counter()
                    idle, busy = self._round(program)
                    rounds[i].append((busy - idle) / self._num_busy(program))
                    durations[i] = time.perf_counter() - start
                    advance(0)
            if n == 0:
                num_rounds = np.ceil(PROGRAM_SECONDS / agreed(durations)).clip(4, REPEATS)
            advance(1)
        # Noise may make a difference 0 or negative; no work takes less than a clock can tell.
        return [agreed(np.maximum(of_slice, 1e-6)) for of_slice in at_usual_speed(rounds)]

    def _learn_speed(self) -> None:
        """Times a whole sequence once, and keeps how long a token takes in each direction."""
        program = self._programs[self._whole]
        self._seconds_per_token = np.full(2, 1e-12)  # so that all ticks are busy
        idle, busy = self._round(program)
        seconds = np.maximum(busy[0] - idle, 1e-6) / program.num_ticks
        self._seconds_per_token = agreed(seconds) / self._whole.size
        # Idle sweeps are subtracted. Busy ticks take as long or longer, so noise matters little.
        self._least_seconds = max(MIN_SECONDS, float(agreed(np.array(idle))))

    def _round(self, program: Program) -> tuple[float, np.ndarray]:
        """Returns the seconds of an idle sweep, and of sweeps with work, `[context, direction]`."""
        inputs, num_busy = self._inputs, self._num_busy(program)

        def seconds(*items: int) -> float:
            tables = (
                self._table(item, program.num_ticks, n)
                for item, n in zip(items, num_busy, strict=True)
            )
            return seconds_of(program.compiled, *inputs, *tables)

        seconds(0, 0)  # warms up memory and caches, which another program has used
        contexts_ = range(len(program.shape.contexts))
        busy = [(seconds(n, IDLE), seconds(IDLE, n)) for n in contexts_]
        # Idle sweeps come last, since the first sweep with work after them is slow. There are two,
        # since an error in them is in all results.
        idle = (seconds(IDLE, IDLE) + seconds(IDLE, IDLE)) / 2
        return idle, np.array(busy)

    def _samples(
        self,
        shapes: Sequence[TimedShape],
        times: Sequence[np.ndarray],
        stage_seconds: tuple[float, float],
    ) -> tuple[Sample, ...]:
        """Returns what stages take that have all their layers, from the times of one layer."""
        samples = []
        for shape, of_one_layer in zip(shapes, times, strict=True):
            besides = stage_seconds[0] + stage_seconds[1] * shape.size
            layer = np.maximum(
                of_one_layer - besides, of_one_layer / 2
            )  # whatever noise makes of it
            seconds = of_one_layer + (self._num_layers - 1) * layer
            samples += [
                Sample(*shape[:2], context, forward, backward, shape.is_test)
                for context, (forward, backward) in zip(
                    shape.contexts, seconds.tolist(), strict=True
                )
            ]
        return tuple(samples)

    def _without_layers(self, shape: TimedShape) -> WithoutLayers:
        """Returns programs of a shape, whose stages have no layers."""
        spec = self._with_layers(1)
        work = make_transfer(spec, Item(0, 0, *shape[:2]))
        few, many = (
            self._compile(spec, work, self._table(IDLE, n)) for n in (MAX_TICKS, 3 * MAX_TICKS)
        )
        return WithoutLayers(shape, few, many)

    def _time_without_layers(
        self, programs: Sequence[WithoutLayers]
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Returns the seconds of a tick without work, and those that a stage without layers works
        in a busy tick: both as a constant, and seconds for each token.
        """
        idle, more_idle, busy = (
            self._table(*table)
            for table in ((IDLE, MAX_TICKS), (IDLE, 3 * MAX_TICKS), (0, 3 * MAX_TICKS))
        )
        seconds = []
        for _, few, many in programs:
            runs = (few, idle), (many, more_idle), (many, busy)
            rounds = [
                [seconds_of(run, *self._inputs, table) for run, table in runs]
                for _ in range(1 + REPEATS)
            ]
            few_idle, all_idle, all_busy = np.median(rounds[1:], 0)  # the first one warms up
            seconds.append([(all_idle - few_idle) / 2, (all_busy - all_idle) / 3])
        shapes = [program.shape for program in programs]
        transfer, work = (_line(shapes, own) for own in agreed(np.array(seconds) / MAX_TICKS).T)
        return (max(transfer[0], 0), max(transfer[1], 0)), (max(work[0], 0), max(work[1], 0))

    def _deferred(self, shape: TimedShape) -> DeferredPrograms:
        """Returns the programs that time the gradients of weights of slices of a shape. One context
        is enough, since these gradients don't depend on it.
        """
        bare, later = shape._replace(contexts=(0,)), _with_schedule(self._spec, "1f1b-deferred")
        whole, without = (self._program(spec, bare) for spec in (self._spec, later))
        spec, table = self._with_layers(1, later), self._table(IDLE, whole.num_ticks)[..., None]
        work = make_weights_work(spec, Item(0, 0, *shape[:2]))
        return DeferredPrograms(whole, without, self._compile(spec, work, table))

    def _time_deferral(self, programs: Sequence[DeferredPrograms]) -> Deferral:
        """Times backward passes with and without gradients of weights, and these alone."""
        seconds, inputs = [], self._inputs
        for whole, without, alone in programs:
            num_busy = self._num_busy(whole)[1]
            tables = [self._table(item, whole.num_ticks, num_busy)[..., None] for item in (IDLE, 0)]
            rows = []
            for _ in range(1 + NUM_DEFERRED):  # the first one warms up
                passes = [self._round(program) for program in (whole, without)]
                backward = [of_slice[0, 1] - idle for idle, of_slice in passes]
                # As in `_round`: one sweep to warm up, one with work, and two idle ones.
                _, busy, *idle = (seconds_of(alone, *inputs, tables[n]) for n in (0, 1, 0, 0))
                rows.append([busy - sum(idle) / 2, *backward])
            seconds.append(self._num_layers * np.median(rows[1:], 0) / num_busy)
        shapes = [whole.shape for whole, _, _ in programs]
        weights, whole, without = agreed(np.array(seconds)).T
        return Deferral(_line(shapes, weights), _line(shapes, whole - without))

    def _memory(self, fixed_bytes: int, programs: Sequence[Program]) -> Memory:
        """Estimates memory from the compiler's figures for the programs.

        The compiler's figure has two parts: working memory, which grows with the slice, and
        buffers, whose size is known. The buffers are subtracted.
        """
        per_token = sum(activation_bytes_per_token(self._with_layers(1)))
        sizes = np.array([program.shape.size for program in programs])
        kept = np.array([p.shape.num_rows for p in programs]) * self._seq_len * per_token
        temporary = np.array([_temporary_bytes(p.compiled) for p in programs]) - kept
        least, more = sizes.argmin(), sizes > sizes.min()
        slopes = (temporary[more] - temporary[least]) / (sizes[more] - sizes[least])
        saved, gathered = activation_bytes_per_token(self._spec)
        return Memory(
            fixed_bytes=fixed_bytes,
            saved_bytes_per_token=saved + trunk_bytes_per_token(self._spec),
            gathered_bytes_per_token=gathered,
            deferred_bytes_per_token=deferred_bytes_per_token(
                _with_schedule(self._spec, "1f1b-deferred")
            ),
            working_bytes_per_token=math.ceil(max([0.0, *slopes])),
        )

    def _table(self, item: int, num_ticks: int, num_busy: int | None = None) -> np.ndarray:
        """Returns a table `[tick, stage]` in which all stages work on the item in the first
        `num_busy` ticks, by default in all, and idle in the others.
        """
        table = np.full((num_ticks, self._spec.num_stages), IDLE, np.int32)
        table[:num_busy] = item
        return table


class _Progress:
    """Counts the parts of the work that are done."""

    def __init__(self, on_progress: Callable[[int, int], None], num_parts: int) -> None:
        self._on_progress, self._num_parts, self._done = on_progress, num_parts, 0

    def __call__(self, num_done: int) -> None:
        self._done += num_done
        self._on_progress(self._done, self._num_parts)


def _with_schedule(spec: StageSpec, schedule: Literal["auto", ScheduleName]) -> StageSpec:
    plan = dataclasses.replace(spec.config.plan, schedule=schedule, chunks=None)
    return spec.with_config(dataclasses.replace(spec.config, plan=plan))


def _line(shapes: Sequence[TimedShape], seconds: np.ndarray) -> tuple[float, float]:
    """Returns a constant, and seconds for each token, from the times of two shapes. A single one
    has no part that grows with it.
    """
    if len(shapes) == 1:
        return float(seconds[0]), 0.0
    smaller, larger = shapes
    per_token = (seconds[1] - seconds[0]) / (larger.size - smaller.size)
    return float(seconds[0] - per_token * smaller.size), float(per_token)


def _rows_that_fit(spec: StageSpec) -> int:
    """Returns how many sequences fit in memory beside parameters, gradients and optimiser state; at
    least one. If gradients of weights are deferred, all tokens count as waiting for them.
    """
    config, limit = spec.config, limit_bytes(spec)
    if limit is None:
        return config.train.batch_size
    params, opt_state = state_bytes(abstract_state(spec, make_optimizer(config)))
    per_token = sum(activation_bytes_per_token(spec))
    if spec.weight_grads == "some ticks later":
        per_token += deferred_bytes_per_token(spec)
    return max(1, int((limit - 2 * params - opt_state) // (config.model.seq_len * per_token)))


def _temporary_bytes(program: Compiled) -> int:
    """Returns the temporary bytes of a program; 0 if the backend does not tell."""
    analysis = program.memory_analysis()
    return analysis.temp_size_in_bytes if analysis else 0
