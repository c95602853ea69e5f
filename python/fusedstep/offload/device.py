"""What the pipeline asks of the place where parameters live, and the host as such a place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .. import _core, narrow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]


class Copy(Protocol):
    """Copies under way, started together."""

    def wait(self) -> None:
        """Return once the targets may be read and the sources written; raise if a copy failed."""


class Device(Protocol):
    """Where parameters live, and the two streams that copy between there and the host.

    The pipeline never touches a buffer between the start of a copy and the end of its `wait`, and
    never has two copies of one direction write to the same place.
    """

    def memory(self, array: Any, like: Any) -> Any:
        """Return the bytes of an array as a vector to be sliced, the elements as `like` has them.

        That of ``memory(x, x)`` is the memory of `x` itself; of another array it may be a copy,
        made on the stream that computes.

        Parameters
        ----------
        array : array
            A parameter or a gradient.
        like : array
            The parameter, in the order of whose memory the elements are.

        Raises
        ------
        ValueError
            `array` is `like`, and its elements do not fill a piece of memory.
        """

    def pinned(self, size: int) -> Bytes:
        """Return `size` bytes of host memory that copies do not have to stop for."""

    def mark(self) -> Any:
        """Return a mark of the work that has been queued on the stream that computes so far."""

    def download(self, pairs: Sequence[tuple[Any, Bytes]], marks: Sequence[Any]) -> Copy:
        """Start to copy from the device to pinned memory, behind the work before the marks."""

    def upload(self, pairs: Sequence[tuple[Bytes, Any]], marks: Sequence[Any]) -> Copy:
        """Start to copy from pinned memory to the device, behind the work before the marks."""


class _Done:
    """Copies that were made at once."""

    def wait(self) -> None:
        pass


class HostDevice:
    """Parameters in host memory, as NumPy arrays: copies are made at once."""

    def memory(self, array: NDArray[Any], like: NDArray[Any]) -> Bytes:
        if array.flags.c_contiguous and like.flags.c_contiguous:
            return array.reshape(-1).view(np.uint8)
        ordered = array.transpose(narrow._memory_order(like))
        if array is like and not ordered.flags.c_contiguous:
            raise ValueError(
                "its elements do not fill a piece of memory, which is copied as a whole; "
                "pass a contiguous array"
            )
        return ordered.reshape(-1).view(np.uint8)

    def pinned(self, size: int) -> Bytes:
        return narrow.new_array((size,), np.dtype(np.uint8))

    def mark(self) -> None:
        return None

    def download(self, pairs: Sequence[tuple[Bytes, Bytes]], marks: Sequence[None]) -> Copy:
        return self._copied(pairs)

    def upload(self, pairs: Sequence[tuple[Bytes, Bytes]], marks: Sequence[None]) -> Copy:
        return self._copied(pairs)

    def _copied(self, pairs: Sequence[tuple[Bytes, Bytes]]) -> Copy:
        for source, target in pairs:
            _core.copy_bytes(source, target, False)
        return _Done()


def library_of(array: Any) -> str:
    """Return the name of the library that an array is of: "numpy", "cupy", "torch"."""
    return type(array).__module__.partition(".")[0]


def device_of(array: Any) -> Device:
    """Return the device of a parameter.

    Raises
    ------
    TypeError
        It is of no library that is known here.
    """
    if isinstance(array, np.ndarray):
        return HostDevice()
    if library_of(array) == "cupy":
        from .cupy import CupyDevice

        return CupyDevice(array.device)
    if library_of(array) == "torch":
        from .torch import device_of_tensor

        return device_of_tensor(array)
    raise TypeError(
        f"params: expected NumPy arrays, CuPy arrays or PyTorch tensors, got "
        f"{type(array).__module__}.{type(array).__qualname__}"
    )


def dtype_of(array: Any) -> np.dtype[Any]:
    """Return an array's dtype as NumPy has it.

    Raises
    ------
    TypeError
        It is none that can be stepped.
    """
    name = str(array.dtype).removeprefix("torch.")
    if name == "bfloat16":
        return narrow.bfloat16()
    if name not in ("float32", "float64", "float16"):
        raise TypeError(f"{name}; expected float32, float64, bfloat16 or float16")
    return np.dtype(name)


def kind_of(value: Any) -> str:
    """Return a value's type, as errors name it."""
    return f"{type(value).__module__}.{type(value).__qualname__}"
