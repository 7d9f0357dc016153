"""Which documents share a sequence."""

import bisect
from collections.abc import Sequence

Piece = tuple[int, int]  # where it begins, and where it ends


def best_fit(pieces: Sequence[Piece], size: int) -> list[list[Piece]]:
    """Puts each piece, none longer than `size`, with those that leave the least room where it fits.

    Sequences are in the order of their first pieces, and pieces in the order given.
    """
    sequences: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # that some sequence has left, and its number, ascending
    for start, stop in pieces:
        length = stop - start
        found = bisect.bisect_left(room, (length, 0))
        if found < len(room):
            left, number = room.pop(found)
        else:
            left, number = size, len(sequences)
            sequences.append([])
        sequences[number].append((start, stop))
        if left > length + 1:  # a single token has nothing to learn
            bisect.insort(room, (left - length, number))
    return sequences
