"""Plans as a run would, without training: `tpipe plan` with a config."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax

from tpipe_jax.config.settings import Config
from tpipe_jax.data.carried import with_carried
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.errors import UserError
from tpipe_jax.pipeline.spec import make_spec, spec_on_devices
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.settings import read_settings
from tpipe_jax.profiling.measured_plan import plan_slices
from tpipe_jax.profiling.mesh_search import choose_mesh, factorisations, take_latencies
from tpipe_jax.reporting.console import Console
from tpipe_jax.reporting.plan_report import draw_plan
from tpipe_jax.reporting.workdir import changed_settings, describe_in_files
from tpipe_jax.runtime.stop import MEASURING, Stop, Stopped


def plan_until_stopped(
    config: Config, workdir: Path, devices: Sequence[jax.Device], console: Console
) -> int:
    """Plans as `plan_run` does, until Ctrl-C or SIGTERM; returns the exit status."""
    with Stop(console.say, MEASURING) as stop:
        try:
            plan_run(config, workdir, devices, console, stop.check)
        except Stopped:
            console.say("Interrupted before there was a plan: the same command goes on.")
            return stop.status()
    return 0


def plan_run(
    config: Config,
    workdir: Path,
    devices: Sequence[jax.Device],
    console: Console,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Plans as a run of this config would. Writes the files that describe such a run, and plan.png.

    A later run in the same workdir need not measure again. `check` is called in between. Raises
    `UserError` for settings that don't fit the devices, or that leave nothing to plan, and whatever
    `check` raises.
    """
    config, carried = with_carried(config)
    if carried:
        console.say(carried)
    is_auto = config.mesh.auto
    if is_auto:  # checks what it can before minutes of measuring
        some_mesh = next(factorisations(config.mesh, len(devices)))
        some = replace(config, mesh=some_mesh)
        some = make_spec(some, make_mesh(some_mesh, devices))
        _check_is_own(some.config, workdir, but=("config.mesh.", "config.optim.shard_state "))
        config = choose_mesh(config, devices, workdir, console, check)
    spec = spec_on_devices(config, devices)
    config = spec.config
    request = read_settings(config)
    if isinstance(request, Plan):
        raise UserError(
            "there is nothing to plan, since the settings have all slices: leave "
            "config.plan.token_slices or config.plan.batch_slices, and config.plan.file, at auto."
        )
    _check_is_own(config, workdir)
    if is_auto:
        take_latencies(config.mesh, workdir)
    table, planning = plan_slices(spec, request, workdir, console, check)
    factors = planning.chunk_factors
    console.show_planning(planning)
    if jax.process_index() == 0:
        describe_in_files(config, workdir, planning.plan, factors)
        draw_plan(workdir, table, planning)
    console.say(f"plan.json, plan.png and latency.json are in {workdir}")


def _check_is_own(config: Config, workdir: Path, but: tuple[str, ...] = ()) -> None:
    """Raises `UserError` if the folder holds a run with other settings; those that begin with `but`
    may differ.
    """
    changes = changed_settings(config, workdir) if jax.process_index() == 0 else []
    changes = [change for change in changes if not change.startswith(but)]
    if changes and (workdir / "metrics.jsonl").exists():
        raise UserError(
            f"--workdir={workdir} holds a run with other settings ({'; '.join(changes)}), whose "
            "plan would be overwritten: choose another folder."
        )
