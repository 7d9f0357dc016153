"""Token files as other programs write them."""

import struct
from pathlib import Path

import numpy as np

TOKENS = np.arange(3, 1003) % 700


def megatron(path: Path, dtype: str, code: int, lengths: tuple[int, ...] = (300, 1, 699)) -> Path:
    """As `IndexedDatasetBuilder` of Megatron-LM writes it."""
    path.write_bytes(TOKENS.astype(dtype).tobytes())
    sizes = np.array(lengths, "<i4")
    starts = np.concatenate([[0], np.cumsum(sizes[:-1])]) * np.dtype(dtype).itemsize
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sizes)) + struct.pack("<Q", len(sizes) + 1)
    index += sizes.tobytes() + starts.astype("<i8").tobytes()
    index += np.arange(len(sizes) + 1, dtype="<i8").tobytes()
    path.with_suffix(".idx").write_bytes(index)
    return path
