"""A schedule as a picture: stages down, time across, one box for each slice on each stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from tpipe_jax.schedule import Schedule, simulate


def draw_timeline(
    path: Path,
    schedule: Schedule,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    title: str,
    unit: str = "s",
) -> None:
    """Writes a PNG of the simulated timeline, given the time of each item on a stage."""
    boxes = simulate(schedule, forward_seconds, backward_seconds)
    num_stages, num_items = schedule.num_stages, len(schedule.items)
    is_one_row = all(item.num_rows == 1 for item in schedule.items)
    end = max(box.stop_seconds for box in boxes)
    busy = sum(box.stop_seconds - box.start_seconds for box in boxes) / (num_stages * end)

    figure = Figure(figsize=(12, 1.8 + 0.55 * min(num_stages, 24)), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["viridis"]
    for box in boxes:
        shade = colours(0.15 + 0.75 * box.item / max(1, num_items - 1))
        width = box.stop_seconds - box.start_seconds
        style: dict[str, Any] = {"alpha": 0.55, "hatch": "///"} if box.is_backward else {}
        corner = box.start_seconds, box.stage - 0.4
        axes.add_patch(
            Rectangle(corner, width, 0.8, facecolor=shade, edgecolor="white", lw=0.8, **style)
        )
        item = schedule.items[box.item]
        label = f"{item.num_tokens}" if is_one_row else f"{item.num_rows} x {item.num_tokens}"
        if width > 0.008 * len(label) * end and num_stages <= 24:
            axes.text(
                *(box.start_seconds + width / 2, box.stage),
                label,
                ha="center",
                va="center",
                fontsize=8,
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
            )
    axes.set(xlim=(0, end), ylim=(num_stages - 0.5, -0.5), xlabel=f"time [{unit}]")
    axes.set_yticks(range(num_stages), [f"stage {s}" for s in range(num_stages)])
    axes.set_title(f"{title}\nstages are busy {busy:.0%} of the time", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    grey: dict[str, Any] = {"facecolor": "grey", "edgecolor": "white"}
    kinds = [
        Patch(label="forward", **grey),
        Patch(label="backward", alpha=0.55, hatch="///", **grey),
    ]
    figure.legend(handles=kinds, loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
