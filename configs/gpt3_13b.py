"""GPT3-13B in setting 5 of the TeraPipe paper: 40 stages of 8 devices, batch 32.

    python launch/multihost.py --config=configs/gpt3_13b.py --config.data.train=tokens.bin

The mesh needs 320 devices (docs/clusters.md). The paper measured 1.863 s a step on V100s with whole
sequences, one at a time, and 1.328 s with --config.plan.token-slices=704,688,656
--config.plan.batch-slices=uniform:32 (Li et al. 2021); by default slices are planned. Setting 4 is
--config.mesh.data=2 --config.mesh.pipe=20.
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
            num_layers=40, d_model=5120, num_heads=40, vocab_size=50257, seq_len=2048
        ),
        mesh=MeshConfig(data=1, pipe=40, model=8),
        train=TrainConfig(num_steps=100_000, batch_size=32, eval_every=1000, sample_tokens=0),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=2000),
        data=DataConfig(train="tokens.bin"),
        checkpoint=CheckpointConfig(every=1000),
    )
