"""The engine on NCCL, against a stand-in for CuPy's interface: no GPU is needed, none is tested.

The stand-in has the names, arguments and order of `cupy.cuda.nccl.NcclCommunicator`, and arrays in
host memory whose pointers it follows. Its streams do nothing but remember what was asked of them.
"""

import ctypes
import sys
import threading
import types

import numpy as np
import pytest
from thread_engine import run_ranks

from fusedstep.distributed import NcclEngine

UNIQUE_ID = tuple(range(-64, 64))
TYPES = {7: np.float32, 8: np.float64}
SUM = 0


class Device:
    """What the engine sees of a CuPy array; `host` is the memory that it points to."""

    def __init__(self, values, dtype):
        self.host = np.array(values, dtype)
        self.size, self.dtype = self.host.size, self.host.dtype
        self.data = types.SimpleNamespace(ptr=self.host.ctypes.data)


class Event:
    def __init__(self, stream):
        self.stream = stream


class Stream:
    ptr = 1234

    def __init__(self, non_blocking=False):
        self.non_blocking = non_blocking
        self.waited_for = []

    def record(self):
        return Event(self)

    def wait_event(self, event):
        self.waited_for.append(event.stream)


class Communicators:
    """The communicators of one job, one for each thread."""

    def __init__(self):
        self.barrier = None
        self.lock = threading.Lock()
        self.sent = {}

    def make(self):
        job = self

        class NcclCommunicator:
            def __init__(self, ndev, commId, rank):
                assert commId == UNIQUE_ID
                self.rank, self.size = rank, ndev
                with job.lock:
                    if job.barrier is None:
                        job.barrier = threading.Barrier(ndev)

            def _exchange(self, pointer, count, datatype, stream):
                assert stream == Stream.ptr
                job.sent[self.rank] = memory(pointer, count, datatype).copy()
                job.barrier.wait(60)
                arrays = [job.sent[rank] for rank in range(self.size)]
                job.barrier.wait(60)
                return arrays

            def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):
                assert op == SUM
                arrays = self._exchange(sendbuf, count, datatype, stream)
                memory(recvbuf, count, datatype)[...] = sum(arrays)

            def reduceScatter(self, sendbuf, recvbuf, recvcount, datatype, op, stream):
                assert op == SUM
                arrays = self._exchange(sendbuf, recvcount * self.size, datatype, stream)
                part = slice(self.rank * recvcount, (self.rank + 1) * recvcount)
                memory(recvbuf, recvcount, datatype)[...] = sum(arrays)[part]

            def allGather(self, sendbuf, recvbuf, count, datatype, stream):
                arrays = self._exchange(sendbuf, count, datatype, stream)
                memory(recvbuf, count * self.size, datatype)[...] = np.concatenate(arrays)

        return NcclCommunicator


def memory(pointer, count, datatype):
    dtype = np.dtype(TYPES[datatype])
    raw = (ctypes.c_byte * (count * dtype.itemsize)).from_address(pointer)
    return np.frombuffer(raw, dtype)


@pytest.fixture
def cupy(monkeypatch):
    """Put a stand-in for CuPy in its place; each thread has a current stream of its own."""
    local = threading.local()

    def get_current_stream():
        if not hasattr(local, "stream"):
            local.stream = Stream()
        return local.stream

    module, cuda, nccl = (types.ModuleType(n) for n in ("cupy", "cupy.cuda", "cupy.cuda.nccl"))
    module.cuda, cuda.nccl = cuda, nccl
    cuda.Stream, cuda.get_current_stream = Stream, get_current_stream
    nccl.available = True
    nccl.NCCL_SUM, nccl.NCCL_FLOAT32, nccl.NCCL_FLOAT64 = SUM, 7, 8
    nccl.get_unique_id = lambda: UNIQUE_ID
    nccl.NcclCommunicator = Communicators().make()
    for name, stand_in in (("cupy", module), ("cupy.cuda", cuda), ("cupy.cuda.nccl", nccl)):
        monkeypatch.setitem(sys.modules, name, stand_in)
    return module


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_collective_operations_on_device_arrays(cupy, size, dtype):
    def job(host):
        engine = NcclEngine(host)
        assert (engine.rank, engine.size) == (host.rank, host.size)
        values = np.arange(2.0 * size) + engine.rank
        send, recv = Device(values, dtype), Device([0, 0], dtype)
        request = engine.reduce_scatter(send, recv)
        request.wait()
        gathered = Device(np.where(np.arange(2 * size) // 2 == engine.rank, values, 0), dtype)
        engine.all_gather(gathered).wait()
        reduced = Device(values, dtype)
        engine.all_reduce(reduced).wait()
        current = cupy.cuda.get_current_stream()
        # NCCL's stream waited for the current one before each operation, and that one after each.
        assert engine._stream.waited_for == [current] * 3
        assert current.waited_for == [engine._stream] * 3
        assert engine._stream.non_blocking
        return [a.host.tolist() for a in (recv, gathered, reduced)]

    total = size * np.arange(2.0 * size) + sum(range(size))
    everyone = [float(i + i // 2) for i in range(2 * size)]
    for rank, result in enumerate(run_ranks(size, job)):
        part = total[2 * rank : 2 * rank + 2].tolist()
        assert result == [part, everyone, total.tolist()]


def test_host_arrays_go_through_the_host_engine(cupy):
    def job(host):
        engine = NcclEngine(host)
        recv = np.zeros(1)
        engine.reduce_scatter(np.array([1.0, 2.0]), recv).wait()
        gathered = np.array([engine.rank + 1] * 2)
        engine.all_gather(gathered).wait()
        reduced = np.ones(3)
        engine.all_reduce(reduced).wait()
        return recv.tolist() + gathered.tolist() + reduced.tolist()

    assert run_ranks(2, job) == [[2.0, 1, 2, 2.0, 2.0, 2.0], [4.0, 1, 2, 2.0, 2.0, 2.0]]


def test_cupy_without_nccl_on_one_rank_is_an_error_on_all(cupy, monkeypatch):
    lacking = threading.local()

    class Nccl(types.ModuleType):
        @property
        def available(self):
            return not getattr(lacking, "yes", False)

    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", nccl := Nccl("cupy.cuda.nccl"))
    cupy.cuda.nccl = nccl

    def job(host):
        lacking.yes = host.rank == 1
        with pytest.raises(ImportError, match="rank 1: NcclEngine: this CuPy finds no NCCL"):
            NcclEngine(host)

    run_ranks(2, job)


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"NcclEngine needs CuPy .*pip install cupy"):
        NcclEngine(None)
