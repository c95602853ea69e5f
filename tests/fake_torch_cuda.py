"""Tensors that say they are on a GPU, in host memory: PyTorch's own in everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_gpu import change_dlpack
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
_waits_are_refused = False


@contextmanager
def no_waits() -> Iterator[None]:
    """Fail where the host looks at the GPU's memory, which it would have to wait for."""
    global _waits_are_refused
    _waits_are_refused = True
    try:
        yield
    finally:
        _waits_are_refused = False


def _waiting(name: str) -> Any:
    def look(self: Any, *args: Any) -> Any:
        if _waits_are_refused:
            raise AssertionError(f"{name} waits for the GPU")
        return getattr(on_host(self), name)(*args)

    return look


class CudaTensor(torch.Tensor):
    """What fusedstep reads of a tensor on a GPU."""

    __module__ = "torch"

    device = GPU  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]

    def __dlpack_device__(self) -> tuple[int, int]:  # type: ignore[override]
        return 2, 0

    def __dlpack__(self, **options: Any) -> Any:
        if options.pop("stream") != -1:
            raise AssertionError("a step is to join PyTorch's stream, not to make another wait")
        capsule = torch.Tensor.__dlpack__(on_host(self), **options)
        change_dlpack(capsule, type=2)
        return capsule

    def __deepcopy__(self, memo: Any) -> CudaTensor:
        return on_gpu(on_host(self).clone())

    item, tolist, __bool__, __int__, __float__, __index__, __format__ = map(
        _waiting,
        ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__format__"),
    )  # type: ignore[assignment]

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        if _waits_are_refused:
            raise AssertionError("cpu() waits for the GPU")
        return on_host(self).clone()

    def numpy(self) -> Any:  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a tensor as what it is."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def on_gpu(tensor: torch.Tensor) -> CudaTensor:
    """Return a tensor that says its memory is a GPU's."""
    return tensor.detach().as_subclass(CudaTensor)


class _Moving(TorchFunctionMode):
    """Keeps in host memory what is wanted on a GPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.to and args[1:] and isinstance(args[1], torch.device):
            kwargs["device"] = args[1]
            args = args[:1]
        device = kwargs.get("device")
        if device is None:
            return function(*args, **kwargs)
        result = function(*args, **{**kwargs, "device": "cpu"})
        return on_gpu(result) if torch.device(device) == GPU else on_host(result)


@dataclass
class Cuda:
    """PyTorch's current stream as a test sets it."""

    stream: int = 0x51
    capturing: bool = False
    asked: list[Any] = field(default_factory=list)

    def current_stream(self, device: Any) -> SimpleNamespace:
        self.asked.append(device)
        return SimpleNamespace(cuda_stream=self.stream)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> Any:
    """Make PyTorch believe in a GPU whose kernels run on the host."""
    fake = Cuda()
    monkeypatch.setattr(torch.cuda, "current_stream", fake.current_stream)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    # Else a GradScaler does nothing.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with _Moving():
        yield fake
