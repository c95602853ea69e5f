"""The engine on NCCL, against a stand-in for CuPy's interface: no GPU is needed, none is tested.

The stand-in has the names, arguments and order of `cupy.cuda.nccl.NcclCommunicator`, and arrays in
host memory whose pointers it follows. Its streams do nothing but remember what was asked of them.
"""

import ctypes
import inspect
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from thread_engine import run_ranks

from fusedstep.distributed import NcclEngine

UNIQUE_IDS = {13: tuple(range(-64, 64)), 14: bytes(range(128, 256))}
TYPES = {7: np.float32, 8: np.float64}
SUM = 0


class Device:
    """What the engine sees of a CuPy array; `host` is the memory that it points to."""

    def __init__(self, values, dtype):
        self.host = np.array(values, dtype)
        self.size, self.dtype = self.host.size, self.host.dtype
        self.data = types.SimpleNamespace(ptr=self.host.ctypes.data)


class Event:
    done = True

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

    def __init__(self, unique_id):
        self.unique_id = unique_id
        self.barrier = None
        self.lock = threading.Lock()
        self.sent = {}

    def make(self):
        job = self

        class NcclCommunicator:
            def __init__(self, ndev, commId, rank):
                if type(commId) is not type(job.unique_id):  # as Cython checks it
                    raise TypeError(f"commId: expected {type(job.unique_id)}")
                assert commId == job.unique_id
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

            def check_async_error(self):
                pass

            def abort(self):
                raise AssertionError("there was no error")

        return NcclCommunicator


def memory(pointer, count, datatype):
    dtype = np.dtype(TYPES[datatype])
    raw = (ctypes.c_byte * (count * dtype.itemsize)).from_address(pointer)
    return np.frombuffer(raw, dtype)


@pytest.fixture(params=UNIQUE_IDS)
def cupy(monkeypatch, request):
    """Put a stand-in for CuPy in its place; each thread has a current stream of its own."""
    unique_id = UNIQUE_IDS[request.param]
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
    nccl.get_unique_id = lambda: unique_id
    nccl.NcclCommunicator = Communicators(unique_id).make()
    module.__version__, nccl.get_version = f"{request.param}.0.0", lambda: 23203
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
        # NCCL's stream waited for the current one before each operation.
        assert engine._stream.waited_for == [current] * 3
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


def per_thread(value, other):
    """Return a function that gives `other` in the thread that has called it with True."""
    local = threading.local()

    def get(set_other=None):
        if set_other is not None:
            local.other = set_other
        return other if getattr(local, "other", False) else value

    return get


def test_cupy_without_nccl_on_one_rank_is_an_error_on_all(cupy, monkeypatch):
    available = per_thread(True, False)

    class Nccl(types.ModuleType):
        @property
        def available(self):
            return available()

        def __getattr__(self, name):
            return getattr(whole, name)

    whole = cupy.cuda.nccl
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", nccl := Nccl("cupy.cuda.nccl"))
    cupy.cuda.nccl = nccl

    def job(host):
        available(host.rank == 1)
        with pytest.raises(ImportError, match="rank 1: NcclEngine: CuPy finds no NCCL: pip"):
            NcclEngine(host)

    run_ranks(2, job)


def test_ranks_with_different_versions_of_nccl(cupy):
    cupy.cuda.nccl.get_version = version = per_thread(23203, 22707)

    def job(host):
        version(host.rank == 1)
        with pytest.raises(ValueError, match=r"disagree on NcclEngine: .*23203, .*NCCL 22707"):
            NcclEngine(host)

    run_ranks(2, job)


@pytest.mark.parametrize("broken", ["Stream", "get_unique_id"])
def test_a_gpu_that_does_not_work_is_an_error_on_all_ranks(cupy, monkeypatch, broken):
    """Before NCCL makes its connections, which would wait for that rank for ever."""
    fails = per_thread(False, True)
    module = cupy.cuda if broken == "Stream" else cupy.cuda.nccl
    works = getattr(module, broken)

    def maybe(**options):
        if fails():
            raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return works(**options)

    monkeypatch.setattr(module, broken, maybe)

    def job(host):
        fails(host.rank == 0)
        with pytest.raises(RuntimeError, match="rank 0: cudaErrorNoDevice"):
            NcclEngine(host)

    run_ranks(2, job)


def test_an_error_of_the_network_is_raised_and_frees_the_stream(cupy, monkeypatch):
    engine = NcclEngine(None)
    aborted = []

    def failed(_):
        raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR: connection reset by peer")

    monkeypatch.setattr(cupy.cuda.nccl.NcclCommunicator, "check_async_error", failed)
    monkeypatch.setattr(cupy.cuda.nccl.NcclCommunicator, "abort", lambda comm: aborted.append(comm))
    request = engine.all_reduce(Device([1, 2], np.float32))
    with pytest.raises(RuntimeError, match="connection reset"):
        request.wait()
    assert aborted == [engine._comm]


def test_a_rank_that_waits_in_vain_ends_its_process():
    code = (
        "import types\n"
        "from fusedstep.distributed import nccl\n"
        "engine = types.SimpleNamespace(rank=1, size=2, timeout=0.3)\n"
        "engine._comm = types.SimpleNamespace(check_async_error=lambda: None)\n"
        "never = types.SimpleNamespace(done=False)\n"
        "nccl._NcclRequest(engine, never, 'all_gather', ()).wait()\n"
    )
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert job.returncode == 74
    assert "rank 1 of 2 has waited 0.3 s for the others in all_gather" in job.stderr


def test_a_timeout_that_is_none(cupy):
    with pytest.raises(ValueError, match="timeout: expected a number of seconds > 0, got 0"):
        NcclEngine(None, timeout=0)


@pytest.mark.filterwarnings("ignore:.*nccl library could not be loaded:UserWarning")
def test_the_stand_in_is_called_as_cupy_is():
    pytest.importorskip("cupy", reason="CuPy is not installed: pip install cupy-cuda13x")
    from cupy.cuda import nccl

    if not nccl.available:
        pytest.skip("NCCL is not installed: pip install nvidia-nccl-cu13")
    # Cython's first line of documentation, "allReduce(self, intptr_t sendbuf, ...)".
    stand_in = Communicators(b"").make()
    for name in ("allReduce", "reduceScatter", "allGather", "check_async_error", "abort"):
        line = getattr(nccl.NcclCommunicator, name).__doc__.splitlines()[0]
        arguments = line.partition("(")[2].partition(")")[0].split(", ")
        names = [argument.split()[-1] for argument in arguments]
        assert names == list(inspect.signature(getattr(stand_in, name)).parameters)
    assert nccl.NCCL_SUM == SUM
    assert list(TYPES) == [nccl.NCCL_FLOAT32, nccl.NCCL_FLOAT64]
    unique_id = nccl.get_unique_id()
    assert type(unique_id) in map(type, UNIQUE_IDS.values())
    assert len(unique_id) == 128


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"NcclEngine needs CuPy .*pip install cupy"):
        NcclEngine(None)
