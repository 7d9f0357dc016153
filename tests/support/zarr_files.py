"""Reads the arrays of a checkpoint as docs/checkpoints.md says they are, with numpy alone."""

import itertools
import json
from pathlib import Path

import numpy as np


def read_array(folder: Path) -> np.ndarray:
    about = json.loads((folder / ".zarray").read_text())
    assert (about["zarr_format"], about["order"], about["compressor"]) == (2, "C", None)
    shape, chunk = about["shape"], about["chunks"]
    result = np.full(shape, 99, about["dtype"])  # no file may be missing
    counts = [-(-n // c) for n, c in zip(shape, chunk, strict=True)]
    for grid in itertools.product(*map(range, counts)):
        data = np.fromfile(folder / (".".join(map(str, grid)) or "0"), about["dtype"])
        starts = [g * c for g, c in zip(grid, chunk, strict=True)]
        where = tuple(slice(s, s + c) for s, c in zip(starts, chunk, strict=True))
        result[where] = data.reshape(chunk)[tuple(map(slice, result[where].shape))]
    return result


def read_all(checkpoint: Path) -> dict[str, np.ndarray]:
    """All arrays, by name."""
    folders = sorted(path.parent for path in checkpoint.rglob(".zarray"))
    return {folder.relative_to(checkpoint).as_posix(): read_array(folder) for folder in folders}
