"""Steps between NumPy's matrix products: ``python -m fusedstep.bench.beside_blas``.

After a product OpenBLAS keeps its threads spinning in wait of another, on the processors that a
step shares its work among. How long, it reads from the environment when NumPy is first imported, so
each setting has processes of its own, which take turns.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import fusedstep as fs

from . import machine

VARIABLE = "OPENBLAS_THREAD_TIMEOUT"
SETTINGS = {"as it comes": None, f"{VARIABLE}=4": "4"}
PRODUCTS = (256, 512)  # rows and columns
ELEMENTS = (100_000, 1_000_000)


def microseconds(elements: int, rows: int, rounds: int) -> dict[str, float]:
    """Return medians of a product and of a step of float32 Adam, in turn in this process."""
    rng = np.random.default_rng(0)
    param, grad = rng.standard_normal((2, elements), np.float32)
    left, right = rng.standard_normal((2, rows, rows), np.float32)
    step = fs.Adam(param).step
    moments = []
    for _ in range(rounds):
        began = time.perf_counter()
        left @ right
        between = time.perf_counter()
        step(grad)
        moments.append((began, between, time.perf_counter()))
    kept = moments[rounds // 10 :]
    return {
        "product": statistics.median(between - began for began, between, _ in kept) * 1e6,
        "step": statistics.median(end - between for _, between, end in kept) * 1e6,
    }


def in_own_process(setting: str | None, *case: int) -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if setting is not None:
        environment[VARIABLE] = setting
    command = [sys.executable, "-m", "fusedstep.bench.beside_blas", "--case", *map(str, case)]
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    timings: dict[str, float] = json.loads(answer.stdout)
    return timings


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000, help="products and steps of a process")
    parser.add_argument("--output", type=Path, default=Path("bench-record"), metavar="DIR")
    parser.add_argument("--case", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.case:
        print(json.dumps(microseconds(*args.case)))
        return
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    print(f"NumPy's BLAS is {blas['name']} {blas['version']}; {VARIABLE} is OpenBLAS's")
    cases: list[dict[str, Any]] = []
    for rows, elements in itertools.product(PRODUCTS, ELEMENTS):
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
        for _ in range(3):
            for name, setting in SETTINGS.items():
                runs[name].append(in_own_process(setting, elements, rows, args.rounds))
        for name, timings in runs.items():
            found = {
                part: statistics.median(timing[part] for timing in timings)
                for part in ("product", "step")
            }
            cases.append({"elements": elements, "rows": rows, "setting": name, **found})
            print(
                f"product of {rows} x {rows} {found['product']:8.1f} us, "
                f"step of {elements:>9,} {found['step']:6.1f} us: {name}"
            )
    record = {**machine.describe(), "blas": blas, "cases": cases}
    print(f"wrote {machine.write_record(args.output, 'beside_blas', record['cpu'], record)}")


if __name__ == "__main__":
    main()
