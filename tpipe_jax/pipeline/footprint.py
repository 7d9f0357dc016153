"""Bytes that a stage stores for each token, computed from the shapes of its buffers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from tpipe_jax.pipeline.buffers import UNDIVIDED, Saved
from tpipe_jax.pipeline.build import gradients_of, packing_of, saved_of
from tpipe_jax.pipeline.spec import StageSpec


def activation_bytes_per_token(spec: StageSpec) -> tuple[int, int]:
    """Returns two numbers, bytes per token on a device: the memory of a sequence in the pipeline,
    and the additional memory while it goes backward.
    """
    saved, gathered = cache_bytes_per_token(spec)
    if not spec.config.memory.offload:
        saved += _values_bytes_per_token(spec)
    left = deferred_bytes_per_token(spec) if spec.weight_grads == "at the end" else 0
    return saved + left, gathered


def host_bytes_per_token(spec: StageSpec) -> int:
    """Bytes for each token of a sequence in the pipeline that a device keeps on its host."""
    return _values_bytes_per_token(spec) if spec.config.memory.offload else 0


def deferred_bytes_per_token(spec: StageSpec) -> int:
    """Bytes for each token of a slice whose gradients of weights are still to be computed."""
    return _bytes_per_token(spec, [d.d_outputs for d in _shapes(spec, gradients_of)])


def trunk_bytes_per_token(spec: StageSpec) -> int:
    """Bytes for each token of the buffer that holds the input of a stage, then its output."""
    return spec.config.model.d_model * spec.dtype.itemsize


def cache_bytes_per_token(spec: StageSpec) -> tuple[int, int]:
    """The share of attention caches in both numbers of `activation_bytes_per_token`, in bytes: keys
    and values in the first, their gradients in the second.
    """
    saved, gathered = (
        _bytes_per_token(spec, [d.cache for d in _shapes(spec, buffers)])
        for buffers in (_saved_of, gradients_of)
    )
    return saved, gathered


def _values_bytes_per_token(spec: StageSpec) -> int:
    return _bytes_per_token(spec, [saved.values for saved in _shapes(spec, _saved_of)])


def _shapes(spec: StageSpec, buffers: Callable[..., list[Any]]) -> list[Any]:
    """The shapes of the buffers for one sequence; no memory is allocated."""
    return jax.eval_shape(partial(buffers, spec, num_rows=1))


def _saved_of(spec: StageSpec, num_rows: int) -> list[Saved]:
    return saved_of(spec, packing_of(spec, spec.config.model.seq_len), num_rows)


def _bytes_per_token(spec: StageSpec, buffers: Any) -> int:
    """Bytes on one device for each token, from the buffers for one sequence."""
    num_bytes = 0
    for path, a in jax.tree.leaves_with_path(buffers):
        is_whole = path[-1] in map(jax.tree_util.DictKey, UNDIVIDED)
        num_bytes += a.size * a.dtype.itemsize // (1 if is_whole else spec.mesh.shape["model"])
    return num_bytes // spec.config.model.seq_len
