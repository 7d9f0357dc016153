"""Timelines as a trace file, timeline.json: an event for each slice on each stage."""

import json
from pathlib import Path
from typing import Any

from tpipe_jax.json_files import read_json
from tpipe_jax.planning.schedule import Schedule
from tpipe_jax.planning.simulate import Box, Timeline

EXPECTED, MEASURED = 0, 1  # kinds of timelines in a trace


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
    """Returns the name and the timeline of the events of one kind; None if they are not of this
    schedule.
    """
    items = {name: item for item, name in enumerate(_item_names(schedule))}
    try:
        [given] = [event["args"] for event in events if event["name"] == "process_name"]
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
        return (str(given["name"]), timeline) if boxes else None
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
        work_of(events)  # raises if they are no events of slices
        return events
    except (OSError, ValueError, KeyError, TypeError):
        return []


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
