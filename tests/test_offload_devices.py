"""What offload does with CuPy and with PyTorch's CUDA, seen through stand-ins for their streams."""

from __future__ import annotations

import ctypes
import warnings
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest

import fusedstep as fs
from fusedstep.offload import OffloadedOptimizer

SHAPES = ((3, 4), (9000,), (2, 3, 4), (), (0, 3))
BUCKET_BYTES = 17_000  # three of them


class Stream:
    """A stream as CuPy and PyTorch have it, which only writes down what it is asked for."""

    def __init__(self, log: list[tuple[Any, ...]], name: str) -> None:
        self.log, self.name, self.ptr, self.events = log, name, id(self), 0

    def record(self, event: Any = None) -> Event:
        self.events += 1
        self.log.append(("record", self.name, self.events))
        return Event(self.log, self.name, self.events)

    record_event = record

    def wait_event(self, event: Event) -> None:
        self.log.append(("wait", self.name, event.stream, event.number))


class Event:
    def __init__(self, log: list[tuple[Any, ...]], stream: str, number: int) -> None:
        self.log, self.stream, self.number = log, stream, number

    def synchronize(self) -> None:
        self.log.append(("synchronize", self.stream, self.number))


def check_order(log: list[tuple[Any, ...]], downloads: int, uploads: int) -> None:
    """Check that each bucket waits for the gradients, is copied, and is waited for.

    The stream that goes down waits for what computes, which has been marked before; each batch of
    copies is followed by an event of its stream, and each event is waited for.
    """
    expected = []
    for stream, count in (("down", downloads), ("up", uploads)):
        own = [entry for entry in log if entry[1] == stream and entry[0] != "synchronize"]
        first = min((entry[2] for entry in own if entry[0] == "record"), default=1)
        for number in range(first, first + count):
            batch = own[: own.index(("record", stream, number)) + 1]
            own = own[len(batch) :]
            if stream == "down":
                assert batch[0][0] == "wait"
                while batch[0][0] == "wait":
                    wait = batch.pop(0)
                    assert wait[:3] == ("wait", "down", "compute")
                    assert log.index(("record", "compute", wait[3])) < log.index(wait)
            assert len(batch) > 1
            assert all(entry[0] == "copy" for entry in batch[:-1])
            expected.append(("synchronize", stream, number))
        assert own == []
    assert sorted(e for e in log if e[0] == "synchronize") == sorted(expected)


