"""When the stages worked in a step that was run, read from a trace of what their devices did.

In each tick in which a direction has any work, each stage works or idles, and then hands its result
on to its neighbour. Both happen in a conditional of the program (`Skips.run_on_all_if`). So the
work of a tick lies between the start of the conditional and the start of its transfer. These
conditionals and their transfers are found in the text of the program, and then by their names in
the trace.
"""

import json
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.profiler import ProfileData
from jax.sharding import Mesh

from tpipe_jax.devices.exchanges import collective_kind
from tpipe_jax.devices.hlo import read
from tpipe_jax.devices.scopes import ON_ALL
from tpipe_jax.errors import UserError
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import IDLE, Schedule, make_schedule
from tpipe_jax.planning.simulate import Box, Kind, Timeline
from tpipe_jax.reporting.stragglers import StageOfShard
from tpipe_jax.reporting.workdir import add_measured_ticks
from tpipe_jax.runtime.processes import gathered

Result = TypeVar("Result")


class Event(NamedTuple):
    """One operation on a device, with its times in seconds."""

    name: str
    start: float
    stop: float


class TickConditional(NamedTuple):
    """One direction of a tick in the program's text: a conditional and the transfers in it."""

    conditional: str
    transfers: frozenset[str]


def traced(
    run: Callable[[], Result], text: str, schedule: Schedule, mesh: Mesh
) -> tuple[Result, dict[StageOfShard, list[Box]], float]:
    """Runs a step, to its end.

    Returns the result of the step, the boxes of the stages whose first device belongs to this
    process, by data shard and stage, timed by the host's clock, and the duration of the step. All
    times are in seconds. There are no boxes if the trace cannot be taken or does not show them:
    devices other than CPUs may name their operations differently.
    """
    events: dict[int, list[Event]] = {}
    with _recorded(events):
        start = time.monotonic()
        result = jax.block_until_ready(run())
        seconds = time.monotonic() - start
    lanes, boxes = find_tick_conditionals(text), {}
    for (shard, stage), device in np.ndenumerate(mesh.devices[:, :, 0]):
        if device.process_index == jax.process_index():
            # A trace numbers devices within a process, but CPUs among those of all processes.
            number = device.id if device.platform == "cpu" else device.local_hardware_id
            own = stage_boxes(events.get(number, []), lanes, schedule, stage)
            boxes[shard, stage] = own
    return result, boxes, seconds


def gathered_ticks(
    boxes: Mapping[StageOfShard, Sequence[Box]], workdir: Path, plan: Plan, step: int
) -> tuple[str, float | None]:
    """Adds the boxes of the first data shard to timeline.json and timeline.png, once in a run.

    Returns a text on how this went, and the bubble, the share of time in which stages idle. Only
    process 0 gets the bubble, if known.
    """
    bubble = None

    def report(texts: list[str]) -> str:
        """Returns a text even if something fails: the other processes wait for it."""
        nonlocal bubble
        timeline = merged(texts, plan.num_stages)
        if not timeline:
            return "the trace does not show its ticks"
        is_all = make_schedule(plan).weights is None
        bubble = timeline.bubble if is_all else None
        try:
            add_measured_ticks(workdir, plan, step, timeline)
        except UserError as error:
            return str(error)
        passes = "" if is_all else " with passes, gradients of weights aside"
        return (
            f"{timeline.step_seconds:.3g} s from the first slice to the last, stages busy "
            f"{1 - timeline.bubble:.0%} of it{passes}; timeline.png shows each tick"
        )

    of_first = [box for (shard, _), own in boxes.items() if shard == 0 for box in own]
    outcome = gathered("ticks", to_text(of_first), report)
    return outcome, bubble


def to_text(boxes: Sequence[Box]) -> str:
    """Returns boxes as the text that processes send each other."""
    return json.dumps([tuple(vars(box).values()) for box in boxes])


