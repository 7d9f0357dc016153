"""GPT3-1B in setting 1 of the TeraPipe paper: 24 stages, 8 data shards, batch 128.

    python launch/multihost.py --config=configs/gpt3_1b.py --config.data.train=tokens.bin

The mesh needs 192 devices (docs/clusters.md). The paper measured 1.254 s a step with token slices
on V100s, which it does not state, and 1.517 s without (Li et al. 2021); by default slices are
planned. Its settings 2 and 3 have batch 72: --config.train.batch-size=72 --config.mesh.model=8 with
--config.mesh.data=2 --config.mesh.pipe=12, or with --config.mesh.data=1 --config.mesh.pipe=24;
whole sequences were best there, 0.913 s in setting 3.
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
            num_layers=24, d_model=2048, num_heads=16, vocab_size=50257, seq_len=2048
        ),
        mesh=MeshConfig(data=8, pipe=24, model=1),
        train=TrainConfig(num_steps=100_000, batch_size=128, eval_every=1000, sample_tokens=0),
        optim=OptimConfig(learning_rate=2e-4, warmup_steps=2000),
        data=DataConfig(train="tokens.bin"),
        checkpoint=CheckpointConfig(every=1000),
    )
