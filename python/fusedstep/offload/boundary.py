"""What an offloaded optimizer is given, taken apart and checked before anything is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import _core
from ..distributed import boundary
from .device import Device, device_of, dtype_of, kind_of, library_of


class Gradient(NamedTuple):
    """A gradient as it is copied: the bytes, in the order of its parameter's memory."""

    memory: Any
    dtype: np.dtype[Any]


class Parameters(boundary.Parameters):
    """The parameters of an optimizer, and what they were when it was made.

    Attributes
    ----------
    device : Device
        Where they live.
    memory : list of array
        The bytes of each, as they are now.
    dtypes, shapes, sizes : list
        Of each.
    The others are those of sharded optimizers.

    Raises
    ------
    TypeError, ValueError
        As the ordinary optimizer; they are not all on one device; the memory of one has gaps.
    """

    def __init__(self, params: Any, device: Device | None) -> None:
        self._read_groups(params)
        self.dtypes = [self._checked_dtype(i) for i in range(len(self.arrays))]
        self.shapes = [tuple(array.shape) for array in self.arrays]
        self.sizes = [int(np.prod(shape, dtype=np.int64)) for shape in self.shapes]
        self.device = device or device_of(self.arrays[0])
        self._places: list[Any] = []
        self.read_memory()

    def _checked_dtype(self, i: int) -> np.dtype[Any]:
        array, name = self.arrays[i], f"params{self.suffixes[i]}"
        if library_of(array) not in ("numpy", "cupy", "torch"):
            raise TypeError(
                f"{name}: expected a NumPy array, a CuPy array or a PyTorch tensor, got "
                f"{kind_of(array)}"
            )
        first = self.arrays[0]
        if library_of(array) != library_of(first):
            raise TypeError(f"{name}: {kind_of(array)}, but the first one is {kind_of(first)}")
        if _device_of(array) != _device_of(first):
            raise ValueError(
                f"{name}: on {_device_of(array)}, but the first one is on {_device_of(first)}; an "
                "optimizer is for one device"
            )
        if getattr(array, "is_nested", False):
            raise TypeError(f"{name}: a nested tensor; only dense (strided) tensors can be stepped")
        if isinstance(array, np.ndarray):
            _core.check_parameter(array, self.suffixes[i])
        try:
            dtype = dtype_of(array)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error
        return dtype

    def read_memory(self) -> None:
        """Find the parameters where they are now: PyTorch's may have been given other memory."""
        places = [_place_of_tensor(array) for array in self.arrays]
        if places == self._places:
            return
        self._places = []
        self.memory = []
        for i, array in enumerate(self.arrays):
            name = f"params{self.suffixes[i]}"
            if tuple(array.shape) != self.shapes[i] or dtype_of(array) != self.dtypes[i]:
                raise ValueError(
                    f"{name}: {array.dtype} of shape {tuple(array.shape)}, but it was "
                    f"{self.dtypes[i]} of shape {self.shapes[i]} when the optimizer was made"
                )
            self.memory.append(self._memory(array, array, name))
        self._spans = boundary.Spans(self.memory, self.suffixes)
        self._places = places

    def as_copied(self, grads: Sequence[Any]) -> list[Gradient | None]:
        """Return a gradient for each parameter, or None, as they are copied."""
        return [None if g is None else self._flat_grad(i, g) for i, g in enumerate(grads)]

    def _memory(self, array: Any, like: Any, name: str) -> Any:
        try:
            return self.device.memory(array, like)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _flat_grad(self, i: int, grad: Any) -> Gradient:
        """Check a gradient and return it as it is copied."""
        if isinstance(grad, np.ndarray):  # a matrix cannot be made flat
            grad = np.asarray(grad)
        param, name = self.arrays[i], f"grads{self.suffixes[i]}"
        if library_of(grad) != library_of(param):
            raise TypeError(
                f"{name}: expected {kind_of(param)}, as its parameter, got {kind_of(grad)}"
            )
        if _device_of(grad) != _device_of(param):
            raise ValueError(
                f"{name}: on {_device_of(grad)}, but its parameter is on {_device_of(param)}"
            )
        allowed = (
            ("float64",) if self.dtypes[i] == np.float64 else ("float32", "bfloat16", "float16")
        )
        if str(grad.dtype).removeprefix("torch.") not in allowed:
            raise TypeError(
                f"{name}: {grad.dtype}, but its parameter is {param.dtype}; "
                f"{' or '.join(allowed)} expected"
            )
        if tuple(grad.shape) != self.shapes[i]:
            raise ValueError(
                f"{name}: shape {tuple(grad.shape)}, but its parameter has {self.shapes[i]}"
            )
        memory = self._memory(grad, param, name)
        self._spans.check(memory, name)
        return Gradient(memory, dtype_of(grad))


def _device_of(array: Any) -> Any:
    return getattr(array, "device", "cpu")


def _place_of_tensor(array: Any) -> Any:
    """Return what changes when a tensor of PyTorch is given other memory; others keep theirs."""
    if not hasattr(array, "data_ptr") or str(array.layout) != "torch.strided":
        return None
    return array.data_ptr(), array.shape, array.stride(), array.dtype
