"""A step with state in host memory: ``python -m fusedstep.bench.offload``.

Held against the slower of its two parts, each measured alone in the same run: copying gradients to
the host and parameters back, both at the same time, and the ordinary step on host arrays. With a
GPU (through PyTorch) it is measured against torchao's CPUOffloadOptimizer and DeepSpeed's CPUAdam
too, where they are installed. Without one, a stand-in takes its place: copies take the time that a
link of ``--bandwidth`` would, and move nothing, so that processors are as free as with a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import fusedstep as fs
from fusedstep.offload import HostDevice, OffloadedOptimizer
from fusedstep.offload.pipeline import DEPTH

from . import machine

WANTED = 0.8  # of what the slower part alone would take
TENSOR = 16_000_000  # elements of the largest one
HYPER = {"lr": 1e-3, "weight_decay": 0.01}

Step = Callable[[], object]


class StandIn(HostDevice):
    """A GPU that is not there, at the end of a link whose two directions are independent.

    Parameters
    ----------
    bandwidth : float
        Of each direction, in bytes per second.
    """

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth = bandwidth
        self._free = {"down": 0.0, "up": 0.0}

    def download(self, pairs: Sequence[tuple[Any, Any]], marks: Sequence[Any]) -> Arrival:
        return self._sent("down", pairs)

    def upload(self, pairs: Sequence[tuple[Any, Any]], marks: Sequence[Any]) -> Arrival:
        return self._sent("up", pairs)

    def _sent(self, direction: str, pairs: Sequence[tuple[Any, Any]]) -> Arrival:
        size = sum(source.nbytes for source, _ in pairs)
        begin = max(time.perf_counter(), self._free[direction])
        self._free[direction] = begin + size / self._bandwidth
        return Arrival(self._free[direction])


class Arrival:
    def __init__(self, when: float) -> None:
        self._when = when

    def wait(self) -> None:
        if (left := self._when - time.perf_counter()) > 0:
            time.sleep(left)


class NoStep:
    """In the place of a bucket's native optimizer: what is left is the copying."""

    steps: Sequence[int] = ()

    def step(self, *arguments: Any) -> None:
        pass


def host_arrays(count: int, dtype: np.dtype[Any], value: float) -> list[Any]:
    sizes = [min(TENSOR, count - begin) for begin in range(0, count, TENSOR)]
    return [np.full(size, value, dtype) for size in sizes]


def median_seconds(step: Step, repeats: int) -> float:
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ordinary_seconds(count: int, dtype: np.dtype[Any], storage: Any, repeats: int) -> float:
    grads = host_arrays(count, dtype, 1e-3)
    optimizer = fs.AdamW(host_arrays(count, dtype, 0.5), **HYPER, **storage)
    return median_seconds(lambda: optimizer.step(grads), repeats)


def without_steps(core: OffloadedOptimizer) -> None:
    steps = core._pipeline.steps
    steps[:] = [step._replace(native=NoStep()) for step in steps]


def on_stand_in(
    count: int, dtype: np.dtype[Any], bandwidth: float, storage: Any, bucket_bytes: int
) -> Callable[..., tuple[Step, OffloadedOptimizer]]:
    params, grads = host_arrays(count, dtype, 0.5), host_arrays(count, dtype, 1e-3)

    def make(clip_norm: float | None = None, **options: Any) -> tuple[Step, OffloadedOptimizer]:
        optimizer = OffloadedOptimizer(
            fs.AdamW, params, device=StandIn(bandwidth), bucket_bytes=bucket_bytes,
            **HYPER, **storage, **options,
        )  # fmt: skip
        return lambda: optimizer.step(grads, clip_norm=clip_norm), optimizer

    return make


def on_gpu(
    torch: Any, count: int, dtype: np.dtype[Any], storage: Any, bucket_bytes: int
) -> tuple[Callable[..., tuple[Step, OffloadedOptimizer]], list[Any]]:
    from fusedstep.offload.torch import OffloadedOptimizer as Offloaded

    kind = getattr(torch, dtype.name)
    params = [
        torch.full((array.size,), 0.5, dtype=kind, device="cuda", requires_grad=True)
        for array in host_arrays(count, np.dtype(np.int8), 0)
    ]
    for param in params:
        param.grad = torch.full_like(param, 1e-3)

    def make(clip_norm: float | None = None, **options: Any) -> tuple[Step, OffloadedOptimizer]:
        optimizer = Offloaded(
            fs.AdamW, params, bucket_bytes=bucket_bytes, **HYPER, **storage, **options
        )

        def step() -> None:
            optimizer.step(clip_norm=clip_norm)
            torch.cuda.synchronize()

        return step, optimizer._core

    return make, params


