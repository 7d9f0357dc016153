"""`tpipe plan`: plans the slices of a model, measured here, for GPUs that are not here, or from a
file of latencies. No jax.
"""

from typing import Any

from tpipe_jax.commands.launch import launch
from tpipe_jax.config.command_line import parse_plan
from tpipe_jax.config.flags import FilePlanFlags, GpuPlanFlags
from tpipe_jax.errors import UserError
from tpipe_jax.files import writing_to
from tpipe_jax.runtime.noise import without_noise


def main(args: list[str], program: str) -> int:
    """Runs the command; returns the exit status."""
    flags = parse_plan(args, program)
    if isinstance(flags, FilePlanFlags):
        _plan_from_file(flags)
        return 0
    if isinstance(flags, GpuPlanFlags):
        return _plan_for_gpus(flags)
    return launch(flags, _plan_by_measuring)


def _plan_from_file(flags: FilePlanFlags) -> None:
    """Plans without a device and without jax."""
    from tpipe_jax.planning.latency_file import load_table
    from tpipe_jax.planning.placement import chunk_factors
    from tpipe_jax.planning.plan import PlanRequest
    from tpipe_jax.planning.planner import GIB, check_request, find_plan
    from tpipe_jax.reporting.console import Console
    from tpipe_jax.reporting.plan_report import draw_plan

    schedule = None if flags.schedule == "auto" else flags.schedule
    if flags.chunks and schedule is None:
        schedule = "interleaved"
    request = PlanRequest(
        flags.num_stages,
        flags.batch_size,
        flags.seq_len,
        schedule=schedule,
        num_chunks=flags.chunks,
        num_layers=flags.num_layers,
    )
    check_request(request)
    factors = flags.stage_factors or chunk_factors(
        flags.num_layers or flags.num_stages, flags.num_stages
    )
    limit = None if flags.memory_limit_gib is None else flags.memory_limit_gib * GIB
    table = load_table(flags.latency)
    if (flags.workdir / "metrics.jsonl").exists():
        raise UserError(
            f"--workdir={flags.workdir} holds a run, whose plan would be overwritten: choose "
            "another folder."
        )
    planning = find_plan(table, request, factors, limit)
    console = Console()
    console.show_planning(planning)
    with writing_to(flags.workdir):
        flags.workdir.mkdir(parents=True, exist_ok=True)
        planning.plan.save(flags.workdir / "plan.json")
    draw_plan(flags.workdir, table, planning)
    console.say(f"plan.json and plan.png are in {flags.workdir}")


def _plan_for_gpus(flags: GpuPlanFlags) -> int:
    """Plans for GPUs that are not here."""
    with without_noise():  # of libraries that miss the devices
        from tpipe_jax.commands.plan_ahead import plan_ahead
        from tpipe_jax.devices.targets import prepare_compiler
    from tpipe_jax.reporting.console import Console

    prepare_compiler()
    return plan_ahead(flags, Console())


def _plan_by_measuring(*args: Any) -> int:
    """Profiles the model of a config on its devices and plans its slices."""
    from tpipe_jax.commands.plan import plan_until_stopped

    return plan_until_stopped(*args)
