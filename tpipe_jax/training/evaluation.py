"""The mean loss of a model over batches."""

from collections.abc import Iterable

from jax import Array
from jax.stages import Compiled

from tpipe_jax.model.block import Params


def mean_loss(
    loss: Compiled, params: Params, batches: Iterable[tuple[Array, int]]
) -> tuple[float, int]:
    """Returns the mean loss of all targets, nats per token, and the number of targets.

    `batches` are rows on the mesh, each with its number of targets that count. `loss` is compiled
    from `step.make_loss`. The mean loss is 0 if there is no target.
    """
    total, num_targets = 0.0, 0
    for rows, count in batches:
        total += count * float(loss(params, rows))
        num_targets += count
    return total / max(num_targets, 1), num_targets
