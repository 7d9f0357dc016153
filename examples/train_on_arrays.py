"""Trains on arrays of your own, in a loop of your own, and on two stages in four slices.

python examples/train_on_arrays.py
"""

from collections.abc import Iterator

import numpy as np

import tpipe_jax
from tpipe_jax.config import Config, MeshConfig, ModelConfig, OptimConfig, PlanConfig, TrainConfig

MODULUS = 97


def batches(batch_size: int, seq_len: int) -> Iterator[np.ndarray]:
    """Sequences that grow by 1, 2 or 3 from token to token, modulo 97: `[B, T + 1]`."""
    random = np.random.default_rng(0)
    while True:
        start = random.integers(0, MODULUS, (batch_size, 1))
        yield (start + random.integers(1, 4, (batch_size, seq_len + 1)).cumsum(1)) % MODULUS


def main(num_steps: int = 200) -> None:
    config = Config(
        model=ModelConfig(num_layers=2, d_model=64, num_heads=4, vocab_size=MODULUS, seq_len=32),
        mesh=MeshConfig(pipe=2),
        plan=PlanConfig(token_slices="uniform:4", batch_slices="uniform:1"),
        train=TrainConfig(num_steps=num_steps, batch_size=64),
        optim=OptimConfig(learning_rate=3e-3),
    )
    step = tpipe_jax.make_train_step(config)
    state = step.init()
    data = batches(config.train.batch_size, config.model.seq_len)
    for n, rows in zip(range(1, num_steps + 1), data, strict=False):
        state, metrics = step(state, rows)
        if n % 50 == 0:
            print(f"step {n}: loss {metrics['loss']:.3f} nats per token")
    print(f"no model can be better than {np.log(3):.3f}")


if __name__ == "__main__":
    main()
