"""Plans as files, and what a plan is for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tpipe_jax.errors import UserError
from tpipe_jax.planning.plan import Plan, PlanRequest, Prediction, load_plan


def test_plan_file(tmp_path: Path):
    Plan(2, (2, 1), ((3, 1), (4,))).save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "num_stages": 2,
        "schedule": "terapipe",
        "batch_slices": [2, 1],
        "token_slices": [[3, 1], [4]],
    }


def test_a_plan_of_chunks_is_kept_as_a_file(tmp_path: Path):
    path, plan = tmp_path / "plan.json", Plan(2, (1,), ((3, 1),), None, "interleaved", 3)
    plan.save(path)
    assert load_plan(path, PlanRequest(2, 1, 4)) == plan
    assert load_plan(path, PlanRequest(2, 1, 4, num_layers=6)) == plan
    with pytest.raises(UserError, match=r"3 chunks of 2 stages each, but .*num_layers is 5"):
        load_plan(path, PlanRequest(2, 1, 4, num_layers=5))
    with pytest.raises(UserError, match=r"chunks of 3, but config.plan.chunks is 2"):
        load_plan(path, PlanRequest(2, 1, 4, num_chunks=2))
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"num_chunks": 1}))
    with pytest.raises(UserError, match="1 chunks of a stage under interleaved"):
        load_plan(path, PlanRequest(2, 1, 4))
    for number in (0, -2, True, "2"):
        path.write_text(json.dumps(content | {"schedule": "terapipe", "num_chunks": number}))
        with pytest.raises(UserError, match="a size in it is not a positive whole number"):
            load_plan(path, PlanRequest(2, 1, 4))


def test_a_plan_with_times_of_gradients_of_weights_is_kept_as_a_file(tmp_path: Path):
    path, ones = tmp_path / "plan.json", ((1.0, 2.0), (3.0, 4.0))
    times = Prediction(9.0, 0.0, ones, ones, ones, False, 8.0, ones)
    plan = Plan(2, (1, 1), ((3, 1), (3, 1)), times, "1f1b-deferred")
    plan.save(path)
    assert load_plan(path, PlanRequest(2, 2, 4)) == plan
    content = json.loads(path.read_text())
    for wrong, sentence in (([], "not of its slices"), (None, "are of 1f1b-deferred")):
        path.write_text(json.dumps(content | {"slice_weight_seconds": wrong}))
        with pytest.raises(UserError, match=sentence):
            load_plan(path, PlanRequest(2, 2, 4))


def test_a_plan_of_another_schedule_is_refused(tmp_path: Path):
    path = tmp_path / "plan.json"
    Plan(2, (1, 1), ((3, 1), (4,)), schedule="1f1b").save(path)
    request = PlanRequest(2, 2, 4)
    assert load_plan(path, request).schedule == "1f1b"
    with pytest.raises(UserError, match=r"a schedule of 1f1b, but .* is terapipe"):
        load_plan(path, replace(request, schedule="terapipe"))
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"schedule": "gpipe"}))
    with pytest.raises(UserError, match="has a schedule that is not known, 'gpipe'"):
        load_plan(path, request)
    content.pop("schedule")
    path.write_text(json.dumps(content))
    assert load_plan(path, request).schedule == "terapipe"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimal": "false"}, "optimal is 'false', neither true nor false"),
        ({"optimal": 0}, "optimal is 0, neither true nor false"),
        ({"lower_bound_seconds": 9.1}, "lower_bound_seconds=9.1 is above its predicted_step_se"),
        ({"outside_seconds": 10}, "outside_seconds=10 is above its predicted_step_seconds=9"),
        (
            {"slice_transfer_seconds": [[0, 2.1]]},
            r"slice_transfer_seconds\[0\]\[1\]=2.1 is above its slice_forward_seconds\[0\]\[1\]=2,",
        ),
        (
            {"slice_transfer_seconds": [[1.0, 0]], "slice_backward_seconds": [[0.5, 2]]},
            r"slice_transfer_seconds\[0\]\[0\]=1 is above its slice_backward_seconds\[0\]\[0\]=0.5",
        ),
    ],
)
def test_a_prediction_that_contradicts_itself_is_refused(
    changes: dict[str, object], sentence: str, tmp_path: Path
):
    path, request = tmp_path / "plan.json", PlanRequest(2, 1, 4)
    times = Prediction(9.0, 1.0, ((1.0, 2.0),), ((2.0, 3.0),), ((1.0, 2.0),), False, 9.0 + 1e-9)
    Plan(2, (1,), ((3, 1),), times).save(path)
    assert load_plan(path, request).prediction == times
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=f"is no plan: its .*{sentence}"):
        load_plan(path, request)
