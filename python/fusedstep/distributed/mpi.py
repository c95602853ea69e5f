"""The engine of jobs that were started with mpirun, on mpi4py."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from .engine import GAVE_UP, Request, check_timeout, wait_until

# The key under which a communicator holds its duplicate.
_duplicates: int | None = None


class MpiEngine:
    """Collective operations of an MPI communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        ``MPI.COMM_WORLD`` by default. It is duplicated, once for all engines: messages of others on
        it do no harm.
    timeout : float
        Seconds. A rank that has waited so long for the others says so on stderr and ends the whole
        job (``MPI_Abort``, exit status 74).

    Raises
    ------
    ImportError
        mpi4py is not installed, or finds no MPI library.
    ValueError
        `timeout` is not positive.
    """

    def __init__(self, comm: Any = None, *, timeout: float = 300.0) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise ImportError(
                "MpiEngine needs mpi4py and an MPI library: pip install mpi4py mpich"
            ) from error
        check_timeout(timeout)
        self._mpi = MPI
        given = MPI.COMM_WORLD if comm is None else comm
        self._comm = given
        self.timeout = timeout
        self.rank: int = given.Get_rank()
        self.size: int = given.Get_size()
        self._comm = self._duplicate(given)

    def reduce_scatter(self, send: Any, recv: Any) -> Request:
        _synchronise(send)
        return self._started(self._comm.Ireduce_scatter_block(send, recv), "reduce_scatter")

    def all_gather(self, buffer: Any) -> Request:
        _synchronise(buffer)
        return self._started(self._comm.Iallgather(self._mpi.IN_PLACE, buffer), "all_gather")

    def all_reduce(self, buffer: Any) -> Request:
        _synchronise(buffer)
        return self._started(self._comm.Iallreduce(self._mpi.IN_PLACE, buffer), "all_reduce")

    def _duplicate(self, comm: Any) -> Any:
        """Return the duplicate of a communicator: one for all engines, as MPI has only so many."""
        global _duplicates
        if _duplicates is None:
            _duplicates = self._mpi.Comm.Create_keyval()
        duplicate = comm.Get_attr(_duplicates)
        if duplicate is None:
            duplicate, request = comm.Idup()
            self._started(request, "the start").wait()
            comm.Set_attr(_duplicates, duplicate)
        return duplicate

    def _started(self, request: Any, operation: str) -> Request:
        return _MpiRequest(self, request, operation)


class _MpiRequest:
    def __init__(self, engine: MpiEngine, request: Any, operation: str) -> None:
        self._engine = engine
        self._request = request
        self._operation = operation

    def wait(self) -> None:
        if not wait_until(self._request.Test, self._engine, self._operation):
            self._engine._comm.Abort(GAVE_UP)
            os._exit(GAVE_UP)


def _synchronise(buffer: Any) -> None:
    """Have a GPU array complete in memory: MPI knows nothing of streams."""
    if not isinstance(buffer, np.ndarray):
        import cupy

        cupy.cuda.get_current_stream().synchronize()
