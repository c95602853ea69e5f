"""Steps that are counted in a GPU's memory, for parameters that PyTorch holds."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import gpu


class StepCount:
    """The number of steps that some parameters have taken together.

    Parameters
    ----------
    params : sequence of tensors
        On one GPU.
    words : int
        The size of what the native optimizer keeps of them there, its own count first.
    start : int or StepCount
        The steps that they have taken so far, or what has counted them.
    in_state : bool
        Whether the state of each has the number as well.
    """

    def __init__(
        self, params: Sequence[Any], words: int, start: int | StepCount, in_state: bool
    ) -> None:
        self.params = list(params)
        self.group_state = gpu.zeros(words, np.dtype(np.int64), params[0])
        # One float32 for each parameter, as PyTorch has it.
        self.vector = gpu.zeros(len(params) if in_state else 0, np.dtype(np.float32), params[0])
        self._steps = {id(p): self.vector[i] for i, p in enumerate(params)} if in_state else {}
        if isinstance(start, StepCount):  # from there to here, without a look at it
            self.group_state[:1].copy_(start.group_state[:1])
            self.vector.copy_(start.vector[:1].expand_as(self.vector))
        else:
            self.group_state[:1].fill_(start)
            self.vector.fill_(start)

    def is_of(self, params: Sequence[Any]) -> bool:
        """Whether these are all of its parameters, in their order."""
        return len(params) == len(self.params) and all(map(operator.is_, params, self.params))

    def step_of(self, param: Any) -> Any:
        """Return the number as a parameter's state has it, or None."""
        return self._steps.get(id(param))
