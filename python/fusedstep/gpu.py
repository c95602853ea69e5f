"""What a GPU array's own library does for an optimizer: new state, copies from and to the host."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _library(array: Any) -> tuple[str, Any]:
    name = type(array).__module__.partition(".")[0]
    return name, sys.modules.get(name)


def _unknown_library(array: Any) -> TypeError:
    return TypeError(
        f"params: an optimizer cannot allocate state like a {type(array).__qualname__} of "
        f"{_library(array)[0]}; keep the state yourself and call a function (adam_step)"
    )


def is_on_host(array: Any) -> bool:
    return isinstance(array, np.ndarray)


def is_gpu_array(value: Any) -> bool:
    """Whether a hyper-parameter is an array of a library that has GPU arrays."""
    return _library(value)[0] in ("cupy", "torch")


def dtype_of(array: Any) -> np.dtype[Any]:
    """Return an array's dtype as NumPy has it."""
    if is_on_host(array):
        return array.dtype  # type: ignore[no-any-return]
    if not hasattr(array, "dtype"):
        raise _unknown_library(array)
    return np.dtype(str(array.dtype).removeprefix("torch."))


def strides_of(array: Any) -> tuple[int, ...]:
    """Return an array's strides, in elements or in bytes as its library has them."""
    strides: tuple[int, ...] = array.stride() if hasattr(array, "stride") else array.strides
    return strides


def zeros_like(param: Any) -> Any:
    """Return zeros in the parameter's layout, on its GPU."""
    name, library = _library(param)
    if name == "cupy":
        with param.device:
            return library.zeros_like(param)
    if name == "torch":
        return library.zeros_like(param, requires_grad=False)
    raise _unknown_library(param)


def zero_integers(count: int, param: Any) -> Any:
    """Return a vector of int64 zeros on the GPU of a parameter."""
    name, library = _library(param)
    if name == "cupy":
        with param.device:
            return library.zeros(count, "int64")
    return library.zeros(count, dtype=library.int64, device=param.device)


def to_host(array: Any) -> NDArray[Any]:
    """Return a GPU array's copy in host memory, once the work queued before is done."""
    name, _ = _library(array)
    if name == "cupy":
        copy: NDArray[Any] = array.get()
        return copy
    if name == "torch":
        array = array.detach().cpu().numpy()
    return np.asarray(array)


def to_number(array: Any) -> float:
    """Return the one element of a GPU array."""
    return float(to_host(array).reshape(()))


def from_host(target: Any, values: NDArray[Any]) -> None:
    """Copy a host array, or one number for all elements, into a GPU array."""
    name, library = _library(target)
    values = np.broadcast_to(values, target.shape)
    if name == "cupy":
        with target.device:
            target[...] = library.asarray(values)
    else:
        target.copy_(library.from_numpy(np.ascontiguousarray(values)))