def arrays(seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    made = [np.asarray(rng.standard_normal(shape)).astype(np.float32) for shape in SHAPES]
    made[2] = np.asfortranarray(made[2])
    return made


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Real CuPy arrays on host memory, with stand-ins for streams and copies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no CUDA toolkit
        module = pytest.importorskip("cupy", reason="CuPy is not installed")
    log: list[tuple[Any, ...]] = []
    streams: dict[int, Stream] = {}

    def new_stream(*, non_blocking: bool) -> Stream:
        assert non_blocking
        stream = Stream(log, ("down", "up")[len(streams)])
        streams[stream.ptr] = stream
        return stream

    kinds = {
        "down": module.cuda.runtime.memcpyDeviceToHost,
        "up": module.cuda.runtime.memcpyHostToDevice,
    }

    def copy(target: int, source: int, size: int, kind: int, stream: int) -> None:
        name = streams[stream].name
        assert kind == kinds[name]
        log.append(("copy", name, size))
        ctypes.memmove(target, source, size)

    def wrap(array: Any) -> Any:
        memory = module.cuda.UnownedMemory(array.ctypes.data, max(array.nbytes, 1), array, 0)
        pointer = module.cuda.MemoryPointer(memory, 0)
        return module.ndarray(array.shape, array.dtype, pointer, array.strides)

    def contiguous(array: Any) -> Any:
        flat = (ctypes.c_char * 10_000).from_address(array.data.ptr)
        return wrap(np.ndarray(array.shape, array.dtype, flat, 0, array.strides).copy())

    compute = Stream(log, "compute")
    monkeypatch.setattr(module.cuda, "Stream", new_stream)
    monkeypatch.setattr(module.cuda, "Event", lambda **options: options)
    monkeypatch.setattr(module.cuda, "get_current_stream", lambda: compute)
    monkeypatch.setattr(module.cuda, "alloc_pinned_memory", bytearray)
    monkeypatch.setattr(module.cuda.runtime, "memcpyAsync", copy)
    monkeypatch.setattr(module, "ascontiguousarray", contiguous)
    monkeypatch.setattr(module, "offload_log", log, raising=False)
    monkeypatch.setattr(module, "offload_streams", streams, raising=False)
    monkeypatch.setattr(module, "wrap", wrap, raising=False)
    return module


def test_cupy_arrays(cupy):
    from fusedstep.offload.cupy import CupyDevice

    plain, ours = arrays(0), arrays(0)
    expected = fs.Adam(plain)
    offloaded = OffloadedOptimizer(
        fs.Adam,
        [cupy.wrap(a) for a in ours],
        bucket_bytes=BUCKET_BYTES,
        device=CupyDevice(nullcontext()),
    )
    check_order(cupy.offload_log, 3, 0)
    for t, options in enumerate(({}, {"clip_norm": 1.0})):
        grads = arrays(t + 1)
        if t == 1:
            grads[2] = np.ascontiguousarray(grads[2])  # not in its parameter's order
        cupy.offload_log.clear()
        info = offloaded.step([cupy.wrap(g) for g in grads], **options)
        assert info == expected.step(grads, **options)
        check_order(cupy.offload_log, 6 if options else 3, 3)
        assert [a.tobytes() for a in ours] == [a.tobytes() for a in plain]


def test_what_is_resumed_waits_for_the_work_on_the_parameters(cupy, tmp_path):
    from fusedstep.offload.cupy import CupyDevice

    def made(values: Any, **options: Any) -> OffloadedOptimizer:
        params = [cupy.wrap(a) for a in values]
        device = CupyDevice(nullcontext())
        return OffloadedOptimizer(fs.Adam, params, device=device, state_dir=tmp_path, **options)

    made(arrays(0)).flush()
    cupy.offload_log.clear()
    cupy.offload_streams.clear()
    values = arrays(1)
    made(values, resume=True)
    assert all((a == b).all() for a, b in zip(values, arrays(0), strict=True))
    log = [entry[:2] for entry in cupy.offload_log]
    assert log[:2] == [("record", "compute"), ("wait", "up")]
    assert ("copy", "up") in log[2:]


def test_cupy_arrays_with_gaps_are_refused(cupy):
    from fusedstep.offload.cupy import CupyDevice

    gaps = cupy.wrap(np.ones((4, 6), np.float32)[:, ::2])
    with pytest.raises(ValueError, match=r"params\[0\]: its elements .* cupy.ascontiguousarray"):
        OffloadedOptimizer(fs.GD, [gaps], device=CupyDevice(nullcontext()))


def test_host_gradients_of_cupy_parameters_are_refused(cupy):
    from fusedstep.offload.cupy import CupyDevice

    params = [cupy.wrap(a) for a in arrays(0)]
    offloaded = OffloadedOptimizer(fs.GD, params, device=CupyDevice(nullcontext()))
    with pytest.raises(TypeError, match=r"grads\[0\]: expected cupy.ndarray, as its parameter"):
        offloaded.step(arrays(1))


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyTorch with stand-ins for CUDA's streams and for pinned memory."""
    module = pytest.importorskip("torch", reason="PyTorch is not installed")
    log: list[tuple[Any, ...]] = []
    made: list[Stream] = []
    entered: list[Stream] = []

    def new_stream(device: Any) -> Stream:
        made.append(Stream(log, ("down", "up")[len(made)]))
        return made[-1]

    @contextmanager
    def stream(chosen: Stream) -> Any:
        entered.append(chosen)
        yield
        entered.pop()

    copy, empty = module.Tensor.copy_, module.empty

    def logged_copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
        if entered:
            assert non_blocking
            log.append(("copy", entered[-1].name, source.nbytes))
        return copy(target, source)

    def pageable(*size: int, pin_memory: bool = False, **options: Any) -> Any:
        if pin_memory:
            log.append(("pinned", "host", *size))
        return empty(*size, **options)

    compute = Stream(log, "compute")
    monkeypatch.setattr(module.cuda, "Stream", new_stream)
    monkeypatch.setattr(module.cuda, "Event", lambda *, blocking: blocking)
    monkeypatch.setattr(module.cuda, "stream", stream)
    monkeypatch.setattr(module.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(module.Tensor, "copy_", logged_copy)
    monkeypatch.setattr(module, "empty", pageable)
    monkeypatch.setattr(module, "offload_log", log, raising=False)
    return module


@pytest.mark.parametrize("overlap", [False, True])
def test_cuda_tensors(overlap, torch):
    from fusedstep.offload.torch import CudaTensors
    from fusedstep.offload.torch import OffloadedOptimizer as Offloaded

    plain, ours = arrays(0), [torch.nn.Parameter(torch.from_numpy(a)) for a in arrays(0)]
    expected = fs.AdamW(plain)
    offloaded = Offloaded(
        fs.AdamW, ours, bucket_bytes=BUCKET_BYTES, device=CudaTensors(torch.device("cuda"))
    )
    check_order(torch.offload_log, 3, 0)
    assert len([entry for entry in torch.offload_log if entry[0] == "pinned"]) == 6
    for t, options in enumerate(({}, {"clip_norm": 1.0})):
        grads = arrays(t + 1)
        torch.offload_log.clear()
        loss = sum((p * torch.from_numpy(g)).sum() for p, g in zip(ours, grads, strict=True))
        offloaded.zero_grad()
        if overlap:
            with offloaded.overlap(**options):
                loss.backward()
            info = offloaded.step()
        else:
            loss.backward()
            info = offloaded.step(**options)
        assert info == expected.step(grads, **options)
        check_order(torch.offload_log, 6 if options else 3, 3)
        waits = [entry for entry in torch.offload_log if entry[0] == "wait"]
        # In the backward pass a bucket waits for each of its gradients.
        assert (len(waits) > (6 if options else 3)) == overlap
        for p, expected_p in zip(ours, plain, strict=True):
            assert np.array_equal(p.detach().numpy(), expected_p)


def test_nothing_of_a_gpu_is_imported_for_the_host(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, numpy as np, fusedstep as fs\n"
        "from fusedstep.offload import OffloadedOptimizer\n"
        "OffloadedOptimizer(fs.Adam, np.ones(3)).step(np.ones(3))\n"
        "assert not {'torch', 'cupy', 'mpi4py'} & set(sys.modules)\n"
        "import fusedstep\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, fusedstep; assert 'fusedstep.offload' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
