"""Mixtral 8x7B v0.1: its public shape, in sequences of 32768 tokens on 32 GPUs.

    python launch/multihost.py --config=mixtral_8x7b --config.data.train=tokens.bin

'model' divides the experts of each layer. The weights come from a Hugging Face folder with
`tpipe convert import` (docs/trained.md).
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
            vocab_size=32000,
            seq_len=32768,
            rope_theta=1_000_000.0,
            num_experts=8,
            experts_per_token=2,
        ),
        mesh=MeshConfig(pipe=8, model=4),
        train=TrainConfig(num_steps=100_000, batch_size=4, eval_every=1000, sample_tokens=0),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
        data=DataConfig(train="tokens.bin"),
        checkpoint=CheckpointConfig(every=1000),
    )
