"""Draws a schedule, and writes it as a trace: one box for each slice on each stage."""

import json
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from tpipe_jax.planning.schedule import Schedule
from tpipe_jax.planning.simulate import Kind, Timeline

EXPECTED, MEASURED = 0, 1  # kinds of timelines in a trace
STYLES: dict[Kind, dict[str, Any]] = {
    "forward": {},
    "backward": {"alpha": 0.55, "hatch": "///"},
    "weights": {"alpha": 0.3, "hatch": "..."},
}
LABELS: dict[Kind, str] = {
    "forward": "forward",
    "backward": "backward",
    "weights": "gradients of weights",
}


def draw_timeline(
    path: Path, schedule: Schedule, timeline: Timeline, title: str, unit: str = "s"
) -> None:
    """Writes a PNG of the timeline of a schedule."""
    figure = Figure(figsize=(12, 1.8 + 0.55 * min(schedule.num_stages, 24)), layout="constrained")
    axes = figure.subplots()
    kinds = draw_boxes(axes, schedule, timeline, unit)
    busy = f"stages are busy {1 - timeline.bubble:.0%} of the time"
    axes.set_title(f"{title}\n{busy}", fontsize=10)
    figure.legend(handles=kinds, loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def draw_boxes(
    axes: Axes, schedule: Schedule, timeline: Timeline, unit: str, end: float | None = None
) -> list[Patch]:
    """Draws the timeline, on an axis that ends with it or at `end`. Returns the entries of a
    legend.
    """
    num_stages, num_items = schedule.num_stages, len(schedule.items)
    is_one_row = all(item.num_rows == 1 for item in schedule.items)
    end = end or timeline.step_seconds or 1.0
    colours = colormaps["viridis"]
    are_many = num_stages > 24
    rectangles = []
    for box in timeline.boxes:
        shade = colours(0.15 + 0.75 * box.item / max(1, num_items - 1))
        width = box.stop_seconds - box.start_seconds
        style = dict(STYLES[box.kind])
        if are_many:
            style.pop("hatch", None)
        corner = box.start_seconds, box.stage - 0.4
        edge = "none" if are_many else "white"
        rectangles.append(
            Rectangle(corner, width, 0.8, facecolor=shade, edgecolor=edge, lw=0.8, **style)
        )
        if are_many:
            continue
        axes.add_patch(rectangles[-1])
        item = schedule.items[box.item]
        label = f"{item.num_tokens}" if is_one_row else f"{item.num_rows} x {item.num_tokens}"
        if width > 0.008 * len(label) * end:
            axes.text(
                *(box.start_seconds + width / 2, box.stage),
                label,
                ha="center",
                va="center",
                fontsize=8,
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
            )
    if are_many:  # much faster to draw than many single patches
        axes.add_collection(PatchCollection(rectangles, match_original=True))
    axes.set(xlim=(0, end), ylim=(num_stages - 0.5, -0.5), xlabel=f"time [{unit}]")
    step = -(-num_stages // 24)
    axes.set_yticks(range(0, num_stages, step), [f"stage {s}" for s in range(0, num_stages, step)])
    axes.spines[["top", "right", "left"]].set_visible(False)
    grey: dict[str, Any] = {"facecolor": "grey", "edgecolor": "white"}
    shown = {box.kind for box in timeline.boxes}
    return [
        Patch(label=LABELS[kind], **style, **grey)
        for kind, style in STYLES.items()
        if kind in shown
    ]


def trace_events(
    kind: int, name: str, schedule: Schedule, timeline: Timeline
) -> list[dict[str, Any]]:
    """Returns a timeline as events of the trace event format: a process of number `kind` and of
    this name, with a thread for each stage. A second of the timeline is a second of the trace.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": kind, "name": "process_name", "args": {"name": name}}
    ]
    for stage in range(timeline.num_stages):
        thread = {"ph": "M", "pid": kind, "tid": stage}
        events.append(thread | {"name": "thread_name", "args": {"name": f"stage {stage}"}})
    has_chunks = any(item.chunk for item in schedule.items)
    for box in timeline.boxes:
        item = schedule.items[box.item]
        events.append(
            {
                "ph": "X",
                "pid": kind,
                "tid": box.stage,
                "cat": box.kind,
                "name": f"{item.num_rows} x {item.num_tokens} at {item.row}, {item.token}"
                + f", chunk {item.chunk}" * has_chunks,
                "ts": 1e6 * box.start_seconds,
                "dur": 1e6 * (box.stop_seconds - box.start_seconds),
            }
        )
    return events


def write_trace(path: Path, events: list[dict[str, Any]]) -> None:
    """Writes events to a file that Perfetto opens."""
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def read_trace(path: Path, kind: int) -> list[dict[str, Any]]:
    """Returns the events of one kind in a trace file; none if it is missing or not a trace."""
    try:
        return [
            event for event in json.loads(path.read_text())["traceEvents"] if event["pid"] == kind
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def work_of(events: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """Returns which stage works on which slice in which direction, in order. Leaves out gradients
    of weights, which measured ticks do not have.
    """
    return sorted(
        (e["tid"], e["cat"], e["name"]) for e in events if e["ph"] == "X" and e["cat"] != "weights"
    )
