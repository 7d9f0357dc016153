"""Plans the slices of GPT3-1B on 24 stages from a formula of its latencies, without a device.

python examples/plan_only.py
"""

import numpy as np

import tpipe_jax
from tpipe_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from tpipe_jax.planning import LatencyTable

UNIT = 8  # tokens that slices are multiples of


def latencies(seq_len: int) -> LatencyTable:
    """Of one layer on a device that up to 256 tokens keep busy for as long as 256 do, seconds."""
    num_units = seq_len // UNIT
    tokens = UNIT * np.arange(1, num_units + 1)[:, None]
    context = UNIT * np.arange(num_units)[None, :]
    forward = 2.5e-6 * np.maximum(tokens, 256) + 4e-10 * tokens * (context + tokens / 2)
    forward = np.where(tokens + context <= seq_len, forward, np.inf)[None]  # one sequence at a time
    return LatencyTable(UNIT, forward, 2 * forward)


if __name__ == "__main__":
    model = ModelConfig(num_layers=24, d_model=2048, num_heads=16, vocab_size=50257, seq_len=8192)
    config = Config(model, MeshConfig(pipe=24), train=TrainConfig(batch_size=2))
    plan = tpipe_jax.plan(config, latencies(model.seq_len))
    print(f"batch slices {plan.batch_slices}, token slices of the first {plan.token_slices[0]}")
    assert plan.prediction is not None
    print(f"predicted step {1e3 * plan.prediction.step_seconds:.0f} ms")
