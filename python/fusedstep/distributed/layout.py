"""How the elements of all parameters are dealt out to the ranks.

The parameters of one dtype, one after the other, are its element space. It is cut into buckets, and
each bucket into one equal slice for each rank; the end of the last bucket is padding. Slices are
whole chunks of `CHUNK` elements, so that what is computed chunk by chunk does not depend on the
number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK = 256


@dataclass(frozen=True)
class Part:
    """Some elements of one parameter, and where they lie in a buffer."""

    param: int
    start: int
    stop: int
    offset: int

    @property
    def place(self) -> slice:
        return slice(self.offset, self.offset + self.stop - self.start)


@dataclass(frozen=True)
class Bucket:
    """A range of the element space that is communicated at once.

    Attributes
    ----------
    dtype : numpy.dtype
        Of its elements.
    first_chunk : int
        Number of its first chunk, counted over all dtypes.
    slice_size : int
        Elements of a rank's slice, padding included.
    parts : tuple of Part
        What it holds; offsets count from its start.
    """

    dtype: np.dtype[Any]
    first_chunk: int
    slice_size: int
    parts: tuple[Part, ...]

    def slice_parts(self, rank: int) -> Iterator[Part]:
        """Yield what the slice of `rank` holds; offsets count from the start of that slice."""
        begin, end = rank * self.slice_size, (rank + 1) * self.slice_size
        for part in self.parts:
            low = max(begin, part.offset)
            high = min(end, part.place.stop)
            if low < high:
                shift = part.start - part.offset
                yield Part(part.param, low + shift, high + shift, low - begin)

    def chunks(self, rank: int) -> slice:
        """Return the numbers of the chunks in the slice of `rank`."""
        count = self.slice_size // CHUNK
        first = self.first_chunk + rank * count
        return slice(first, first + count)


def cut(
    sizes: Sequence[int], dtypes: Sequence[np.dtype[Any]], ranks: int, bucket_bytes: int
) -> tuple[list[Bucket], int]:
    """Return the buckets of parameters with these sizes, and the number of chunks that are used.

    Only the padding lies in chunks of higher numbers.
    """
    buckets = []
    used = 0
    for dtype in dict.fromkeys(dtypes):
        members = [i for i, d in enumerate(dtypes) if d == dtype]
        starts = np.concatenate([[0], np.cumsum([sizes[i] for i in members])]).tolist()
        total = starts[-1]
        grain = ranks * CHUNK
        most = max(1, bucket_bytes // dtype.itemsize // grain) * grain
        for begin in range(0, total, most):
            size = min(most, -(-(total - begin) // grain) * grain)
            parts = []
            for i, start in zip(members, starts, strict=False):
                low, high = max(begin, start), min(begin + size, start + sizes[i])
                if low < high:
                    parts.append(Part(i, low - start, high - start, low - begin))
            buckets.append(Bucket(dtype, used + begin // CHUNK, size // ranks, tuple(parts)))
        used += -(-total // CHUNK)
    return buckets, used
