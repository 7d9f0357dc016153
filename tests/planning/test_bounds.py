"""What takes too much time or memory to plan is refused before the work."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.forged import bounded_memory
from support.latencies import profile
from tpipe_jax.cli.plan import main
from tpipe_jax.config.settings import Config
from tpipe_jax.errors import UserError
from tpipe_jax.planning import latency_file
from tpipe_jax.planning.bounds import (
    MAX_CELLS,
    MAX_DEVICES,
    MAX_SEQUENCES,
    MAX_STAGES,
    MAX_TIMES,
    check_devices,
    fits_times,
    most_slices,
)
from tpipe_jax.planning.latency import LatencyTable
from tpipe_jax.planning.latency_file import load_table
from tpipe_jax.planning.plan import Plan, PlanRequest, read_plan
from tpipe_jax.planning.planner import find_plan
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.planning.settings import divisors, parse_slices, read_settings, unit_tokens

EXAMPLE = Path(__file__).parents[2] / "examples" / "latency.json"
SECONDS = 5


def refused(work: Any, sentence: str) -> None:
    """Soon, with one short sentence, and without much memory."""
    start = time.monotonic()
    with bounded_memory(2**28), pytest.raises(UserError, match=sentence) as error:
        work()
    assert time.monotonic() - start < SECONDS
    assert len(str(error.value)) < 500
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--num-stages=1000000 --batch-size=1 --seq-len=1024",
            "1000000 must be at most 723 stages",
        ),
        ("--num-stages=4 --batch-size=1000000 --seq-len=1024", "1000000 must be at most 4096 seq"),
        (
            "--num-stages=4 --batch-size=1 --seq-len=2147483584",
            "and at most 8388608 can be planned",
        ),
        ("--num-stages=4 --batch-size=1 --seq-len=2147483647", "is not a multiple of the unit"),
        ("--num-stages=700 --batch-size=1 --seq-len=1024 --chunks=1000", "700 stages can work on"),
    ],
)
def test_flags_of_a_plan_from_a_file(flags: str, sentence: str, tmp_path: Path):
    args = [f"--latency={EXAMPLE}", f"--workdir={tmp_path / 'plan'}", *flags.split()]
    refused(lambda: main(args, "plan"), sentence)
    assert not list(tmp_path.iterdir())


def config(**settings: Any) -> Config:
    """The default settings with some changed, as `train__batch_size`."""
    made = Config()
    for name, value in settings.items():
        section, field = name.split("__")
        made = replace(made, **{section: replace(getattr(made, section), **{field: value})})
    return made


MILLION = ",".join(["1"] * 1_000_000)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"model__seq_len": 2**31 - 1},
            "seq_len=2147483647 with a unit of 1 tokens makes 21474836",
        ),
        ({"train__batch_size": 2**31 - 1}, "2147483647 must be at most 4096 sequences"),
        ({"mesh__pipe": 2**31 - 1}, "config.mesh.pipe=2147483647 must be at most 723 stages"),
        (
            {"model__seq_len": 2**20, "plan__unit_tokens": 1},
            "set config.plan.unit_tokens to a larg",
        ),
        (
            {"model__seq_len": 2 * 10**9, "plan__token_slices": "uniform:1000000000"},
            "uniform:1000000000 must ask for at most 524287 slices",
        ),
        (
            {"model__seq_len": 10**6, "plan__token_slices": MILLION},
            r"token_slices=1,1,1,[1,]* \.\.\. must have at most 524287 slices",
        ),
        (
            {"model__seq_len": 10**6, "plan__token_slices": "uniform:10000"},
            "config.plan.token_slices makes 10000 places",
        ),
        ({"plan__token_slices": "uniform:" + "9" * 5000}, r"uniform:9+ \.\.\. must ask for 1 to"),
        ({"plan__token_slices": "9" * 5000}, r"token_slices=9+ \.\.\. sums to"),
        (
            {
                "model__seq_len": sum(range(1, 400)),
                "plan__token_slices": ",".join(map(str, range(1, 400))),
                "plan__batch_slices": "uniform:1",
            },
            "config.plan.token_slices has 399 lengths, each with programs of its own",
        ),
        (
            {"train__batch_size": 10_000, "plan__batch_slices": "uniform:5000"},
            "config.plan.batch_slices has 5000 batch slices",
        ),
        (
            {
                "mesh__pipe": 512,
                "plan__token_slices": "uniform:256",
                "plan__batch_slices": "uniform:8",
            },
            "makes 2048 slices, and 512 stages can work on at most 512: make fewer",
        ),
    ],
)
def test_settings_of_a_plan(settings: dict[str, Any], sentence: str):
    refused(lambda: read_settings(config(**settings)), sentence)


def test_too_many_devices_to_plan_for():
    check_devices("config.mesh", 10_000)
    refused(lambda: check_devices("config.mesh", MAX_DEVICES + 1), "makes 65537 devices")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_stages": 1000}, "its 1000 stages are more than 723"),
        ({"token_slices": [[1] * 600_000]}, "it has 600000 slices, more than the 262142 that 2"),
        ({"token_slices": [list(range(1, 300))]}, "its slices have 299 lengths, more than 256"),
        (
            {"batch_slices": [1] * 5000, "token_slices": [[4]] * 5000},
            "its 5000 batch slices are more than 4096",
        ),
        ({"batch_slices": [2**31]}, "not a positive whole number up to 2147483647"),
        ({"batch_slices": [True]}, "not a positive whole number"),
        ({"batch_slices": [1.0]}, "not a positive whole number"),
        ({"batch_slices": ["1"]}, "not a positive whole number"),
        ({"num_stages": 10**4000}, "not a positive whole number"),
        ({"schedule": "x" * 10**6}, r"a schedule that is not known, 'x+\.\.\.$"),
    ],
)
def test_plans_in_files(changes: dict[str, Any], what: str):
    content = {"num_stages": 2, "batch_slices": [1], "token_slices": [[2, 2]], **changes}
    with pytest.raises(ValueError, match=what) as error:
        read_plan(content)
    assert len(str(error.value)) < 400


PREDICTED = {
    "predicted_step_seconds": 9.0,
    "slice_forward_seconds": [[1.0]],
    "slice_backward_seconds": [[1.0]],
    "optimal": True,
    "lower_bound_seconds": 1.0,
}


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), 1e400, -1, [], {}, 10**4000])
@pytest.mark.parametrize("name", [*PREDICTED, "outside_seconds", "slice_transfer_seconds"])
def test_predicted_times_of_plans_in_files(name: str, value: Any):
    content = {"num_stages": 2, "batch_slices": [1], "token_slices": [[4]], **PREDICTED}
    assert read_plan(content).prediction is not None
    if name in ("optimal", "outside_seconds") and value is True:
        value = 2.5 if name == "optimal" else True
    if name.startswith("slice"):
        value = [[value]]
    with pytest.raises(ValueError, match=r"its |it has") as error:
        read_plan({**content, name: value})
    assert len(str(error.value)) < 400


def test_more_times_than_can_be_planned_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latency_file, "MAX_TIMES", 100)
    path, rows = tmp_path / "latency.json", [[1.0] * 11] * 11
    path.write_text(json.dumps({"unit_tokens": 8, "forward": [rows], "backward": [rows]}))
    refused(lambda: load_table(path), "forward has more than the 100 times")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"batch_size": 10**9}, "it is of 1000000000 sequences and the times of 4"),
        ({"batch_size": True}, "a size is not a positive whole number"),
        ({"seq_len": 128.0}, "a size is not a positive whole number"),
        ({"key_block": 10**30}, "a size is not a positive whole number"),
        ({"transfer": [True, 1]}, "a figure is not between"),
        ({"outside_seconds": 1e300}, "a figure is not between"),
        ({"key": 1}, "it has no key"),
        ({"samples": [[1, 8, 0, 1.0, 1.0, False]] * 10_001}, "or more than 10000 samples"),
        ({"samples": [[1, 8, 0.5, 1.0, 1.0, False]]}, "a sample has no context"),
        ({"samples": [[1, 8, 0, True, 1.0, False]]}, "a sample is not a time"),
        ({"samples": [[1, 8, 0, 1.0, 1.0, "no"]]}, "does not say whether it is a test"),
        ({"deferral": [[1, 1], [True, 1]]}, "not two pairs of numbers"),
    ],
)
def test_profiles_in_files(changes: dict[str, Any], what: str, tmp_path: Path):
    profile().table(8).save(tmp_path / "latency.json")
    content = json.loads((tmp_path / "latency.json").read_text())
    load_table(tmp_path / "latency.json")
    content["profile"] |= changes
    (tmp_path / "latency.json").write_text(json.dumps(content))
    refused(lambda: load_table(tmp_path / "latency.json"), re.escape(what))


def test_a_profile_makes_no_table_that_is_too_large():
    refused(lambda: profile(seq_len=2**20).table(8), "set a larger config.plan.unit_tokens")


def test_given_slices_take_no_times_of_others():
    """Of each pair of cuts there were times, so a thousand slices took as long as a million."""
    slices = tuple(range(1, 129)) + (1,) * 500
    of_all = profile(batch_size=1, seq_len=sum(slices))
    table = replace(of_all.table(sum(slices)), profile=of_all)
    start = time.monotonic()
    planning = find_plan(table, PlanRequest(2, 1, sum(slices), (1,), slices), [1.0, 1.0])
    assert time.monotonic() - start < SECONDS
    assert planning.plan.token_slices == (slices,)


@pytest.mark.parametrize(
    ("settings", "num_units"),
    [
        ({"model__seq_len": 2048}, 256),
        ({"model__seq_len": 2**21}, 256),
        ({"model__seq_len": 2**21, "train__batch_size": 1024}, 64),
        ({"model__seq_len": 2048, "train__batch_size": 1536}, 64),
        ({"model__seq_len": 1021}, 1021),
        ({"mesh__pipe": 512, "model__seq_len": 2048}, 256),
    ],
)
def test_what_is_real_is_planned(settings: dict[str, Any], num_units: int):
    given = config(**settings)
    assert isinstance(read_settings(given), PlanRequest)
    unit = unit_tokens(given)
    assert given.model.seq_len // unit == num_units
    assert fits_times(given.train.batch_size, num_units)


def test_divisors():
    for number in (1, 2, 12, 97, 360, 2**31 - 1):
        small = [n for n in range(1, 400) if number % n == 0]
        assert [n for n in divisors(number) if n < 400] == small


def test_bounds_leave_room_for_what_is_real():
    assert MAX_STAGES * MAX_STAGES < MAX_CELLS
    assert most_slices(MAX_STAGES) > 0 >= most_slices(MAX_STAGES + 1)
    assert most_slices(512) >= 512
    assert most_slices(64) >= 8000
    assert MAX_SEQUENCES >= 3072
    assert MAX_TIMES >= 128 * 256**2
    assert parse_slices("uniform:64", 2**21, "a", "b") == (2**15,) * 64


def test_a_table_of_few_sequences_and_many_stages():
    """Each plan has more slices than the stages can work on, or fewer than are allowed."""
    times = np.ones((1, 1, 1))
    table, request = LatencyTable(8, times, times), PlanRequest(700, 4000, 8)
    with pytest.raises(UserError, match="no allowed slices"):
        find_plan(table, request, [1.0] * 700)


def test_a_schedule_of_thousands_of_batch_slices_takes_seconds():
    start = time.monotonic()
    schedule = make_schedule(Plan(8, (1,) * 4000, ((4,),) * 4000, schedule="1f1b-deferred"))
    assert time.monotonic() - start < SECONDS
    assert schedule.num_rows < 32
