"""Sharded steps and checkpoints of CuPy arrays, without a GPU.

The kernels are the CUDA ones, compiled for the host. CuPy and NCCL are stand-ins: arrays in host
memory that have what CuPy's have, and no more.
"""

import sys
import types

import numpy as np
import pytest
from fake_gpu import CupyArray
from test_distributed_nccl import UNIQUE_IDS, Communicators, Stream
from thread_engine import run_ranks

import fusedstep as fs
from fusedstep.distributed import NcclEngine, ShardedOptimizer

pytest_plugins = ["cuda_on_host"]
SHAPES = {"w": (40, 30), "empty": (0, 3), "b": (7,), "c": (1000,)}
DTYPES = {"w": np.float32, "empty": np.float32, "b": np.float64, "c": np.float32}


def forwarded(name):
    """Return a method that does with the host's memory what NumPy does, and makes a CuPy array."""
    return lambda self, *args, **options: Array(getattr(self.host, name)(*args, **options))


class Array(CupyArray):
    """What a sharded optimizer uses of a ``cupy.ndarray``; it mixes with NumPy as little."""

    __module__ = "cupy"
    __qualname__ = "ndarray"

    def __init__(self, array):
        super().__init__(np.asarray(array))
        self.size, self.nbytes, self.flags = self.host.size, self.host.nbytes, self.host.flags
        if self.size == 0:
            self.data.ptr = 0  # CuPy allocates nothing

    def __setitem__(self, key, values):
        assert isinstance(values, Array) or np.isscalar(values)
        self.host[key] = getattr(values, "host", values)

    def __itruediv__(self, divisor):
        assert isinstance(divisor, self.dtype.type)
        self.host /= divisor
        return self

    def __len__(self):
        return len(self.host)

    __getitem__, __pow__ = forwarded("__getitem__"), forwarded("__pow__")
    reshape, astype, copy, sum = map(forwarded, ("reshape", "astype", "copy", "sum"))


@pytest.fixture
def new_job(gpu, monkeypatch):
    """Put a stand-in for CuPy in its place; return what gives it another NCCL."""
    module, nccl = types.ModuleType("cupy"), types.ModuleType("cupy.cuda.nccl")
    cuda = types.ModuleType("cupy.cuda")
    stream = Stream()
    module.__version__, module.cuda, cuda.nccl = "14.2.0", cuda, nccl
    module.ndarray, module.asarray = Array, lambda array: Array(np.array(array))
    module.empty = lambda size, dtype: Array(np.full(size, 77, dtype))
    module.zeros_like = lambda like, dtype: Array(np.zeros_like(like.host, dtype))
    cuda.Stream, cuda.get_current_stream = Stream, lambda device=None: stream
    nccl.available, nccl.get_version = True, lambda: 23203
    nccl.NCCL_SUM, nccl.NCCL_FLOAT32, nccl.NCCL_FLOAT64 = 0, 7, 8
    nccl.get_unique_id = lambda: UNIQUE_IDS[14]
    for name, stand_in in (("cupy", module), ("cupy.cuda", cuda), ("cupy.cuda.nccl", nccl)):
        monkeypatch.setitem(sys.modules, name, stand_in)

    def new_job():
        nccl.NcclCommunicator = Communicators(UNIQUE_IDS[14]).make()

    return new_job


def values(seed):
    rng = np.random.default_rng(seed)
    # Whole numbers, whose sums are exact.
    return {name: rng.integers(-9, 9, SHAPES[name]).astype(DTYPES[name]) for name in SHAPES}


def train(optimizer, steps, kind):
    for t in steps:
        grads = {name: kind(array) for name, array in values(t).items()}
        if t % 2:
            grads["b"] = None
        optimizer.step(grads, grad_scale=0.5, clip_norm=50.0, skip_nonfinite=True)


def bits(params):
    return [array.tobytes() for array in params.values()]


def unbroken(until):
    """Return the parameters after this many steps of NumPy arrays on one rank."""
    params = values(0)
    train(ShardedOptimizer(fs.AdamW, params, lr=0.1), range(1, until + 1), np.asarray)
    return bits(params)


def sharded(host):
    """Return parameters on the GPU, by their memory, and their optimizer."""
    memory = values(0)
    params = {name: Array(array) for name, array in memory.items()}
    return memory, ShardedOptimizer(fs.AdamW, params, NcclEngine(host), lr=0.1, bucket_bytes=2048)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sharded_steps_have_the_bits_of_numpy(new_job, gpu, ranks):
    def job(engine):
        memory, optimizer = sharded(engine)
        train(optimizer, range(1, 5), Array)
        return bits(memory)

    new_job()
    launches = gpu.launch_count()
    assert run_ranks(ranks, job) == [unbroken(4)] * ranks
    assert gpu.launch_count() > launches


def test_checkpoints_go_between_ranks_and_between_gpu_and_host(new_job, tmp_path):
    pytest.importorskip("safetensors")

    def job(engine):
        memory, optimizer = sharded(engine)
        loaded = optimizer.load(tmp_path)
        first = loaded.extra + 1 if loaded else 1
        train(optimizer, range(first, first + 2), Array)
        optimizer.save(tmp_path, extra=first + 1)
        return bits(memory)

    for ranks, until in ((2, 2), (3, 4), (1, 6)):
        new_job()
        assert run_ranks(ranks, job) == [unbroken(until)] * ranks
    params = values(9)
    ShardedOptimizer(fs.AdamW, params).load(tmp_path)
    assert bits(params) == unbroken(6)
