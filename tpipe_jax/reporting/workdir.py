"""Files that describe a run, in its folder: config.json, plan.json, timeline.png, timeline.json."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tpipe_jax.config.own_runs import RUN_FILE, check_links, record_run
from tpipe_jax.config.settings import Config, differences, from_dict, to_dict
from tpipe_jax.errors import UserError
from tpipe_jax.files import locked, writing_to
from tpipe_jax.json_files import read_json
from tpipe_jax.model.flops import forward_flops
from tpipe_jax.planning.estimator import predicted_timeline
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.planning.simulate import Timeline, simulate
from tpipe_jax.reporting.timeline import draw_timeline
from tpipe_jax.reporting.trace_file import (
    EXPECTED,
    MEASURED,
    read_timeline,
    read_trace,
    trace_events,
    work_of,
    write_trace,
)

FILES = ("plan.json", "plan.png", "timeline.png", "timeline.json", "metrics.jsonl")
# Names of computed timelines in timeline.json.
PREDICTED, OPERATIONS = "predicted", "operations: a second is a GFLOP in a layer"


def changed_settings(config: Config, workdir: Path) -> list[str]:
    """Returns, as text, the settings that differ from those of the run that is in the folder
    already.

    Raises `UserError` if the folder has files that are not of a run, since they would be
    overwritten, or if it is a stranger's and a link leads out of it.
    """
    check_links(workdir)
    try:
        path = workdir / RUN_FILE
        if not path.exists():
            foreign = [name for name in FILES if os.path.lexists(workdir / name)]
            if foreign:
                raise UserError(f"{foreign[0]} without one")
            return []
        before = to_dict(from_dict(read_json(path)))
    except (UserError, ValueError, OSError, AttributeError) as error:
        raise UserError(
            f"--workdir={workdir} is not the folder of a run, which has a config.json ({error}): "
            "choose another folder."
        ) from error
    return [f"{name} {then} -> {now}" for name, now, then in differences(to_dict(config), before)]


def describe_in_files(
    config: Config, workdir: Path, plan: Plan, chunk_factors: Sequence[float]
) -> None:
    """Writes config.json, plan.json, timeline.png and timeline.json. The last two keep the measured
    ticks of an earlier start if its slices were the same. Raises `UserError` if a file cannot be
    written.
    """
    schedule = make_schedule(plan)
    if plan.prediction:
        timeline, name = predicted_timeline(plan, chunk_factors), PREDICTED
    else:
        cost = [
            item.num_rows * forward_flops(config.model, item.num_tokens, item.token) / 1e9
            for item in schedule.items
        ]
        # A backward pass takes about twice the operations of a forward pass. Half of them are for
        # gradients of weights.
        later = None if schedule.weights is None else cost
        backward = [2 * c for c in cost] if later is None else cost
        timeline = simulate(
            schedule, cost, backward, weight_seconds=later, chunk_factors=chunk_factors
        )
        name = OPERATIONS
    events = trace_events(EXPECTED, name, schedule, timeline)
    measured = read_trace(workdir / "timeline.json", MEASURED)
    if work_of(measured) == work_of(events):
        events += measured
    with writing_to(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        write_config(config, workdir)
        plan.save(workdir / "plan.json")
        _write_timelines(workdir, plan, events)


def write_config(config: Config, workdir: Path) -> None:
    """Writes config.json, in one step, since others may read it, and notes that it is the user's
    own (`config.own_runs`). Raises OSError.
    """
    note_config(config, workdir)
    new = workdir / f"{RUN_FILE}.new"
    new.unlink(missing_ok=True)  # it may be a link
    new.write_bytes(_content(config))
    os.replace(new, workdir / RUN_FILE)


def note_config(config: Config, workdir: Path) -> None:
    """Notes that the config.json of this config is the user's own, on a host that does not write
    it: each host may have a home folder of its own.
    """
    record_run(workdir, _content(config))


def _content(config: Config) -> bytes:
    return (json.dumps(to_dict(config), indent=2) + "\n").encode()


def add_measured_ticks(workdir: Path, plan: Plan, step: int, timeline: Timeline) -> None:
    """Adds the measured timeline of a step to timeline.json and timeline.png. Raises `UserError` if
    it cannot.
    """
    measured = trace_events(MEASURED, f"measured, step {step}", make_schedule(plan), timeline)
    with writing_to(workdir):
        events = read_trace(workdir / "timeline.json", EXPECTED) + measured
        _write_timelines(workdir, plan, events)


def _write_timelines(workdir: Path, plan: Plan, events: list[dict[str, Any]]) -> None:
    """Writes timeline.json and, if the events have a computed timeline, timeline.png."""
    schedule = make_schedule(plan)
    write_trace(workdir / "timeline.json", events)
    computed, measured = (
        read_timeline([event for event in events if event["pid"] == kind], schedule)
        for kind in (EXPECTED, MEASURED)
    )
    if computed:
        name, timeline = computed
        slices = f"{len(schedule.items)} slices ({'sequences x ' * (plan.batch_size > 1)}tokens)"
        title = f"{slices} on {schedule.num_stages} stages, "
        title += "at the predicted times" if name == PREDICTED else "by floating-point operations"
        unit = "s" if name == PREDICTED else "GFLOP in a layer"
        draw_timeline(workdir / "timeline.png", schedule, timeline, title, unit, measured)


@contextmanager
def left_as_found(folder: Path) -> Iterator[None]:
    """Removes the folder, and those above it, if they are new and empty when a `UserError` ends the
    block: a run that is refused leaves nothing behind.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except UserError:
        for path in new:
            with suppress(OSError):  # it is not empty
                path.rmdir()
        raise


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Makes a folder of a workdir, and keeps other runs out of it.

    Raises `UserError` if another run is in it.
    """
    with writing_to(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    sentence = (
        f"another run is at work in --workdir={folder.parent}: wait for its end, stop it, or "
        "choose another folder."
    )
    with locked(descriptor, folder, sentence):
        yield
