"""Steps in fewer bytes on a GPU, and clipping: one array, beside peers' 8-bit steps on the same."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

import fusedstep as fs
from fusedstep.dtypes import bfloat16

from . import narrow
from .workloads import BETAS, EPS, LR

Step = Callable[[], object]

PLAIN, EIGHT_BIT, SMALLEST = (
    narrow.PLAIN,
    "float32, 8-bit moments",
    "bfloat16 + 8 bits, 8-bit moments",
)
CLIPPED = "float32, clip_norm"
SIXTEEN_BIT, OFFSET = "bfloat16 throughout", "bfloat16 throughout, odd offset"
BITSANDBYTES, TORCHAO, FLASH = "bitsandbytes Adam8bit", "torchao AdamW8bit", "FlashOptim"
SIZES = (1_000_000, 100_000_000, 1_000_000_000)
# (contender, at least this many times as fast as, the other), at the largest size, by CUDA events
REQUIRED = (
    (EIGHT_BIT, 1.6, PLAIN),
    (EIGHT_BIT, 1.0, BITSANDBYTES),
    (EIGHT_BIT, 1.0, TORCHAO),
    (SMALLEST, 1.0, FLASH),
    (CLIPPED, 1 / 1.2, PLAIN),
    (OFFSET, 1 / 1.03, SIXTEEN_BIT),
)


def arrays(cupy: Any, elements: int, dtype: str) -> tuple[Any, Any]:
    """Return a parameter and a gradient, made on the GPU."""
    made = []
    for seed, scale in ((0, 0.01), (1, 1.0)):
        values = cupy.random.default_rng(seed).standard_normal(elements, dtype=cupy.float32)
        values *= cupy.float32(scale)
        if dtype == "bfloat16":  # cut off, which any library can
            values = (values.view(np.uint32) >> 16).astype(np.uint16).view(bfloat16())
        made.append(values)
    return made[0], made[1]


def own_steps(cupy: Any, elements: int) -> Iterator[tuple[str, Step]]:
    by_dtype = {dtype: arrays(cupy, elements, dtype) for dtype in ("float32", "bfloat16")}
    for name, (dtype, options, _) in narrow.OURS.items():
        param, grad = by_dtype[dtype]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what rounding loses
            optimizer = fs.Adam(param, lr=LR, betas=BETAS, eps=EPS, **options)
        yield name, lambda optimizer=optimizer, grad=grad: optimizer.step(grad)
        if name == PLAIN:
            yield (
                CLIPPED,
                lambda optimizer=optimizer, grad=grad: optimizer.step(grad, clip_norm=1.0),
            )


def odd_offset(cupy: Any, elements: int) -> Step:
    """Return a step of a tensor of 8k + 1 elements, one element past a 16-byte boundary."""
    size = elements // 8 * 8 + 1
    param, grad = (array[1:] for array in arrays(cupy, size + 1, "bfloat16"))
    _, options, _ = narrow.OURS[SIXTEEN_BIT]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer = fs.Adam(param, lr=LR, betas=BETAS, eps=EPS, **options)
    return lambda: optimizer.step(grad)


def torch_step(cupy: Any, elements: int, dtype: str, make: Callable[[list[Any]], Any]) -> Step:
    """Return a peer's step; raise where it leaves its parameters as they are."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise RuntimeError("this PyTorch has no CUDA, or sees no GPU")
    param, grad = (torch.from_dlpack(array) for array in arrays(cupy, elements, "float32"))
    tensor = param.to(getattr(torch, dtype)).requires_grad_()
    tensor.grad = grad.to(tensor.dtype)
    before = tensor.detach()[:4096].clone()
    step: Step = make([tensor]).step
    for _ in range(3):
        step()
    if (
        tensor.detach()[:4096] != before
    ).float().mean() < 0.5:  # bfloat16 loses some steps, not most
        raise RuntimeError("does not update its parameters")
    return step


def bitsandbytes(tensors: list[Any]) -> Any:
    adam = importlib.import_module("bitsandbytes.optim").Adam8bit
    return adam(tensors, lr=LR, betas=BETAS, eps=EPS)


def torchao(tensors: list[Any]) -> Any:
    adam = importlib.import_module("torchao.optim").AdamW8bit
    return adam(tensors, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)


def flash(tensors: list[Any]) -> Any:
    adam = importlib.import_module("flashoptim").FlashAdam
    return adam(tensors, lr=LR, betas=BETAS, eps=EPS)


PEERS = {
    BITSANDBYTES: ("float32", bitsandbytes),
    TORCHAO: ("float32", torchao),
    FLASH: ("bfloat16", flash),
}


def run(
    cupy: Any,
    interleaved: Callable[[dict[str, Step]], dict[str, Any]],
    free_memory: Callable[[], int],
    limit: int,
    say: Callable[..., None],
) -> list[dict[str, Any]]:
    """Time every contender for which the GPU has memory, at each size up to a limit."""
    cases = []
    for elements in (size for size in SIZES if size <= limit):
        # Parameters and gradients of both types, and the largest state beside what is there.
        if free_memory() < 24 * elements:
            say(f"{elements:,} in fewer bytes: skipped, the GPU has too little memory")
            continue
        steps: dict[str, Step] = {}
        for name, step in own_steps(cupy, elements):
            steps[name] = step
            if free_memory() < 12 * elements:
                break
        if free_memory() >= 16 * elements:
            steps[OFFSET] = odd_offset(cupy, elements)
        for name, (dtype, make) in PEERS.items():
            if free_memory() < 16 * elements:
                say(f"{elements:,}: no GPU memory for {name}")
                continue
            try:
                steps[name] = torch_step(cupy, elements, dtype, make)
            except Exception as error:  # whatever keeps a peer from running is its reason
                say(f"{elements:,} {name}: not timed ({type(error).__name__}: {error})")
        timings = interleaved(steps)["gpu"]
        for name, timing in timings.items():
            say(f"{elements:>13,} {name:34} {timing.median * 1e3:9.3f} ms")
        cases.append(
            {"elements": elements, "timings": {name: asdict(t) for name, t in timings.items()}}
        )
        steps.clear()
        cupy.get_default_memory_pool().free_all_blocks()
    return cases


def requirements_of(cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Hold the figures against what is required of them."""
    of_largest = [case["timings"] for case in cases if case["elements"] == SIZES[-1]]
    medians = {name: t["median"] for timings in of_largest for name, t in timings.items()}
    for contender, factor, other in REQUIRED:
        measured = None
        if {contender, other} <= medians.keys():
            measured = medians[other] / medians[contender]
        yield {
            "case": f"in fewer bytes, {SIZES[-1]:,}",
            "claim": f"{contender}, times as fast as {other} (gpu)",
            "required": factor,
            "measured": measured,
            "met": None if measured is None else measured >= factor,
            "other_processors": None,
        }
