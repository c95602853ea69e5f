"""The engine of jobs that were started by PyTorch: torch.distributed, with gloo for the host."""

from __future__ import annotations

from typing import Any

from .engine import Request


class TorchEngine:
    """Collective operations of a process group of torch.distributed on arrays in host memory.

    A rank that has died, or one that does not answer within the `timeout` that was given to
    ``init_process_group``, raises torch's RuntimeError in the others.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        The default group, if not given. Its backend must take tensors of the host (gloo).

    Raises
    ------
    ImportError
        torch is not installed.
    RuntimeError
        There is no process group yet.
    """

    def __init__(self, group: Any = None) -> None:
        try:
            import torch
            import torch.distributed as dist
        except ImportError as error:
            raise ImportError("TorchEngine needs PyTorch: pip install torch") from error
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "TorchEngine: no process group; call torch.distributed.init_process_group first"
            )
        self._tensor = torch.from_numpy
        self._dist = dist
        self._group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        # New names since torch 2.13; the old ones warn there.
        self._reduce_scatter = _first(dist, "reduce_scatter_single", "reduce_scatter_tensor")
        self._all_gather = _first(dist, "all_gather_single", "all_gather_into_tensor")

    def reduce_scatter(self, send: Any, recv: Any) -> Request:
        return self._started(self._reduce_scatter, self._tensor(recv), self._tensor(send))

    def all_gather(self, buffer: Any) -> Request:
        whole = self._tensor(buffer)
        own = whole.chunk(self.size)[self.rank].clone()
        return self._started(self._all_gather, whole, own)

    def all_reduce(self, buffer: Any) -> Request:
        return self._started(self._dist.all_reduce, self._tensor(buffer))

    def _started(self, operation: Any, *tensors: Any) -> Request:
        request: Request = operation(*tensors, group=self._group, async_op=True)
        return request


def _first(module: Any, *names: str) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))
