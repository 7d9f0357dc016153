"""The compiled programs in lower precision; tests/pipeline has their float32."""

import dataclasses

import jax
import numpy as np
import pytest

from support import reference
from tpipe_jax.config.settings import (
    IGNORE,
    Config,
    DataConfig,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    PrecisionConfig,
    TrainConfig,
)
from tpipe_jax.devices.mesh import make_mesh, put_rows
from tpipe_jax.errors import UserError
from tpipe_jax.model import transformer
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.training.step import checked_rows, make_loss_and_grads


@pytest.mark.slow
def test_embedding_gradient_in_bfloat16_sums_many_tokens():
    """A token that occurs thousands of times: sums in bfloat16 would stand still at 256 terms."""
    config = Config(
        model=ModelConfig(num_layers=1, d_model=16, num_heads=2, vocab_size=5, seq_len=1024),
        plan=PlanConfig("uniform:1", "uniform:1"),
        train=TrainConfig(batch_size=4),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    params = reference.to_stages(transformer.init(config.model, jax.random.key(0)), mesh)
    rows = put_rows(mesh, np.full((4, 1025), 3, np.int32))
    schedule = make_schedule(reference.plan_of(config))
    half = dataclasses.replace(config, precision=PrecisionConfig("bfloat16"))
    (_, exact), (_, rounded) = (
        make_loss_and_grads(make_spec(c, mesh), schedule)(params, rows) for c in (config, half)
    )
    # bfloat16 has 8 bits: errors of a few times 2^-8 of the largest gradient.
    reference.assert_close(rounded["embed"], exact["embed"], 0.03)


def test_a_plan_that_keeps_a_part_at_a_time_has_no_deferred_products():
    """Also under a schedule that takes gradients of weights later by itself."""
    for schedule in ("1f1b", "1f1b-deferred"):
        config = Config(
            ModelConfig(num_layers=2, d_model=16, num_heads=2, vocab_size=5, seq_len=8),
            MeshConfig(pipe=2),
            PlanConfig("uniform:2", "uniform:2", schedule=schedule),
            TrainConfig(batch_size=2),
        )
        plan = reference.plan_of(config)
        config = dataclasses.replace(config, memory=MemoryConfig(defer_weight_grads=True))
        spec = make_spec(config, make_mesh(config.mesh, jax.devices()[:2]))
        with pytest.raises(UserError, match="needs all of a batch at once"):
            make_loss_and_grads(spec, make_schedule(plan))


SMALL = Config(ModelConfig(num_layers=1, d_model=8, num_heads=2, vocab_size=11, seq_len=4))
MARKED = dataclasses.replace(SMALL, data=DataConfig(packing="whole"))
ROW = [3, 10, 0, 2, 1]
MARKED_ROW = [[3, 10, 0, 2], [10, 0, IGNORE, 1], [0, 0, 2, 3]]


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16", "int8"])
def test_rows_that_fit_are_the_same_numbers(dtype: str):
    for config, row in ((SMALL, ROW), (MARKED, MARKED_ROW), (SMALL, [3, 4, 5, IGNORE, IGNORE])):
        rows = np.array([row, row], dtype if dtype != "uint16" or np.min(row) >= 0 else "int16")
        checked = checked_rows(config, rows)
        assert checked.dtype == np.int32
        np.testing.assert_array_equal(checked, rows)
    rows = np.array([ROW], np.int32)
    assert checked_rows(SMALL, rows) is rows  # no copy


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ((1, 3), 11, r"rows\[1, 3\]=11 is no token: ids are from 0 to 10, and a target"),
        ((0, 4), -100, r"rows\[0, 4\]=-100 is no token.* that does not count is .*IGNORE=-1\."),
        ((0, 0), 2**32, r"rows\[0, 0\]=4294967296 is no token"),
        ((1, 2), IGNORE, r"rows\[1, 2\]=-1 is the input for a token that counts"),
    ],
)
def test_the_first_bad_place_of_rows_is_named(place: tuple[int, ...], value: int, what: str):
    rows = np.array([ROW, ROW])
    rows[place] = value
    rows[1, 4] = 99 if value == 11 else 1  # a later one is not named
    with pytest.raises(UserError, match=what):
        checked_rows(SMALL, rows)


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ((1, 0, 3), IGNORE, r"rows\[1, 0, 3\]=-1 is no token"),
        ((0, 1, 2), -100, r"rows\[0, 1, 2\]=-100 is no token"),
        ((0, 1, 2), 11, r"rows\[0, 1, 2\]=11 is no token"),
        ((1, 2, 1), 2, r"rows\[1, 2, 1\]=2 is no start of a document"),
        ((1, 2, 1), -1, r"rows\[1, 2, 1\]=-1 is no start of a document"),
    ],
)
def test_the_first_bad_place_of_marked_rows(place: tuple[int, ...], value: int, what: str):
    rows = np.array([MARKED_ROW, MARKED_ROW])
    rows[place] = value
    with pytest.raises(UserError, match=what):
        checked_rows(MARKED, rows)


@pytest.mark.parametrize("dtype", ["float32", "bool", "str"])
def test_rows_of_another_type_are_refused(dtype: str):
    with pytest.raises(UserError, match="must be whole numbers: give token ids as int32"):
        checked_rows(SMALL, np.array([ROW]).astype(dtype))
