"""The mean loss over batches of different sizes."""

from typing import Any

import numpy as np
import pytest

from tpipe_jax.training.evaluation import mean_loss


def test_each_target_counts_once():
    losses = np.array([[1.0, 2.0, 6.0], [4.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    counts = [3, 1, 0]

    def loss(params: str, n: int) -> float:
        assert params == "params"
        return losses[n, : counts[n]].mean() if counts[n] else 5.0

    program: Any = loss
    mean, num_targets = mean_loss(program, "params", enumerate(counts))
    assert (mean, num_targets) == (pytest.approx((1 + 2 + 6 + 4) / 4), 4)


def test_nothing_to_predict_is_no_loss():
    program: Any = lambda *_: float("nan")  # noqa: E731
    assert mean_loss(program, None, []) == (0.0, 0)
