"""The compiled programs in lower precision; tests/pipeline has their float32."""

import dataclasses

import jax
import numpy as np
import pytest

from support import reference
from tpipe_jax.config.settings import Config, ModelConfig, PlanConfig, PrecisionConfig, TrainConfig
from tpipe_jax.devices.mesh import make_mesh, put_rows
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
