"""Reads and writes the arrays of a checkpoint, as Zarr."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from tpipe_jax.checkpoint import manifest
from tpipe_jax.checkpoint.layout import ArrayShape, Fragment, Index, restored
from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.errors import UserError, brief

PyTree = Any

NUM_READERS = 8  # arrays that are read at the same time
NUM_WRITERS = 4  # chunks that are written at the same time


def restore(checkpoint: Path, model: ModelConfig, like: PyTree, num_chunks: int = 1) -> PyTree:
    """Returns a saved state, or a part of it, bitwise, in the shardings of `like`.

    Raises `UserError` if an array of it is missing or cannot be read.
    """
    open_array = cache(lambda name: open_zarr(checkpoint / name))

    def read(name: str, shape: ArrayShape, index: Index) -> np.ndarray:
        array = open_array(name)
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape} instead of {shape}")
        return array[index].read().result()

    leaves, structure = jax.tree.flatten_with_path(like)
    paths, likes = zip(*leaves, strict=True)
    try:
        with ThreadPoolExecutor(NUM_READERS) as pool:
            arrays = pool.map(
                lambda path, a: restored(model, path, a, read, num_chunks), paths, likes
            )
            return jax.tree.unflatten(structure, list(arrays))
    except (ValueError, OSError) as error:  # what TensorStore raises, whatever goes wrong
        raise UserError(
            f"the checkpoint in {checkpoint} cannot be read ({brief(error)}): move that folder "
            "away to continue from an older one, or start another run with --workdir."
        ) from error


def read_array(checkpoint: Path, name: str) -> np.ndarray:
    """Returns a whole array, by its name in the model's layout. Raises ValueError if it cannot."""
    return open_zarr(checkpoint / name).read().result()


def write_arrays(folder: Path, parts: Sequence[Fragment]) -> manifest.Digests:
    """Writes chunks of arrays as Zarr, and with the first chunk of an array its description.

    Returns the size and the SHA-256 of each file.
    """

    def write(part: Fragment) -> manifest.Digests:
        chunk = np.zeros(part.zarr_chunk, part.data.dtype)
        chunk[tuple(map(slice, part.data.shape))] = part.data  # a chunk at the end may need padding
        grid = [i.start // n for i, n in zip(part.index, part.zarr_chunk, strict=True)]
        contents = {f"{part.name}/{'.'.join(map(str, grid)) or '0'}": chunk.tobytes()}
        if not any(grid):
            contents[f"{part.name}/.zarray"] = _zarray(part)
        (folder / part.name).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            manifest.write_file(folder / name, content)
        return {name: (len(c), manifest.digest(c)) for name, c in contents.items()}

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        return {name: digest for one in pool.map(write, parts) for name, digest in one.items()}


def _zarray(part: Fragment) -> bytes:
    """Returns the description of an array, in version 2 of Zarr."""
    about = {
        "zarr_format": 2,
        "shape": part.shape,
        "chunks": part.zarr_chunk,
        "dtype": part.data.dtype.newbyteorder("<").str,
        "order": "C",
        "compressor": None,
        "filters": None,
        "fill_value": None,
    }
    return json.dumps(about).encode()


def open_zarr(path: Path) -> Any:
    """Opens an array's folder with TensorStore. Raises ValueError if it cannot."""
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path.absolute()}/"}}
    return ts.open({**spec, "fill_missing_data_reads": False}, read=True).result()
