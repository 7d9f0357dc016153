"""A block of the user, and a run with it."""

from typing import Any

from support import runs
from tpipe_jax.config.settings import (
    AttentionConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
)

LLAMA = f"{runs.ROOT / 'examples/own_block.py'}:LlamaBlock"
T, B = 24, 2


def make_config(block: str, mesh: MeshConfig, is_apart: bool = False, **more: Any) -> Config:
    """Blocks of 4 keys; 2 layers and slices of one shape, so that programs are small."""
    return Config(
        ModelConfig(num_layers=2, d_model=16, num_heads=4, vocab_size=29, seq_len=T, block=block),
        mesh,
        PlanConfig("uniform:3", f"uniform:{B // mesh.data}"),
        TrainConfig(batch_size=B),
        data=DataConfig(cross_document_attention=not is_apart),
        attention=AttentionConfig(block=4),
        **more,
    )
