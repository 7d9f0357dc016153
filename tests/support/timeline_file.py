"""What timeline.json says of a step that was traced."""

import itertools
import json
from pathlib import Path
from typing import Any

Ticks = dict[tuple[str, int, str], tuple[float, float]]


def check_measured(workdir: Path, step: int, num_stages: int, num_slices: int) -> None:
    """Each stage has worked on each slice once in each direction, one after another and after the
    stage that it has the slice from.
    """
    trace = json.loads((workdir / "timeline.json").read_text())["traceEvents"]
    [pid] = [e["pid"] for e in trace if e.get("args", {}).get("name") == f"measured, step {step}"]
    work = [event for event in trace if event["pid"] == pid and event["ph"] == "X"]
    found: Ticks = {}
    for event in work:
        span = event["ts"], event["ts"] + event["dur"]
        found[event["cat"], event["tid"], event["name"]] = span
    assert len(found) == len(work) == 2 * num_stages * num_slices
    assert min(start for start, _ in found.values()) == 0
    assert all(stop > start for start, stop in found.values())
    for stage in range(num_stages):
        own = sorted(span for (_, tid, _), span in found.items() if tid == stage)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(own))
    for (direction, stage, name), (start, _) in found.items():
        giver: Any = stage - 1 if direction == "forward" else stage + 1
        if 0 <= giver < num_stages:
            assert found[direction, giver, name][1] <= start
