"""Where the figures of the benchmarks are kept: `bench/results/NAME.json`, with the machine."""

import datetime
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = Path(__file__).with_name("results")
DOCS = FOLDER.parents[1] / "docs"


def machine() -> dict[str, Any]:
    """What the figures of a run depend on, without names of hosts."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("tpipe_jax", "jax", "jaxlib", "numpy")},
    }


def save(name: str, content: dict[str, Any], folder: Path = FOLDER) -> None:
    """Writes the figures of a benchmark; floats keep four digits."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), **_rounded(content)}, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)  # on one line
    (folder / f"{name}.json").write_text(text + "\n")


def picture(name: str, folder: Path) -> Path:
    """Where to draw what belongs to results in the folder; docs/ shows those that are kept."""
    return (DOCS if folder == FOLDER else folder) / f"{name}.png"


def add(
    name: str, section: str, parts: dict[str, Any], order: Sequence[str], folder: Path = FOLDER
) -> dict[str, Any]:
    """Adds parts of a benchmark to what is saved of it, in the order of all parts, each with its
    date; returns those that are saved.
    """
    is_begun = (folder / f"{name}.json").exists()
    before = load(name, folder)[section] if is_begun else {}
    date = machine()["date"]
    parts = before | {part: {"date": date, **figures} for part, figures in parts.items()}
    ordered = {part: parts[part] for part in order if part in parts}
    save(name, {section: ordered}, folder)
    return ordered


def draw_bars(
    path: Path,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    label: str,
    title: str,
    colours: Sequence[str],
    decimals: int = 2,
) -> None:
    """Writes a PNG of bars, one of each series in each group, with their values."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    add_bars(axes, groups, series, colours, decimals)
    axes.set(ylabel=label, title=title)
    figure.legend(loc="outside lower center", ncols=len(series), frameon=False)
    figure.savefig(path, dpi=110, facecolor="white")


def add_bars(
    axes: Axes,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    colours: Sequence[str],
    decimals: int = 2,
) -> None:
    """Draws bars, one of each series in each group, with their values."""
    width = 0.86 / len(series)
    for i, (name, values) in enumerate(series.items()):
        at = [group + (i + 0.5) * width - 0.43 for group in range(len(groups))]
        bars = axes.bar(at, values, 0.94 * width, label=name, color=colours[i])
        axes.bar_label(bars, fmt=f"%.{decimals}f")
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)


def load(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """What has been saved."""
    return json.loads((folder / f"{name}.json").read_text())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
