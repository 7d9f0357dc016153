"""Draws plan.png, a picture to judge a plan by. No jax."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from tpipe_jax.files import writing_to
from tpipe_jax.planning.estimator import predicted_timeline
from tpipe_jax.planning.latency import LatencyTable, Profile, Sample
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.reporting.timeline import MANY_STAGES, draw_boxes, duration, label_boxes


def draw_plan(
    workdir: Path, table: LatencyTable, plan: Plan, chunk_factors: Sequence[float]
) -> None:
    """Writes plan.png: latencies as measured and fitted, the fit's error, the predicted timeline.

    Raises `UserError` if it cannot be written.
    """
    assert plan.prediction is not None
    schedule, timeline = make_schedule(plan), predicted_timeline(plan, chunk_factors)
    num_stages = min(plan.num_stages, MANY_STAGES)
    heights = 6.0, 2.2 + max(2.0, 0.6 * num_stages)
    figure = Figure(figsize=(14, sum(heights)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    tests = [sample for sample in table.profile.samples if sample.is_test] if table.profile else []
    panels = top.subplots(1, 2 + bool(tests))
    _draw_latencies(panels[0], "forward", table.forward, table, plan)
    _draw_latencies(panels[1], "backward", table.backward, table, plan)
    if table.profile and tests:
        _draw_errors(panels[2], table.profile, tests)
    axes = bottom.subplots()
    entries = draw_boxes(axes, schedule, timeline)
    axes.set_title(
        f"computed from these times: a step of {duration(plan.prediction.step_seconds)}, "
        f"{duration(plan.prediction.outside_seconds)} of it outside the pipeline; "
        f"in the pipeline stages are busy {1 - timeline.bubble:.0%} of the time"
    )
    bottom.legend(handles=entries, loc="outside lower right", ncols=5, frameon=False)
    label_boxes(axes, schedule, timeline)
    with writing_to(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        figure.savefig(workdir / "plan.png", dpi=110, facecolor="white")


def _draw_latencies(
    axes: Axes, name: str, times: np.ndarray, table: LatencyTable, plan: Plan
) -> None:
    """Draws curves over the length of a slice, one for each of a few contexts: for one sequence,
    and for as many as the plan's first batch slice has.
    """
    num_sizes, num_slices, num_contexts = times.shape
    tokens = np.arange(1, num_slices + 1) * table.unit_tokens
    shown = sorted({1, min(plan.batch_slices[0], num_sizes)})
    contexts = sorted({0, num_contexts // 4, num_contexts // 2, 3 * num_contexts // 4})
    colours = [colormaps["viridis"](share) for share in np.linspace(0, 0.85, len(contexts))]
    for b, style in zip(shown, ("-", "--"), strict=False):
        for context, colour in zip(contexts, colours, strict=True):
            seconds = times[b - 1, :, context]
            seconds = np.where(np.isfinite(seconds), seconds, np.nan)
            label = f"{f'{b} sequences, ' * (b > 1)}{context * table.unit_tokens} tokens before it"
            axes.plot(tokens, seconds * 1e3, style, color=colour, lw=1.2, label=label)
    if table.profile:
        transfer = table.profile.transfer
        for sample in table.profile.samples:
            if sample.num_rows in shown:
                share = sample.context / (num_contexts * table.unit_tokens)
                held = transfer[0] + transfer[1] * sample.num_rows * sample.num_tokens
                axes.plot(
                    sample.num_tokens,
                    (getattr(sample, f"{name}_seconds") + held) * 1e3,
                    "x" if sample.is_test else "o",
                    color=colormaps["viridis"](min(0.85, share)),
                    ms=4,
                )
    if times.max(where=np.isfinite(times), initial=0) > 0:
        axes.set(xscale="log", yscale="log")
        _plain_ticks(axes.xaxis, 2)
        _plain_ticks(axes.yaxis)
    axes.set(xlabel="tokens of the slice", ylabel="time of a stage [ms]")
    title = f"{name} pass of a slice"
    if table.profile:
        title = f"{title}, measured (dots and crosses)\nand fitted (lines; not to crosses)"
    axes.set_title(title)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)


def _draw_errors(axes: Axes, profile: Profile, tests: Sequence[Sample]) -> None:
    """Draws prediction against measurement, for the slices that the model was not fitted to."""
    lines = []
    for name, model, colour in zip(
        ("forward", "backward"), profile.models(), ("tab:blue", "tab:orange"), strict=True
    ):
        measured = [getattr(sample, f"{name}_seconds") * 1e3 for sample in tests]
        errors = 100 * model.relative_errors()
        axes.plot(measured, errors, "x", color=colour, label=name)
        size = np.abs(errors)
        lines.append(
            f"{name}: median {np.median(size):.1f}%, 95th percentile {np.percentile(size, 95):.1f}%"
        )
    axes.axhline(0, color="grey", lw=0.8)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.set(xlabel="measured time [ms]", ylabel="predicted too long (+) or too short (-) by [%]")
    axes.set_title("\n".join(["error of the fit at the crosses", *lines]))
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)


def _plain_ticks(axis: Axis, base: int = 10) -> None:
    """Gives a logarithmic axis plain numbers: 1, 2, 5, 10 and so on, or powers of two."""
    axis.set_major_locator(LogLocator(base, subs=(1, 2, 5) if base == 10 else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
