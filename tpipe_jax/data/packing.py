"""Which documents share a sequence."""

import bisect
import heapq
from collections.abc import Sequence

Span = tuple[int, int]  # where it begins, and where it ends


def best_fit(pieces: Sequence[Span], size: int) -> list[list[Span]]:
    """Puts each piece, none longer than `size`, with those that leave the least room where it fits.

    Sequences are in the order of their first pieces, and pieces in the order given.
    """
    sequences: list[list[Span]] = []
    # The sequences that have so much room left, as a heap, and the amounts that some have.
    having: list[list[int]] = [[] for _ in range(size + 1)]
    amounts: list[int] = []
    for start, stop in pieces:
        length = stop - start
        found = bisect.bisect_left(amounts, length)
        if found < len(amounts):
            left = amounts[found]
            number = heapq.heappop(having[left])
            if not having[left]:
                amounts.pop(found)
        else:
            left, number = size, len(sequences)
            sequences.append([])
        sequences[number].append((start, stop))
        left -= length
        if left > 1:  # a single token has nothing to learn
            if not having[left]:
                bisect.insort(amounts, left)
            heapq.heappush(having[left], number)
    return sequences
