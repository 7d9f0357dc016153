"""Timelines as a trace file, timeline.json: an event for each slice on each stage."""

import json
import re
from pathlib import Path
from typing import Any, get_args

from tpipe_jax.json_files import is_number, read_json
from tpipe_jax.planning.plan import MAX_SECONDS
from tpipe_jax.planning.schedule import Schedule
from tpipe_jax.planning.simulate import Box, Kind, Timeline

EXPECTED, MEASURED = 0, 1  # kinds of timelines in a trace
NAME = re.compile(r"[\w:, ]{1,80}")  # of a timeline; other signs could be formulas to matplotlib


def trace_events(
    kind: int, name: str, schedule: Schedule, timeline: Timeline
) -> list[dict[str, Any]]:
    """Returns a timeline as events of the trace event format: a process of number `kind` and of
    this name, with a thread for each stage. A second of the timeline is a second of the trace.
    """
    events: list[dict[str, Any]] = [
        {
            "ph": "M",
            "pid": kind,
            "name": "process_name",
            "args": {"name": name, "step_seconds": timeline.step_seconds},
        }
    ]
    for stage in range(timeline.num_stages):
        thread = {"ph": "M", "pid": kind, "tid": stage}
        events.append(thread | {"name": "thread_name", "args": {"name": f"stage {stage}"}})
    names = _item_names(schedule)
    for box in timeline.boxes:
        events.append(
            {
                "ph": "X",
                "pid": kind,
                "tid": box.stage,
                "cat": box.kind,
                "name": names[box.item],
                "ts": 1e6 * box.start_seconds,
                "dur": 1e6 * (box.stop_seconds - box.start_seconds),
            }
        )
    return events


def read_timeline(events: list[dict[str, Any]], schedule: Schedule) -> tuple[str, Timeline] | None:
    """Returns the name and the timeline of the events of one kind, as `read_trace` returns them;
    None if they are not of this schedule.
    """
    items = {name: item for item, name in enumerate(_item_names(schedule))}
    try:
        [given] = [event["args"] for event in events if event["name"] == "process_name"]
        if not is_number(given["step_seconds"]) or not 0 <= given["step_seconds"] <= MAX_SECONDS:
            return None
        boxes = [
            Box(
                event["tid"],
                items[event["name"]],
                event["cat"],
                event["ts"] / 1e6,
                (event["ts"] + event["dur"]) / 1e6,
            )
            for event in events
            if event["ph"] == "X"
        ]
        timeline = Timeline(tuple(boxes), float(given["step_seconds"]), schedule.num_stages)
        is_whole = len(boxes) == len({(box.stage, box.item, box.kind) for box in boxes}) > 0
        is_on_stages = all(box.stage < schedule.num_stages for box in boxes)
        is_named = NAME.fullmatch(given["name"])
        return (given["name"], timeline) if is_whole and is_on_stages and is_named else None
    except (ValueError, KeyError, TypeError):
        return None


def write_trace(path: Path, events: list[dict[str, Any]]) -> None:
    """Writes events to a file that Perfetto opens."""
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
    path.write_text(text + "\n", encoding="utf-8")


def read_trace(path: Path, kind: int) -> list[dict[str, Any]]:
    """Returns the events of one kind in a trace file; none if it is missing or not a trace."""
    try:
        events = [event for event in read_json(path)["traceEvents"] if event["pid"] == kind]
        return events if all(map(_is_event, events)) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _is_event(event: dict[str, Any]) -> bool:
    """Whether an event from a file is as `trace_events` makes them. Raises KeyError if not."""
    if type(event["pid"]) is not int or not isinstance(event["name"], str):
        return False
    if event["ph"] == "M":
        return isinstance(event["args"], dict)
    times = event["ts"], event["dur"]
    return (
        event["ph"] == "X"
        and type(event["tid"]) is int
        and event["tid"] >= 0
        and event["cat"] in get_args(Kind)
        and all(is_number(t) and 0 <= t <= 1e6 * MAX_SECONDS for t in times)
    )


def work_of(events: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """Returns which stage works on which slice in which direction, in order. Leaves out gradients
    of weights, which measured ticks do not have.
    """
    return sorted(
        (e["tid"], e["cat"], e["name"]) for e in events if e["ph"] == "X" and e["cat"] != "weights"
    )


def _item_names(schedule: Schedule) -> list[str]:
    has_chunks = any(item.chunk for item in schedule.items)
    return [
        f"{item.num_rows} x {item.num_tokens} at {item.row}, {item.token}"
        + f", chunk {item.chunk}" * has_chunks
        for item in schedule.items
    ]
