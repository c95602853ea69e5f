"""On a GPU: the bits of the CPU, on the current stream, without waiting. ``pytest -m gpu``."""

import numpy as np
import pytest
from test_cuda_on_host import ADAM, RULES

import fusedstep as fs

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy():
    module = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        count = module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    if count == 0:
        pytest.skip("no GPU")
    return module


def random_arrays(rule, dtype, sizes, offset=0):
    """Return views of random arrays, `offset` elements past an alignment boundary."""
    rng = np.random.default_rng(0)
    names = ("params", "grads", *RULES[rule][1])
    return {
        name: [
            np.abs(
                rng.standard_normal(size + offset) * 10.0 ** rng.uniform(-44, 10, size + offset)
            ).astype(dtype)
            for size in sizes
        ]
        for name in names
    }


def step_both(cupy, rule, arrays, offset=0, step=3):
    function, state, fixed = RULES[rule]
    options = {**fixed, **({"step": step} if state else {})}
    on_gpu = {name: [cupy.asarray(a) for a in owned] for name, owned in arrays.items()}
    for memory in (arrays, on_gpu):
        views = {name: [a[offset:] for a in owned] for name, owned in memory.items()}
        getattr(fs, function)(**views, **options)
    for name, owned in arrays.items():
        for i, (host, device) in enumerate(zip(owned, on_gpu[name], strict=True)):
            assert host.tobytes() == device.get().tobytes(), f"{name}[{i}]"


@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", RULES)
def test_odd_lengths_and_offsets(rule, dtype, offset, cupy):
    arrays = random_arrays(rule, dtype, [1, 2, 3, 5, 63, 4095, 4097, 100_003], offset)
    with np.errstate(all="ignore"):
        step_both(cupy, rule, arrays, offset)


@pytest.mark.parametrize("count", [1, 7, 1000, 5000])
def test_lists(count, cupy):
    sizes = np.random.default_rng(count).integers(1, 200, count)
    step_both(cupy, "adam", random_arrays("adam", np.float32, sizes))


def test_a_step_is_captured_in_a_graph_and_replayed(cupy):
    arrays = random_arrays("adam", np.float32, [1000])
    on_gpu = {name: cupy.asarray(a) for name, (a,) in arrays.items()}
    start = {name: a.copy() for name, a in on_gpu.items()}
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        fs.adam_step(**on_gpu, step=1)  # the kernel is loaded before the capture
        for name, a in start.items():
            on_gpu[name][...] = a
        stream.begin_capture()
        fs.adam_step(**on_gpu, step=1)
        graph = stream.end_capture()
        graph.launch()
    stream.synchronize()
    fs.adam_step(**{name: a for name, (a,) in arrays.items()}, step=1)
    for name in ("params", *ADAM):
        assert arrays[name][0].tobytes() == on_gpu[name].get().tobytes()


def test_a_step_does_not_wait_for_the_gpu(cupy):
    arrays = {name: cupy.ones(1000, cupy.float32) for name in ("params", "grads", *ADAM)}
    stream = cupy.cuda.Stream(non_blocking=True)
    busy = cupy.RawKernel(
        r"""extern "C" __global__ void busy(volatile int* gate) { while (*gate == 0) {} }""", "busy"
    )
    pinned = cupy.cuda.alloc_pinned_memory(4)
    gate = np.frombuffer(pinned, np.int32, 1)
    gate[0] = 0
    fs.adam_step(**arrays, step=1)
    cupy.cuda.Device().synchronize()
    with stream:
        busy((1,), (1,), (np.uintp(pinned.ptr),))
        fs.adam_step(**arrays, step=2)
        done = stream.record()
    waiting = not done.done
    gate[0] = 1
    stream.synchronize()
    assert waiting
