"""Real CuPy arrays, which need no GPU while their memory is the host's: how steps read them."""

import re
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import float32

import fusedstep as fs
from fusedstep import gpu as gpu_library

pytest_plugins = ["cuda_on_host"]


@pytest.fixture
def cupy(request, monkeypatch):
    # First, since the next fixture puts a stand-in in its place.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no CUDA toolkit
        module = pytest.importorskip("cupy", reason="CuPy is not installed")
    request.getfixturevalue("gpu")
    monkeypatch.setitem(sys.modules, "cupy", module)
    stream = SimpleNamespace(ptr=7, is_capturing=lambda: False)
    monkeypatch.setattr(module.cuda, "get_current_stream", lambda device=None: stream)
    return module


@pytest.fixture
def on_gpu(cupy, monkeypatch):
    def wrap(array, device=0, dtype=None):
        memory = cupy.cuda.UnownedMemory(
            array.ctypes.data, max(array.nbytes, 1), array, device_id=device
        )
        pointer = cupy.cuda.MemoryPointer(memory, 0)
        return cupy.ndarray(array.shape, dtype or array.dtype, pointer, array.strides)

    monkeypatch.setattr(
        gpu_library, "zeros_like", lambda p, dtype, lead=0: wrap(np.zeros(p.shape, dtype))
    )
    monkeypatch.setattr(gpu_library, "zeros", lambda n, dtype, p: wrap(np.zeros(n, dtype)))
    return wrap


SHAPES = [(), (5,), (2, 3), (2, 3, 4), (0, 3), (4, 1)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fresh", [False, True])
def test_steps_have_the_bits_of_numpy(fresh, dtype, on_gpu, gpu):
    memory = [float32(*shape).astype(dtype) for shape in SHAPES]
    expected = [a.copy() for a in memory]
    ours, theirs = fs.Adam([on_gpu(a) for a in memory]), fs.Adam(expected)
    values = [np.empty_like(a) for a in memory]
    grads = [on_gpu(a) for a in values]
    for t in range(1, 5):
        for a in values:
            a[...] = t / 10
        launches = gpu.launch_count()
        ours.step([on_gpu(a) for a in values] if fresh else grads)
        assert gpu.launch_count() - launches == 1
        theirs.step(values)
        assert [a.tobytes() for a in memory] == [a.tobytes() for a in expected]
    assert gpu.last_stream() == 7


@pytest.mark.parametrize("options", [
    {"state_dtype": "8bit", "master_weights": "correction8"},
    {"state_dtype": "bfloat16", "master_weights": "stochastic"},
], ids=str)  # fmt: skip
def test_narrow_steps_have_the_bits_of_numpy(options, on_gpu, gpu):
    dtype = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16
    memory = [float32(*shape).astype(dtype) for shape in SHAPES]
    expected = [a.copy() for a in memory]
    ours, theirs = fs.Adam([on_gpu(a) for a in memory], **options), fs.Adam(expected, **options)
    for _ in range(3):
        grads = [np.ones_like(a) for a in memory]
        cleared = [g.copy() for g in grads]
        launches = gpu.launch_count()
        ours.step([on_gpu(g) for g in cleared], clip_norm=1.0, zero_grad=True)
        assert gpu.launch_count() - launches == 1
        theirs.step(grads, clip_norm=1.0)
        assert [a.tobytes() for a in memory] == [a.tobytes() for a in expected]
        assert not any(any(g.tobytes()) for g in cleared)


def made(on_gpu):
    """Return an optimizer that has seen its gradients twice, so that it reads them quickly."""
    memory = [float32(4), float32(3, 2), float32(2, 3, 4)]
    optimizer = fs.GD([on_gpu(a) for a in memory], lr=0.5)
    for _ in range(2):
        optimizer.step([on_gpu(np.ones_like(a)) for a in memory])
    return memory, optimizer


@pytest.mark.parametrize(
    ("which", "change", "error", "message"),
    [
        (1, lambda a, wrap: wrap(np.ones((2, 3), np.float32)), ValueError, "shape (2, 3)"),
        (1, lambda a, wrap: wrap(np.ones(6, np.float32)), ValueError, "shape (6,)"),
        (1, lambda a, wrap: wrap(np.ones((3, 3), np.float32)), ValueError, "shape (3, 3)"),
        (2, lambda a, wrap: wrap(np.ones((2, 4, 3), np.float32)), ValueError, "shape (2, 4, 3)"),
        (1, lambda a, wrap: wrap(np.ones((3, 2))), TypeError, "float64, but its parameter is"),
        (1, lambda a, wrap: wrap(np.ones((3, 2), np.int32)), TypeError, "int32, but its"),
        (1, lambda a, wrap: wrap(np.ones((3, 2), np.float32), 1), ValueError, "on GPU 1, but"),
        (1, lambda a, wrap: wrap(a), ValueError, "overlap in memory"),
        (1, lambda a, wrap: np.ones((3, 2), np.float32), ValueError, "in host memory"),
    ],
)
def test_another_gradient_is_seen(which, change, error, message, on_gpu):
    memory, optimizer = made(on_gpu)
    before = [a.copy() for a in memory]
    grads = [on_gpu(np.ones_like(a)) for a in memory]
    grads[which] = change(memory[which], on_gpu)
    with pytest.raises(error, match=re.escape(message)):
        optimizer.step(grads)
    assert [a.tobytes() for a in memory] == [a.tobytes() for a in before]


def test_a_transposed_gradient_is_walked_as_it_lies(on_gpu):
    memory, optimizer = made(on_gpu)
    before = memory[1].copy()
    values = float32(2, 3)
    grads = [on_gpu(np.ones_like(a)) for a in memory]
    grads[1] = on_gpu(values.T)
    optimizer.step(grads)
    assert memory[1].tolist() == (before - np.float32(0.5) * values.T).tolist()
