"""Draws docs/timeline.png: one sequence on four stages, whole and in slices, to the same scale.

    python bench/picture.py

The slices are those that the planner finds, and the times those of the model of V100s
(`bench/v100.py`), for layers of GPT3-175B, two a stage, each on eight GPUs.
"""

from pathlib import Path

from matplotlib.figure import Figure

from tpipe_jax.planning.plan import Plan, PlanRequest
from tpipe_jax.planning.planner import find_plan
from tpipe_jax.planning.schedule import terapipe
from tpipe_jax.planning.simulate import simulate
from tpipe_jax.reporting.timeline import draw_boxes, duration, label_boxes
from v100 import SETTINGS, fit, latency_table, slice_seconds

PATH = Path(__file__).parents[1] / "docs" / "timeline.png"


def main() -> None:
    cluster = fit(SETTINGS)
    [largest] = [s for s in SETTINGS if s.name.startswith("10 ")]
    setting = largest._replace(num_layers=8, num_stages=4, batch_size=1)
    request = PlanRequest(4, 1, setting.seq_len)
    sliced = find_plan(latency_table(setting, cluster), request, [1.0] * 4).plan
    plans = Plan(4, (1,), ((setting.seq_len,),)), sliced

    timelines = []
    for plan in plans:
        schedule = terapipe(plan)
        slices = ((item.num_tokens, item.token) for item in schedule.items)
        times = zip(*(slice_seconds(setting, cluster, 1, *each) for each in slices), strict=True)
        seconds = ([float(t) for t in own] for own in times)
        timelines.append((schedule, simulate(schedule, *seconds)))

    figure, entries = Figure(figsize=(11, 6.8), layout="constrained"), []
    figure.suptitle(
        "computed: a step on four stages, each two layers of GPT3-175B on eight V100 GPUs"
    )
    end = max(timeline.step_seconds for _, timeline in timelines)
    both = figure.subplots(2, 1)
    for axes, (schedule, timeline) in zip(both, timelines, strict=True):
        entries = draw_boxes(axes, schedule, timeline, end=end)
        count = len(schedule.items)
        what = f"{count} slices of it" if count > 1 else f"one sequence of {setting.seq_len} tokens"
        took = f"{duration(timeline.step_seconds)}, stages busy {1 - timeline.bubble:.0%}"
        axes.set_title(f"{what}: {took}", loc="left")
    figure.legend(handles=entries, loc="outside lower right", ncols=4, frameon=False)
    for axes, timeline in zip(both, timelines, strict=True):
        label_boxes(axes, *timeline)
    figure.savefig(PATH, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
