"""Qwen3 4B, on sequences of 262144 tokens, two a step, on 16 H100 (docs/long-context.md).

    python launch/multihost.py --config=qwen3_4b_256k --config.data.train=tokens.bin

The base of rotary positions is that of the versions of Qwen3 4B for such contexts.
"""

from tpipe_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
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
            seq_len=262144,
            tied_head=True,
            rope_theta=5_000_000.0,
            norm_eps=1e-6,
            qk_norm=True,
        ),
        mesh=MeshConfig(pipe=8, model=2),
        plan=PlanConfig(token_slices="uniform:128"),
        memory=MemoryConfig(remat="attn"),
        train=TrainConfig(num_steps=500, batch_size=2, eval_every=1000, sample_tokens=0),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=10),
        data=DataConfig(train="tokens.bin"),
        checkpoint=CheckpointConfig(every=50),
    )
