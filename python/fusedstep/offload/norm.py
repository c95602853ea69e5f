"""The global norm of gradients that were squared bucket by bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .boundary import Gradient


def norm_of(grads: Sequence[Gradient | None], sums: Sequence[NDArray[Any]]) -> float:
    """Return the norm of all gradients from the sums of the squares of their blocks.

    They are added in the order of csrc/core/norm.hpp.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        of_gradients = [
            sum_in_pairs(own) for grad, own in zip(grads, sums, strict=True) if grad and own.size
        ]
        return math.sqrt(sum_in_pairs(np.array(of_gradients)))


def sum_in_pairs(values: NDArray[Any]) -> float:
    """Add neighbours until one value is left."""
    while values.size > 1:
        rest = values[values.size // 2 * 2 :]
        values = np.concatenate([values[:-1:2] + values[1::2], rest])
    return float(values[0]) if values.size else 0.0
