"""Plans for GPUs that are not here: `tpipe plan --gpu`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tpipe_jax.config.flags import GpuPlanFlags
from tpipe_jax.config.settings import Config, MeshConfig, ScheduleName
from tpipe_jax.devices.hardware import GIB, peak_flops
from tpipe_jax.devices.speeds import ERROR, Network, Speed, speed_of
from tpipe_jax.devices.targets import gpu_target
from tpipe_jax.errors import Infeasible, UserError
from tpipe_jax.files import writing_to
from tpipe_jax.model.flops import step_flops
from tpipe_jax.model.remat import candidates
from tpipe_jax.model.transformer import num_params
from tpipe_jax.pipeline.spec import StageSpec, spec_on_devices
from tpipe_jax.planning.bounds import check_devices, fits_times
from tpipe_jax.planning.estimator import Estimator, predicted_timeline
from tpipe_jax.planning.latency import LatencyTable
from tpipe_jax.planning.plan import Plan, PlanRequest
from tpipe_jax.planning.planner import Planning, find_plan
from tpipe_jax.planning.schedule_search import step_seconds
from tpipe_jax.planning.settings import divisors, read_settings, unit_tokens, work_factors
from tpipe_jax.planning.slicer import least_work
from tpipe_jax.profiling.measured_plan import LATENCY, read_own
from tpipe_jax.profiling.mesh_search import factorisations
from tpipe_jax.profiling.predicted import Predictor
from tpipe_jax.reporting.console import Console, count, schedule_name
from tpipe_jax.reporting.meshes_plot import Point, draw_meshes
from tpipe_jax.reporting.plan_report import draw_plan
from tpipe_jax.runtime.noise import without_noise
from tpipe_jax.runtime.stop import Stop, Stopped
from tpipe_jax.training.memory import TooLarge, fitting_step, limit_bytes, program_bytes
from tpipe_jax.training.optimizer import make_optimizer

# Places where a sequence may be cut, unless the settings have a unit. There are more where many
# stages work on a long sequence, as long as each part has enough tokens for a GPU.
MOST_UNITS, UNITS_PER_STAGE, ENOUGH_TOKENS = 64, 16, 2048
MOST_COMPILED = 4  # steps that are compiled to find one that fits
MOST_PLANNED = 3  # ways that are planned under all schedules
QUICK: tuple[ScheduleName, ...] = ("terapipe", "1f1b")  # schedules to compare ways by
STOPPING = "Stopping; nothing is lost."


@dataclass(frozen=True)
class Way:
    """A way to divide the GPUs, and what became of it."""

    mesh: MeshConfig
    spec: StageSpec | None = None
    table: LatencyTable | None = None
    planning: Planning | None = None
    reason: str = ""
    """Why there is no plan."""
    needed_bytes: float = math.inf
    is_compiled: bool = False
    """Whether the bytes are those of the compiled step, and not an estimate."""

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step; infinite without a plan."""
        return step_seconds(self.planning.plan) if self.planning else math.inf


def plan_ahead(flags: GpuPlanFlags, console: Console) -> int:
    """Plans for the GPUs that the flags name, prints what it found, and writes the files; returns
    the exit status. Raises `UserError` if the flags don't fit together, or if no plan fits.
    """
    _check_workdir(flags.workdir)
    if flags.config.plan.file is not None:
        raise UserError(
            f"config.plan.file={flags.config.plan.file} is a plan already: leave it out, or "
            "see what it needs with tpipe compile."
        )
    meshes, network, speed = _meshes(flags), _network(flags), speed_of(flags.gpu)
    console.say("compiling and planning, which takes a minute or two ...")
    with Stop(console.say, STOPPING) as stop:
        try:
            with console.working("compiling and planning") as show:
                ways = _plan_all(
                    flags, meshes, Predictor(flags.gpu, speed, network), show, stop.check
                )
                ways = _compiled(flags, ways, stop.check)
        except Stopped:
            console.say("Interrupted before there was a plan: the same command starts again.")
            return stop.status()
    _show(flags, ways, network, speed, console)
    best = ways[0]
    if best.planning is None:
        raise UserError(_nothing_fits(flags, ways))
    _write(flags.workdir, ways)
    files = ["plan.json", "latency.json", "plan.png", *["meshes.png"] * (len(ways) > 1)]
    console.say(f"{', '.join(files[:-1])} and {files[-1]} are in {flags.workdir}")
    return 0


