"""The compiled programs in lower precision; tests/pipeline has their float32."""

import dataclasses

import jax
import numpy as np
import pytest

from support import reference
from tpipe_jax.config.settings import (
    Config,
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
from tpipe_jax.training.step import make_loss_and_grads


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
