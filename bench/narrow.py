"""Narrow state and parameters: ``python -m fusedstep.bench.narrow``.

Adam on one array, in float32 and in fewer bytes, beside the peers that have such a step, on the
same values in one process. A peer that does not change its parameters is not timed.
"""

import argparse
import importlib
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fusedstep as fs
from fusedstep.narrow import bfloat16

from . import machine
from .peers import DeepSpeed, step_of
from .timing import Step, interleaved
from .workloads import BETAS, EPS, LR

PLAIN = "float32"
# name: the parameter's and gradient's type, what the optimizer is given, bytes moved per parameter
OURS: dict[str, tuple[str, dict[str, Any], int]] = {
    PLAIN: ("float32", {}, 28),
    "float32, 8-bit moments": ("float32", {"state_dtype": "8bit"}, 16),
    "bfloat16, float32 moments": ("bfloat16", {}, 22),
    "bfloat16 throughout": ("bfloat16", {"state_dtype": "bfloat16"}, 14),
    "bfloat16 + 8 bits, 8-bit moments": (
        "bfloat16",
        {"state_dtype": "8bit", "master_weights": "correction8"},
        12,
    ),
}
TORCH, TORCH16, DEEPSPEED = "torch fused", "torch fused bfloat16", "DeepSpeed bfloat16"
# (elements, contender, at least this many times as fast as, the other)
REQUIRED = (
    (100_000, "bfloat16 throughout", 1.5, TORCH16),
    (100_000, "bfloat16, float32 moments", 2.0, DEEPSPEED),
    (64_000_000, "float32, 8-bit moments", 1.5, PLAIN),
    (64_000_000, "float32, 8-bit moments", 1.5, TORCH),
    (64_000_000, "bfloat16 + 8 bits, 8-bit moments", 1.8, PLAIN),
    (64_000_000, "bfloat16 throughout", 1.5, TORCH16),
    (64_000_000, "bfloat16, float32 moments", 1.0, DEEPSPEED),
)


def own_step(elements: int, dtype: str, options: dict[str, Any]) -> tuple[Step, Any]:
    param, grad = arrays(elements, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a parameter without anything beside it
        step = fs.Adam(param, lr=LR, betas=BETAS, eps=EPS, **options).step
    return lambda: step(grad), param


def arrays(elements: int, dtype: str) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    to = np.dtype(np.float32) if dtype == "float32" else bfloat16()
    # Small enough that a step of lr is not lost in the parameters' rounding.
    param = rng.standard_normal(elements, np.float32) * np.float32(0.01)
    return param.astype(to), rng.standard_normal(elements, np.float32).astype(to)


def torch_step(
    elements: int, dtype: str, make: Callable[[Any, list[Any]], Any]
) -> tuple[Step, list[Any]]:
    torch = importlib.import_module("torch")
    torch.set_num_threads(fs.get_num_threads())
    param, grad = arrays(elements, dtype)
    as_tensor = (
        torch.from_numpy
        if dtype == "float32"
        else lambda a: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    )
    tensor = as_tensor(param).requires_grad_()
    tensor.grad = as_tensor(grad)
    return make(torch, [tensor]).step, [param]


def torch_fused(torch: Any, tensors: list[Any]) -> Any:
    return torch.optim.Adam(tensors, lr=LR, betas=BETAS, eps=EPS, fused=True)


def deepspeed(_: Any, tensors: list[Any]) -> Any:
    return DeepSpeed().optimizer(tensors)


PEERS = {
    TORCH: ("float32", torch_fused),
    TORCH16: ("bfloat16", torch_fused),
    DEEPSPEED: ("bfloat16", deepspeed),
}


def contenders(elements: int, say: Callable[[str], None]) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    for name, (dtype, options, _) in OURS.items():
        steps[name], _ = own_step(elements, dtype, options)
    for name, (dtype, make) in PEERS.items():
        step = step_of(name, partial(torch_step, elements, dtype, make), say)
        if step is not None:
            steps[name] = step
    return steps


def run(elements: int, say: Callable[[str], None]) -> dict[str, Any]:
    others = machine.Others()
    timings = interleaved(contenders(elements, say), 1.0)
    disturbance = others.processors()
    plain = timings[PLAIN].median
    for name, timing in timings.items():
        moved = OURS[name][2] * elements / timing.median / 1e9 if name in OURS else 0.0
        say(
            f"{elements:>11,} {name:34} {timing.median * 1e3:9.3f} ms"
            f" {plain / timing.median:6.2f} x" + (f" {moved:6.1f} GB/s" if moved else "")
        )
    return {
        "elements": elements,
        "other_processors": disturbance,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="no array above a million")
    parser.add_argument("--output", type=Path, default=Path("bench-record"), metavar="DIR")
    args = parser.parse_args()
    machine.require(parser, {"ml_dtypes": "ml_dtypes"})
    cases = [run(n, print) for n in ((100_000,) if args.quick else (100_000, 64_000_000))]
    rows = []
    for elements, contender, factor, other in REQUIRED:
        medians = {
            name: timing["median"]
            for case in cases
            if case["elements"] == elements
            for name, timing in case["timings"].items()
        }
        if {contender, other} <= medians.keys():
            measured = medians[other] / medians[contender]
            rows.append(
                {"elements": elements, "claim": f"{contender} / {other}", "required": factor,
                 "measured": measured, "met": measured >= factor}
            )  # fmt: skip
            print(
                f"{elements:>11,} {contender} / {other}: {measured:.2f} "
                f"(at least {factor}) {'met' if measured >= factor else 'NOT MET'}"
            )
    record = {**machine.describe(), "cases": cases, "requirements": rows}
    print(f"wrote {machine.write_record(args.output, 'narrow', record['cpu'], record)}")


if __name__ == "__main__":
    main()
