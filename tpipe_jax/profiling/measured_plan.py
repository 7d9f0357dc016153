"""Measures a model on its mesh and plans its slices.

Shapes that were never timed are timed now, those of the plan and of the fastest uniform plan, and
planning is repeated; otherwise the search would favour shapes whose time the model underestimates.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np

from tpipe_jax.errors import UserError
from tpipe_jax.files import writing_to
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.planning.latency import LatencyTable, Profile
from tpipe_jax.planning.latency_file import load_table, read_profile
from tpipe_jax.planning.plan import Plan, PlanRequest, read_plan
from tpipe_jax.planning.planner import Planning, find_plan
from tpipe_jax.planning.settings import unit_tokens, work_factors
from tpipe_jax.profiling.cache_key import profile_key
from tpipe_jax.profiling.profiler import Profiler
from tpipe_jax.reporting.console import Console
from tpipe_jax.runtime.processes import from_first
from tpipe_jax.training.memory import fitting_policy, limit_bytes
from tpipe_jax.training.optimizer import make_optimizer

LATENCY = "latency.json"  # in the workdir
MAX_REFINEMENTS = 2  # each takes seconds; mostly one is enough


def plan_slices(
    spec: StageSpec,
    request: PlanRequest,
    workdir: Path,
    console: Console,
    check: Callable[[], None] = lambda: None,
) -> tuple[LatencyTable, Planning]:
    """Returns the latencies of slices, and the fastest plan that keeps to the request.

    The latencies are measured and saved as `latency.json` in the workdir, unless this file already
    has latencies of the same model, mesh and machine. `check` is called in between. Raises
    `UserError` if no plan keeps to the request and to the memory, and whatever `check` raises.
    """
    spec = fitting_policy(spec, request, make_optimizer(spec.config))
    path, unit = workdir / LATENCY, unit_tokens(spec.config)
    limit, profiler = limit_bytes(spec), None
    needs_deferral = "1f1b-deferred" in request.schedules
    profile = _measured_before(path, spec, needs_deferral)
    if profile:
        console.say(f"latencies as measured before: {path}")
    else:
        with console.profiling() as show_progress:

            def on_progress(done: int, num_parts: int) -> None:
                show_progress(done, num_parts)
                check()

            profiler = Profiler(spec)
            profile = profiler.profile(on_progress, needs_deferral)
        console.say(_errors(profile))
    num_refinements = 0
    while True:
        table = profile.table(unit)
        if profiler:
            _save(path, table)
        planning = find_plan(table, request, work_factors(spec.config), limit)
        plan = as_first(planning.plan)
        planning = replace(
            planning, plan=plan, chunk_factors=tuple(work_factors(spec.config, plan))
        )
        wanted = planning.plan.shapes | planning.fastest_uniform.shapes
        new = wanted - {sample[:2] for sample in profile.samples if not sample.is_test}
        if not new or num_refinements == MAX_REFINEMENTS:
            return table, planning
        check()
        shapes = ", ".join(f"{b} x {n}" for b, n in sorted(new))
        console.say(f"timing what the plan is made of: {shapes} tokens")
        profiler = profiler or Profiler(spec)
        profile = profiler.refine(profile, sorted(new), lambda *_: check())
        num_refinements += 1


def as_first(plan: Plan) -> Plan:
    """Returns the plan of process 0, since all processes must run the same program."""
    return read_plan(json.loads(from_first(json.dumps(plan.to_dict()))))


def _measured_before(path: Path, spec: StageSpec, needs_deferral: bool) -> Profile | None:
    """Returns the profile that process 0 finds, if it fits the spec and has all that is needed."""
    profile = read_own(path) if jax.process_index() == 0 else None
    if profile and profile.key != profile_key(spec):
        profile = None
    if profile and needs_deferral and not profile.deferral:
        profile = None
    content = json.loads(from_first(json.dumps(asdict(profile) if profile else None)))
    return read_profile(content) if content else None


def read_own(path: Path) -> Profile | None:
    """Returns the measurements in the file; None if a new file may be written in its place.

    Raises `UserError` if the file was not measured here, since it would be overwritten.
    """
    if not path.exists():
        return None
    try:
        table = load_table(path)
    except UserError:
        if (path.parent / "config.json").exists():
            return None  # a damaged file of a run
        raise
    if table.profile is None:
        raise UserError(
            f"--workdir={path.parent} has a latency.json that was not measured here, and would be "
            "overwritten: choose another folder, or move it away."
        )
    return table.profile


def _errors(profile: Profile) -> str:
    """Says how far the latency model is off on slices that were kept out of its fit."""
    texts = []
    for name, model in zip(("forward", "backward"), profile.models(), strict=True):
        errors = 100 * np.abs(model.relative_errors())
        if len(errors):
            middle, high = np.percentile(errors, (50, 95))
            texts.append(f"{name} {middle:.1f}% (95th percentile {high:.1f}%)")
    return f"latency model: median error {', '.join(texts) or 'unknown'} on slices kept out of it"


def _save(path: Path, table: LatencyTable) -> None:
    """Writes the table as `latency.json`, in process 0 only."""
    if jax.process_index() == 0:
        with writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            table.save(path)
