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
from tpipe_jax.planning.planner import Planning
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.reporting.timeline import MANY_STAGES, draw_boxes, duration, label_boxes


def draw_plan(workdir: Path, table: LatencyTable, planning: Planning) -> None:
    """Writes plan.png: a step unsliced and as planned, to one scale; below, the latencies as
    measured and fitted, and the fit's error. Raises `UserError` if it cannot be written.
    """
    steps = _steps(planning)
    rows = min(planning.plan.num_stages, MANY_STAGES)
    heights = [len(steps) * (1.5 + max(1.2, 0.5 * rows)), 5.5]
    figure = Figure(figsize=(14, sum(heights)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    drawn = top.subplots(len(steps), 1, squeeze=False)[:, 0]
    timelines = [predicted_timeline(plan, factors) for _, plan, factors in steps]
    end, entries = max(timeline.step_seconds for timeline in timelines), []
    for axes, (name, plan, _), timeline in zip(drawn, steps, timelines, strict=True):
        assert plan.prediction is not None
        entries = draw_boxes(axes, make_schedule(plan), timeline, end=end)
        outside = duration(plan.prediction.outside_seconds)
        axes.set_title(
            f"{name}: computed from these times, {duration(plan.prediction.step_seconds)} a step, "
            f"{outside} of it outside the pipeline; stages are busy {1 - timeline.bubble:.0%} of "
            "the time in it",
            loc="left",
        )
    top.legend(handles=entries, loc="outside upper right", ncols=5, frameon=False)
    tests = [sample for sample in table.profile.samples if sample.is_test] if table.profile else []
    panels = bottom.subplots(1, 2 + bool(tests))
    _draw_latencies(panels[0], "forward", table.forward, table, planning.plan)
    _draw_latencies(panels[1], "backward", table.backward, table, planning.plan)
    if table.profile and tests:
        _draw_errors(panels[2], table.profile, tests)
    for axes, (_, plan, _), timeline in zip(drawn, steps, timelines, strict=True):
        label_boxes(axes, make_schedule(plan), timeline)
    with writing_to(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        figure.savefig(workdir / "plan.png", dpi=110, facecolor="white")


def _steps(planning: Planning) -> list[tuple[str, Plan, list[float]]]:
    """Returns the steps to draw: a name, the plan, and the times of its chunks. A step without
    slices comes first, if there is one and it is not what was planned.
    """
    plan, factors = planning.plan, list(planning.chunk_factors)
    steps = [("planned", plan, factors)]
    unsliced = planning.unsliced.plan if planning.unsliced else None
    if unsliced and unsliced.token_slices != plan.token_slices:
        whole = np.reshape(factors, (plan.num_chunks, plan.num_stages)).sum(0).tolist()
        steps.insert(0, ("unsliced", unsliced, whole))
    return steps


def _draw_latencies(
    axes: Axes, name: str, times: np.ndarray, table: LatencyTable, plan: Plan
) -> None:
    """Draws curves over the length of a slice, one for each of a few contexts: for as many
    sequences as the plan's first batch slice has, or one if these were not measured.
    """
    num_sizes, num_slices, num_contexts = times.shape
    tokens = np.arange(1, num_slices + 1) * table.unit_tokens
    samples = table.profile.samples if table.profile else ()
    b = min(plan.batch_slices[0], num_sizes)
    if samples and b not in {sample.num_rows for sample in samples}:
        b = 1
    contexts = sorted({0, num_contexts // 4, num_contexts // 2, 3 * num_contexts // 4})
    colours = [colormaps["viridis"](share) for share in np.linspace(0, 0.85, len(contexts))]
    for context, colour in zip(contexts, colours, strict=True):
        seconds = times[b - 1, :, context]
        seconds = np.where(np.isfinite(seconds), seconds, np.nan)
        label = f"{context * table.unit_tokens} tokens of context" if context else "no context"
        axes.plot(tokens, seconds * 1e3, color=colour, lw=1.2, label=label)
    for sample in samples:
        if sample.num_rows == b:
            assert table.profile
            transfer = table.profile.transfer
            share = sample.context / (num_contexts * table.unit_tokens)
            held = transfer[0] + transfer[1] * sample.num_rows * sample.num_tokens
            axes.plot(
                sample.num_tokens,
                (getattr(sample, f"{name}_seconds") + held) * 1e3,
                "X" if sample.is_test else "o",
                color=colormaps["viridis"](min(0.85, share)),
                markeredgecolor="white",
                ms=8 if sample.is_test else 7,
                zorder=3,
            )
    if times.max(where=np.isfinite(times), initial=0) > 0:
        axes.set(xscale="log", yscale="log")
        _plain_ticks(axes.xaxis, 2)
        _plain_ticks(axes.yaxis)
    axes.set(xlabel="tokens of the slice", ylabel="time of a stage [ms]")
    title = f"{name} pass of a slice" + f" of {b} sequences" * (b > 1)
    if table.profile:
        title = f"{title}: measured (dots, crosses)\nand fitted (lines; not to crosses)"
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