def _check_workdir(workdir: Path) -> None:
    if (workdir / "metrics.jsonl").exists():
        raise UserError(
            f"--workdir={workdir} holds a run, whose plan would be overwritten: choose another "
            "folder."
        )
    profile = read_own(workdir / LATENCY)
    if profile is not None and "predicted" not in profile.key:
        raise UserError(
            f"--workdir={workdir} has a latency.json that was measured, and predicted "
            "times would overwrite it: choose another folder."
        )


def _meshes(flags: GpuPlanFlags) -> list[MeshConfig]:
    """Returns the meshes to plan for. Raises `UserError` if there are none on these hosts."""
    mesh, each = flags.config.mesh, flags.gpus_per_host
    total = None if flags.hosts is None else flags.hosts * each
    if total is not None:
        check_devices(f"--hosts={flags.hosts} of --gpus-per-host={each} GPUs", total)
    if not mesh.auto:
        check_devices("config.mesh", mesh.num_devices)
    if mesh.auto:
        if total is None:
            raise UserError(
                "config.mesh=auto needs to know how many GPUs there are: set --hosts, of "
                f"--gpus-per-host={each} GPUs each."
            )
        return list(factorisations(mesh, total))
    if total is not None and mesh.num_devices != total:
        raise UserError(
            f"config.mesh has {mesh.num_devices} devices, and --hosts={flags.hosts} of "
            f"--gpus-per-host={each} GPUs have {total}: set --config.mesh=auto to find a mesh, or "
            "config.mesh.data, pipe and model so that their product is that."
        )
    if mesh.num_devices > each and mesh.num_devices % each:
        raise UserError(
            f"config.mesh has {mesh.num_devices} devices, which hosts of --gpus-per-host={each} "
            "GPUs cannot share evenly: set another of the two."
        )
    return [mesh]


def _network(flags: GpuPlanFlags) -> Network:
    gbits = flags.bandwidth or speed_of(flags.gpu).host_gbits
    return Network(flags.gpus_per_host, gbits * 1e9 / 8, flags.latency_us * 1e-6)


def _plan_all(
    flags: GpuPlanFlags,
    meshes: Sequence[MeshConfig],
    predictor: Predictor,
    show: Callable[[int, int], None],
    check: Callable[[], None],
) -> list[Way]:
    """Returns all ways to divide the GPUs, the fastest first.

    Ways that cannot be faster than one that was planned before are not planned, and programs for
    them are not compiled. First ways are planned under few schedules; the fastest are then planned
    under all.
    """
    ways: list[Way] = []
    num_parts = len(meshes) + MOST_PLANNED

    def on_progress(num_done: int = 0) -> None:
        check()
        show(len(ways), num_parts)

    best = math.inf
    # Fewer GPUs that share operators come first: they exchange less.
    for mesh in sorted(meshes, key=lambda mesh: mesh.model):
        way = _way(flags, mesh)
        if way.spec is not None and predictor.least_seconds(way.spec) < best:
            way = _plan(way, predictor, QUICK, best, on_progress)
        elif way.spec is not None:
            way = replace(way, reason=f"a step takes more than {best:.3g} s there")
        best = min(best, way.seconds)
        ways.append(way)
        on_progress()
    ways.sort(key=lambda way: way.seconds)
    for n in range(min(MOST_PLANNED, len(ways))):
        if ways[n].planning is not None:
            ways[n] = _plan(ways[n], predictor, None, math.inf, on_progress)
        show(len(meshes) + n + 1, num_parts)
    return sorted(ways, key=lambda way: way.seconds)


