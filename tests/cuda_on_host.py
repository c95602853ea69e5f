"""The CUDA kernels' source, compiled for the host, in place of the CUDA backend."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_gpu import Cupy

import fusedstep as fs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = next(filter(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"]), None)
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    path = tmp_path_factory.mktemp("cuda_on_host") / "cuda_on_host.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    flags += ["-ffp-contract=off", "-fno-math-errno", f'-DFUSEDSTEP_VERSION="{fs.__version__}"']
    source = ROOT / "tests" / "native" / "cuda_on_host.cpp"
    subprocess.run([compiler, *flags, source, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    for counted in ("launch", "small_launch", "begun", "loaded", "norm"):
        getattr(library, f"{counted}_count").restype = ctypes.c_int64
    library.last_stream.restype = ctypes.c_uint64
    library.get_backend.restype = ctypes.c_void_p
    return library


@pytest.fixture
def gpu(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """Make the kernels on the host the CUDA backend, and CuPy importable."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    capsule = new(library.get_backend(), b"fusedstep.GpuBackend", None)
    monkeypatch.setitem(sys.modules, "fusedstep._cuda", SimpleNamespace(backend=capsule))
    Cupy().install(monkeypatch)
    yield library
    library.set_most_blocks(3)
    library.set_device_of_pointers(0)
    library.set_refused_dtype(-1)
    library.set_norm_is_refused(0)
    library.set_launches_to_failure(-1)
