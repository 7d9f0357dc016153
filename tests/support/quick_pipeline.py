"""A model and parameters for tests of whole pipelines."""

from functools import partial
from typing import Any

import jax
import numpy as np

from tpipe_jax.config.settings import (
    ModelConfig,
)
from tpipe_jax.model import transformer

Params = Any  # nested dictionaries and lists of arrays

# Float32 rounds to 6e-8, and errors grow along layers and sums over tokens: 1e-6 is seen.
TOLERANCE = 1e-5


def draw_params(config: ModelConfig) -> Params:
    """Parameters large enough for biases, norms and attention to matter."""
    random = np.random.default_rng(1)

    def draw(path: jax.tree_util.KeyPath, a: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1 if jax.tree_util.keystr(path).endswith("['scale']") else 0
        return random.normal(mean, 0.2, a.shape).astype(a.dtype)

    shapes = jax.eval_shape(partial(transformer.init, config), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


# Machine code that is not optimised takes half the time to compile; the program is the same.
QUICK = {"xla_backend_optimization_level": 0}
