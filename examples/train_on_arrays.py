"""Trains on arrays of your own, in a loop of your own, and on two stages in four slices.

python examples/train_on_arrays.py
"""

from collections.abc import Iterator

import numpy as np

import tpipe_jax
from tpipe_jax.config import Config, MeshConfig, ModelConfig, OptimConfig, PlanConfig, TrainConfig

MODULUS = 97


def batches(batch_size: int, seq_len: int) -> Iterator[np.ndarray]:
    """Sequences in which each token is the sum of the two before it, modulo 97: `[B, T + 1]`."""
    random = np.random.default_rng(0)
    while True:
        rows = np.empty((batch_size, seq_len + 1), np.int32)
        rows[:, :2] = random.integers(0, MODULUS, (batch_size, 2))
        for t in range(2, seq_len + 1):
            rows[:, t] = (rows[:, t - 1] + rows[:, t - 2]) % MODULUS
        yield rows


def main(num_steps: int = 400) -> float:
    """The last loss, nats per token."""
    config = Config(
        model=ModelConfig(num_layers=2, d_model=64, num_heads=4, vocab_size=MODULUS, seq_len=32),
        mesh=MeshConfig(pipe=2),
        plan=PlanConfig(token_slices="uniform:4", batch_slices="uniform:1"),
        train=TrainConfig(num_steps=num_steps, batch_size=64),
        optim=OptimConfig(learning_rate=3e-3),
    )
    step = tpipe_jax.make_train_step(config)
    state, loss = step.init(), np.nan
    data = batches(config.train.batch_size, config.model.seq_len)
    for n, rows in zip(range(1, num_steps + 1), data, strict=False):
        state, metrics = step(state, rows)
        if n % 100 == 0 or n == num_steps:
            loss = float(metrics["loss"])  # waits for the step
            print(f"step {n}: loss {loss:.3f} nats per token")
    return loss


if __name__ == "__main__":
    main()
