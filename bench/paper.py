"""The paper's table again: its ten settings and three longer sequences, predicted and planned.

    python bench/paper.py

For a model of its V100 cluster (`bench/v100.py`, three constants fitted to the unsliced times),
this says what a step takes unsliced, which slices the planner finds, what they take, and what the
paper measured; what its own slices take in the same model; and how uniform slices compare in
settings 8 and 9. Nothing runs on a GPU: these are predictions. Writes `bench/results/paper.json`
and `docs/paper.png`.
"""

import argparse
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import results
from tpipe_jax.planning.plan import Plan, PlanRequest
from tpipe_jax.planning.planner import find_plan
from tpipe_jax.planning.settings import uniform
from v100 import (
    SETTINGS,
    UNIFORM,
    UNIT_TOKENS,
    Cluster,
    Setting,
    fit,
    latency_table,
    reduction_seconds,
    step_seconds,
)

QUICK = ("8 GPT3-44B", "9 GPT3-175B")


@dataclass(frozen=True)
class Row:
    """A setting, predicted."""

    setting: Setting
    plan: Plan
    unsliced_seconds: float
    sliced_seconds: float
    papers_plan_seconds: float | None
    """What the slices that the paper found take in the model."""

    @property
    def speedup(self) -> float:
        return self.unsliced_seconds / self.sliced_seconds


def main() -> None:
    args = parse_args()
    cluster = fit(SETTINGS)
    print(
        f"fitted to the unsliced times: {cluster.flops_per_second / 1e12:.1f} TFLOP/s a device, "
        f"{cluster.network_bytes_per_second / 1e9:.2f} GB/s a host between hosts, "
        f"{cluster.nvlink_bytes_per_second / 1e9:.1f} GB/s a device in all-reduces"
    )
    rows = [predict(s, cluster) for s in SETTINGS if not args.quick or s.name in QUICK]
    print_table(rows)
    sweeps = {name: sweep(name, cluster) for name in UNIFORM}
    for name, predicted in sweeps.items():
        print_sweep(name, predicted)
    content = {
        "cluster": cluster._asdict(),
        "geometric_mean_error": {kind: error(rows, kind) for kind in ("unsliced", "sliced")},
        "settings": {row.setting.name: as_json(row) for row in rows},
        "uniform": sweeps,
    }
    results.save("paper", content, args.folder)
    draw(results.picture("paper", args.folder), results.load("paper", args.folder))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="settings 8 and 9 only")
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="for the results")
    return parser.parse_args()


def predict(setting: Setting, cluster: Cluster) -> Row:
    shape = setting.num_stages, setting.batch_size, setting.seq_len
    request = PlanRequest(*shape, schedule="terapipe")  # the paper's
    table = latency_table(setting, cluster)
    plan = find_plan(table, request, [1.0] * setting.num_stages).plan
    assert plan.prediction
    papers = setting.token_slices
    return Row(
        setting,
        plan,
        step_seconds(setting, cluster, (setting.seq_len,)),
        plan.prediction.step_seconds + reduction_seconds(setting, cluster),
        step_seconds(setting, cluster, papers) if papers else None,
    )


def sweep(name: str, cluster: Cluster) -> dict[int, float]:
    """Predicted seconds with so many equal slices."""
    [setting] = [s for s in SETTINGS if s.name == name]
    num_units = setting.seq_len // UNIT_TOKENS
    return {
        n: step_seconds(setting, cluster, tuple(UNIT_TOKENS * u for u in uniform(num_units, n)))
        for n in UNIFORM[name]
    }


def error(rows: list[Row], kind: str) -> float:
    """Geometric mean of predicted over measured time, or its inverse where that is larger."""
    name = f"{kind}_seconds"
    logs = [abs(math.log(getattr(row, name) / getattr(row.setting, name))) for row in rows]
    return math.exp(sum(logs) / len(logs)) - 1


