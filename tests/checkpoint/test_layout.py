"""States on all kinds of meshes, taken apart into the model's arrays and put together again."""

from collections import Counter
from typing import Any

import chex
import jax
import numpy as np
import pytest
from jax.tree_util import keystr

from support.numbered_states import MODEL, abstract, numbered, state_on
from tpipe_jax.checkpoint.layout import fragments, restored
from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.training.health import Health
from tpipe_jax.training.state import TrainState

MESHES = [
    MeshConfig(1, 1, 1),
    MeshConfig(2, 2, 2),
    MeshConfig(1, 4, 2),
    MeshConfig(2, 3, 1),
    MeshConfig(8, 1, 1),
    MeshConfig(1, 8, 1),  # more stages than layers
    MeshConfig(1, 1, 4),
]


def gathered(state: TrainState, num_chunks: int = 1) -> dict[str, np.ndarray]:
    """The arrays of the model that the fragments make, each element exactly once."""
    arrays: dict[str, np.ndarray] = {}
    times: dict[str, np.ndarray] = {}
    for fragment in fragments(MODEL, state, num_chunks):
        whole = arrays.setdefault(fragment.name, np.zeros(fragment.shape, fragment.data.dtype))
        count = times.setdefault(fragment.name, np.zeros(fragment.shape, int))
        whole[fragment.index] = fragment.data
        count[fragment.index] += 1
        for i, n in zip(fragment.index, fragment.zarr_chunk, strict=True):
            assert i.start % n == 0  # a chunk of its own
            assert i.stop - i.start <= n
    for count in times.values():
        np.testing.assert_array_equal(count, 1)
    return arrays


def expected() -> dict[str, np.ndarray]:
    arrays = {"step": 7, "opt_state/1/0/count": 7, "opt_state/1/2/count": 7}
    arrays |= {f"loss_scale/{name}": 7 for name in ("value", "good_steps")}
    arrays |= {f"health/{name}": 7 for name in Health._fields}
    for path, leaf in jax.tree.leaves_with_path(numbered()):
        name = keystr(path, simple=True, separator="/")
        for prefix, factor in (("params", 1), ("opt_state/1/0/mu", 2), ("opt_state/1/0/nu", 3)):
            arrays[f"{prefix}/{name}"] = factor * leaf
    return {name: np.asarray(array) for name, array in arrays.items()}


@pytest.mark.parametrize("shard_state", [False, True])
@pytest.mark.parametrize("config", MESHES, ids=str)
def test_pieces_make_the_arrays_of_the_model(config: MeshConfig, shard_state: bool) -> None:
    got, want = gathered(state_on(config, shard_state)), expected()
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
        assert got[name].dtype == (array.dtype if array.ndim else got[name].dtype)


@pytest.mark.parametrize("num_chunks", [2, 3])
def test_pieces_of_stages_with_chunks_are_the_same(num_chunks: int) -> None:
    state = state_on(MeshConfig(2, 2, 2), num_chunks=num_chunks)
    got, want = gathered(state, num_chunks), expected()
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("config", MESHES, ids=str)
def test_a_state_is_restored_on_any_mesh(config: MeshConfig, num_chunks: int) -> None:
    arrays, (_, like) = expected(), abstract(config, num_chunks=num_chunks)
    asked: Counter[str] = Counter()

    def read(name: str, shape: tuple[int, ...], index: Any) -> np.ndarray:
        asked[name] += 1
        assert arrays[name].shape == shape
        return arrays[name][index]

    leaves, structure = jax.tree.flatten_with_path(like)
    got = jax.tree.unflatten(
        structure, [restored(MODEL, *leaf, read, num_chunks) for leaf in leaves]
    )
    want = state_on(config, num_chunks=num_chunks)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(want))
    assert jax.tree.map(lambda a: a.sharding, got) == jax.tree.map(lambda a: a.sharding, like)
    assert asked.keys() == arrays.keys()
