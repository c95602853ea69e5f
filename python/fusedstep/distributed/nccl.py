"""The engine of GPUs: NCCL for CuPy arrays, in a job that was started with mpirun."""

from __future__ import annotations

import ast
import os
from typing import Any

import numpy as np

from .engine import (
    GAVE_UP,
    Engine,
    Request,
    agree,
    as_engine,
    check_timeout,
    gather_text,
    wait_until,
)


class NcclEngine:
    """Collective operations of NCCL for CuPy arrays; NumPy arrays go through the host's engine.

    NCCL works on a stream of its own, so that it overlaps with the update. `Request.wait` holds
    back the processor, as NCCL itself knows no time limit. Only the constructor may wait for ever,
    while NCCL connects, for a rank that stops there.

    Parameters
    ----------
    host : mpi4py.MPI.Intracomm or Engine
        Between the processors of the same ranks.
    timeout : float
        Seconds. A rank that has waited so long for the others says so on stderr and ends its
        process with status 74, upon which `mpirun` ends the others.

    Raises
    ------
    ImportError
        CuPy or NCCL is not installed on some rank.
    ValueError
        `timeout` is not positive, or the ranks have different versions of CuPy or NCCL.
    RuntimeError
        A GPU cannot be used.
    """

    def __init__(self, host: Any, *, timeout: float = 300.0) -> None:
        self._host: Engine = as_engine(host)
        self.rank = self._host.rank
        self.size = self._host.size
        self.timeout = timeout
        facts, unique, error = "", "", None
        try:
            check_timeout(timeout)
            self._cupy, self._nccl = _libraries()
            facts = f"CuPy {self._cupy.__version__}, NCCL {self._nccl.get_version()}"
            self._stream = self._cupy.cuda.Stream(non_blocking=True)
            if self.rank == 0:
                unique = repr(self._nccl.get_unique_id())
        except Exception as failure:
            error = failure
        agree(self._host, error, facts, "NcclEngine")
        # Bytes since CuPy 14, before that a tuple of 128 integers.
        identity = ast.literal_eval(gather_text(self._host, unique)[0])
        self._comm = self._nccl.NcclCommunicator(self.size, identity, self.rank)
        self._types = {"float32": self._nccl.NCCL_FLOAT32, "float64": self._nccl.NCCL_FLOAT64}

    def reduce_scatter(self, send: Any, recv: Any) -> Request:
        if isinstance(send, np.ndarray):
            return self._host.reduce_scatter(send, recv)
        arguments = (send.data.ptr, recv.data.ptr, recv.size, self._types[send.dtype.name])
        self._begin()
        self._comm.reduceScatter(*arguments, self._nccl.NCCL_SUM, self._stream.ptr)
        return self._end("reduce_scatter", send, recv)

    def all_gather(self, buffer: Any) -> Request:
        if isinstance(buffer, np.ndarray):
            return self._host.all_gather(buffer)
        count = buffer.size // self.size
        own = buffer.data.ptr + self.rank * count * buffer.dtype.itemsize
        self._begin()
        self._comm.allGather(
            own, buffer.data.ptr, count, self._types[buffer.dtype.name], self._stream.ptr
        )
        return self._end("all_gather", buffer)

    def all_reduce(self, buffer: Any) -> Request:
        if isinstance(buffer, np.ndarray):
            return self._host.all_reduce(buffer)
        pointer = buffer.data.ptr
        kind = self._types[buffer.dtype.name]
        self._begin()
        self._comm.allReduce(
            pointer, pointer, buffer.size, kind, self._nccl.NCCL_SUM, self._stream.ptr
        )
        return self._end("all_reduce", buffer)

    def _begin(self) -> None:
        """Let NCCL wait for what CuPy's current stream still has to do."""
        self._stream.wait_event(self._cupy.cuda.get_current_stream().record())

    def _end(self, operation: str, *buffers: Any) -> Request:
        return _NcclRequest(self, self._stream.record(), operation, buffers)


class _NcclRequest:
    def __init__(
        self, engine: NcclEngine, event: Any, operation: str, buffers: tuple[Any, ...]
    ) -> None:
        self._engine = engine
        self._event = event
        self._operation = operation
        self._buffers = buffers  # held until NCCL has used them

    def wait(self) -> None:
        if not wait_until(self._done, self._engine, self._operation):
            os._exit(GAVE_UP)

    def _done(self) -> bool:
        try:
            self._engine._comm.check_async_error()
        except Exception:
            self._engine._comm.abort()  # what is on the stream would never end
            raise
        return bool(self._event.done)


def _libraries() -> tuple[Any, Any]:
    try:
        import cupy
        from cupy.cuda import nccl
    except ImportError as error:
        raise ImportError(
            f"NcclEngine needs CuPy ({error}): pip install cupy-cuda13x nvidia-nccl-cu13"
        ) from error
    if not nccl.available:
        raise ImportError("NcclEngine: CuPy finds no NCCL: pip install nvidia-nccl-cu13")
    return cupy, nccl
