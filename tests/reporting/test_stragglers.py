"""Which stage is called slow, and when."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from support import runs
from tpipe_jax.planning.simulate import Box
from tpipe_jax.reporting import stragglers
from tpipe_jax.reporting.stragglers import StageOfShard, Stragglers, to_text, work_seconds

LAYERS = (4, 4, 3, 0)  # the last stage has none
PLACES = [(shard, stage) for shard in range(2) for stage in range(4)]
NAMES = {place: f"host-{place[0]}, process {4 * place[0] + place[1]}" for place in PLACES}


def times(slow: Mapping[StageOfShard, float] = {}) -> list[str]:
    """Two processes, a data shard each: 0.1 s for each layer, some so many times as long."""
    return [
        to_text({(s, n): 0.1 * LAYERS[n] * slow.get((s, n), 1) for s, n in PLACES if s == shard})
        for shard in range(2)
    ]


def test_only_a_stage_that_is_slow_for_long_is_named():
    watch = Stragglers(LAYERS, NAMES)
    slow = {(1, 2): 1.5}
    assert watch.add(100, times(slow)) == ""
    assert watch.add(200, times(slow)) == ""
    line = watch.add(300, times({(1, 2): 1.4}))
    assert line.startswith(
        "stage 2 of data shard 1 (host-1, process 6) has taken 1.50 times as long"
    )
    assert "since step 100" in line
    assert watch.add(400, times(slow)) == ""  # it is told once
    assert watch.add(500, times()) == (
        "stage 2 of data shard 1 (host-1, process 6) is no slower than the others any more"
    )
    assert watch.add(600, times()) == ""


def test_a_step_between_begins_the_count_again():
    watch = Stragglers(LAYERS, NAMES)
    for step in range(6):
        assert watch.add(step, times({(0, 0): 2.0} if step % 3 < 2 else {})) == ""


def test_fewer_layers_and_small_differences_are_not_slow():
    watch = Stragglers(LAYERS, NAMES)
    for step in range(5):
        assert watch.add(step, times({(0, 0): 1.2})) == ""


@pytest.mark.parametrize("texts", [["{}"], [to_text({(0, 0): 1.0})], [to_text({})] * 2])
def test_what_is_not_known_is_not_compared(texts: list[str]):
    watch = Stragglers(LAYERS, NAMES)
    assert [watch.add(step, texts) for step in range(4)] == [""] * 4


def test_work_is_what_stages_do_between_waits():
    boxes = [Box(1, 0, "forward", 1.0, 1.5), Box(1, 0, "backward", 3.0, 4.0)]
    assert work_seconds({(0, 1): boxes, (0, 0): []}) == {(0, 1): 1.5}


@pytest.mark.slow
def test_a_run_times_its_stages_and_names_a_slow_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of all data shards; and computes what a run without does."""
    changes = {"mesh": {"data": 2, "pipe": 2}, "train": {"num_steps": 7}}
    config = runs.changed(runs.small_config(tmp_path), model={"num_layers": 4}, **changes)
    seen: list[dict[StageOfShard, float]] = []

    def with_a_slow_one(boxes: Mapping[StageOfShard, Sequence[Box]]) -> dict[StageOfShard, float]:
        seen.append(work_seconds(boxes))
        return {place: 3.0 if place == (1, 1) else 1.0 for place in seen[-1]}

    monkeypatch.setattr(stragglers, "work_seconds", with_a_slow_one)
    timed = runs.changed(config, metrics={"stage_times_every": 2})
    said = runs.run(timed, tmp_path / "timed")
    runs.run(config, tmp_path / "plain")
    losses = [[line["loss"] for line in runs.metrics(tmp_path / n)] for n in ("timed", "plain")]
    assert losses[0] == losses[1]
    assert len(seen) == 3
    places = {(shard, stage) for shard in range(2) for stage in range(2)}
    assert all(found.keys() == places and min(found.values()) > 0 for found in seen)
    [line] = [line for line in said if "times as long for a layer" in line]
    assert line.startswith("step 6: stage 1 of data shard 1 (")
    assert "process 0) has taken 3.00 times as long" in line