def _way(flags: GpuPlanFlags, mesh: MeshConfig) -> Way:
    """Returns a mesh with its spec, or with the reason why it does not serve."""
    config = replace(flags.config, mesh=mesh)
    if mesh.pipe > config.model.num_layers:
        return Way(mesh, reason=f"there are {count(config.model.num_layers, 'layer')}")
    if flags.config.mesh.auto and mesh.model > flags.gpus_per_host:
        return Way(mesh, reason="operators would be shared across hosts")
    try:
        with without_noise():
            num_hosts = max(1, mesh.num_devices // flags.gpus_per_host)
            target = gpu_target(flags.gpu, mesh, num_hosts)
        spec = spec_on_devices(config, target.devices, target.facts)
        if spec.dtype.itemsize != 2:
            raise UserError(
                f"config.precision.compute={config.precision.compute} has no prediction: it "
                "is for products in 16 bits: set it to auto."
            )
        read_settings(spec.config)
    except UserError as error:
        if not flags.config.mesh.auto:
            raise
        return Way(mesh, reason=str(error).removesuffix("."))
    return Way(mesh, spec)


def _plan(
    way: Way,
    predictor: Predictor,
    schedules: tuple[ScheduleName, ...] | None,
    best: float,
    on_progress: Callable[[int], None],
) -> Way:
    """Plans a way with the first choice of saved values that fits in memory: under these schedules,
    as far as the settings leave a choice, or under all. A way that takes more than `best` is not
    planned.
    """
    assert way.spec
    reason = way.reason
    for remat in candidates(way.spec.config.memory):
        spec = _with_policy(way.spec, remat)
        config = spec.config
        with without_noise():
            profile = predictor.profile(spec, unit_to_plan(config), on_progress)
        table, limit, factors = (
            profile.table(unit_to_plan(config)),
            limit_bytes(spec),
            work_factors(config),
        )
        request = _as_request(read_settings(config), config)
        estimator = Estimator.of(table, request, factors)
        work = least_work(*estimator.times, request.batch_size, request.batch_slices)
        if work + profile.outside_seconds >= best:
            return replace(way, reason=f"a step takes more than {best:.3g} s there")
        allowed = [name for name in schedules or () if name in request.schedules] or [None]
        requests = [replace(request, schedule=name) if name else request for name in allowed]
        found = []
        for asked in requests:
            on_progress(0)
            try:
                found.append(find_plan(table, asked, factors, limit))
            except Infeasible as error:
                reason = f"it does not fit: {str(error).removesuffix('.')}"
        if found:
            planning = min(found, key=lambda planning: step_seconds(planning.plan))
            chunks = tuple(work_factors(config, planning.plan))
            return replace(
                way,
                spec=spec,
                table=table,
                planning=replace(planning, chunk_factors=chunks),
                needed_bytes=estimator.step_bytes(planning.plan),
            )
    return replace(way, reason=reason)


def _compiled(flags: GpuPlanFlags, ways: list[Way], check: Callable[[], None]) -> list[Way]:
    """Compiles the steps of the fastest ways until one fits, by XLA's own figures. Returns the ways
    with that one first.
    """
    ways, rejected = list(ways), []
    for _ in range(MOST_COMPILED):
        way = ways[0]
        if way.planning is None or way.spec is None:
            break
        check()
        try:
            with without_noise():
                spec, step = fitting_step(
                    way.spec, way.planning.plan, make_optimizer(way.spec.config)
                )
        except TooLarge as error:
            rejected.append(replace(ways.pop(0), planning=None, reason=f"does not fit: {error}"))
            if not ways:
                break
            continue
        ways[0] = replace(way, spec=spec, needed_bytes=program_bytes(step), is_compiled=True)
        break
    return [*ways, *rejected]


def _as_request(given: Plan | PlanRequest, config: Config) -> PlanRequest:
    """Returns what the plan must keep to. Slices that are all given are kept."""
    if isinstance(given, PlanRequest):
        return given
    return PlanRequest(
        config.mesh.pipe,
        given.batch_size,
        given.seq_len,
        given.batch_slices,
        given.token_slices[0],
        given.schedule,
        given.num_chunks if given.num_chunks > 1 else None,
        config.model.num_layers,
    )


def unit_to_plan(config: Config) -> int:
    """Returns the unit of slices in tokens: as set, or so that a sequence has few units."""
    unit, seq_len = unit_tokens(config), config.model.seq_len
    if config.plan.unit_tokens is not None:
        return unit
    most = max(MOST_UNITS, min(UNITS_PER_STAGE * config.mesh.pipe, seq_len // ENOUGH_TOKENS))
    num_rows = config.train.batch_size // config.mesh.data
    return next(
        n
        for n in divisors(seq_len)
        if n % unit == 0
        and seq_len // n <= most
        and (fits_times(num_rows, seq_len // n) or n == seq_len)
    )


def _with_policy(spec: StageSpec, remat: str) -> StageSpec:
    memory = replace(spec.config.memory, remat=remat)
    return spec.with_config(replace(spec.config, memory=memory))


def _show(
    flags: GpuPlanFlags, ways: list[Way], network: Network, speed: Speed, console: Console
) -> None:
    config, best = flags.config, ways[0]
    total = best.mesh.num_devices
    origin = "measured" if speed.is_measured else "assumed from the data sheet"
    typical = "" if flags.bandwidth else ", typical for these GPUs (--bandwidth)"
    console.show_facts(
        {
            "model": f"{num_params(config.model):,} parameters, "
            f"{config.train.batch_size} x {config.model.seq_len} tokens a step",
            "GPUs": f"{total} x {flags.gpu}: products at {speed.product_flops / 1e12:.0f} TFLOP/s, "
            f"memory at {speed.bytes_per_second / 1e9:.0f} GB/s ({origin})",
            "network": f"{network.host_bytes_per_second * 8 / 1e9:g} Gbit/s a host{typical}, "
            f"{network.latency_seconds * 1e6:g} us",
            "times": f"predicted, not measured: a step may take {ERROR:.0%} less or more",
        }
    )
    if best.planning:
        console.show_planning(best.planning)
    rows = [_row(flags, way) for way in ways]
    columns = ["data", "pipe", "model", "plan", "step", "tokens/s", "MFU", "bubble", "GiB", "days"]
    shown = columns if flags.tokens else columns[:-1]
    console.show_ways(shown, [row[: len(shown)] for row in rows if len(row) > 4])
    for row in rows:
        if len(row) == 4:
            console.say(f"data {row[0]} x pipe {row[1]} x model {row[2]}: {row[3]}")
    if best.is_compiled and best.spec:
        limit = limit_bytes(best.spec)
        spare = "" if limit is None else f" of {limit / GIB:.1f} GiB that jax may use"
        console.say(
            f"the step of the first compiles for these GPUs and fits: XLA says "
            f"{best.needed_bytes / GIB:.2f} GiB{spare}, with config.memory.remat="
            f"{best.spec.config.memory.remat}; memory of the others is an estimate"
        )


def _row(flags: GpuPlanFlags, way: Way) -> list[str]:
    """Returns the figures of a way, or its axes and the reason why it has none."""
    axes = [str(getattr(way.mesh, axis)) for axis in ("data", "pipe", "model")]
    if way.planning is None or way.spec is None:
        return [*axes, way.reason]
    config, plan = way.spec.config, way.planning.plan
    tokens = config.train.batch_size * config.model.seq_len / way.seconds
    peak = peak_flops(config, way.spec.device.kind)
    achieved = step_flops(config) / (way.seconds * way.mesh.num_devices)
    num_slices = sum(map(len, plan.token_slices))
    bubble = predicted_timeline(plan, way.planning.chunk_factors).bubble
    return [
        *axes,
        f"{schedule_name(plan)}, {count(num_slices, 'slice')}",
        f"{way.seconds:.3g} s" if way.seconds >= 1 else f"{1e3 * way.seconds:.3g} ms",
        f"{tokens:,.0f}",
        f"{achieved / peak:.0%}" if peak else "unknown",
        f"{bubble:.0%}",
        f"{way.needed_bytes / GIB:.1f}",
        f"{flags.tokens / tokens / 86400:,.3g}" if flags.tokens else "",
    ]


def _nothing_fits(flags: GpuPlanFlags, ways: list[Way]) -> str:
    """Says that no mesh serves, and why the first one does not."""
    way = ways[0]
    axes = f"data {way.mesh.data} x pipe {way.mesh.pipe} x model {way.mesh.model}"
    if len(ways) == 1:
        return f"{axes} of {flags.gpu} does not serve this model: {way.reason}."
    return (
        f"config.mesh=auto finds no way to divide {way.mesh.num_devices} x {flags.gpu} that serves "
        f"this model: {axes}, the nearest, does not, since {way.reason}."
    )


def _write(workdir: Path, ways: list[Way]) -> None:
    best = ways[0]
    assert best.planning
    assert best.table
    assert best.spec
    with writing_to(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        best.planning.plan.save(workdir / "plan.json")
        best.table.save(workdir / "latency.json")
    draw_plan(workdir, best.table, best.planning)
    if len(ways) > 1:
        points = [
            Point(
                f"{way.mesh.data} x {way.mesh.pipe} x {way.mesh.model}",
                way.seconds,
                way.needed_bytes / GIB,
            )
            for way in ways
            if way.planning and np.isfinite(way.needed_bytes)
        ]
        limit = limit_bytes(best.spec)
        draw_meshes(workdir, points, None if limit is None else limit / GIB)
