"""Llama 3.1 8B, on sequences of 131072 tokens, two a step, on 8 H100 (docs/long-context.md).

python launch/multihost.py --config=llama3_8b_128k --config.data.train=tokens.bin
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
            num_layers=32,
            d_model=4096,
            num_heads=32,
            num_kv_heads=8,
            d_ff=14336,
            vocab_size=128256,
            seq_len=131072,
            rope_theta=500_000.0,
            rope_scaling="llama3:8,1,4,8192",
        ),
        mesh=MeshConfig(pipe=8),
        plan=PlanConfig(token_slices="uniform:64"),
        memory=MemoryConfig(remat="attn"),
        train=TrainConfig(num_steps=1000, batch_size=2, eval_every=1000, sample_tokens=0),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=20),
        data=DataConfig(train="tokens.bin"),
        checkpoint=CheckpointConfig(every=100),
    )
