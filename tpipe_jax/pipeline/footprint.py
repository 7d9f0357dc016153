"""Bytes that a stage keeps for each token, from the shapes of its buffers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from tpipe_jax.config.settings import Config
from tpipe_jax.devices.precision import compute_dtype
from tpipe_jax.pipeline.buffers import UNDIVIDED
from tpipe_jax.pipeline.build import deferral, empty_gradients_of, empty_saved_of


def activation_bytes_per_token(config: Config, mesh: Mesh) -> tuple[int, int]:
    """What is kept on a device for each token of a sequence in the pipeline, and besides for each
    of one that goes backward.
    """
    saved, gathered = _shapes(config, mesh, empty_saved_of), cache_bytes_per_token(config, mesh)[1]
    to_the_end = deferral(config) == "to the end"
    left = deferred_bytes_per_token(config, mesh) if to_the_end else 0
    return _bytes_per_token(config, mesh, saved) + left, gathered


def deferred_bytes_per_token(config: Config, mesh: Mesh) -> int:
    """Of a slice that waits for gradients of weights."""
    d_outputs = [d.d_outputs for d in _shapes(config, mesh, empty_gradients_of)]
    return _bytes_per_token(config, mesh, d_outputs)


def trunk_bytes_per_token(config: Config, mesh: Mesh) -> int:
    """What the stage is given, or makes of it."""
    return config.model.d_model * compute_dtype(config.precision, mesh).itemsize


def cache_bytes_per_token(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Of `activation_bytes_per_token`, what are keys, values and their gradients."""
    saved, gathered = (
        _bytes_per_token(config, mesh, [d.cache for d in _shapes(config, mesh, buffers)])
        for buffers in (empty_saved_of, empty_gradients_of)
    )
    return saved, gathered


def _shapes(config: Config, mesh: Mesh, buffers: Callable[..., list[Any]]) -> list[Any]:
    """Buffers for one sequence, without their memory."""
    return jax.eval_shape(partial(buffers, config, mesh, num_rows=1))


def _bytes_per_token(config: Config, mesh: Mesh, buffers: Any) -> int:
    """Bytes of buffers for one sequence, for one token on one device."""
    num_bytes = 0
    for path, a in jax.tree.leaves_with_path(buffers):
        is_whole = path[-1] in map(jax.tree_util.DictKey, UNDIVIDED)
        num_bytes += a.size * a.dtype.itemsize // (1 if is_whole else mesh.shape["model"])
    return num_bytes // config.model.seq_len
