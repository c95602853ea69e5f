"""How the parameters' memory is cut into buckets.

The parameters lie one after the other in a copy in host memory, the last one first, since that is
the order in which a backward pass has their gradients ready. A bucket is a range of this copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A parameter is cut at multiples of this number of elements: the blocks in which the squares of a
# gradient are summed (csrc/core/norm.hpp).
BLOCK = 4096
CACHE_LINE = 64


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of parameter `param`, in host memory from byte `offset` on."""

    param: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Bucket:
    """Pieces that are copied and updated together: bytes `begin` to `end` of host memory."""

    begin: int
    end: int
    pieces: tuple[Piece, ...]


def aligned(size: int) -> int:
    """Return a number of bytes, rounded up to whole cache lines."""
    return -(-size // CACHE_LINE) * CACHE_LINE


def places(sizes: Sequence[int], itemsizes: Sequence[int]) -> tuple[list[int], int]:
    """Return where each parameter begins, in bytes, and the size of all of them."""
    offsets = [0] * len(sizes)
    end = 0
    for i in reversed(range(len(sizes))):
        offsets[i] = end
        end += aligned(sizes[i] * itemsizes[i])
    return offsets, end


def cut(
    sizes: Sequence[int], itemsizes: Sequence[int], whole: Sequence[bool], bucket_bytes: int
) -> list[Bucket]:
    """Return the buckets of parameters with these sizes, in elements and bytes of an element.

    No bucket is larger than `bucket_bytes`, but for one with a single block of a parameter, or with
    a single parameter that must stay whole.
    """
    offsets, _ = places(sizes, itemsizes)
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    begin = end = 0

    def close() -> None:
        if pieces:
            buckets.append(Bucket(begin, end, tuple(pieces)))
            pieces.clear()

    for i in reversed(range(len(sizes))):
        start = 0
        while start < sizes[i]:
            offset = offsets[i] + start * itemsizes[i]
            if not pieces:
                begin = offset
            most = (begin + bucket_bytes - offset) // itemsizes[i]
            count = sizes[i] - start
            if count > most:
                count = 0 if whole[i] else most // BLOCK * BLOCK
            if count <= 0:
                if pieces:
                    close()
                    continue
                count = sizes[i] if whole[i] else min(BLOCK, sizes[i] - start)
            pieces.append(Piece(i, start, start + count, offset))
            start += count
            end = offset + count * itemsizes[i]
    close()
    return buckets
