"""GPU libraries that are not there: arrays which say that they are on a GPU, in host memory."""

from __future__ import annotations

import ctypes
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray


def zeros(shape: Any, dtype: Any = np.float64) -> NDArray[Any]:
    """Return zeros that begin at a boundary, as a GPU's memory does."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(count + 256, np.uint8)
    offset = -memory.ctypes.data % 256
    return memory[offset : offset + count].view(dtype).reshape(shape)


class CupyArray:
    """What fusedstep reads of a ``cupy.ndarray``."""

    __module__ = "cupy"
    __qualname__ = "ndarray"

    def __init__(self, array: NDArray[Any], device: int = 0) -> None:
        self.host = array
        self.dtype, self.shape, self.strides = array.dtype, array.shape, array.strides
        self.ndim, self.size, self.flags = array.ndim, array.size, array.flags
        self.device = nullcontext()
        self.data = SimpleNamespace(ptr=array.ctypes.data, device_id=device)

    def __array__(self, *args: Any, **options: Any) -> None:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __getitem__(self, key: Any) -> CupyArray:
        return CupyArray(self.host[key], self.data.device_id)

    def __setitem__(self, key: Any, values: CupyArray) -> None:
        self.host[key] = values.host

    def __lshift__(self, count: int) -> CupyArray:
        return CupyArray(self.host << count, self.data.device_id)

    def reshape(self, shape: Any) -> CupyArray:
        return CupyArray(self.host.reshape(shape), self.data.device_id)

    def view(self, dtype: Any) -> CupyArray:
        return CupyArray(self.host.view(dtype), self.data.device_id)

    def astype(self, dtype: Any) -> CupyArray:
        return CupyArray(self.host.astype(dtype), self.data.device_id)

    def get(self) -> NDArray[Any]:
        return self.host.copy()


@dataclass
class Cupy:
    """The fake module as a test sees it."""

    stream: int = 0
    capturing: bool = False
    asked: list[int] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def get_current_stream(device: int) -> SimpleNamespace:
            self.asked.append(device)
            return SimpleNamespace(ptr=self.stream, is_capturing=lambda: self.capturing)

        module = ModuleType("cupy")
        module.ndarray = CupyArray
        module.zeros_like = lambda like, dtype: CupyArray(
            np.zeros_like(like.host, dtype), like.data.device_id
        )
        module.zeros = lambda *args: CupyArray(zeros(*args))
        module.asarray = CupyArray
        module.cuda = SimpleNamespace(get_current_stream=get_current_stream)
        monkeypatch.setitem(sys.modules, "cupy", module)


class DlpackTensor(ctypes.Structure):
    """The beginning of DLPack's ``DLTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )


def change_dlpack(capsule: Any, **changes: Any) -> None:
    """Change fields of the tensor in a capsule, or ``length``, its first dimension's."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    versioned = "dltensor_versioned" in repr(capsule)
    pointer = get(capsule, b"dltensor_versioned" if versioned else b"dltensor")
    tensor = DlpackTensor.from_address(pointer + (32 if versioned else 0))
    for name, value in changes.items():
        if name == "length":
            tensor.shape[0] = value
        else:
            setattr(tensor, name, value)


class DlpackArray:
    """An array of a library that exports CUDA memory through DLPack."""

    def __init__(
        self, array: NDArray[Any], *, versioned: bool = True, device_type: int = 2, **tensor: Any
    ) -> None:
        self.host, self.dtype, self.shape = array, array.dtype, array.shape
        self.versioned, self.device_type = versioned, device_type
        # What the capsule says otherwise than NumPy's own.
        self.tensor = {"type": device_type, **tensor}
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device_type, 0

    def __dlpack__(self, stream: int, **options: Any) -> Any:
        if options and not self.versioned:
            raise TypeError("no such argument")
        capsule = self.host.__dlpack__(**options)
        self.streams.append(stream)
        change_dlpack(capsule, **self.tensor)
        return capsule


class InterfaceArray:
    """An array of a library that has only ``__cuda_array_interface__``."""

    def __init__(self, array: NDArray[Any], **changes: Any) -> None:
        self.host, self.dtype, self.shape = array, array.dtype, array.shape
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "strides": None if array.flags.c_contiguous else array.strides,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, not array.flags.writeable),
            "version": 3,
            **changes,
        }


def float32(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
