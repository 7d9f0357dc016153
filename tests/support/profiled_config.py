"""A model that is profiled in a moment."""

from tpipe_jax.config.settings import (
    Config,
    MeshConfig,
    ModelConfig,
    TrainConfig,
)

CONFIG = Config(
    model=ModelConfig(num_layers=2, d_model=16, num_heads=2, vocab_size=11, seq_len=64),
    mesh=MeshConfig(pipe=2),
    train=TrainConfig(batch_size=4),
)
