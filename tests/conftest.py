"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest

import fusedstep as fs


@pytest.fixture(autouse=True)
def _restore_settings() -> Iterator[None]:
    """Leave the process's settings to the next test as they were."""
    isa, threads = fs.get_isa(), fs.get_num_threads()
    yield
    fs.set_isa(isa)
    fs.set_num_threads(threads)


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, _restore_settings: None) -> str:
    """Run the test once on each instruction set that this machine has."""
    if request.param not in fs.available_isas():
        pytest.skip(f"no {request.param} on this machine, or not in this build")
    fs.set_isa(request.param)
    return request.param
