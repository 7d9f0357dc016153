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
from tpipe_jax.reporting.timeline import draw_boxes
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
        milliseconds = ([1000 * float(t) for t in own] for own in times)
        timelines.append((schedule, simulate(schedule, *milliseconds)))

    figure, kinds = Figure(figsize=(11, 5), layout="constrained"), []
    end = max(timeline.step_seconds for _, timeline in timelines)
    for axes, each in zip(figure.subplots(2, 1, sharex=True), timelines, strict=True):
        schedule, timeline = each
        kinds = draw_boxes(axes, schedule, timeline, "ms", end)
        count = len(schedule.items)
        what = f"{count} slices of it" if count > 1 else f"one sequence of {setting.seq_len} tokens"
        axes.set_title(
            f"{what}: {timeline.step_seconds:.0f} ms, stages busy {1 - timeline.bubble:.0%}",
            fontsize=10,
            loc="left",
        )
    figure.legend(handles=kinds, loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    figure.savefig(PATH, dpi=110)


if __name__ == "__main__":
    main()