def print_table(rows: list[Row]) -> None:
    print(f"\n{'':16}{'unsliced, s':^25}{'sliced, s':^25}{'speed-up':^14}  {'its slices':^17}")
    heads = ("paper", "model", "ratio")
    print(f"{'':16}{''.join(f'{h:>8}' for h in heads * 2)} {'paper':>8}{'model':>7}", end="  ")
    print(f"{'model':>9}{'/ ours':>8}  slices found")
    for row in rows:
        s = row.setting
        text = f"{s.name:16}"
        for measured, predicted in (
            (s.unsliced_seconds, row.unsliced_seconds),
            (s.sliced_seconds, row.sliced_seconds),
        ):
            text += f"{measured:8.3f}{predicted:8.3f}{predicted / measured:8.2f}"
        text += f" {s.unsliced_seconds / s.sliced_seconds:7.2f}x{row.speedup:6.2f}x  "
        papers = row.papers_plan_seconds
        text += f"{papers:8.3f}s{papers / row.sliced_seconds:8.3f}" if papers else " " * 17
        print(f"{text}  {slices_found(row.plan)}")
    unsliced, sliced = (error(rows, kind) for kind in ("unsliced", "sliced"))
    print(f"geometric mean error: unsliced {unsliced:.1%} (fitted), sliced {sliced:.1%}")


def slices_found(plan: Plan) -> str:
    """Short: how many batch slices of how many sequences, and the token slices of the first."""
    groups = [(len(list(own)), size) for size, own in itertools.groupby(plan.batch_slices)]
    tokens = plan.token_slices[0]
    return (
        ", ".join(f"{count} x {size}" for count, size in groups)
        + f" by {len(tokens)}: {tokens[0]} to {tokens[-1]}"
    )


def print_sweep(name: str, predicted: dict[int, float]) -> None:
    measured = UNIFORM[name]
    print(f"\n{name}, uniform slices:  " + "".join(f"{n:8}" for n in measured))
    for label, values in (("paper", measured), ("model", predicted)):
        best = min(values, key=lambda n: values[n])
        cells = "".join(f"{value:8.3f}" for value in values.values())
        print(f"{label:>{len(name) + 18}}:  {cells}  best {best}")
    ours = min(predicted, key=lambda n: predicted[n])
    gap = measured[ours] / min(measured.values()) - 1
    print(f"the model's best took the paper {gap:.1%} longer than the best that it measured")


def as_json(row: Row) -> dict[str, object]:
    s = row.setting
    return {
        "paper": {"unsliced_seconds": s.unsliced_seconds, "sliced_seconds": s.sliced_seconds},
        "model": {
            "unsliced_seconds": row.unsliced_seconds,
            "sliced_seconds": row.sliced_seconds,
            "speedup": row.speedup,
            "papers_slices_seconds": row.papers_plan_seconds,
        },
        "batch_slices": row.plan.batch_slices,
        "token_slices": row.plan.token_slices,
        "is_optimal": row.plan.prediction and row.plan.prediction.is_optimal,
    }


def draw(path: Path, content: dict[str, Any]) -> None:
    figure = Figure(figsize=(12.5, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.1, 1))[:, 0]
    axes, settings, sweeps = top.subplots(), content["settings"], content["uniform"]
    paper, ours = (
        [row[whose]["unsliced_seconds"] / row[whose]["sliced_seconds"] for row in settings.values()]
        for whose in ("paper", "model")
    )
    labels, colours = ("measured by the paper, on V100s", "computed here"), ("0.6", "tab:blue")
    groups = [re.sub(",? ", "\n", name) for name in settings]
    results.add_bars(axes, groups, dict(zip(labels, (paper, ours), strict=True)), colours)
    axes.set_title("measured by the paper, and computed here: speed-up by token slices")
    axes.set(xlabel="setting of the paper", ylabel="time without slices / with slices")
    axes.legend(frameon=False)
    for name, other in zip(sweeps, bottom.subplots(1, len(sweeps)), strict=True):
        counts = list(UNIFORM[name])
        both = UNIFORM[name].values(), sweeps[name].values()
        for times, marker, colour, label in zip(both, "os", colours, labels, strict=True):
            other.plot(counts, list(times), f"{marker}-", color=colour, label=label)
        other.set(xscale="log", ylim=(0, None), title=f"setting {name.replace(' ', ': ')}")
        other.set(xlabel="number of equal slices", ylabel="time of a step [s]")
        other.set_xticks(counts, [str(n) for n in counts])
        other.minorticks_off()
        other.spines[["top", "right"]].set_visible(False)
        other.legend(frameon=False)
    figure.savefig(path, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
