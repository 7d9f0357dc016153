"""Finds stages and hosts that are slower than the others for long, from the ticks of traced steps.

In a pipeline all stages wait for the slowest one, so that every process sees the same long steps.
Only the times in which stages work, and do not wait, tell which one it is.
"""

import json
from collections.abc import Mapping, Sequence
from statistics import median

from tpipe_jax.planning.simulate import Box

SLOWER = 1.25  # times as long for a layer as the median of the other stages
IN_A_ROW = 3  # timed steps

StageOfShard = tuple[int, int]  # numbers of the data shard and of the stage


def work_seconds(boxes: Mapping[StageOfShard, Sequence[Box]]) -> dict[StageOfShard, float]:
    """Returns how long each stage worked in a step; stages whose ticks are not known are left
    out.
    """
    return {
        place: sum(box.stop_seconds - box.start_seconds for box in own)
        for place, own in boxes.items()
        if own
    }


def to_text(seconds: Mapping[StageOfShard, float]) -> str:
    """Returns the times as the text that processes send each other."""
    return json.dumps([[*place, time] for place, time in seconds.items()])


class Stragglers:
    """Watches the times of all stages, in process 0."""

    def __init__(self, layers: Sequence[int], names: Mapping[StageOfShard, str]) -> None:
        """`layers` are those of each stage, `names` the hosts and processes."""
        self._layers, self._names = layers, names
        self._slow: dict[StageOfShard, list[tuple[int, float]]] = {}

    def add(self, step: int, texts: Sequence[str]) -> str:
        """Adds the times of a step, one text of each process (`to_text`). Returns what is new, or
        nothing: a stage that has been slow `IN_A_ROW` times, or that has been and is no more.
        """
        per_layer = {
            (shard, stage): seconds / self._layers[stage]
            for text in texts
            for shard, stage, seconds in json.loads(text)
            if self._layers[stage]
        }
        if len(per_layer) < 2:
            return ""
        lines = []
        for place, seconds in sorted(per_layer.items()):
            usual = median(own for other, own in per_layer.items() if other != place)
            before = self._slow.get(place, [])
            if seconds > SLOWER * usual:
                self._slow[place] = [*before, (step, seconds / usual)]
                if len(self._slow[place]) == IN_A_ROW:
                    lines.append(self._slower(place))
            elif self._slow.pop(place, None) and len(before) >= IN_A_ROW:
                lines.append(f"{self._name(place)} is no slower than the others any more")
        return "; ".join(lines)

    def _slower(self, place: StageOfShard) -> str:
        steps, ratios = zip(*self._slow[place], strict=True)
        return (
            f"{self._name(place)} has taken {median(ratios):.2f} times as long for a layer as the "
            f"others do mostly, in each of the last {IN_A_ROW} timed steps, since step {steps[0]}: "
            "they wait for it"
        )

    def _name(self, place: StageOfShard) -> str:
        shard, stage = place
        return f"stage {stage} of data shard {shard} ({self._names[place]})"
