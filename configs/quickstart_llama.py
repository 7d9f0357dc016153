"""A small byte-level Llama on two pipeline stages, for a laptop with two cores.

    python launch/multihost.py --config=quickstart_llama

As `quickstart.py`, with Llama's block: rotary positions, RMSNorm, SwiGLU and grouped queries. Its
600 steps take about two minutes with planning and compiling, and reach a held-out loss of 2.04 nats
a byte.
"""

from tpipe_jax.config import (
    CheckpointConfig,
    Config,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            family="llama",
            num_layers=4,
            d_model=128,
            num_heads=4,
            num_kv_heads=2,
            vocab_size=256,
            seq_len=1024,
        ),
        mesh=MeshConfig(data=1, pipe=2, model=1),
        train=TrainConfig(
            num_steps=600,
            batch_size=1,
            init="local",
            log_every=10,
            eval_every=100,
            eval_batches=16,
            compare_steps=10,
            trace_step=20,
        ),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=100),
        checkpoint=CheckpointConfig(every=200),
    )
