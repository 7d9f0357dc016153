"""Chooses which documents share a sequence."""

import bisect
import heapq
from collections.abc import Sequence

Span = tuple[int, int]  # its first token, and the one after its last


def best_fit(pieces: Sequence[Span], size: int) -> list[list[Span]]:
    """Packs pieces, none longer than `size`, into sequences.

    Each piece goes to the fullest sequence that still has room for it. If there is none, it begins
    a new one. Sequences are in the order of their first pieces, and pieces in the order given.
    """
    sequences: list[list[Span]] = []
    # having[n] is a heap of the sequences with room for n tokens; `amounts` lists, ascending, the
    # n of heaps that are not empty.
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
