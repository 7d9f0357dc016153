"""What the settings say of a plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tpipe_jax
from support import reference
from tpipe_jax.config.settings import (
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    ScheduleName,
    TrainConfig,
)
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.errors import UserError
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.plan import Plan, PlanRequest
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.planning.settings import parse_slices, read_settings, settled
from tpipe_jax.planning.settings import unit_tokens as unit_tokens_of
from tpipe_jax.training.step import make_loss_and_grads


def parse(text: str, total: int) -> tuple[int, ...] | None:
    return parse_slices(text, total, "config.plan.token_slices", "config.model.seq_len")


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40))
def test_a_list_is_taken_as_it_stands(lengths: list[int]):
    assert parse(",".join(map(str, lengths)), sum(lengths)) == tuple(lengths)
    assert parse(" , ".join(map(str, lengths)), sum(lengths)) == tuple(lengths)


@given(st.integers(1, 500), st.data())
def test_uniform_slices_are_as_even_as_they_go(total: int, data: st.DataObject):
    num = data.draw(st.integers(1, total))
    slices = parse(f"uniform:{num}", total)
    assert len(slices) == num
    assert sum(slices) == total
    assert max(slices) - min(slices) <= 1
    assert list(slices) == sorted(slices, reverse=True)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("10,5", "config.plan.token_slices=10,5 sums to 15, but config.model.seq_len is 16"),
        ("16,0", "neither auto nor uniform:N nor a list of positive lengths"),
        ("20,-4", "neither auto nor uniform:N nor a list of positive lengths"),
        ("", "neither auto nor uniform:N nor a list of positive lengths"),
        ("8,,8", "neither auto nor uniform:N nor a list of positive lengths"),
        ("8.0,8.0", "neither auto nor uniform:N nor a list of positive lengths"),
        ("uniform", "neither auto nor uniform:N nor a list of positive lengths"),
        ("uniform:x", "neither auto nor uniform:N nor a list of positive lengths"),
        ("even:4", "neither auto nor uniform:N nor a list of positive lengths"),
        ("uniform:0", "must ask for 1 to 16 slices"),
        ("uniform:17", "must ask for 1 to 16 slices"),
    ],
)
def test_slices_that_break_a_rule_are_refused(text: str, sentence: str):
    with pytest.raises(UserError) as error:
        parse(text, 16)
    assert sentence in str(error.value)
    assert "config.plan.token_slices" in str(error.value)


def config(batch_size: int, data: int, batch_slices: str) -> Config:
    return Config(
        model=ModelConfig(seq_len=12),
        mesh=MeshConfig(data=data, pipe=3),
        plan=PlanConfig(token_slices="7,5", batch_slices=batch_slices),
        train=TrainConfig(batch_size=batch_size),
    )


def test_batch_slices_are_of_one_data_shard():
    plan = reference.plan_of(config(batch_size=12, data=2, batch_slices="3,2,1"))
    assert plan == Plan(3, (3, 2, 1), ((7, 5), (7, 5), (7, 5)))
    assert (plan.batch_size, plan.seq_len) == (6, 12)


def test_batch_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"config\.plan\.batch_slices=3,3 sums to 6, .* is 12"):
        reference.plan_of(config(batch_size=12, data=1, batch_slices="3,3"))
    with pytest.raises(UserError, match=r"batch_size=9 is not a multiple of config\.mesh\.data=2"):
        reference.plan_of(config(batch_size=9, data=2, batch_slices="uniform:1"))


def test_unit_is_8_tokens_and_more_in_long_sequences():
    def unit(seq_len: int, unit_tokens: int | None = None) -> int:
        return unit_tokens_of(
            Config(model=ModelConfig(seq_len=seq_len), plan=PlanConfig(unit_tokens=unit_tokens))
        )

    assert [unit(n) for n in (256, 2048, 8192, 100, 7, 1021)] == [8, 8, 32, 5, 7, 1]
    assert unit(96, 12) == 12
    with pytest.raises(UserError, match=r"config\.plan\.unit_tokens=10 does not divide .*=96"):
        unit(96, 10)


def test_what_is_left_to_the_planner_is_a_request():
    def read(**fields: str) -> Plan | PlanRequest:
        return read_settings(
            Config(
                model=ModelConfig(seq_len=16),
                mesh=MeshConfig(data=2, pipe=3),
                plan=PlanConfig(**fields),
                train=TrainConfig(batch_size=8),
            )
        )

    assert read() == PlanRequest(3, 4, 16, None, None, num_layers=4)
    assert read(token_slices=" auto ", batch_slices="3,1") == PlanRequest(
        3, 4, 16, (3, 1), None, num_layers=4
    )
    assert read(token_slices="uniform:2") == PlanRequest(3, 4, 16, None, (8, 8), num_layers=4)
    assert read(token_slices="16", batch_slices="4") == Plan(3, (4,), ((16,),))
    assert read(schedule="1f1b") == PlanRequest(3, 4, 16, schedule="1f1b", num_layers=4)
    given = read(token_slices="uniform:2", batch_slices="uniform:4", schedule="1f1b")
    assert given == Plan(3, (1,) * 4, ((8, 8),) * 4, schedule="1f1b")


@pytest.mark.parametrize("schedule", ["1f1b", "1f1b-deferred"])
@pytest.mark.parametrize(
    ("batch_size", "changes", "sentence"),
    [
        (1, {}, r"only one: set config.plan.schedule=terapipe, or config.train.batch_size so"),
        (4, {"batch_slices": "4"}, r"only one: set .* or config.plan.batch_slices so"),
        (4, {"memory": MemoryConfig(defer_weight_grads=True)}, r"defer_weight_grads=true needs"),
    ],
)
def test_1f1b_needs_several_batch_slices(
    batch_size: int, changes: dict, sentence: str, schedule: ScheduleName
):
    changes = dict(changes)
    memory = changes.pop("memory", MemoryConfig())
    plan = PlanConfig(**changes, schedule=schedule)
    with pytest.raises(UserError, match=rf"config\.plan\.schedule={schedule} .*{sentence}"):
        read_settings(Config(plan=plan, train=TrainConfig(batch_size=batch_size), memory=memory))
    plan = replace(plan, schedule="auto")
    read_settings(Config(plan=plan, train=TrainConfig(batch_size=batch_size), memory=memory))


@pytest.mark.parametrize(
    ("fields", "num_stages", "sentence"),
    [
        ({"chunks": 2}, 1, "schedule=interleaved shortens .*pipe=1 has one: set another"),
        ({"schedule": "interleaved"}, 1, "pipe=1 has one: set another schedule, or more stages"),
        ({"schedule": "1f1b-deferred"}, 1, "pipe=1 has one: set another schedule, or more stages"),
        ({"schedule": "interleaved"}, 3, "2 chunks of each of .*pipe=3 stages needs .*, 6, and"),
        ({"schedule": "interleaved", "chunks": 3}, 2, "3 chunks of each of .* layers, 6, and"),
        ({"chunks": 3}, 2, "3 chunks of each of .* layers, 6, and config.model.num_layers=4"),
        ({"schedule": "1f1b", "chunks": 2}, 2, "chunks=2 is for .*=interleaved, not 1f1b"),
    ],
)
def test_schedules_that_cannot_serve_are_refused(fields: dict, num_stages: int, sentence: str):
    """Of four layers and eight sequences."""
    config = Config(mesh=MeshConfig(pipe=num_stages), plan=PlanConfig(**fields))
    with pytest.raises(UserError, match=sentence):
        read_settings(config)


@pytest.mark.parametrize(
    ("plan", "defers", "sentence"),
    [
        (Plan(1, (4, 4), ((256,),) * 2, None, "1f1b-deferred"), False, "shortens .*pipe=1 has one"),
        (Plan(1, (8,), ((256,),), None, "interleaved", 2), False, "shortens .*pipe=1 has one"),
        (Plan(2, (4, 4), ((256,),) * 2, None, "1f1b-deferred"), True, "keeps a part of the batch"),
        (Plan(2, (4, 4), ((256,),) * 2, None, "1f1b"), True, "keeps a part of the batch"),
    ],
)
def test_a_plan_is_judged_as_settings_are(plan: Plan, defers: bool, sentence: str, tmp_path: Path):
    """From a file, and given to the library."""
    plan.save(tmp_path / "plan.json")
    config = Config(
        mesh=MeshConfig(pipe=plan.num_stages), memory=MemoryConfig(None, "auto", defers)
    )
    from_file = replace(config, plan=PlanConfig(file=str(tmp_path / "plan.json")))
    begin = f"has a schedule of {plan.schedule}, which {sentence}"
    with pytest.raises(UserError, match=rf"^config\.plan\.file=.*plan\.json {begin}"):
        read_settings(from_file)
    with pytest.raises(UserError, match=f"^the plan {begin}"):
        tpipe_jax.make_train_step(config, plan, jax.devices()[: plan.num_stages])
    plan = replace(plan, schedule="terapipe", num_chunks=1)
    plan.save(tmp_path / "plan.json")
    assert read_settings(from_file) == plan


def test_chunks_are_those_that_are_given_or_that_layers_allow():
    def request(num_stages: int, **fields: Any) -> PlanRequest:
        config = Config(
            model=ModelConfig(num_layers=8),
            mesh=MeshConfig(pipe=num_stages),
            plan=PlanConfig(**fields),
        )
        found = read_settings(config)
        assert isinstance(found, PlanRequest)
        return found

    everything = "terapipe", "1f1b", "interleaved", "1f1b-deferred"
    assert (request(2).schedules, request(2).chunk_options) == (everything, (2, 4))
    assert request(4).chunk_options == (2,)
    assert request(5).schedules == ("terapipe", "1f1b", "1f1b-deferred")
    assert request(1).schedules == ("terapipe", "1f1b")
    assert request(2, batch_slices="8").schedules == ("terapipe", "interleaved")
    assert request(2, chunks=3).schedules == ("interleaved",)
    assert request(2, chunks=3).chunk_options == (3,)
    assert request(2, schedule="interleaved").schedules == ("interleaved",)


def test_a_plan_says_where_layers_lie():
    slices = {"token_slices": "uniform:2", "batch_slices": "uniform:1"}
    config = Config(mesh=MeshConfig(pipe=2), plan=PlanConfig(**slices, schedule="interleaved"))
    plan = read_settings(config)
    assert isinstance(plan, Plan)
    assert plan.num_chunks == 2
    found = Config(mesh=MeshConfig(pipe=2))
    assert found.plan.num_chunks == 1
    assert settled(found, plan).plan.num_chunks == 2
    assert settled(config, replace(plan, schedule="1f1b", num_chunks=1)).plan.num_chunks == 1


def test_deferred_products_are_planned_under_terapipe():
    config = Config(memory=MemoryConfig(defer_weight_grads=True))
    request = read_settings(config)
    assert isinstance(request, PlanRequest)
    assert request.schedules == ("terapipe",)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    other = Plan(1, (1,) * 8, ((256,),) * 8, schedule="1f1b")
    with pytest.raises(
        UserError, match=r"keeps a part at a time: set config.memory.defer_weight_grads=false"
    ):
        make_loss_and_grads(make_spec(config, mesh), make_schedule(other))
