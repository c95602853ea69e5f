"""Fixtures of all tests."""

import sys
from collections.abc import Iterator

import pytest

import fusedstep as fs
from fusedstep import _core


@pytest.fixture(autouse=True)
def _restore_settings() -> Iterator[None]:
    """Leave the process's settings to the next test as they were."""
    isa, threads = fs.get_isa(), fs.get_num_threads()
    yield
    fs.set_isa(isa)
    fs.set_num_threads(threads)


@pytest.fixture(params=[True, False], ids=["as on Intel", "as on others"])
def maker(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test once in each way that is fast on processors of one maker or another."""
    before = _core.made_by_intel()
    _core.set_made_by_intel(request.param)
    yield
    _core.set_made_by_intel(before)


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a build without the CUDA backend; with one, test_gpu_arrays.py looks at GPU arrays."""
    monkeypatch.setitem(sys.modules, "fusedstep._cuda", None)


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, _restore_settings: None) -> str:
    """Run the test once on each instruction set that this machine has."""
    if request.param not in fs.available_isas():
        pytest.skip(f"no {request.param} on this machine, or not in this build")
    fs.set_isa(request.param)
    return request.param
