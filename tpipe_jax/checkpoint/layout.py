"""A state's arrays as the model has them, whatever mesh they lie on.

On a mesh, each array of block n is `[P, ...]`. Row p is the layer in the nth place of stage p. The
row is zero if stage p has no layer there. Which layer is in which place depends on the number of
chunks of each stage (`placement`). The token embedding has rows of padding
(`sharding.param_specs`). In the model, each layer has its own arrays, under its own number, and the
embedding has no padding.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.tree_util import DictKey, KeyPath, SequenceKey

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.planning.placement import stage_layers

ArrayShape = tuple[int, ...]
Index = tuple[slice, ...]  # with start and stop


# Tables with a row for each token, which are padded on a mesh.
TABLES = (DictKey("embed"), DictKey("tokens")), (DictKey("head"), DictKey("table"))

NUM_COPIERS = 4  # shards that are copied to the host at the same time: training waits for it


class Fragment(NamedTuple):
    """A part of an array of the model, on this process's host."""

    name: str
    """The name of the whole array, as `params/blocks/3/ff_in/kernel`."""
    shape: ArrayShape
    """The shape of the whole array."""
    zarr_chunk: ArrayShape
    """The shape of every fragment of the array; those at its end may be smaller."""
    index: Index
    """Where in the whole array this part lies."""
    data: np.ndarray


def arrays(
    config: ModelConfig, state: Any, num_chunks: int = 1
) -> Iterator[tuple[str, ArrayShape, np.dtype]]:
    """Yields name, shape and type of each array of the model in a state, which may be abstract."""
    for path, array in jax.tree.leaves_with_path(state):
        whole = tuple(slice(0, n) for n in array.shape)
        for name, shape, _, _ in _Leaf(config, path, array.shape, num_chunks).parts(whole):
            yield name, shape, array.dtype


def fragments(config: ModelConfig, state: Any, num_chunks: int = 1) -> Iterator[Fragment]:
    """Yields copies of all parts of a state that this process has. All processes together yield
    each part once.
    """
    own = [
        (path, array, shard)
        for path, array in jax.tree.leaves_with_path(state)
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]
    for _, _, shard in own:
        shard.data.copy_to_host_async()
    with ThreadPoolExecutor(NUM_COPIERS) as pool:
        copies = pool.map(_copy, (shard for _, _, shard in own))
        for (path, array, shard), data in zip(own, copies, strict=True):
            leaf = _Leaf(config, path, array.shape, num_chunks)
            yield from leaf.to_model(_bounded(shard.index, array.shape), data)


def _copy(shard: jax.Shard) -> np.ndarray:
    """Returns a shard's data on the host. On a CPU, without a copy, it would be a view of the
    buffer. XLA could then not reuse a donated buffer, and would copy it.
    """
    return np.array(shard.data, copy=shard.device.platform == "cpu" or None)


def restored(
    config: ModelConfig,
    path: KeyPath,
    like: jax.ShapeDtypeStruct,
    read: Callable[[str, ArrayShape, Index], np.ndarray],
    num_chunks: int = 1,
) -> Array:
    """Reads an array of the state, in the sharding of `like`.

    `read(name, shape, index)` returns a region of an array of the model.
    """
    leaf = _Leaf(config, path, like.shape, num_chunks)

    @cache  # since several devices may have the same part
    def part(*bounds: tuple[int, int]) -> np.ndarray:
        index = tuple(slice(*b) for b in bounds)
        data = np.zeros([i.stop - i.start for i in index], like.dtype)
        for name, shape, of_model, of_part in leaf.parts(index):
            data[of_part] = read(name, shape, of_model)
        return data

    def part_at(index: Index | None) -> np.ndarray:
        return part(*((i.start, i.stop) for i in _bounded(index or (), like.shape)))

    return jax.make_array_from_callback(like.shape, like.sharding, part_at, dtype=like.dtype)


class _Leaf:
    """An array of the state on a mesh, and the arrays of the model that it is made of."""

    def __init__(
        self, config: ModelConfig, path: KeyPath, shape: ArrayShape, num_chunks: int
    ) -> None:
        self._path, self._shape = path, shape
        self._vocab_size = config.vocab_size
        at = [i for i, key in enumerate(path[:-1]) if key == DictKey("blocks")]
        # Where in the path the place of a layer in its stage stands.
        self._place = at[0] + 1 if at else None
        if self._place is not None:
            layers = stage_layers(config.num_layers, shape[0], num_chunks)
            self._layers: list[int] = layers[path[self._place].idx].tolist()
        self._is_vocabulary = path[-2:] in TABLES

    def parts(self, bounds: Index) -> Iterator[tuple[str, ArrayShape, Index, Index]]:
        """Yields the model's arrays that overlap a region of this array. For each: name, shape, the
        overlap's place in the model's array, and its place in the region.
        """
        if self._place is not None:
            for stage in range(bounds[0].start, bounds[0].stop):
                layer = self._layers[stage]
                if layer >= 0:
                    here = (slice(stage - bounds[0].start, stage - bounds[0].start + 1),)
                    yield self._name(layer), self._shape[1:], bounds[1:], here
        elif self._is_vocabulary:
            first, stop = bounds[0].start, min(bounds[0].stop, self._vocab_size)
            if first < stop:
                shape = self._vocab_size, *self._shape[1:]
                yield self._name(), shape, (slice(first, stop), *bounds[1:]), (slice(stop - first),)
        else:
            yield self._name(), self._shape, bounds, ()

    def to_model(self, bounds: Index, data: np.ndarray) -> Iterator[Fragment]:
        """Yields a shard as parts of the model's arrays."""
        chunk = data.shape if self._place is None else data.shape[1:]
        for name, shape, index, here in self.parts(bounds):
            own = data[here]
            yield Fragment(name, shape, chunk, index, own if self._place is None else own[0])

    def _name(self, layer: int | None = None) -> str:
        path = list(self._path)
        if layer is not None:
            assert self._place is not None
            path[self._place] = SequenceKey(layer)
        return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _bounded(index: Index, shape: ArrayShape) -> Index:
    """Returns the index with all its bounds given."""
    return tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, shape, strict=True))
