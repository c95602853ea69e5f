"""The optimizers for PyTorch against PyTorch's own: ``python -m fusedstep.bench.torch_optim``."""

import argparse
import sys

import torch

import fusedstep.torch as fst

from .timing import interleaved
from .workloads import MANY_SMALL, MLP

LARGE = 64_000_000
# What is stepped, the shapes, the dtype, our options, and at least how many times as fast as fused.
CASES = (
    (MLP.name, MLP.shapes, torch.float32, {}, 5.0),
    (MANY_SMALL.name, MANY_SMALL.shapes, torch.float32, {}, 20.0),
    (
        f"{LARGE:,} bfloat16, 8-bit state",
        ((LARGE,),),
        torch.bfloat16,
        {"state_dtype": "8bit", "master_weights": "stochastic"},
        1.6,
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the large case")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of each contender")
    arguments = parser.parse_args()
    missed = 0
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; medians of one step")
    for name, shapes, dtype, options, wanted in CASES[:2] if arguments.quick else CASES:
        optimizers = {
            "fusedstep": fst.AdamW(_parameters(shapes, dtype), **options),
            "torch fused": torch.optim.AdamW(_parameters(shapes, dtype), fused=True),
        }
        timings = interleaved({k: o.step for k, o in optimizers.items()}, arguments.budget)
        ours, theirs = (timings[k].median for k in optimizers)
        ratio = theirs / ours
        missed += ratio < wanted
        print(
            f"{name}: fusedstep {ours * 1e6:,.1f} us, torch fused {theirs * 1e6:,.1f} us, "
            f"{ratio:.2f} times (at least {wanted:g}{'' if ratio >= wanted else ': MISSED'})",
            flush=True,
        )
    return 1 if missed else 0


def _parameters(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        parameter.grad = torch.randn(shape, generator=generator).to(dtype)
        parameters.append(parameter)
    return parameters


if __name__ == "__main__":
    sys.exit(main())
