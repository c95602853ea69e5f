"""Offloaded optimizers on a GPU: the bits of the ordinary ones on the host. ``pytest -m gpu``."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusedstep as fs
from fusedstep.offload import OffloadedOptimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:::cupy"),
    pytest.mark.filterwarnings("ignore:params.*so that a step smaller:UserWarning"),
]

SHAPES = ((300, 1000), (5,), (), (0, 3), (1 << 20,), (64, 64, 3))


def without_gpu(reason: str) -> None:
    # `dev.py gpu` is not to report success for tests that did not run.
    (pytest.fail if os.environ.get("FUSEDSTEP_NEEDS_GPU") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def cupy() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no CUDA toolkit
            module = importlib.import_module("cupy")
        count = module.cuda.runtime.getDeviceCount()
    except Exception as error:  # no CuPy, no driver
        without_gpu(f"{type(error).__name__}: {error}")
    else:
        if count == 0:
            without_gpu("no GPU")
    return module


@pytest.fixture(scope="module")
def torch() -> Any:
    try:
        module = importlib.import_module("torch")
    except ImportError as error:
        pytest.skip(str(error))
    if not module.cuda.is_available():
        pytest.skip("this PyTorch finds no GPU")  # it may be a CPU build on a machine with one
    return module


def arrays(seed: int, dtype: Any = np.float32) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in SHAPES]


@pytest.mark.parametrize("pin_params", [False, True])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_cupy_arrays_have_the_bits_of_numpy(dtype, options, pin_params, cupy):
    storage = {"master_weights": "float32"} if dtype == np.float16 else {}
    plain = arrays(0, dtype)
    ours = [cupy.asarray(a) for a in plain]
    expected = fs.AdamW(plain, lr=0.01, **storage)
    offloaded = OffloadedOptimizer(
        fs.AdamW, ours, lr=0.01, bucket_bytes=200_000, pin_params=pin_params, **storage
    )
    for t in range(5):
        grads = arrays(t + 1, dtype)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:  # where the gradients are still being computed when the step begins
            half = [cupy.asarray(g) / 2 for g in grads]
            for _ in range(20):
                busy = cupy.ones((1000, 1000)) @ cupy.ones((1000, 1000))
            on_gpu = [h * 2 for h in half]
            assert offloaded.step(on_gpu, **options) == expected.step(grads, **options)
        del busy
        assert all(np.array_equal(a.get(), b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_cuda_tensors_have_the_bits_of_the_host(kind, overlap, clip_norm, torch):
    from fusedstep.offload.torch import OffloadedOptimizer as Offloaded

    dtype = getattr(torch, kind)
    storage = {"master_weights": "float32"} if kind == "bfloat16" else {}
    torch.manual_seed(0)
    layers = [torch.nn.Linear(512, 512) for _ in range(8)]
    model = torch.nn.Sequential(*layers).to(dtype).cuda()
    host = [p.detach().cpu().clone() for p in model.parameters()]

    def as_array(tensor: Any) -> Any:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    expected = fs.AdamW([as_array(t) for t in host], lr=0.01, **storage)
    offloaded = Offloaded(fs.AdamW, model.parameters(), lr=0.01, bucket_bytes=300_000, **storage)
    for t in range(5):
        offloaded.zero_grad()
        x = torch.randn(64, 512, generator=torch.Generator().manual_seed(t)).to(dtype).cuda()
        loss = model(x).square().sum()
        if overlap:
            with offloaded.overlap(clip_norm=clip_norm):
                loss.backward()
            info = offloaded.step()
        else:
            loss.backward()
            info = offloaded.step(clip_norm=clip_norm)
        grads = [as_array(p.grad.cpu()) for p in model.parameters()]
        assert info == expected.step(grads, clip_norm=clip_norm)
        assert all(torch.equal(p.cpu(), h) for p, h in zip(model.parameters(), host, strict=True))


def test_state_is_resumed_from_a_file(tmp_path, cupy):
    plain = arrays(0)
    expected = fs.Adam(plain)
    ours = [cupy.asarray(a) for a in arrays(0)]
    offloaded = OffloadedOptimizer(fs.Adam, ours, state_dir=tmp_path, bucket_bytes=200_000)
    for t in range(4):
        if t == 2:
            offloaded.flush()
            ours = [cupy.zeros_like(a) for a in ours]
            offloaded = OffloadedOptimizer(fs.Adam, ours, state_dir=tmp_path, resume=True)
        grads = arrays(t + 1)
        expected.step(grads)
        offloaded.step([cupy.asarray(g) for g in grads])
    assert all(np.array_equal(a.get(), b) for a, b in zip(ours, plain, strict=True))
