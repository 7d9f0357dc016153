"""Draws meshes.png: the ways to divide the devices, by step time and memory. No jax."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from tpipe_jax.files import writing_to


class Point(NamedTuple):
    """A way to divide the devices."""

    name: str
    seconds: float
    gib: float


def draw_meshes(workdir: Path, points: Sequence[Point], limit_gib: float | None) -> None:
    """Writes meshes.png. What fits into the limit has one colour, what does not another. Raises
    `UserError` if it cannot be written.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for fits, colour, label in ((True, "tab:blue", "fits"), (False, "tab:red", "does not fit")):
        own = [p for p in points if (limit_gib is None or p.gib <= limit_gib) == fits]
        if own:
            axes.plot(
                [p.gib for p in own], [p.seconds for p in own], "o", color=colour, label=label
            )
    for point in points:
        axes.annotate(
            point.name,
            (point.gib, point.seconds),
            xytext=(6, 3),
            textcoords="offset points",
        )
    if limit_gib is not None:
        axes.axvline(limit_gib, color="grey", lw=1, ls="--", label="memory of a device")
    axes.set(xlabel="memory of a device [GiB]", ylabel="predicted step [s]", xlim=(0, None))
    axes.set_ylim(0, 1.1 * max((p.seconds for p in points), default=1))
    axes.set_title("ways to divide the devices: data x pipe x model")
    axes.legend(frameon=False, loc="upper right")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    with writing_to(workdir):
        figure.savefig(workdir / "meshes.png", dpi=110, facecolor="white")
