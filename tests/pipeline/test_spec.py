"""What settings and devices make of the stages."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from tpipe_jax.config.settings import (
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    PrecisionConfig,
)
from tpipe_jax.errors import UserError
from tpipe_jax.pipeline.spec import make_spec, spec_on_devices
from tpipe_jax.planning.placement import stage_layers

CONFIG = Config(ModelConfig(num_layers=7, d_model=16, num_heads=2), MeshConfig(pipe=2))


def test_what_is_left_open_is_filled_in():
    spec = spec_on_devices(CONFIG, jax.devices()[:2])
    assert (spec.config.precision.compute, spec.dtype) == ("float32", np.float32)
    assert spec.config.attention.backend == "xla"
    assert spec.config.model.d_ff == 64
    assert spec.config.optim.shard_state is False
    assert spec.heads == (2, 2, 8)
    assert spec.saved_names == ("q", "attn", "middle", "router", "hidden")
    again = make_spec(spec.config, spec.mesh)
    assert again.config == spec.config


@pytest.mark.parametrize("num_layers", [1, 4, 7, 8])
@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_layers_lie_where_the_placement_says(num_layers: int, num_chunks: int):
    plan = PlanConfig(schedule="interleaved", chunks=num_chunks) if num_chunks > 1 else PlanConfig()
    model = replace(CONFIG.model, num_layers=num_layers)
    spec = spec_on_devices(replace(CONFIG, model=model, plan=plan), jax.devices()[:2])
    assert (spec.num_stages, spec.num_chunks) == (2, num_chunks)
    places = stage_layers(num_layers, 2, num_chunks)
    assert spec.layers_per_stage == len(places)
    assert np.sum(spec.chunk_layers, 0).tolist() == (places >= 0).sum(0).tolist()


def test_gradients_of_weights_come_when_the_settings_say():
    at_the_end = replace(CONFIG, memory=MemoryConfig(defer_weight_grads=True))
    later = replace(CONFIG, plan=PlanConfig(schedule="1f1b-deferred"))
    found = [
        spec_on_devices(config, jax.devices()[:2]).weight_grads
        for config in (CONFIG, at_the_end, later)
    ]
    assert found == ["at once", "at the end", "some ticks later"]


def test_the_format_is_that_of_the_settings():
    config = replace(CONFIG, precision=PrecisionConfig("bfloat16"))
    assert spec_on_devices(config, jax.devices()[:2]).dtype == jax.numpy.bfloat16


def test_devices_that_do_not_fit_are_refused():
    config = replace(CONFIG, mesh=MeshConfig(pipe=3))
    with pytest.raises(UserError, match=r"^config.mesh.data=1 \* pipe=3 \* model=1 asks for 3"):
        spec_on_devices(config, jax.devices()[:2])


def test_chunks_that_cannot_be_take_no_time():
    """They are refused later, with the settings that do not fit them."""
    plan = PlanConfig(schedule="interleaved", chunks=2**31 - 1)
    assert spec_on_devices(replace(CONFIG, plan=plan), jax.devices()[:2]).num_chunks == 2**31 - 1
