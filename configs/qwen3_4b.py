"""Qwen3 4B: its public shape, in sequences of 32768 tokens on 8 GPUs.

    python launch/multihost.py --config=qwen3_4b --config.data.train=tokens.bin

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
            num_layers=36,
            d_model=2560,
            num_heads=32,
            num_kv_heads=8,
            head_width=128,
            d_ff=9728,
            vocab_size=151936,
            seq_len=32768,
            tied_head=True,
            rope_theta=1_000_000.0,
            norm_eps=1e-6,
            qk_norm=True,
        ),
        mesh=MeshConfig(pipe=4, model=2),
        train=TrainConfig(num_steps=100_000, batch_size=4, eval_every=1000, sample_tokens=0),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
        data=DataConfig(train="tokens.bin"),
        checkpoint=CheckpointConfig(every=1000),
    )
