"""config.mesh=auto: finds the way to divide the devices whose planned step is the fastest."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import jax

from tpipe_jax.config.settings import Config, MeshConfig
from tpipe_jax.errors import Infeasible, UserError
from tpipe_jax.files import writing_to
from tpipe_jax.pipeline.spec import spec_on_devices
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.settings import read_settings
from tpipe_jax.profiling.measured_plan import LATENCY, plan_slices, read_own
from tpipe_jax.reporting.console import Console, Ranked
from tpipe_jax.reporting.workdir import changed_settings, run_lock, write_config
from tpipe_jax.training.memory import out_of_memory


def choose_mesh(
    config: Config,
    devices: Sequence[jax.Device],
    workdir: Path,
    console: Console,
    check: Callable[[], None] = lambda: None,
) -> Config:
    """Returns the config with the mesh of the fastest plan; prints all meshes, ranked.

    Each mesh has its own folder in the workdir, and is measured unless the folder already has its
    measurements. `check` is called in between. Raises `UserError` if no mesh can be used, if the
    workdir has files that are not of a run, or if another run is measuring in it. Also raises
    whatever `check` raises.
    """
    is_first = jax.process_index() == 0
    if is_first:  # an error in one process ends all
        changed_settings(config, workdir)
        read_own(workdir / LATENCY)
    ranking = []
    with run_lock(workdir / "meshes") if is_first else nullcontext():
        for mesh in factorisations(config.mesh, len(devices)):
            check()
            console.say(f"mesh: data {mesh.data} x pipe {mesh.pipe} x model {mesh.model}")
            folder = _folder(workdir, mesh)
            ranking.append(_try(replace(config, mesh=mesh), devices, folder, console, check))
    ranking.sort(key=lambda ranked: ranked.seconds)
    console.show_ranking(ranking)
    best = ranking[0]
    if best.planning is None:
        raise UserError(
            f"config.mesh=auto finds no way to divide {len(devices)} devices that serves this run: "
            f"data {best.mesh.data} x pipe {best.mesh.pipe} x model {best.mesh.model}, "
            f"for one, does not, since {best.reason}"
        )
    return replace(config, mesh=best.mesh)


def take_latencies(mesh: MeshConfig, workdir: Path) -> None:
    """Copies the measurements of the chosen mesh to where a run in the workdir looks for them."""
    if jax.process_index() == 0:
        with writing_to(workdir):
            shutil.copy(_folder(workdir, mesh) / LATENCY, workdir / LATENCY)


def factorisations(mesh: MeshConfig, num_devices: int) -> Iterator[MeshConfig]:
    """Yields all meshes data x pipe x model of the devices; those with most stages come first."""
    sizes = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    for pipe in reversed(sizes):
        for model in (n for n in sizes if num_devices // pipe % n == 0):
            data = num_devices // pipe // model
            yield replace(mesh, data=data, pipe=pipe, model=model, auto=False)


def _try(
    config: Config,
    devices: Sequence[jax.Device],
    folder: Path,
    console: Console,
    check: Callable[[], None],
) -> Ranked:
    """Measures and plans on a mesh; returns only the reason if the mesh cannot be used.

    Every process finds such a reason on its own. Other errors end the run.
    """
    if config.mesh.pipe > config.model.num_layers:
        return Ranked(config.mesh, reason=f"there are {config.model.num_layers} layers.")
    try:
        spec = spec_on_devices(config, devices)
        request = read_settings(spec.config)
    except UserError as error:
        return Ranked(config.mesh, reason=str(error))
    if isinstance(request, Plan):
        return Ranked(config.mesh, reason="the settings have all slices, whose times are unknown.")
    if jax.process_index() == 0:
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_config(spec.config, folder)
    try:
        with out_of_memory():
            _, planning = plan_slices(spec, request, folder, console, check)
    except Infeasible as error:
        return Ranked(config.mesh, reason=str(error))
    return Ranked(config.mesh, planning)


def _folder(workdir: Path, mesh: MeshConfig) -> Path:
    return workdir / "meshes" / f"{mesh.data}x{mesh.pipe}x{mesh.model}"
