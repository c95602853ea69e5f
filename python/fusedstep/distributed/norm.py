"""The global norm of sharded gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..gpu import to_host
from .engine import Engine
from .layout import CHUNK, Bucket


def global_norm(
    engine: Engine, buckets: Sequence[Bucket], slices: Iterable[Any], chunks: int
) -> float:
    """Return the Euclidean norm of all gradients, the same bits for any number of ranks.

    The squares of each chunk are summed in float64 by the rank that has it. The ranks exchange
    these sums, and each adds all of them up in one order.

    Parameters
    ----------
    engine : Engine
        Between the ranks.
    buckets : sequence of Bucket
        All of them.
    slices : iterable of array
        This rank's slice of the gradients of each bucket, with zeros for padding.
    chunks : int
        How many chunks are more than padding.

    Returns
    -------
    float
        Not finite if any gradient is not, or if the sum of the squares exceeds float64.
    """
    sums = np.zeros(chunks)
    with np.errstate(over="ignore", invalid="ignore"):
        for bucket, gradients in zip(buckets, slices, strict=True):
            squares = gradients.astype(np.float64).reshape(-1, CHUNK) ** 2
            own = to_host(squares.sum(axis=1))
            place = bucket.chunks(engine.rank)
            kept = sums[place]  # shorter than `own` where that ends in padding
            kept += own[: len(kept)]  # padding may reach into the next dtype: zeros there
        # A chunk's sum is zero on all ranks but one, so the order of this addition does not matter.
        engine.all_reduce(sums).wait()
        return float(np.sqrt(sums.sum()))