def peers(torch: Any, params: list[Any]) -> dict[str, Callable[[], Step]]:
    """Return how the peers that are installed take the same step, and name those that are not."""
    made: dict[str, Callable[[], Step]] = {}
    try:
        offload = importlib.import_module("torchao.optim").CPUOffloadOptimizer
    except Exception as error:
        print(f"torchao: not measured ({type(error).__name__}: {error})")
    else:

        def torchao() -> Step:
            optimizer = offload(params, torch.optim.AdamW, fused=True, **HYPER)
            ones = [torch.full_like(param, 1e-3) for param in params]

            def step() -> None:
                # Its copies begin in the hooks of a backward pass.
                for param in params:
                    param.grad = None
                torch.autograd.backward(params, ones)
                optimizer.step()
                torch.cuda.synchronize()

            return step

        made["torchao CPUOffloadOptimizer"] = torchao
    try:
        cpu_adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    except Exception as error:
        print(f"DeepSpeed: not measured ({type(error).__name__}: {error})")
    else:

        def deepspeed() -> Step:
            host = [param.detach().float().cpu().pin_memory() for param in params]
            for copy in host:
                copy.grad = torch.empty_like(copy).pin_memory()
            optimizer = cpu_adam(host, adamw_mode=True, **HYPER)

            def step() -> None:
                for copy, param in zip(host, params, strict=True):
                    copy.grad.copy_(param.grad, non_blocking=True)
                torch.cuda.synchronize()
                optimizer.step()
                for copy, param in zip(host, params, strict=True):
                    param.data.copy_(copy, non_blocking=True)
                torch.cuda.synchronize()

            return step

        made["DeepSpeed CPUAdam"] = deepspeed
    return made


def cuda_torch() -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fusedstep.bench.offload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--params", type=float, help="(default: 1e9 with a GPU, else 64e6)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32",
        help="bfloat16 has float32 copies in host memory (default: %(default)s)")  # fmt: skip
    add("--bandwidth", type=float, default=25e9,
        help="of the stand-in's link in each direction, bytes/s (default: 25e9)")  # fmt: skip
    add("--bucket-bytes", type=int, default=16 << 20, help="(default: %(default)s)")
    add("--steps", type=int, default=9, help="to take the median of (default: 9)")
    add("--stand-in", action="store_true", help="also where there is a GPU")
    args = parser.parse_args(argv)

    torch = None if args.stand_in else cuda_torch()
    count = int(args.params or (1e9 if torch else 64e6))
    storage: dict[str, Any] = {}
    dtype = np.dtype(np.float32)
    if args.dtype == "bfloat16":
        dtype, storage = fs.narrow.bfloat16(), {"master_weights": "float32"}
    where = (
        torch.cuda.get_device_name()
        if torch
        else f"NO GPU: a stand-in whose link has {args.bandwidth / 1e9:g} GB/s each way"
    )
    print(f"{count:,} {args.dtype} parameters, AdamW, buckets of {args.bucket_bytes:,} bytes")
    print(f"{machine.cpu_model()}, {fs.get_num_threads()} threads; {where}\n")

    processor = ordinary_seconds(count, dtype, storage, args.steps)
    rivals: dict[str, Callable[[], Step]] = {}
    if torch:
        make, params = on_gpu(torch, count, dtype, storage, args.bucket_bytes)
        rivals = peers(torch, params)
    else:
        make = on_stand_in(count, dtype, args.bandwidth, storage, args.bucket_bytes)
    step, core = make(pin_params=True)
    without_steps(core)
    link = median_seconds(step, args.steps)
    limit = max(link, processor)

    print("| | ms | limit / step |\n|---|--:|--:|")
    print(f"| copies alone, both ways | {link * 1e3:.1f} | |")
    print(f"| ordinary step alone | {processor * 1e3:.1f} | |")
    missed = False
    seconds = {}
    for name, options in (
        ("step, pin_params", {"pin_params": True}),
        ("step", {}),
        ("step, clip_norm", {"clip_norm": 1.0}),
    ):
        del step, core
        step, core = make(**options)
        seconds[name] = median_seconds(step, args.steps)
        ratio = limit / seconds[name]
        judged = "" if name != "step, pin_params" else f" (at least {WANTED:g})"
        if judged and ratio < WANTED:
            missed, judged = True, f" (at least {WANTED:g}: MISSED)"
        print(f"| {name} | {seconds[name] * 1e3:.1f} | {ratio:.2f}{judged} |", flush=True)
    held = core.memory_bytes()
    del step, core
    for name, prepare in rivals.items():
        rival = median_seconds(prepare(), args.steps)
        slower = rival <= seconds["step, pin_params"]
        missed = missed or slower
        print(f"| {name} | {rival * 1e3:.1f} | {limit / rival:.2f}{' (FASTER)' * slower} |")
    print(
        f"\nHost memory: parameters {held['params'] / 1e6:.0f} MB, state {held['state'] / 1e6:.0f} "
        f"MB, {2 * DEPTH} pinned buffers {held['buffers'] / 1e6:.0f} MB"
    )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
