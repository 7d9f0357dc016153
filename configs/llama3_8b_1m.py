"""Llama 3.1 8B, on sequences of 1048576 tokens, one a step, on 32 H100 (docs/long-context.md).

    python launch/multihost.py --config=llama3_8b_1m --config.data.train=tokens.bin

Rotary positions are stretched by YaRN, from the 131072 tokens that the model was trained for.
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
            seq_len=1048576,
            rope_theta=500_000.0,
            rope_scaling="yarn:8,131072",
        ),
        mesh=MeshConfig(pipe=32),
        plan=PlanConfig(token_slices="uniform:256"),
        memory=MemoryConfig(remat="attn"),
        train=TrainConfig(num_steps=200, batch_size=1, eval_every=1000, sample_tokens=0),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=10),
        data=DataConfig(train="tokens.bin"),
        checkpoint=CheckpointConfig(every=50),
    )
