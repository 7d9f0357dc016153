"""GPT3-44B in setting 8 of the TeraPipe paper: 48 stages of 8 devices, batch 8.

    python launch/multihost.py --config=configs/gpt3_44b.py --config.data.train=tokens.bin

The mesh needs 384 devices (docs/clusters.md). The paper measured 2.662 s a step on V100s with whole
sequences, one at a time, and 1.111 s with --config.plan.token-slices=384,384,368,320,296,296
--config.plan.batch-slices=uniform:8 (Li et al. 2021); by default slices are planned. Setting 6 is
--config.mesh.data=4 --config.mesh.pipe=96 --config.mesh.model=1, and setting 7 --config.mesh.data=2
--config.mesh.pipe=24.
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
            num_layers=96, d_model=6144, num_heads=48, vocab_size=50257, seq_len=2048
        ),
        mesh=MeshConfig(data=1, pipe=48, model=8),
        train=TrainConfig(num_steps=100_000, batch_size=8, eval_every=1000, sample_tokens=0),
        optim=OptimConfig(learning_rate=0.8e-4, warmup_steps=2000),
        data=DataConfig(train="tokens.bin"),
        checkpoint=CheckpointConfig(every=1000),
    )
