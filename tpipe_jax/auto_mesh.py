"""config.mesh=auto: of all ways to divide the devices, that of the fastest planned step."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax

from tpipe_jax.autoplan import plan_slices
from tpipe_jax.config import Config, MeshConfig, UserError
from tpipe_jax.console import Console, Ranked
from tpipe_jax.memory import out_of_memory
from tpipe_jax.plans import Plan
from tpipe_jax.run import prepare
from tpipe_jax.writing import writing_to


def choose_mesh(
    config: Config,
    devices: Sequence[jax.Device],
    workdir: Path,
    console: Console,
    check: Callable[[], None] = lambda: None,
) -> Config:
    """The config with the mesh of the fastest plan; prints all, ranked.

    Each mesh is measured and planned in a folder of its own in the workdir, unless that holds what
    was measured before, and the latencies of the one that is taken go into the workdir, where a
    run finds them. Raises `UserError` if none serves, and what `check` raises.
    """
    found: list[Ranked] = []
    for mesh in factorisations(config.mesh, len(devices)):
        check()
        found.append(_try(replace(config, mesh=mesh), devices, _folder(workdir, mesh), console))
    ranking = sorted(found, key=lambda ranked: ranked.seconds)
    console.show_ranking(ranking)
    best = ranking[0]
    if best.planning is None:
        raise UserError(
            f"config.mesh=auto finds no way to divide {len(devices)} devices that serves this run: "
            f"data {best.mesh.data} x pipe {best.mesh.pipe} x model {best.mesh.model}, "
            f"for one, does not, since {best.reason}"
        )
    if jax.process_index() == 0:
        with writing_to(workdir):
            shutil.copy(_folder(workdir, best.mesh) / "latency.json", workdir / "latency.json")
    return replace(config, mesh=best.mesh)


def factorisations(mesh: MeshConfig, num_devices: int) -> Iterator[MeshConfig]:
    """All data x pipe x model of so many devices; those with most stages come first."""
    sizes = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    for pipe in reversed(sizes):
        for model in (n for n in sizes if num_devices // pipe % n == 0):
            yield replace(mesh, data=num_devices // pipe // model, pipe=pipe, model=model)


def _try(config: Config, devices: Sequence[jax.Device], folder: Path, console: Console) -> Ranked:
    """Measures and plans on a mesh, if that is possible."""
    mesh = config.mesh
    console.say(f"mesh: data {mesh.data} x pipe {mesh.pipe} x model {mesh.model}")
    if mesh.pipe > config.model.num_layers:
        return Ranked(mesh, reason=f"there are {config.model.num_layers} layers.")
    try:
        run = prepare(config, devices)
        if isinstance(run.plan, Plan):
            return Ranked(mesh, reason="the settings have all slices, whose times are not known.")
        with out_of_memory():
            _, planning = plan_slices(run.config, run.plan, run.mesh, folder, console)
    except UserError as error:
        return Ranked(mesh, reason=str(error))
    return Ranked(mesh, planning)


def _folder(workdir: Path, mesh: MeshConfig) -> Path:
    return workdir / "meshes" / f"{mesh.data}x{mesh.pipe}x{mesh.model}"
