"""Draws loss.png: the losses of runs over their steps, and the learning rates below. No jax."""

import os
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tpipe_jax.errors import UserError, shown
from tpipe_jax.files import writing_to
from tpipe_jax.json_files import is_number, parse_json

FILE = "loss.png"
SMOOTHED = 0.8  # share of the mean so far in an exponential mean over logged steps
MAX_LINE = 2**16  # bytes of a line; a run writes a few hundred
MAX_LINES = 2**20
MAX_DRAWN = 1e30  # beyond which an axis has no room
DRAWN = ("step", "loss", "eval_loss", "learning_rate")  # of a line
COLOURS = 10  # of matplotlib's standard cycle

LoggedLine = dict[str, float | None]


def read_metrics(workdir: Path, names: Sequence[str] | None = None) -> list[LoggedLine]:
    """Returns the lines of metrics.jsonl, as dictionaries: all numbers, or only those of `names`.

    A torn last line, which a kill leaves, is left out. Raises `UserError` if there are no lines.
    """
    path = workdir / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            texts = iter(lambda: file.readline(MAX_LINE + 1), b"")
            lines = [_read_line(text, names) for text in islice(texts, MAX_LINES) if _is_line(text)]
            if next(texts, None) is not None:
                raise ValueError(f"there are more than {MAX_LINES}")
    except OSError as error:
        raise UserError(
            f"{workdir} has no metrics.jsonl to read ({error.strerror}): name the workdir of a run "
            "that has logged a step."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} has lines that are no metrics of a run ({error}).") from None
    return lines


def _is_line(text: bytes) -> bool:
    """Whether a text is not the torn last line that a kill leaves."""
    return text.endswith(b"\n") or len(text) > MAX_LINE


def _read_line(text: bytes, names: Sequence[str] | None) -> LoggedLine:
    """Returns the numbers of a line, or those of `names`. Raises ValueError if it has others."""
    if len(text) > MAX_LINE:
        raise ValueError(f"a line has more than {MAX_LINE} bytes")
    line = parse_json(text)
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise ValueError("a line has no step")
    for name in DRAWN:
        value = line.get(name)
        if value is not None and not (is_number(value) and abs(value) <= MAX_DRAWN):
            raise ValueError(f"{name} is {shown(repr(value))}, no number that can be drawn")
    return line if names is None else {name: line[name] for name in names if name in line}


def draw_losses(workdirs: Sequence[Path], path: Path, option: str = "--workdir") -> None:
    """Writes a picture of the losses of one run or several to `path`.

    `option` is the flag that named the picture's folder; errors quote it. Raises `UserError` if a
    run has no losses, or if the picture cannot be written.
    """
    runs = {workdir: read_metrics(workdir, DRAWN) for workdir in workdirs}
    for workdir, lines in runs.items():
        if not lines:
            raise UserError(f"{workdir} has logged no step yet: wait for one, then draw again.")
    figure = Figure(figsize=(9, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    names = _names(list(runs))
    for n, (workdir, lines) in enumerate(runs.items()):
        label = f"{names[workdir]}: " if len(runs) > 1 else ""
        _draw_run(losses, rates, lines, f"C{n % COLOURS}", label)
    losses.set(ylabel="loss [nats per token]")
    title = ", ".join(names.values()) if len(runs) < 4 else f"{len(runs)} runs"
    # Names of folders are no formulas.
    losses.set_title(f"{title}: measured losses", loc="left", fontsize=11, parse_math=False)
    for text in losses.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    rates.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (losses, rates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    # Replaced in one step, so that whoever looks at the picture never sees a part of it.
    kind = path.suffix.removeprefix(".").lower() or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{option}={path} ends in .{kind}: use .png, .svg or .pdf.")
    with writing_to(path.parent, option), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        figure.savefig(new, dpi=110, format=kind)
        os.replace(new, path)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Returns the exponential mean of values up to each one, without a bias to the first ones."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHED * total + (1 - SMOOTHED) * value
        weight = SMOOTHED * weight + (1 - SMOOTHED)
        means.append(total / weight)
    return np.array(means)


def _draw_run(
    losses: Axes, rates: Axes, lines: Sequence[LoggedLine], colour: str, label: str
) -> None:
    steps, values = _series(lines, "loss")
    losses.plot(steps, values, color=colour, alpha=0.25, lw=1)
    losses.plot(steps, smoothed(values), color=colour, lw=1.8, label=f"{label}training, smoothed")
    steps, values = _series(lines, "eval_loss")
    if values:
        last = f"{label}held out, {values[-1]:.3f} at the end"
        losses.plot(steps, values, "o--", color=colour, ms=5, lw=1, mec="black", label=last)
    rates.plot(*_series(lines, "learning_rate"), color=colour, lw=1.5)


def _series(lines: Sequence[LoggedLine], name: str) -> tuple[list[float], list[float]]:
    """Returns the steps and values of a metric, where it was logged and finite."""
    pairs = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [float(step or 0) for step, _ in pairs], [float(value or 0) for _, value in pairs]


def _names(workdirs: Sequence[Path]) -> dict[Path, str]:
    """Returns a short name for each run: the folder's, or its path where two are alike."""
    names = [workdir.resolve().name for workdir in workdirs]
    return {
        workdir: name if names.count(name) == 1 else str(workdir)
        for workdir, name in zip(workdirs, names, strict=True)
    }
