"""Offloaded optimizers for PyTorch: parameters on a GPU, state in host memory (docs/offload.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import narrow, optim
from ..step_info import StepInfo
from ..torch import _array, _tensor
from . import optimizer as core

if TYPE_CHECKING:
    from .device import Bytes, Copy, Device

__all__ = ["CudaTensors", "HostTensors", "OffloadedOptimizer"]


class HostTensors:
    """Parameters in host memory, as PyTorch's tensors: copies are made at once."""

    def memory(self, array: torch.Tensor, like: Any) -> torch.Tensor:
        if array.layout != torch.strided:
            raise TypeError(f"a {array.layout} tensor; only dense (strided) tensors can be stepped")
        if hasattr(array, "to_local"):
            raise TypeError("a DTensor; offload takes whole tensors")
        if array.is_neg():
            if array is like:
                raise TypeError(
                    "a view whose memory holds the negative of its values, as (x.conj()).imag is; "
                    "give its resolve_neg()"
                )
            array = array.resolve_neg()
        if array.is_contiguous() and like.is_contiguous():
            return array.detach().view(-1).view(torch.uint8)
        ordered = array.detach().permute(narrow._memory_order(like))
        if array is like and not ordered.is_contiguous():
            raise ValueError(
                "its elements do not fill a piece of memory, which is copied as a whole; "
                "pass a contiguous tensor"
            )
        return ordered.reshape(-1).view(torch.uint8)

    def pinned(self, size: int) -> Bytes:
        return narrow.new_array((size,), np.dtype(np.uint8))

    def mark(self) -> Any:
        return None

    def download(self, pairs: Sequence[tuple[torch.Tensor, Bytes]], marks: Sequence[Any]) -> Copy:
        for source, target in pairs:
            torch.from_numpy(target).copy_(source)
        return _Done()

    def upload(self, pairs: Sequence[tuple[Bytes, torch.Tensor]], marks: Sequence[Any]) -> Copy:
        for source, target in pairs:
            target.copy_(torch.from_numpy(source))
        return _Done()


class _Done:
    def wait(self) -> None:
        pass


