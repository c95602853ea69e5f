"""The CUDA kernels' source against the scalar CPU kernels, over thousands of random jobs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def compiled(folder: Path, *sources: str) -> Path:
    compiler = next(filter(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"]), None)
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    path = folder / "jobs"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-pthread"]
    flags += ["-fno-math-errno", "-DFUSEDSTEP_ISA=scalar"]
    # A misaligned access ends the program; this needs no library of the sanitizer's.
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([compiler, *flags, *(ROOT / s for s in sources), "-o", path], check=True)
    return path


def seen_by(program: Path, *arguments: int) -> dict[str, int]:
    command = [program, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return {name: int(value) for name, value in (line.split("=") for line in run.stdout.split())}


@pytest.fixture(scope="module")
def native_jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda_random_jobs")
    return compiled(folder, "tests/native/cuda_random_jobs.cpp", "csrc/cpu/kernels.cpp")


@pytest.fixture(scope="module")
def stored_jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = (
        "tests/native/cuda_stored_jobs.cpp",
        "csrc/cpu/kernels.cpp",
        "csrc/cpu/tile.cpp",
        "csrc/cpu/dispatch.cpp",
    )
    return compiled(tmp_path_factory.mktemp("cuda_stored_jobs"), *sources)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_jobs_have_the_bits_of_the_scalar_kernels(seed: int, native_jobs: Path) -> None:
    seen = seen_by(native_jobs, seed, 250)
    assert seen["jobs"] == 250 * 8
    # Both sizes of table, and jobs that take several, were among them.
    assert 0 < seen["small_tables"] < seen["tables"]
    assert seen["split_jobs"] > 10


@pytest.mark.parametrize("seed", [1, 2])
def test_random_jobs_of_narrow_arrays_have_the_bits_of_the_scalar_kernels(
    seed: int, stored_jobs: Path
) -> None:
    seen = seen_by(stored_jobs, seed, 500, 0)
    assert seen["jobs"] == 500 * 4
    assert seen["fast"] > 500  # tensors that have kernels of their own


def test_threads_that_run_at_the_same_time_exchange_what_they_should(stored_jobs: Path) -> None:
    seen = seen_by(stored_jobs, 3, 30, 30)
    assert seen["at_once"] == seen["jobs"] == 30 * 4
