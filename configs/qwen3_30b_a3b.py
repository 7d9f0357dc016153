"""Qwen3 30B-A3B: its public shape, in sequences of 32768 tokens on 16 GPUs.

    python launch/multihost.py --config=qwen3_30b_a3b --config.data.train=tokens.bin

A token goes through 8 of the 128 experts of a layer. 'model' divides the experts. The weights come
from a Hugging Face folder with `tpipe convert import` (docs/trained.md).
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
            num_layers=48,
            d_model=2048,
            num_heads=32,
            num_kv_heads=4,
            head_width=128,
            d_ff=768,
            vocab_size=151936,
            seq_len=32768,
            rope_theta=1_000_000.0,
            norm_eps=1e-6,
            qk_norm=True,
            num_experts=128,
            experts_per_token=8,
        ),
        mesh=MeshConfig(pipe=8, model=2),
        train=TrainConfig(num_steps=100_000, batch_size=4, eval_every=1000, sample_tokens=0),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
        data=DataConfig(train="tokens.bin"),
        checkpoint=CheckpointConfig(every=1000),
    )
