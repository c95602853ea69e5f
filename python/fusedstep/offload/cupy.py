"""Parameters on a GPU, as CuPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from .. import narrow

if TYPE_CHECKING:
    from .device import Bytes, Copy

_TO_HOST, _TO_DEVICE = 2, 1  # as cudaMemcpyKind numbers them


class CupyDevice:
    """A GPU, computing on CuPy's current stream and copying on two streams of its own.

    Parameters
    ----------
    device : cupy.cuda.Device
        The GPU.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        with device:
            self._down = cupy.cuda.Stream(non_blocking=True)
            self._up = cupy.cuda.Stream(non_blocking=True)

    def memory(self, array: Any, like: Any) -> Any:
        if array.flags.c_contiguous and like.flags.c_contiguous:
            return array.reshape(-1).view(np.uint8)
        ordered = array.transpose(narrow._memory_order(like))
        if not ordered.flags.c_contiguous:
            if array is like:
                raise ValueError(
                    "its elements do not fill a piece of memory, which is copied as a whole; "
                    "pass cupy.ascontiguousarray(...)"
                )
            with self._device:
                ordered = cupy.ascontiguousarray(ordered)
        return ordered.reshape(-1).view(np.uint8)

    def pinned(self, size: int) -> Bytes:
        with self._device:
            return np.frombuffer(cupy.cuda.alloc_pinned_memory(max(size, 1)), np.uint8, size)

    def mark(self) -> Any:
        with self._device:
            return cupy.cuda.get_current_stream().record()

    def download(self, pairs: Sequence[tuple[Any, Bytes]], marks: Sequence[Any]) -> Copy:
        moves = [(target.ctypes.data, source.data.ptr, target.nbytes) for source, target in pairs]
        return self._copy(self._down, _TO_HOST, moves, pairs, marks)

    def upload(self, pairs: Sequence[tuple[Bytes, Any]], marks: Sequence[Any]) -> Copy:
        moves = [(target.data.ptr, source.ctypes.data, source.nbytes) for source, target in pairs]
        return self._copy(self._up, _TO_DEVICE, moves, pairs, marks)

    def _copy(
        self, stream: Any, kind: int, moves: Sequence[Any], pairs: Any, marks: Sequence[Any]
    ) -> Copy:
        with self._device:
            for mark in marks:
                stream.wait_event(mark)
            for target, source, size in moves:
                cupy.cuda.runtime.memcpyAsync(target, source, size, kind, stream.ptr)
            return _Copy(stream.record(_event()), pairs)


class _Copy:
    def __init__(self, event: Any, pairs: Any) -> None:
        self._event = event
        self._pairs = pairs  # held until they have been copied

    def wait(self) -> None:
        self._event.synchronize()


def _event() -> Any:
    # Blocking: the processor has other work than to spin.
    return cupy.cuda.Event(block=True, disable_timing=True)
