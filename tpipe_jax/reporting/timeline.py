"""Draws a schedule: one box for each slice on each stage."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from tpipe_jax.planning.schedule import Schedule
from tpipe_jax.planning.simulate import Kind, Timeline

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
MANY_STAGES = 24
MANY_BOXES = 4000  # of which single patches would take seconds to draw
LABEL_POINTS = 10  # as matplotlib's ticks
CHARACTER_POINTS = 0.65 * LABEL_POINTS  # a digit of matplotlib's font
LINE_POINTS = 0.9 * LABEL_POINTS  # digits have nothing below their line


def duration(seconds: float) -> str:
    """Returns a time as text: in ms, or in s from 10 s on, with three digits."""
    if seconds >= 9.9995:
        return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{1000 * seconds:.0f} ms"


def draw_timeline(
    path: Path,
    schedule: Schedule,
    timeline: Timeline,
    title: str,
    unit: str = "s",
    measured: tuple[str, Timeline] | None = None,
) -> None:
    """Writes a PNG of a computed timeline, in seconds or in another unit of work. A measured
    timeline and its name are drawn below: to one scale with the computed one if this is in seconds.
    The picture is as wide as the labels of its boxes need, up to 20 inches.
    """
    drawn = [(timeline, unit), *([(measured[1], "s")] if measured else [])]
    end = max(own.step_seconds for own, _ in drawn) if unit == "s" else None
    needed = max(1.5 + LINE_POINTS / 72 * _boxes_per_axis(own, end) for own, _ in drawn)
    are_many = schedule.num_stages > MANY_STAGES
    width = 12 if are_many or needed > 20 else max(12, needed)
    longest = max(map(len, slice_names(schedule)))
    row = 0.3 if are_many else 0.6
    if schedule.num_stages <= 8:  # there is room for labels that stand
        row = max(row, 1.4 * longest * CHARACTER_POINTS / 72)
    height = 1.7 + row * min(schedule.num_stages, MANY_STAGES)
    figure = Figure(figsize=(width, 0.5 + len(drawn) * height), layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
    legends = [
        draw_boxes(axes, schedule, own, own_unit, end)
        for axes, (own, own_unit) in zip(panels, drawn, strict=True)
    ]
    panels[0].set_title(f"{title}\ncomputed, not measured: {_summary(timeline, unit)}")
    if measured:
        panels[1].set_title(f"{measured[0]}: {_summary(measured[1], 's')}")
    figure.legend(handles=legends[0], loc="outside lower right", ncols=5, frameon=False)
    for axes, (own, _) in zip(panels, drawn, strict=True):
        label_boxes(axes, schedule, own)
    figure.savefig(path, dpi=110, facecolor="white")


def _boxes_per_axis(timeline: Timeline, end: float | None) -> float:
    """Returns how often the shortest box fits into an axis that ends with the step or at `end`."""
    shortest = min(box.stop_seconds - box.start_seconds for box in timeline.boxes)
    return (end or timeline.step_seconds) / max(shortest, 1e-30)


def _summary(timeline: Timeline, unit: str) -> str:
    step = f"{duration(timeline.step_seconds)} a step in the pipeline, " if unit == "s" else ""
    return f"{step}stages are busy {1 - timeline.bubble:.0%} of the time"


def draw_boxes(
    axes: Axes, schedule: Schedule, timeline: Timeline, unit: str = "s", end: float | None = None
) -> list[Patch]:
    """Draws the timeline, on an axis that ends with it or at `end`. Seconds are shown in ms below
    10 s, another unit as a share of a step. Returns the entries of a legend.
    """
    num_stages, num_items = schedule.num_stages, len(schedule.items)
    end = end or timeline.step_seconds or 1.0
    scale, label = (1.0, "time [s]") if end >= 10 else (1000.0, "time [ms]")
    if unit != "s":
        scale, label = 100 / end, "share of a step [%]"
    if num_stages > MANY_STAGES or len(timeline.boxes) > MANY_BOXES:
        axes.add_collection(_many_boxes(timeline, num_items, scale), autolim=False)
    else:
        for box in timeline.boxes:
            corner = scale * box.start_seconds, box.stage - 0.4
            width = scale * (box.stop_seconds - box.start_seconds)
            look = {"facecolor": _shade(box.item, num_items), "edgecolor": "white", "lw": 0.8}
            axes.add_patch(Rectangle(corner, width, 0.8, **look, **STYLES[box.kind]))
    axes.set(xlim=(0, scale * end), ylim=(num_stages - 0.5, -0.5), xlabel=label)
    step = -(-num_stages // MANY_STAGES)
    axes.set_yticks(range(0, num_stages, step), [f"stage {s}" for s in range(0, num_stages, step)])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    grey: dict[str, Any] = {"facecolor": "grey", "edgecolor": "white"}
    shown = {box.kind for box in timeline.boxes}
    entries = [
        Patch(label=LABELS[kind], **style, **grey)
        for kind, style in STYLES.items()
        if kind in shown
    ]
    if num_items > 1:
        ends = {"first slice": 0, "last slice": num_items - 1}
        entries += [Patch(label=name, color=_shade(i, num_items)) for name, i in ends.items()]
    return entries


def _many_boxes(timeline: Timeline, num_items: int, scale: float) -> PolyCollection:
    """Returns all boxes as one thing to draw, without edges and hatches."""
    shades = np.array([_shade(item, num_items) for item in range(num_items)])
    figures = [
        (scale * box.start_seconds, scale * box.stop_seconds, box.stage) for box in timeline.boxes
    ]
    left, right, stage = np.array(figures, float).T
    top, bottom = stage - 0.4, stage + 0.4
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    colours = shades[[box.item for box in timeline.boxes]]
    colours[:, 3] = [STYLES[box.kind].get("alpha", 1.0) for box in timeline.boxes]
    boxes: Any = np.moveaxis(corners, -1, 0)  # [box, corner, axis]
    return PolyCollection(boxes, facecolors=colours, edgecolors="none")


def label_boxes(axes: Axes, schedule: Schedule, timeline: Timeline) -> None:
    """Writes its slice into each box of a drawn timeline; if one of them is too small, lists the
    slices below the axis instead. The layout of the figure must be complete.
    """
    figure, names = axes.get_figure(root=True), slice_names(schedule)
    assert figure
    figure.draw_without_rendering()  # which gives the axes their size
    space, (left, right) = axes.get_window_extent(), axes.get_xlim()
    points = 72 / figure.dpi
    height = 0.8 * points * space.height / schedule.num_stages
    labels = []
    for patch, box in zip(axes.patches, timeline.boxes, strict=bool(axes.patches)):
        assert isinstance(patch, Rectangle)
        name, width = names[box.item], points * space.width * patch.get_width() / (right - left)
        length = CHARACTER_POINTS * (len(name) + 0.5)
        is_flat = min(width - length, height - LINE_POINTS) >= 0
        if is_flat or min(height - length, width - LINE_POINTS) >= 0:
            labels.append((patch, name, 0 if is_flat else 90))
    what = "sequences x tokens" if " x " in names[0] else "tokens"
    if are_labelled := len(labels) == len(timeline.boxes):
        note = f"in each box: {what} of its slice"
    else:
        own = [name for name, item in zip(names, schedule.items, strict=True) if not item.chunk]
        note = f"{what} of the slices, first to last: {_runs(own)}"
    axes.set_xlabel(f"{axes.get_xlabel()}\n{note}")
    for patch, name, rotation in labels if are_labelled else []:
        red, green, blue, alpha = to_rgba(patch.get_facecolor())
        is_dark = alpha == 1 and 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        x, y = patch.get_center()
        label = axes.text(
            *(x, y, name),
            ha="center",
            va="center",
            rotation=rotation,
            fontsize=LABEL_POINTS,
            color="white" if is_dark else "black",
        )
        if alpha < 1:  # apart from what the box is hatched with
            label.set_path_effects([withStroke(linewidth=2, foreground="white", alpha=0.7)])


def slice_names(schedule: Schedule) -> list[str]:
    """Returns the tokens of each item, behind its sequences where some item has several."""
    is_one_row = all(item.num_rows == 1 for item in schedule.items)
    return [
        f"{item.num_tokens}" if is_one_row else f"{item.num_rows} x {item.num_tokens}"
        for item in schedule.items
    ]


def _shade(item: int, num_items: int) -> Any:
    """Returns the colour of an item, from dark to light."""
    return colormaps["viridis"](0.15 + 0.75 * item / max(1, num_items - 1))


def _runs(names: list[str]) -> str:
    """Returns names in a row as text, equal neighbours once, the middle of many left out."""
    runs = [(name, len(list(own))) for name, own in itertools.groupby(names)]
    texts = [name + f" ({count} times)" * (count > 1) for name, count in runs]
    return ", ".join(texts if len(texts) <= 6 else [*texts[:3], "...", *texts[-2:]])
