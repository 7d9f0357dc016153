"""GPT3-175B in setting 9 of the TeraPipe paper: 96 stages of 4 devices, batch 2.

    python launch/multihost.py --config=configs/gpt3_175b.py --config.data.train=tokens.bin

The mesh needs 384 devices, as 48 hosts of 8 GPUs (docs/clusters.md). The paper measured 9.990 s a
step on V100s with whole sequences, one at a time, and 1.481 s with slices of 4 x 120, 6 x 112, 8 x
104 and 64 tokens (Li et al. 2021); by default slices are planned. Setting 10 is
--config.mesh.pipe=48 --config.mesh.model=8.
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
            num_layers=96, d_model=12288, num_heads=96, vocab_size=50257, seq_len=2048
        ),
        mesh=MeshConfig(data=1, pipe=96, model=4),
        train=TrainConfig(num_steps=100_000, batch_size=2, eval_every=1000, sample_tokens=0),
        optim=OptimConfig(learning_rate=0.6e-4, warmup_steps=2000),
        data=DataConfig(train="tokens.bin"),
        checkpoint=CheckpointConfig(every=1000),
    )
