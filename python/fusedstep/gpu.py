"""What a GPU array's own library does for an optimizer: new state, copies from and to the host."""

from __future__ import annotations

import math
import sys
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from .dtypes import bfloat16
from .step_info import StepInfo

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
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise _unknown_library(array)
    if isinstance(dtype, np.dtype):
        return dtype
    name = str(dtype).removeprefix("torch.")
    return bfloat16() if name == "bfloat16" else np.dtype(name)


def strides_of(array: Any) -> tuple[int, ...]:
    """Return an array's strides, in elements or in bytes as its library has them."""
    strides: tuple[int, ...] = array.stride() if hasattr(array, "stride") else array.strides
    return strides


def lead_of(param: Any) -> int:
    """Return the elements from the boundary below a contiguous parameter's memory to it.

    A boundary is one of 64 bytes on the host and of 16 on a GPU: a kernel that peels moves that
    much at a time between them. An array with another lead than the parameter's it has to move in
    smaller pieces. Small arrays on the host are not worth it.
    """
    if is_on_host(param):
        if param.nbytes < 4096:
            return 0
        address: int = param.__array_interface__["data"][0]
        return address % 64 // dtype_of(param).itemsize
    name, _ = _library(param)
    if name == "cupy" and param.flags.c_contiguous:
        address = param.data.ptr
    elif name == "torch" and param.is_contiguous():
        address = param.data_ptr()
    else:
        return 0
    return int(address) % 16 // dtype_of(param).itemsize


def zeros_like(param: Any, dtype: np.dtype[Any], lead: int = 0) -> Any:
    """Return zeros in the parameter's layout, on its GPU, with a lead where it is contiguous."""
    if lead != 0:
        return zeros(lead + math.prod(param.shape), dtype, param)[lead:].reshape(param.shape)
    name, library = _library(param)
    if name == "cupy":
        with param.device:
            return library.zeros_like(param, dtype=dtype)
    if name == "torch":
        return library.zeros_like(param, dtype=getattr(library, dtype.name), requires_grad=False)
    raise _unknown_library(param)


def zeros(count: int, dtype: np.dtype[Any], param: Any) -> Any:
    """Return a vector of zeros on the GPU of a parameter."""
    name, library = _library(param)
    if name == "cupy":
        with param.device:
            return library.zeros(count, dtype)
    if name == "torch":
        return library.zeros(count, dtype=getattr(library, dtype.name), device=param.device)
    raise _unknown_library(param)


def to_host(array: Any) -> NDArray[Any]:
    """Return a GPU array's copy in host memory, once the work queued before is done."""
    name, library = _library(array)
    if name == "cupy":
        copy: NDArray[Any] = array.get()
        return copy
    if name == "torch":
        array = array.detach()
        if array.dtype is library.bfloat16:  # NumPy takes it for no type of its own
            bits: NDArray[Any] = array.view(library.int16).cpu().numpy()
            return bits.view(bfloat16())
        array = array.cpu().numpy()
    return np.asarray(array)


def to_number(array: Any) -> float:
    """Return the one element of a GPU array."""
    return float(to_host(array).reshape(()))


def from_host(target: Any, values: NDArray[Any]) -> None:
    """Copy a host array, or one number for all elements, into a GPU array."""
    name, library = _library(target)
    values = np.broadcast_to(values, target.shape)
    if dtype_of(target).name == "bfloat16":
        target, values = _bits(target), values.view(np.int16)
    if name == "cupy":
        with target.device:
            target[...] = library.asarray(values)
    else:
        target.copy_(library.from_numpy(np.array(values)))


def copy_as_float32(target: Any, array: Any) -> None:
    """Copy a bfloat16 or float16 array on a GPU into a float32 array there."""
    if _library(array)[0] == "torch":
        target.copy_(array.detach())
        return
    with target.device:
        if dtype_of(array).name == "bfloat16":
            # Its bits are the upper half of a float32's; not every CuPy can convert them.
            bits = array.view(np.uint16).astype(np.uint32) << 16
            target.view(np.uint32)[...] = bits
        else:
            target[...] = array.astype(np.float32)


def is_captured(param: Any) -> bool:
    """Whether work on a parameter's GPU goes into a graph now, by its library's current stream."""
    name, library = _library(param)
    if name == "cupy":
        return bool(library.cuda.get_current_stream(param.data.device_id).is_capturing())
    with library.cuda.device_of(param):
        return bool(param.is_cuda and library.cuda.is_current_stream_capturing())


def _bits(array: Any) -> Any:
    """Return a 16-bit array's memory as int16."""
    name, library = _library(array)
    return array.view(np.int16 if name == "cupy" else library.int16)


class Norm:
    """Where on a GPU the norm of an optimizer's gradients is computed.

    What became of it stays there until it is read.

    Parameters
    ----------
    workspace_bytes : int
        What the native optimizer needs.
    param : GPU array
        On whose GPU the memory is to be.
    """

    def __init__(self, workspace_bytes: int, param: Any) -> None:
        self._param = param
        self._workspace = self._integers(-(-workspace_bytes // 8))
        # One for the step that is being taken, one for the last, which may not have been read yet.
        self._outcomes = [_Outcome(self._integers(3)) for _ in range(2)]
        # Those of captured steps, which every replay writes again.
        self._in_graphs: list[_Outcome] = []

    @property
    def is_in_graph(self) -> bool:
        """Whether a graph may use this memory, whatever becomes of the optimizer."""
        return bool(self._in_graphs)

    def _integers(self, count: int) -> Any:
        return zeros(count, np.dtype(np.int64), self._param)

    def prepare(self) -> tuple[StepInfo, tuple[Any, Any]]:
        """Return what the next step will report, and the memory it needs for that."""
        outcome = next((o for o in self._outcomes if o.is_free()), None)
        if outcome is None:
            outcome = _Outcome(self._integers(3))
            self._outcomes.append(outcome)
        captured = is_captured(self._param)
        if captured:
            self._outcomes.remove(outcome)
            self._in_graphs.append(outcome)
        return outcome.info(changes=captured), (self._workspace, outcome.array)


class _Outcome:
    """The native NormOutcome of one step: two float64 and a bool, in a vector of three int64."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self._reader: weakref.ref[StepInfo] | None = None

    def is_free(self) -> bool:
        """Whether nobody can read it any more."""
        info = None if self._reader is None else self._reader()
        return info is None or info.is_known

    def info(self, *, changes: bool) -> StepInfo:
        info = StepInfo.later(self._read, changes=changes)
        self._reader = weakref.ref(info)
        return info

    def _read(self) -> tuple[float, bool]:
        host = to_host(self.array)
        return float(host.view(np.float64)[0]), bool(host.view(np.bool_)[16])
