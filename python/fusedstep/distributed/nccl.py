"""The engine of GPUs: NCCL for CuPy arrays, in a job that was started with mpirun."""

from __future__ import annotations

from typing import Any

import numpy as np

from .engine import Engine, Request, agree, as_engine, gather_bytes


class NcclEngine:
    """Collective operations of NCCL for CuPy arrays; NumPy arrays go through the host's engine.

    NCCL works on a stream of its own, so that it overlaps with the update. `Request.wait` holds
    back CuPy's current stream, not the processor. A rank that has died is noticed where the
    processors agree on the next step, within the time limit of the host's engine.

    Parameters
    ----------
    host : mpi4py.MPI.Intracomm or Engine
        Between the processors of the same ranks.

    Raises
    ------
    ImportError
        CuPy is not installed on some rank, or is built without NCCL.
    """

    def __init__(self, host: Any) -> None:
        self._host: Engine = as_engine(host)
        self.rank = self._host.rank
        self.size = self._host.size
        error = None
        try:
            import cupy
            from cupy.cuda import nccl

            if not nccl.available:
                error = ImportError("NcclEngine: this CuPy finds no NCCL; see cupy.show_config()")
        except ImportError as failure:
            error = ImportError(f"NcclEngine needs CuPy ({failure}): pip install cupy-cuda13x")
        agree(self._host, error)
        self._cupy = cupy
        self._nccl = nccl
        self._types = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}
        # The id is 128 signed bytes, made by rank 0.
        unique = bytes(x & 0xFF for x in nccl.get_unique_id()) if self.rank == 0 else b""
        identity = np.frombuffer(gather_bytes(self._host, unique)[0], np.int8)
        self._comm = nccl.NcclCommunicator(self.size, tuple(identity.tolist()), self.rank)
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def reduce_scatter(self, send: Any, recv: Any) -> Request:
        if isinstance(send, np.ndarray):
            return self._host.reduce_scatter(send, recv)
        arguments = (send.data.ptr, recv.data.ptr, recv.size, self._types[send.dtype.name])
        self._begin()
        self._comm.reduceScatter(*arguments, self._nccl.NCCL_SUM, self._stream.ptr)
        return self._end(send, recv)

    def all_gather(self, buffer: Any) -> Request:
        if isinstance(buffer, np.ndarray):
            return self._host.all_gather(buffer)
        count = buffer.size // self.size
        own = buffer.data.ptr + self.rank * count * buffer.dtype.itemsize
        self._begin()
        self._comm.allGather(
            own, buffer.data.ptr, count, self._types[buffer.dtype.name], self._stream.ptr
        )
        return self._end(buffer)

    def all_reduce(self, buffer: Any) -> Request:
        if isinstance(buffer, np.ndarray):
            return self._host.all_reduce(buffer)
        pointer = buffer.data.ptr
        kind = self._types[buffer.dtype.name]
        self._begin()
        self._comm.allReduce(
            pointer, pointer, buffer.size, kind, self._nccl.NCCL_SUM, self._stream.ptr
        )
        return self._end(buffer)

    def _begin(self) -> None:
        """Let NCCL wait for what CuPy's current stream still has to do."""
        self._stream.wait_event(self._cupy.cuda.get_current_stream().record())

    def _end(self, *buffers: Any) -> Request:
        return _NcclRequest(self._cupy, self._stream.record(), buffers)


class _NcclRequest:
    def __init__(self, cupy: Any, event: Any, buffers: tuple[Any, ...]) -> None:
        self._cupy = cupy
        self._event = event
        self._buffers = buffers  # held until NCCL has used them

    def wait(self) -> None:
        self._cupy.cuda.get_current_stream().wait_event(self._event)
