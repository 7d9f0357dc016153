"""Llama 3.1 8B: its public shape, in sequences of 8192 tokens on 32 GPUs.

    python launch/multihost.py --config=llama3_8b --config.data.train=tokens.bin

The weights come from a Hugging Face folder with `tpipe convert import` (docs/trained.md).
"""

from tpipe_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            family="llama",
            num_layers=32,
            d_model=4096,
            num_heads=32,
            num_kv_heads=8,
            d_ff=14336,
            vocab_size=128256,
            seq_len=8192,
            rope_theta=500_000.0,
            rope_scaling="llama3:8,1,4,8192",
        ),
        mesh=MeshConfig(data=2, pipe=16),
        train=TrainConfig(num_steps=100_000, batch_size=32, eval_every=1000, sample_tokens=0),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
        data=DataConfig(train="tokens.bin"),
        checkpoint=CheckpointConfig(every=1000),
    )
