"""Draws plan.png, a picture to judge a plan by. No jax."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from tpipe_jax.files import writing_to
from tpipe_jax.planning.estimator import predicted_timeline
from tpipe_jax.planning.latency import LatencyTable, Profile, Sample
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.reporting.timeline import draw_boxes


def draw_plan(
    workdir: Path, table: LatencyTable, plan: Plan, chunk_factors: Sequence[float]
) -> None:
    """Writes plan.png: latencies as measured and fitted, the fit's error, the predicted timeline.

    Raises `UserError` if it cannot be written.
    """
    assert plan.prediction is not None
    figure = Figure(figsize=(13, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(3, 2))[:, 0]
    tests = [sample for sample in table.profile.samples if sample.is_test] if table.profile else []
    panels = top.subplots(1, 2 + bool(tests))
    _draw_latencies(panels[0], "forward", table.forward, table, plan)
    _draw_latencies(panels[1], "backward", table.backward, table, plan)
    if table.profile and tests:
        _draw_errors(panels[2], table.profile, tests)
    axes = bottom.subplots()
    schedule, timeline = make_schedule(plan), predicted_timeline(plan, chunk_factors)
    kinds = draw_boxes(axes, schedule, timeline, "s")
    axes.set_title(
        f"predicted timeline: {timeline.step_seconds:.4g} s in the pipeline, "
        f"{plan.prediction.outside_seconds:.3g} s outside of it, bubble {timeline.bubble:.0%}",
        fontsize=10,
    )
    bottom.legend(handles=kinds, loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    with writing_to(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        figure.savefig(workdir / "plan.png", dpi=110)


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
            label = f"{b} x, after {context * table.unit_tokens}"
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
    axes.set(xlabel="tokens of the slice", ylabel="ms")
    axes.set_title(f"{name}: sequences x, after tokens of context", fontsize=10)
    axes.legend(fontsize=7, frameon=False)
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
    axes.set(xscale="log", xlabel="measured [ms]", ylabel="prediction over measurement - 1 [%]")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("\n".join(["error on slices kept out of the fit", *lines]), fontsize=10)
    axes.legend(fontsize=7, frameon=False)
    axes.grid(alpha=0.25)
