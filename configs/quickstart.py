"""A small byte-level GPT on two pipeline stages, for a laptop with two cores.

    python launch/multihost.py

It learns the documentation that ships inside Python. Expect three to five minutes and a held-out
loss near 2.0 nats per byte at the end; guessing costs 5.5.
"""

from tpipe_jax.config import (
    CheckpointConfig,
    Config,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(num_layers=4, d_model=128, num_heads=4, vocab_size=256, seq_len=256),
        mesh=MeshConfig(data=1, pipe=2, model=1),
        train=TrainConfig(num_steps=900, batch_size=8, log_every=10, eval_every=150),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=100),
        checkpoint=CheckpointConfig(every=300),
    )
