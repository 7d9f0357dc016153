"""How attention divides a slice and its context into blocks: what it reads, in plain numbers."""

from collections.abc import Iterator

import numpy as np

# Keys in one block of scores, and about as many queries: the fastest size from 64 to 512 on a CPU.
BLOCK = 128


def query_block(num_queries: int, block: int = BLOCK) -> int:
    """Returns the number of queries in a block; the last block of a slice may have fewer.

    It prefers a size near `block` that divides the slice, since a last block of another size would
    have to be compiled too.
    """
    near = range(min(num_queries, block * 3 // 2), block // 2, -1)
    divisors = [size for size in near if num_queries % size == 0]
    return min(divisors, key=lambda size: abs(size - block), default=min(num_queries, block))


def context_read(num_tokens: np.ndarray, context: np.ndarray, key_block: int) -> np.ndarray:
    """Returns how many keys more a query reads than without the context: the average over a slice.

    Each block of queries reads the keys before it in whole blocks. So a few tokens of context may
    cost a whole block of keys, or nothing if that block is read for other keys anyway.
    """
    lengths, contexts = np.broadcast_arrays(num_tokens, context)
    result = np.empty(lengths.size)
    for length, where in _groups(lengths.ravel()):
        size = query_block(int(length), key_block)
        starts = np.arange(0, length, size)
        shares = np.minimum(size, length - starts) / length
        whole, rest = np.divmod(contexts.ravel()[where], key_block)
        rests, of_context = np.unique(
            rest, return_inverse=True
        )  # few, where slices are whole units
        with_rest = -(-(rests[:, None] + starts) // key_block)
        added = (with_rest - -(-starts // key_block)) @ shares
        result[where] = key_block * (whole + added[of_context])
    return result.reshape(lengths.shape)


def _groups(values: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    """Yields each distinct value, and the indices at which it occurs."""
    order = np.argsort(values, kind="stable")
    distinct, first = np.unique(values[order], return_index=True)
    return zip(distinct, np.split(order, first)[1:], strict=True)
