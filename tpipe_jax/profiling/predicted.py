"""What stages should take on GPUs that are not here: a `Profile` without a device.

The programs are those that the profiler times: one layer, for few slices. They are compiled for the
GPU, and a roofline reads their time off the text (`devices.roofline`). What a step does outside of
its slices, and the exchanges between devices, are computed from their numbers of operations and
bytes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

from tpipe_jax.config.settings import MeshConfig, PlanConfig, TrainConfig
from tpipe_jax.devices.hlo import Program, read
from tpipe_jax.devices.roofline import Cost, Roofline, Seen
from tpipe_jax.devices.scopes import BACKWARD, FORWARD, SLICE
from tpipe_jax.devices.speeds import Link, Network, Speed
from tpipe_jax.devices.targets import gpu_target
from tpipe_jax.model.flops import step_flops
from tpipe_jax.model.functional import param_shapes
from tpipe_jax.model.registry import block_class
from tpipe_jax.model.sharding import padded_vocab_size
from tpipe_jax.pipeline.footprint import (
    activation_bytes_per_token,
    deferred_bytes_per_token,
    trunk_bytes_per_token,
)
from tpipe_jax.pipeline.spec import StageSpec, spec_on_devices
from tpipe_jax.pipeline.vocab_parallel import tile_tokens
from tpipe_jax.planning.latency import Deferral, Memory, Profile, Sample
from tpipe_jax.planning.schedule import Item
from tpipe_jax.profiling.clock import prepared
from tpipe_jax.profiling.programs import make_stage_work
from tpipe_jax.profiling.shapes import TimedShape, contexts
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_state, state_bytes

MOST_ROWS = 8  # sequences of a slice; more take as much longer as these do than one

# Traffic outside of the slices, from the compiled step of 4 layers of GPT3-1B (2 x 8192 tokens, one
# H200): 43 GB, for 823 million logits and 320 million parameters; and the number of kernels.
LOGIT_BYTES, PARAM_BYTES, OUTSIDE_KERNELS = 20, 80, 600


@dataclass(frozen=True)
class SlicePrograms:
    """The programs of one layer on GPUs that share its operators, for a few shapes of slices."""

    programs: tuple[tuple[TimedShape, Program], ...]
    working_bytes_per_token: float


class Predictor:
    """Predicts profiles of a model on GPUs of one kind. Programs are compiled once for each number
    of GPUs that share operators, and for each choice of saved values.
    """

    def __init__(self, gpu: str, speed: Speed, network: Network) -> None:
        self._gpu, self._speed, self._network = gpu, speed, network
        self._known: dict[tuple[Any, ...], SlicePrograms] = {}

    def profile(
        self,
        spec: StageSpec,
        unit: int,
        on_progress: Callable[[int], None] = lambda num_done: None,
    ) -> Profile:
        """Returns the profile of a spec on its mesh. `on_progress` is called several times a second
        while programs compile, with the number that are done since; it may raise an exception.
        """
        config, speed, mesh = spec.config, self._speed, spec.config.mesh
        num_rows = config.train.batch_size // mesh.data
        most_rows = min(config.train.batch_size, MOST_ROWS)  # the same for all meshes
        compiled = self._programs(spec, most_rows, unit, on_progress)
        links = self._network.links(speed, mesh)
        key_block = min(spec.attention.key_block, config.model.seq_len)
        samples = []
        for shape, program in compiled.programs:
            for context in shape.contexts:
                near = min(context, config.model.window or context)
                seen = Seen(*shape[:2], near, spec.attention.group)
                roofline = Roofline(program, speed, links["model"], seen)
                forward, backward = (
                    spec.layers_per_stage * _slice_cost(roofline, lane).seconds(speed)
                    for lane in (FORWARD, BACKWARD)
                )
                samples.append(Sample(*shape[:2], context, forward, backward, False))
        return Profile(
            batch_size=num_rows,
            seq_len=config.model.seq_len,
            key_block=key_block,
            samples=tuple(samples),
            transfer=_transfer(spec, links),
            outside_seconds=self._outside_seconds(spec),
            memory=self._memory(spec, compiled),
            key={"predicted": self._gpu, "speed": speed._asdict(), "network": self._network},
            deferral=self._deferral(spec),
            tile_tokens=1,
        )

    def least_seconds(self, spec: StageSpec) -> float:
        """Returns a time that no step takes less than, whatever its slices: that of its operations
        and of the exchanges between GPUs that share operators. Nothing is compiled for it.
        """
        config, mesh = spec.config, spec.config.mesh
        products = step_flops(config) / (mesh.num_devices * self._speed.product_flops)
        link = self._network.links(self._speed, mesh)["model"]
        num_tokens = config.train.batch_size // mesh.data * config.model.seq_len
        shared = 2 * (mesh.model - 1) / mesh.model * num_tokens * trunk_bytes_per_token(spec)
        # Results of attention and of the hidden layer, and both once more backward.
        return products + 4 * spec.layers_per_stage * shared / link.bytes_per_second

    def reduction_seconds(self, spec: StageSpec) -> float:
        """Returns the seconds of the sum of gradients over the data shards, in a ring."""
        mesh = spec.config.mesh
        params, _ = state_bytes(abstract_state(spec, make_optimizer(spec.config)))
        data, turns = self._network.links(self._speed, mesh)["data"], 2 * (mesh.data - 1)
        return turns / mesh.data * params / data.bytes_per_second + turns * data.latency_seconds

    def _programs(
        self, spec: StageSpec, most_rows: int, unit: int, on_progress: Callable[[int], None]
    ) -> SlicePrograms:
        config = spec.config
        key = config.mesh.model, spec.saved_names, spec.weight_grads, most_rows, unit
        key += (config.memory.offload,)
        if key not in self._known:
            shapes = slices_to_read(most_rows, config.model.seq_len, unit)
            jobs = {"slices": [partial(self._compile, spec, shape) for shape in shapes]}
            compiled: list[Compiled] = prepared(jobs, on_progress)["slices"]
            programs = tuple(
                (shape, read(program.as_text() or ""))
                for shape, program in zip(shapes, compiled, strict=True)
            )
            self._known[key] = SlicePrograms(programs, _working_bytes(spec, shapes, compiled))
        return self._known[key]

    def _compile(self, spec: StageSpec, shape: TimedShape) -> Compiled:
        """Compiles one layer for slices of a shape, on GPUs that only share operators."""
        spec = self._of_one_layer(spec, shape.num_rows)
        params = abstract_state(spec, make_optimizer(spec.config)).params
        config = spec.config
        x_shape = shape.num_rows, config.model.seq_len, config.model.d_model

        def like(shape: tuple[int, ...], dtype: Any, places: PartitionSpec) -> Any:
            sharding = NamedSharding(spec.mesh, places)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        x_BTD = like(x_shape, np.float32, PartitionSpec("data"))
        table = like((2, 1), np.int32, PartitionSpec())
        work = make_stage_work(spec, [Item(0, 0, *shape[:2])])
        return work.lower(params, x_BTD, table, table).compile()

    def _of_one_layer(self, spec: StageSpec, num_rows: int) -> StageSpec:
        config, num_shared = spec.config, spec.config.mesh.model
        mesh = MeshConfig(model=num_shared, order=config.mesh.order)
        target = gpu_target(self._gpu, mesh, 1)
        config = replace(
            config,
            model=replace(config.model, num_layers=1),
            mesh=mesh,
            train=replace(TrainConfig(), batch_size=num_rows),
            plan=PlanConfig(schedule="terapipe"),
            memory=replace(config.memory, defer_weight_grads=False),
        )
        return spec_on_devices(config, target.devices, target.facts)

    def _outside_seconds(self, spec: StageSpec) -> float:
        """Returns the seconds of the head, the losses and the optimiser, and of the exchanges that
        belong to them.
        """
        config, speed, mesh = spec.config, self._speed, spec.config.mesh
        links, model = self._network.links(speed, mesh), config.model
        num_tokens = config.train.batch_size // mesh.data * model.seq_len
        num_shards = mesh.pipe * mesh.model
        vocab = padded_vocab_size(model, spec.mesh) / num_shards
        params, _ = state_bytes(abstract_state(spec, make_optimizer(config)))
        products = 6 * num_tokens * vocab * model.d_model / speed.product_flops
        traffic = LOGIT_BYTES * num_tokens * vocab + PARAM_BYTES * params / 4
        seconds = products + traffic / speed.bytes_per_second
        seconds += OUTSIDE_KERNELS * speed.kernel_seconds
        seconds += self.reduction_seconds(spec)
        # All stages sum up, in float32, embeddings, outputs, and the gradients of both. Each of the
        # GPUs that share operators sums up a part; then they put the parts together.
        pipe, turns = links["pipe"], 2 * (mesh.pipe - 1)
        num_bytes = 4 * num_tokens * model.d_model
        if mesh.pipe > 1 and mesh.model > 1:
            seconds += 4 * num_bytes / links["model"].bytes_per_second
            num_bytes /= mesh.model
        num_tiles = model.seq_len / tile_tokens(config.train.batch_size // mesh.data, model.seq_len)
        seconds += 4 * turns / mesh.pipe * num_bytes / pipe.bytes_per_second
        return seconds + 4 * turns * num_tiles * pipe.latency_seconds

    def _deferral(self, spec: StageSpec) -> Deferral:
        """Returns the times of gradients of weights: their products, and sums that are read and
        written once for each slice.
        """
        config, speed = spec.config, self._speed
        shapes, linears = param_shapes(config.model), block_class(config.model).linears
        weights = float(sum(shapes[name]["kernel"].size for name in linears))
        weights *= spec.layers_per_stage / config.mesh.model
        line = 8 * weights / speed.bytes_per_second, 2 * weights / speed.product_flops
        return Deferral(line, line)

    def _memory(self, spec: StageSpec, compiled: SlicePrograms) -> Memory:
        config = spec.config
        params, opt_state = state_bytes(abstract_state(spec, make_optimizer(config)))
        saved, gathered = activation_bytes_per_token(spec)
        later = replace(config, plan=replace(config.plan, schedule="1f1b-deferred", chunks=None))
        return Memory(
            fixed_bytes=2 * params + opt_state,
            saved_bytes_per_token=saved + trunk_bytes_per_token(spec),
            working_bytes_per_token=round(compiled.working_bytes_per_token),
            gathered_bytes_per_token=gathered,
            deferred_bytes_per_token=deferred_bytes_per_token(spec.with_config(later))
            if config.mesh.pipe > 1 and not config.memory.defer_weight_grads
            else 0,
        )


def _transfer(spec: StageSpec, links: Mapping[str, Link]) -> tuple[float, float]:
    """Returns the seconds to hand on a slice, and those for each token of it. Each of the GPUs that
    share operators sends a part; then they put the parts together (`collectives.handed_on`).
    """
    mesh, pipe, model = spec.config.mesh, links["pipe"], links["model"]
    if mesh.pipe == 1:
        return 0.0, 0.0
    num_bytes, num_parts = trunk_bytes_per_token(spec), mesh.model
    seconds, per_token = pipe.latency_seconds, num_bytes / num_parts / pipe.bytes_per_second
    if num_parts > 1:
        seconds += model.latency_seconds
        per_token += (num_parts - 1) / num_parts * num_bytes / model.bytes_per_second
    return seconds, per_token


def slices_to_read(most_rows: int, seq_len: int, unit: int) -> list[TimedShape]:
    """Returns the shapes of slices whose programs are compiled: of a unit, of eight, and the whole
    sequence; and the shortest and the longest of several sequences.
    """
    num_units = seq_len // unit
    lengths = sorted({min(n, num_units) for n in (1, 8, num_units)})
    rows = [(1, n) for n in lengths]
    rows += [(most_rows, n) for n in (lengths[0], lengths[-1])] if most_rows > 1 else []
    return [
        TimedShape(b, n * unit, contexts(seq_len, n * unit, unit, (0, 0.5, 1)))
        for b, n in dict.fromkeys(rows)
    ]


def _slice_cost(roofline: Roofline, lane: str) -> Cost:
    """Returns the cost of the work on a slice in a lane of a program of the profiler."""
    program = roofline.program
    loop = next(
        operation
        for operation in program.operations()
        if operation.opcode == "while" and operation.source.endswith(f"/{lane}/while")
    )
    [body] = [
        max(operation.parts, key=lambda name: len(program.computations[name]))
        for operation in program.computations[loop.body]
        if operation.parts and operation.source.endswith((f"/{SLICE}/cond", f"/{SLICE}/while"))
    ]
    return roofline.cost(body)


def _working_bytes(spec: StageSpec, shapes: list[TimedShape], compiled: list[Compiled]) -> float:
    """Returns what stages need for each token that they work on, from the growth of the programs'
    memory beyond the buffers for their sequences.
    """
    per_token = sum(activation_bytes_per_token(spec)) / spec.layers_per_stage
    sizes = np.array([shape.size for shape in shapes])
    kept = np.array([shape.num_rows for shape in shapes]) * spec.config.model.seq_len * per_token
    analyses = [program.memory_analysis() for program in compiled]
    needed = np.array([a.temp_size_in_bytes if a else 0 for a in analyses]) - kept
    least = sizes.argmin()
    growth = (needed - needed[least])[sizes > sizes[least]]
    return float(max([0.0, *(growth / (sizes - sizes[least])[sizes > sizes[least]])]))
