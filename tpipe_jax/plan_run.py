"""What launch/plan.py does with a config: plans as a run would, without training."""

from collections.abc import Sequence
from pathlib import Path

import jax

from tpipe_jax.auto_mesh import choose_mesh
from tpipe_jax.autoplan import plan_slices
from tpipe_jax.backends import resolve_attention
from tpipe_jax.config import Config, UserError, resolved
from tpipe_jax.console import Console
from tpipe_jax.mesh import check_model, make_mesh
from tpipe_jax.plan_files import write_plan
from tpipe_jax.plan_settings import read_settings
from tpipe_jax.plans import Plan
from tpipe_jax.precision import resolve_precision
from tpipe_jax.workdir import changed_settings, describe_in_files


def plan_run(
    config: Config, workdir: Path, devices: Sequence[jax.Device], console: Console
) -> None:
    """Plans as a run of this config would, and leaves what it would leave, and plan.png.

    The workdir may be that of the run, which then need not measure again. Raises `UserError` for
    settings that don't fit the devices, or that leave nothing to plan.
    """
    if config.mesh.auto:
        config = choose_mesh(config, devices, workdir, console)
    mesh = make_mesh(config.mesh, devices)
    config = resolve_attention(resolve_precision(resolved(config), mesh), mesh)
    check_model(config.model, config.mesh)
    request = read_settings(config)
    if isinstance(request, Plan):
        raise UserError(
            "there is nothing to plan, since the settings have all slices: leave "
            "config.plan.token_slices or config.plan.batch_slices, and config.plan.file, at auto."
        )
    changes = changed_settings(config, workdir) if jax.process_index() == 0 else []
    if changes and (workdir / "metrics.jsonl").exists():
        raise UserError(
            f"--workdir={workdir} holds a run with other settings ({'; '.join(changes)}), whose "
            "plan would be overwritten: choose another folder."
        )
    table, planning = plan_slices(config, request, mesh, workdir, console)
    factors = planning.chunk_factors
    console.show_planning(planning)
    if jax.process_index() == 0:
        describe_in_files(config, workdir, planning.plan, factors)
        write_plan(workdir, table, planning.plan, factors)
    console.say(f"plan.json, plan.png and latency.json are in {workdir}")
