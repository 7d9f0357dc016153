"""How attention divides a slice and its context into blocks: what it reads, in plain numbers."""

from collections.abc import Iterator

import numpy as np

# Keys, and about as many queries, of one block of scores: the fastest of 64 to 512 on a CPU.
BLOCK = 128


def query_block(num_queries: int, block: int = BLOCK) -> int:
    """Queries of a block; the last one of a slice may have fewer.

    A size that divides the slice is preferred where one is near `block`, since a last block of
    another size is compiled anew.
    """
    near = range(min(num_queries, block * 3 // 2), block // 2, -1)
    divisors = [size for size in near if num_queries % size == 0]
    return min(divisors, key=lambda size: abs(size - block), default=min(num_queries, block))


def context_read(num_tokens: np.ndarray, context: np.ndarray, key_block: int) -> np.ndarray:
    """Keys that a query of a slice reads more because of the context, on the average of a slice.

    Each block of queries reads what lies before it in whole blocks of keys, so a few tokens of
    context may cost a whole block, or nothing where one was read in part.
    """
    lengths, contexts = np.broadcast_arrays(num_tokens, context)
    result = np.empty(lengths.size)
    for length, where in _groups(lengths.ravel()):
        size = query_block(int(length), key_block)
        starts = np.arange(0, length, size)
        shares = np.minimum(size, length - starts) / length
        with_context = -(-(contexts.ravel()[where, None] + starts) // key_block)
        result[where] = key_block * ((with_context - -(-starts // key_block)) @ shares)
    return result.reshape(lengths.shape)


def _groups(values: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    """Each distinct value, and the indices where it is."""
    order = np.argsort(values, kind="stable")
    distinct, first = np.unique(values[order], return_index=True)
    return zip(distinct, np.split(order, first)[1:], strict=True)
