"""The optimizers for PyTorch against others: ``python -m fusedstep.bench.torch_optim``.

`fusedstep.torch.AdamW` beside PyTorch's own and, where it is installed, DeepSpeed's CPUAdam on
bfloat16, each stepping tensors of equal values in one process.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fusedstep.torch as fst

from . import machine
from .peers import DeepSpeed, step_of
from .timing import Step, interleaved
from .workloads import MANY_SMALL, MLP

OURS, FUSED, DEEPSPEED = "fusedstep", "torch fused", "DeepSpeed"
LARGE = 64_000_000
PEERS: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    FUSED: lambda params: torch.optim.AdamW(params, fused=True),
    DEEPSPEED: lambda params: DeepSpeed().optimizer(params, weight_decay=1e-2, adamw_mode=True),
}


@dataclass(frozen=True)
class Case:
    """What is stepped, our options, and how many times as fast as each peer we are at least."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    required: Mapping[str, float]
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = (
    Case(MLP.name, MLP.shapes, {FUSED: 5.0}),
    Case(MANY_SMALL.name, MANY_SMALL.shapes, {FUSED: 20.0}),
    Case(
        f"{LARGE:,} bfloat16, 8-bit state",
        ((LARGE,),),
        {FUSED: 1.6, DEEPSPEED: 1.6},
        torch.bfloat16,
        {"state_dtype": "8bit", "master_weights": "stochastic"},
    ),
)


def run(case: Case, budget: float) -> dict[str, Any]:
    steps: dict[str, Step] = {OURS: fst.AdamW(_parameters(case), **case.options).step}
    for name in case.required:
        step = step_of(name, partial(_peer_step, PEERS[name], case), print)
        if step is not None:
            steps[name] = step
    others = machine.Others()
    timings = interleaved(steps, budget)
    return {
        "case": case.name,
        "other_processors": others.processors(),
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def requirements_of(case: Case, timings: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, required in case.required.items():
        if name in timings:
            measured = timings[name]["median"] / timings[OURS]["median"]
            rows.append(
                {"case": case.name, "claim": f"{OURS} / {name}", "required": required,
                 "measured": measured, "met": measured >= required}
            )  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the large case")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of each contender")
    parser.add_argument("--output", type=Path, default=Path("bench-record"), metavar="DIR")
    args = parser.parse_args(arguments)
    if not args.quick:
        machine.require(parser, {"ml_dtypes": "ml_dtypes"})
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; medians of one step")
    cases, rows = [], []
    for case in CASES[:2] if args.quick else CASES:
        cases.append(run(case, args.budget))
        timings = cases[-1]["timings"]
        found = ", ".join(f"{name} {t['median'] * 1e6:,.1f} us" for name, t in timings.items())
        print(f"{case.name}: {found}")
        for row in requirements_of(case, timings):
            met = "met" if row["met"] else "MISSED"
            print(f"    {row['claim']}: {row['measured']:.2f} (at least {row['required']:g}) {met}")
            rows.append(row)
    record = {
        **machine.describe(),
        "torch_threads": torch.get_num_threads(),
        "cases": cases,
        "requirements": rows,
    }
    path = machine.write_record(args.output, "torch_optim", record["cpu"], record)
    print(f"wrote {path}")
    return 0 if all(row["met"] for row in rows) else 1


def _peer_step(make: Callable[[list[torch.Tensor]], Any], case: Case) -> tuple[Step, list[Any]]:
    params = _parameters(case)
    return make(params).step, [_memory(param) for param in params]


def _memory(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _parameters(case: Case) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in case.shapes:
        # Small enough that a step of lr is not lost in the parameters' rounding.
        values = torch.randn(shape, generator=generator) * 0.01
        parameters.append(torch.nn.Parameter(values.to(case.dtype)))
        parameters[-1].grad = torch.randn(shape, generator=generator).to(case.dtype)
    return parameters


if __name__ == "__main__":
    sys.exit(main())
