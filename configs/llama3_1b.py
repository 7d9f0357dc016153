"""Llama 3.2 1B: its public shape, in sequences of 8192 tokens on 8 GPUs.

    python launch/multihost.py --config=llama3_1b --config.data.train=tokens.bin

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
            num_layers=16,
            d_model=2048,
            num_heads=32,
            num_kv_heads=8,
            d_ff=8192,
            vocab_size=128256,
            seq_len=8192,
            tied_head=True,
            rope_theta=500_000.0,
            rope_scaling="llama3:32,1,4,8192",
        ),
        mesh=MeshConfig(pipe=8),
        train=TrainConfig(num_steps=100_000, batch_size=32, eval_every=1000, sample_tokens=0),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
        data=DataConfig(train="tokens.bin"),
        checkpoint=CheckpointConfig(every=1000),
    )
