"""Reads and writes the arrays of a checkpoint, as Zarr."""

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from tpipe_jax.checkpoint import manifest
from tpipe_jax.checkpoint.described import ZARRAY
from tpipe_jax.checkpoint.layout import ArrayShape, Fragment, Index, restored
from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.errors import UserError, brief, shown
from tpipe_jax.json_files import read_json

PyTree = Any

NUM_READERS = 8  # arrays that are read at the same time
NUM_WRITERS = 4  # chunks that are written at the same time


def restore(checkpoint: Path, model: ModelConfig, like: PyTree, num_chunks: int = 1) -> PyTree:
    """Returns a saved state, or a part of it, bitwise, in the shardings of `like`.

    Raises `UserError` if an array of it is missing or cannot be read.
    """
    open_array = cache(lambda *about: _open_zarr(checkpoint, *about))

    def read(dtype: np.dtype, name: str, shape: ArrayShape, index: Index) -> np.ndarray:
        return open_array(name, shape, dtype)[index].read().result()

    leaves, structure = jax.tree.flatten_with_path(like)
    paths, likes = zip(*leaves, strict=True)
    try:
        with ThreadPoolExecutor(NUM_READERS) as pool:
            arrays = pool.map(
                lambda path, a: restored(
                    model, path, a, partial(read, np.dtype(a.dtype)), num_chunks
                ),
                *(paths, likes),
            )
            return jax.tree.unflatten(structure, list(arrays))
    except (ValueError, OSError) as error:  # what TensorStore raises, whatever goes wrong
        raise UserError(
            f"the checkpoint in {checkpoint} cannot be read ({brief(error)}): move that folder "
            "away to continue from an older one, or start another run with --workdir."
        ) from error


def read_array(checkpoint: Path, name: str, shape: ArrayShape) -> np.ndarray:
    """Returns a whole parameter, by its name in the model's layout. Raises ValueError or OSError if
    it cannot be read.
    """
    return _open_zarr(checkpoint, name, shape, np.dtype(np.float32)).read().result()


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
            about = _about(part.shape, part.zarr_chunk, part.data.dtype)
            contents[f"{part.name}/{ZARRAY}"] = json.dumps(about).encode()
        (folder / part.name).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            manifest.write_file(folder / name, content)
        return {name: (len(c), manifest.digest(c)) for name, c in contents.items()}

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        return {name: digest for one in pool.map(write, parts) for name, digest in one.items()}


def _about(shape: ArrayShape, zarr_chunk: ArrayShape, dtype: np.dtype) -> dict[str, Any]:
    """Returns the description of an array, in version 2 of Zarr."""
    return {
        "zarr_format": 2,
        "shape": shape,
        "chunks": zarr_chunk,
        "dtype": dtype.newbyteorder("<").str,
        "order": "C",
        "compressor": None,
        "filters": None,
        "fill_value": None,
    }


def _open_zarr(checkpoint: Path, name: str, shape: ArrayShape, dtype: np.dtype) -> Any:
    """Opens an array with TensorStore. Raises ValueError or OSError if it cannot, or if the array
    is not as this package writes one.
    """
    path = checkpoint / name
    _check_as_written(path, name, shape, dtype)
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path.absolute()}/"}}
    return ts.open({**spec, "fill_missing_data_reads": False}, read=True).result()


def _check_as_written(path: Path, name: str, shape: ArrayShape, dtype: np.dtype) -> None:
    """Raises ValueError if the description of an array is not one that `write_arrays` writes, or if
    a chunk has another size than it says.

    TensorStore takes memory for what a description says, and a stranger may have written that.
    """
    found = read_json(path / ZARRAY)
    if not isinstance(found, dict):
        raise ValueError(f"{name}/{ZARRAY} is no object")
    chunk = found.get("chunks")
    if not isinstance(chunk, list) or not all(type(n) is int and n > 0 for n in chunk):
        raise ValueError(f"{name}/{ZARRAY} has no chunks")
    known = _about(shape, tuple(chunk), dtype) | {"dimension_separator": "."}
    found = {"dimension_separator": "."} | found  # it is written by older versions only
    for key in known | found:
        ours, theirs = (
            json.dumps(about[key]) if key in about else "nothing" for about in (known, found)
        )
        if ours != theirs:
            raise ValueError(f"{name} has {shown(key)} {shown(theirs)} instead of {ours}")
    if len(chunk) != len(shape):
        raise ValueError(f"{name} has chunks of {len(chunk)} axes instead of {len(shape)}")
    size = math.prod(chunk) * dtype.itemsize
    sizes = [file.stat().st_size for file in os.scandir(path) if file.name != ZARRAY]
    if any(other != size for other in sizes):
        raise ValueError(f"{name} has chunks of other sizes than {ZARRAY} says")
    if len(sizes) != math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True)):
        raise ValueError(f"{name} has {len(sizes)} chunks, not as many as {ZARRAY} says")
