"""The picture of a plan: what is drawn on it."""

import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from support.latencies import profile
from support.pictures import check_readable, shown
from tpipe_jax.planning.latency import LatencyTable
from tpipe_jax.planning.plan import PlanRequest
from tpipe_jax.planning.planner import find_plan
from tpipe_jax.reporting.plan_report import draw_plan


def test_points_curves_errors_and_timeline(tmp_path: Path, figures: list[Figure]):
    table = profile().table(8)
    planning = find_plan(table, PlanRequest(3, 4, 128), [1.0] * 3)
    plan = planning.plan
    draw_plan(tmp_path, table, planning)
    check_readable(figures[0], tmp_path / "plan.png")
    assert not re.search(r"\$|e[-+]0", shown(figures[0]))  # a power of ten
    unsliced, timeline, forward, backward, errors = figures[0].axes
    b = plan.batch_slices[0] if plan.batch_slices[0] in (1, 2, 4) else 1
    for axes, name, times in (
        (forward, "forward", table.forward),
        (backward, "backward", table.backward),
    ):
        curves = [line for line in axes.lines if len(line.get_xdata()) > 1]
        assert [line.get_label() for line in curves[:2]] == ["no context", "32 tokens of context"]
        assert len(curves) == 4
        np.testing.assert_allclose(curves[0].get_ydata(), 1e3 * times[b - 1, :, 0])
        points = {
            (float(line.get_xdata()[0]), round(float(line.get_ydata()[0]), 6))
            for line in axes.lines
            if len(line.get_xdata()) == 1
        }
        for sample in profile().samples:
            held = 0.5 + 0.25 * sample.num_rows * sample.num_tokens
            milliseconds = 1e3 * (getattr(sample, f"{name}_seconds") + held)
            is_shown = sample.num_rows == b
            assert ((sample.num_tokens, round(milliseconds, 6)) in points) == is_shown
    # The two slices kept out of the fit, which the model finds exactly.
    assert [len(line.get_xdata()) for line in errors.lines[:2]] == [2, 2]
    assert "forward: median 0.0%, 95th percentile 0.0%" in errors.get_title()
    assert plan.prediction
    step = f"{plan.prediction.step_seconds:.3g} s a step, 7000 ms of it outside the pipeline"
    assert f"planned: computed from these times, {step}" in timeline.get_title("left")
    assert len(timeline.patches) == 2 * 3 * sum(map(len, plan.token_slices))
    # Both steps have one scale, so that their lengths can be compared.
    assert planning.unsliced
    whole = f"unsliced: computed from these times, {planning.unsliced.step_seconds:.3g} s a step"
    assert whole in unsliced.get_title("left")
    assert unsliced.get_xlim() == timeline.get_xlim()
    assert len(unsliced.patches) == 2 * 3 * planning.unsliced.batch_slices


def test_times_alone_are_drawn_too(tmp_path: Path, figures: list[Figure]):
    """Even if they are all zero."""
    zeros = LatencyTable(4, np.zeros((1, 2, 2)), np.zeros((1, 2, 2)))
    ones = LatencyTable(4, np.ones((1, 2, 2)), np.ones((1, 2, 2)))
    for table in (zeros, ones):
        planning = find_plan(table, PlanRequest(2, 1, 8), [1.0] * 2)
        draw_plan(tmp_path, table, planning)
        is_sliced = len(planning.plan.token_slices[0]) > 1
        assert len(figures[-1].axes) == 3 + is_sliced


def test_ticks_are_plain_numbers(tmp_path: Path, figures: list[Figure]):
    """Of times from 0.4 to 40 ms, and of lengths in powers of two."""
    seconds = np.geomspace(4e-4, 4e-2, 128)[None, :, None] * np.ones((1, 1, 128))
    table = LatencyTable(8, seconds, 2 * seconds)
    draw_plan(tmp_path, table, find_plan(table, PlanRequest(2, 1, 1024), [1.0] * 2))
    forward = next(axes for axes in figures[0].axes if "forward pass" in axes.get_title())
    forward.set(xlim=(8, 1024), ylim=(0.4, 40))
    ticks = [
        [label.get_text() for label in axis.get_ticklabels(which="both")]
        for axis in (forward.xaxis, forward.yaxis)
    ]
    inside = [
        [text for text in texts if low <= float(text) <= high]
        for texts, (low, high) in zip(ticks, ((8, 1024), (0.4, 40)), strict=True)
    ]
    assert inside[0] == ["8", "16", "32", "64", "128", "256", "512", "1024"]
    assert inside[1] == ["0.5", "1", "2", "5", "10", "20"]
