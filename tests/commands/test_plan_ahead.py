"""The units in which sequences are cut for GPUs that are not here."""

import pytest

from tpipe_jax.commands.plan_ahead import unit_to_plan
from tpipe_jax.config.settings import Config, MeshConfig, ModelConfig, TrainConfig


@pytest.mark.parametrize(
    ("seq_len", "pipe", "unit"),
    [(2048, 96, 32), (131072, 8, 2048), (2**20, 32, 4096), (2**20, 1, 16384)],
)
def test_many_stages_get_finer_units_of_long_sequences(seq_len: int, pipe: int, unit: int):
    """A million tokens in 64 units would leave 32 stages idle for half of the time."""
    model = ModelConfig(num_layers=96, seq_len=seq_len)
    config = Config(model, MeshConfig(pipe=pipe), train=TrainConfig(batch_size=1))
    assert unit_to_plan(config) == unit