def merged(texts: Sequence[str], num_stages: int) -> Timeline | None:
    """Returns the timeline of all processes' boxes, from the first start on; None if a stage has
    none.
    """
    boxes = [Box(*values) for text in texts for values in json.loads(text)]
    if len({box.stage for box in boxes}) < num_stages:
        return None
    begin = min(box.start_seconds for box in boxes)
    moved = [
        replace(box, start_seconds=box.start_seconds - begin, stop_seconds=box.stop_seconds - begin)
        for box in boxes
    ]
    return Timeline(tuple(moved), max(box.stop_seconds for box in moved), num_stages)


def find_tick_conditionals(text: str) -> list[TickConditional]:
    """Returns the conditionals of a compiled program, `compiled.as_text()`, that hand on their
    result.
    """
    program = read(text)

    def transfers(branch: str) -> list[str]:
        return [
            operation.name
            for operation in program.computations[branch]
            if collective_kind(operation) == "collective-permute" and "ppermute" in operation.source
        ]

    lanes = [
        TickConditional(
            operation.name, frozenset(t for part in operation.parts for t in transfers(part))
        )
        for operation in program.operations()
        if operation.opcode == "conditional" or operation.source.endswith(f"/{ON_ALL}/while")
    ]
    return [lane for lane in lanes if lane.transfers]


def stage_boxes(
    events: Sequence[Event], lanes: Sequence[TickConditional], schedule: Schedule, stage: int
) -> list[Box]:
    """Returns the boxes of a stage, from its device's events; none if these are not of one step."""
    found = []
    for lane in lanes:
        starts = sorted(event.start for event in events if event.name == lane.conditional)
        transfers = sorted(event.start for event in events if event.name in lane.transfers)
        if starts and transfers:
            found.append((transfers, starts))
    if len(found) != 2:
        return []
    boxes = []
    kinds: tuple[Kind, Kind] = "forward", "backward"
    tables = zip((schedule.forward, schedule.backward), kinds, strict=True)
    for (transfers, starts), (table, kind) in zip(sorted(found), tables, strict=True):
        column = table[(table != IDLE).any(1), stage].tolist()
        if len(transfers) != len(column) or starts[0] > transfers[0]:
            return []
        for item, stop in zip(column, transfers, strict=True):
            if item != IDLE:
                start = starts[bisect_right(starts, stop) - 1]
                boxes.append(Box(stage, item, kind, start, stop))
    return boxes


@contextmanager
def _recorded(events: dict[int, list[Event]]) -> Iterator[None]:
    """Records what devices of this process do inside the `with` block. Adds the operations to
    `events[device number]`, with the numbers of the trace. Adds nothing if recording fails.
    """
    options, folder = jax.profiler.ProfileOptions(), ""
    options.python_tracer_level = 0
    with ExitStack() as stack:
        with suppress(OSError, RuntimeError):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            jax.profiler.start_trace(folder, profiler_options=options)
        yield
        with suppress(OSError, RuntimeError, ValueError):
            jax.profiler.stop_trace()
            [path] = Path(folder).rglob("*.xplane.pb")
            for device, event in _device_events(ProfileData.from_file(str(path))):
                events.setdefault(device, []).append(event)


def _device_events(profile: ProfileData) -> Iterator[tuple[int, Event]]:
    """Yields each operation, with the number of its device. Raises ValueError if the trace does not
    say when it began.
    """
    planes = list(profile.planes)
    stats_of_planes = [dict(plane.stats) for plane in planes]
    [begin] = [s["profile_start_time"] for s in stats_of_planes if "profile_start_time" in s]
    for event in (event for plane in planes for line in plane.lines for event in line.events):
        stats = dict(event.stats)
        if "hlo_op" in stats and "device_ordinal" in stats:
            start, stop = event.start_ns, event.start_ns + event.duration_ns
            times = (begin + round(start)) / 1e9, (begin + round(stop)) / 1e9
            yield stats["device_ordinal"], Event(stats["hlo_op"], *times)
