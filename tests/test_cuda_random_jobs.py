"""The CUDA kernels' source against the scalar CPU kernels, over thousands of random jobs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("tests/native/cuda_random_jobs.cpp", "csrc/cpu/kernels.cpp")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next(filter(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"]), None)
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    path = tmp_path_factory.mktemp("cuda_random_jobs") / "random_jobs"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    flags += ["-fno-math-errno", "-DFUSEDSTEP_ISA=scalar"]
    # A misaligned access ends the program; this needs no library of the sanitizer's.
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([compiler, *flags, *(ROOT / s for s in SOURCES), "-o", path], check=True)
    return path


@pytest.mark.parametrize("seed", [1, 2])
def test_random_jobs_have_the_bits_of_the_scalar_kernels(seed: int, program: Path) -> None:
    run = subprocess.run([program, str(seed), "250"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    seen = {name: int(value) for name, value in (line.split("=") for line in run.stdout.split())}
    assert seen["jobs"] == 250 * 8
    # Both sizes of table, and jobs that take several, were among them.
    assert 0 < seen["small_tables"] < seen["tables"]
    assert seen["split_jobs"] > 10