class CudaTensors(HostTensors):
    """A GPU, computing on PyTorch's current stream and copying on two streams of its own.

    Parameters
    ----------
    device : torch.device
        The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call,unused-ignore]
        self._up: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call,unused-ignore]

    def pinned(self, size: int) -> Bytes:
        memory: Bytes = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True).numpy()
        return memory

    def mark(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()

    def download(self, pairs: Sequence[tuple[torch.Tensor, Bytes]], marks: Sequence[Any]) -> Copy:
        with torch.cuda.stream(self._down):
            for mark in marks:
                self._down.wait_event(mark)
            for source, target in pairs:
                torch.from_numpy(target).copy_(source, non_blocking=True)
            return _Copy(self._down.record_event(_event()), pairs)

    def upload(self, pairs: Sequence[tuple[Bytes, torch.Tensor]], marks: Sequence[Any]) -> Copy:
        with torch.cuda.stream(self._up):
            for mark in marks:
                self._up.wait_event(mark)
            for source, target in pairs:
                target.copy_(torch.from_numpy(source), non_blocking=True)
            return _Copy(self._up.record_event(_event()), pairs)


class _Copy:
    def __init__(self, event: Any, pairs: Any) -> None:
        self._event = event
        self._pairs = pairs  # held until they have been copied

    def wait(self) -> None:
        self._event.synchronize()


def _event() -> Any:
    # Blocking: the processor has other work than to spin.
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call,unused-ignore]


def device_of_tensor(tensor: torch.Tensor) -> Device:
    if tensor.device.type == "cpu":
        return HostTensors()
    if tensor.device.type == "cuda":
        return CudaTensors(tensor.device)
    raise TypeError(
        f"params: on device {tensor.device.type!r}; only tensors in host memory and on CUDA GPUs "
        "can be stepped"
    )


class OffloadedOptimizer(torch.optim.Optimizer):
    """`fusedstep.offload.OffloadedOptimizer` for PyTorch's parameters.

    Gradients are those in ``.grad``. Learning-rate schedulers, step hooks, `zero_grad` and a
    `GradScaler` work as with any optimizer of PyTorch.

    Parameters
    ----------
    optimizer : type
        `fusedstep.GD`, `fusedstep.Adam` or `fusedstep.AdamW`.
    params : iterable
        As PyTorch's: parameters, pairs of a name and a parameter, or groups. All on one GPU, or in
        host memory; float32, float64, bfloat16 or float16, dense.
    bucket_bytes, pin_params, state_dir, resume, device, **hyper
        As those of `fusedstep.offload.OffloadedOptimizer`.

    Raises
    ------
    TypeError, ValueError
        As `fusedstep.offload.OffloadedOptimizer`.

    Examples
    --------
    >>> import torch, fusedstep as fs
    >>> from fusedstep.offload.torch import OffloadedOptimizer
    >>> model = torch.nn.Linear(4, 1)  # .cuda()
    >>> optimizer = OffloadedOptimizer(fs.AdamW, model.parameters(), lr=1e-3)
    >>> loss = model(torch.ones(2, 4)).square().mean()
    >>> with optimizer.overlap(clip_norm=1.0):
    ...     loss.backward()
    >>> info = optimizer.step()
    >>> optimizer.zero_grad()
    """

    _core: core.OffloadedOptimizer

    def __init__(
        self,
        optimizer: type[optim.Optimizer],
        params: Iterable[Any],
        *,
        bucket_bytes: int = core.BUCKET_BYTES,
        pin_params: bool = False,
        state_dir: str | PathLike[str] | None = None,
        resume: bool = False,
        device: Device | None = None,
        **hyper: Any,
    ) -> None:
        super().__init__(params, {})
        groups = [
            {
                **{key: value for key, value in group.items() if key != "param_names"},
                "params": dict(zip(group["param_names"], group["params"], strict=True))
                if "param_names" in group
                else group["params"],
            }
            for group in self.param_groups
        ]
        self._core = core.OffloadedOptimizer(
            optimizer,
            groups,
            bucket_bytes=bucket_bytes,
            pin_params=pin_params,
            state_dir=state_dir,
            resume=resume,
            device=device,
            **hyper,
        )
        self.defaults = dict(self._core._checker.defaults)
        for own, group in zip(self.param_groups, self._core.param_groups, strict=True):
            own.update({key: group[key] for key in self.defaults})
        self._core.param_groups = self.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: buckets and buffers are made once, with all groups."""
        if hasattr(self, "_core"):
            raise RuntimeError(
                "add_param_group: an offloaded optimizer is made with all its groups; make a new "
                "one and load this one's state_dict()"
            )
        super().add_param_group(param_group)

    @contextmanager
    def overlap(
        self,
        *,
        grad_scale: float = 1.0,
        clip_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> Iterator[None]:
        """Begin the step in the backward pass that runs in this ``with`` block.

        Each bucket goes on its way as soon as the gradients of its parameters are complete. Without
        `clip_norm` and `skip_nonfinite` it is stepped at once, and the parameters are new before
        the backward pass ends. With one of them the gradients are only squared, since all of them
        must have been before the first is used; nothing is changed before `step`.

        To accumulate gradients over several backward passes, run all but the last one outside.
        `step`, which takes no options then, finishes what was begun.

        Parameters
        ----------
        grad_scale, clip_norm, skip_nonfinite
            As for `step`.

        Raises
        ------
        TypeError, ValueError
            As `step`. From the backward pass, where a gradient cannot be used.
        RuntimeError
            As `step`. From the backward pass, where a gradient is complete a second time.
        """
        params = self._core._params.arrays
        with self._core._overlap(grad_scale, clip_norm, skip_nonfinite) as begun:

            def hook(i: int) -> Callable[[torch.Tensor], None]:
                return lambda param: begun.ready(i, param.grad)

            handles = [
                param.register_post_accumulate_grad_hook(hook(i))
                for i, param in enumerate(params)
                if param.requires_grad
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float = 1.0,
        clip_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> Any:
        """Update every parameter that has a gradient; return when all are on the device.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and the gradients anew, and returns the loss.
        grad_scale, clip_norm, skip_nonfinite
            As for `fusedstep.offload.OffloadedOptimizer.step`; not after `overlap`, which has had
            them.

        Returns
        -------
        StepInfo, or the loss that `closure` returned.

        Raises
        ------
        TypeError, ValueError, RuntimeError, Exception
            As `fusedstep.offload.OffloadedOptimizer.step`. After `overlap`, a gradient was changed
            when the step had used it already.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [param.grad for param in self._core._params.arrays]
        info: StepInfo
        if self._core._pending is not None:
            if grad_scale != 1.0 or clip_norm is not None or skip_nonfinite:
                raise ValueError("step: options are overlap()'s where it has begun the step")
            info = self._core._finish(grads)
        else:
            info = self._core._step(
                lambda: self._core._params.as_copied(grads), grad_scale, clip_norm, skip_nonfinite
            )
        return info if closure is None else loss

    def refresh(self) -> None:
        """As `fusedstep.offload.OffloadedOptimizer.refresh`, for what PyTorch does not notice.

        What is written through ``param.data`` is not noticed.
        """
        self._core.refresh()

    def memory_bytes(self) -> dict[str, int]:
        """As `fusedstep.offload.OffloadedOptimizer.memory_bytes`."""
        return self._core.memory_bytes()

    def flush(self) -> None:
        """As `fusedstep.offload.OffloadedOptimizer.flush`."""
        self._core.flush()

    def state_dict(self) -> dict[str, Any]:
        """Return state and hyper-parameters, as `fusedstep.torch`'s optimizers do.

        The tensors are the live state, in host memory.
        """
        plain = self._core.state_dict()
        params = self._core._params.arrays
        state = {
            i: {
                key: torch.tensor(float(value), device="cpu")
                if key == "step"
                else _tensor(value, params[i])
                for key, value in entry.items()
            }
            for i, entry in plain["state"].items()
        }
        groups = [
            {**group, **saved}
            for group, saved in zip(self.param_groups, plain["param_groups"], strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over state and hyper-parameters of `fusedstep.torch`'s or PyTorch's optimizers.

        As `fusedstep.offload.OffloadedOptimizer.load_state_dict`: load the model first.
        """
        core_groups = self._core.param_groups
        saved_groups = state_dict["param_groups"]
        groups = [
            {
                **{key: saved.get(key, own[key]) for key in self.defaults},
                **{k: saved[k] for k in ("params", "param_names", "foreach") if k in saved},
            }
            for own, saved in zip(core_groups, saved_groups, strict=False)
        ]
        state = {
            i: {
                key: float(value) if key == "step" else _array(value.cpu())
                for key, value in entry.items()
            }
            for i, entry in state_dict["state"].items()
        }
        self._core.load_state_dict(
            {"state": state, "param_groups": groups + list(saved_groups[len(groups) :])}
        )
        for own, saved in zip(core_groups, saved_groups, strict=True):
            for key in saved.keys() - self.defaults.keys() - {"params", "param_names"}:
                own[key] = saved[key]

    def save(self, path: str | PathLike[str]) -> None:
        """As `fusedstep.offload.OffloadedOptimizer.save`."""
        self._core.save(path)

    def load(self, path: str | PathLike[str]) -> None:
        """As `fusedstep.offload.OffloadedOptimizer.load`."""
        self._core.load(path)

    def __getstate__(self) -> Any:
        return self._core.__reduce__()

    def __repr__(self) -> str:
        return repr(self._core)
