"""The benchmark on a GPU: CuPy arrays, peers on the same, the device's own copy as the limit."""

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import fusedstep as fs

from . import cuda_narrow, machine, peers
from .timing import Timing
from .workloads import BETAS, EPS, GPT2_SMALL, LR, MANY_SMALL, MLP, Workload, one_array

Step = Callable[[], object]

OURS, BY_HAND, FUSED = "fusedstep", "CuPy", "torch fused"
COPY = "roofline"  # what the pictures call the limit
OFFSET = "fusedstep, odd offset"
OWN_STATE = "fusedstep, odd offset, own state"
PARAMETER_ALONE = "fusedstep, parameter alone at an odd offset"
OFFSETS = (OFFSET, OWN_STATE, PARAMETER_ALONE)

# How a contender's step is timed: "call" from the call to the end of the work on the GPU; "gpu" by
# CUDA events around steps in a row; "python" until the call returns, the GPU being idle before.
# (contender, measure, at least this many times as fast as, the other; "best peer" is the fastest)
Requirement = tuple[str, str, float, str]
CASES: tuple[tuple[Workload, tuple[Requirement, ...]], ...] = (
    (one_array(128), ()),
    (MLP, ()),
    (MANY_SMALL, ((OURS, "call", 5, FUSED),)),
    (GPT2_SMALL, ((OURS, "call", 1.3, FUSED),)),
    (
        one_array(100_000_000),
        (
            (OURS, "gpu", 5, BY_HAND),
            (OFFSET, "gpu", 1 / 1.03, OURS),
            (OWN_STATE, "gpu", 1 / 1.03, OURS),
        ),
    ),
    (
        one_array(1_000_000_000),
        ((OURS, "gpu", 0.92, COPY), (OURS, "gpu", 1.05, FUSED), (OURS, "gpu", 1.0, "best peer")),
    ),
)
PYTHON_COST = 25e-6  # seconds, of a step of 148 arrays
COPY_BYTES = 1 << 30


class Fusedstep(peers.Peer):
    name = OURS
    install = "pip install 'fusedstep[cuda12]' or [cuda13]"
    rules = ("gd", "momentum", "adam")

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy

    def arrays(self, arrays: Iterable[Any]) -> list[Any]:
        return [self.cupy.asarray(array) for array in arrays]

    def result(self, params: list[Any]) -> Callable[[], list[Any]]:
        return lambda: [self.cupy.asnumpy(p) for p in params]

    def make(self, params: list[Any], grads: list[Any], rule: str) -> peers.Made:
        params, grads = self.arrays(params), self.arrays(grads)
        optimizer: fs.Optimizer
        if rule == "adam":
            optimizer = fs.Adam(params, lr=LR, betas=BETAS, eps=EPS)
        else:
            optimizer = fs.GD(params, lr=LR, momentum=0.9 if rule == "momentum" else 0.0)
        step = optimizer.step
        return lambda: step(grads), self.result(params)


class CuPy(Fusedstep):
    """Written by hand, in place where a careful person would."""

    name = BY_HAND
    install = "pip install cupy-cuda13x"
    rules = ("adam",)

    def make(self, params: list[Any], grads: list[Any], rule: str) -> peers.Made:
        params, grads = self.arrays(params), self.arrays(grads)
        return peers.adam_by_hand(self.cupy, params, grads), self.result(params)


class Torch(Fusedstep):
    name = FUSED
    install = "pip install torch (built for CUDA)"
    rules = ("adam",)
    implementation = "fused"

    def __init__(self, cupy: Any) -> None:
        super().__init__(cupy)
        self.torch = importlib.import_module("torch")
        if not self.torch.cuda.is_available():
            raise RuntimeError("this PyTorch has no CUDA, or sees no GPU")

    def make(self, params: list[Any], grads: list[Any], rule: str) -> peers.Made:
        params, grads = self.arrays(params), self.arrays(grads)
        tensors = [self.torch.from_dlpack(p) for p in params]
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = self.torch.from_dlpack(grad)
        optimizer = self.torch.optim.Adam(
            tensors, lr=LR, betas=BETAS, eps=EPS, **{self.implementation: True}
        )
        return optimizer.step, self.result(params)


class TorchForeach(Torch):
    name = "torch foreach"
    implementation = "foreach"


PEERS: tuple[Any, ...] = (Fusedstep, CuPy, Torch, TorchForeach)


@dataclass
class Clock:
    """Times steps on the current device and its default stream, where CuPy and PyTorch both are."""

    cupy: Any

    def wait(self) -> None:
        self.cupy.cuda.Device().synchronize()

    def call(self, step: Step) -> float:
        self.wait()
        start = time.perf_counter()
        step()
        self.wait()
        return time.perf_counter() - start

    def python(self, step: Step) -> float:
        self.wait()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def gpu(self, step: Step, calls: int) -> float:
        begin, end = (self.cupy.cuda.Event() for _ in range(2))
        self.wait()
        begin.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(begin, end)) * 1e-3 / calls


def interleaved(
    clock: Clock, contenders: Mapping[str, Step], budget: float
) -> dict[str, dict[str, Timing]]:
    """Time each contender for about `budget` seconds, in an order that rotates."""
    longest = 0.0
    for step in contenders.values():
        for _ in range(3):
            clock.call(step)
        longest = max(longest, clock.call(step))
    calls = max(2, min(20, int(0.02 / longest)))
    rounds = max(9, min(60, int(budget / (longest * (calls + 4)))))
    samples: dict[str, dict[str, list[float]]] = {
        measure: {name: [] for name in contenders} for measure in ("call", "gpu", "python")
    }
    names = list(contenders)
    gc.disable()
    try:
        for i in range(rounds):
            for j in range(len(names)):
                name = names[(i + j) % len(names)]
                step = contenders[name]
                clock.call(step)  # off the clock: caches as its own last step left them
                samples["call"][name].append(clock.call(step))
                samples["python"][name].append(clock.python(step))
                samples["gpu"][name].append(clock.gpu(step, calls))
    finally:
        gc.enable()
        clock.wait()
    return {
        measure: {name: summary(values, calls) for name, values in of.items()}
        for measure, of in samples.items()
    }


def summary(samples: list[float], calls: int) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4)
    return Timing(median, low, high, len(samples), calls)


def available_peers(cupy: Any, report: Callable[[str, str], None]) -> list[Any]:
    """Return the peers that are there and right; report the others with the reason."""
    found = []
    for peer_class in PEERS:
        try:
            peer = peer_class(cupy)
        except Exception as error:  # whatever keeps a peer from loading is its reason
            report(
                peer_class.name, f"missing ({type(error).__name__}: {error}); {peer_class.install}"
            )
            continue
        try:
            for rule in peer.rules:
                peers.check(peer, rule)
        except Exception as error:
            report(peer_class.name, f"WRONG, not timed ({error})")
            continue
        report(peer_class.name, "ok")
        found.append(peer)
    return found


def random_arrays(cupy: Any, workload: Workload, seed: int) -> list[Any]:
    """Return a workload's arrays, made on the GPU where they are large."""
    if workload.elements < 10_000_000:
        return [cupy.asarray(array) for array in workload.arrays(seed)]
    generator = cupy.random.default_rng(seed)
    return [generator.standard_normal(shape, dtype=cupy.float32) for shape in workload.shapes]


def device_copy(cupy: Any, clock: Clock) -> float:
    """Return the bytes a second, read and written, of copying memory on the device."""
    source, target = (cupy.zeros(COPY_BYTES // 4, cupy.float32) for _ in range(2))
    timings = interleaved(clock, {"copy": lambda: cupy.copyto(target, source)}, 0.5)
    return 2 * COPY_BYTES / timings["gpu"]["copy"].median


def odd_offsets(cupy: Any, elements: int) -> dict[str, Step]:
    """Return steps of a tensor of 4k + 1 elements, one element past a 16-byte boundary.

    Of everything; of parameter and gradient, where the state is an optimizer's; of the parameter
    alone, so that no two accesses of a thread are alike.
    """
    size = elements // 4 * 4 + 1
    p, g, m, v = (cupy.ones(size + 1, cupy.float32)[1:] for _ in range(4))
    optimizer = fs.Adam(p, lr=LR, betas=BETAS, eps=EPS)
    g_0, m_0, v_0 = (cupy.ones(size, cupy.float32) for _ in range(3))
    t = 0

    def step(*state: Any) -> None:
        nonlocal t
        t += 1
        fs.adam_step(p, *state, step=t, lr=LR, betas=BETAS, eps=EPS)

    return {
        OFFSET: lambda: step(g, m, v),
        OWN_STATE: lambda: optimizer.step(g),
        PARAMETER_ALONE: lambda: step(g_0, m_0, v_0),
    }


def launches(step: Step) -> int:
    """Return how many kernels a step of ours launches."""
    backend = importlib.import_module("fusedstep._cuda")
    before = backend.launch_count()
    step()
    return int(backend.launch_count() - before)


def run_case(
    cupy: Any,
    clock: Clock,
    workload: Workload,
    contenders: Iterable[Any],
    say: Callable[..., None],
    budget: float = 1.0,
    with_offset: bool = False,
) -> dict[str, Any] | None:
    """Time every contender for whose state and temporaries the GPU has memory."""
    steps: dict[str, Step] = {}
    one = workload.elements * 4
    free = free_memory(cupy)
    if free < 6 * one:
        say(
            f"{workload.name}: skipped, needs {6 * one >> 30} GiB on the GPU, {free >> 30} are free"
        )
        return None
    params, grads = (random_arrays(cupy, workload, seed) for seed in range(2))
    for peer in contenders:
        # Two moments, and what a step by hand or over lists allocates.
        if free_memory(cupy) < 6 * one:
            say(f"{workload.name}: no GPU memory for {peer.name}")
            continue
        steps[peer.name] = peer.make(params, grads, "adam")[0]
    launched = launches(steps[OURS]) if OURS in steps else None
    if with_offset and free_memory(cupy) >= 10 * one:
        steps.update(odd_offsets(cupy, workload.elements))
    timings = interleaved(clock, steps, budget)
    say(
        f"{workload.name}: "
        + ", ".join(f"{k} {t.median * 1e6:,.1f} us" for k, t in timings["call"].items())
    )
    steps.clear()
    cupy.get_default_memory_pool().free_all_blocks()
    return {
        "name": workload.name,
        "elements": workload.elements,
        "arrays": len(workload.shapes),
        "rule": workload.rule,
        "dtype": workload.dtype,
        "bytes": workload.bytes_moved,
        "launches": launched,
        "timings": {name: asdict(t) for name, t in timings["call"].items()},
        "gpu_timings": {name: asdict(t) for name, t in timings["gpu"].items()},
        "python_timings": {name: asdict(t) for name, t in timings["python"].items()},
    }


def free_memory(cupy: Any) -> int:
    """Return the bytes that can be allocated on the GPU."""
    return int(cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes())


def describe(cupy: Any) -> dict[str, Any]:
    device = cupy.cuda.Device()
    properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    name = properties["name"]
    backend = importlib.import_module("fusedstep._cuda").info()
    return {
        "gpu": name.decode() if isinstance(name, bytes) else name,
        "compute_capability": device.compute_capability,
        "gpu_memory_bytes": properties["totalGlobalMem"],
        "caches": {"L2": properties["l2CacheSize"]},
        "driver": backend["driver"],
        "toolkit": backend["toolkit"],
        "cupy": cupy.__version__,
    }


def run(cupy: Any, clock: Clock, quick: bool, wanted: list[str] | None, say: Any) -> dict[str, Any]:
    """Return the record."""
    record: dict[str, Any] = {
        **machine.describe(),
        **describe(cupy),
        "peers": {},
    }
    say(f"{record['gpu']}, driver for CUDA {record['driver']}")

    def report(name: str, status: str) -> None:
        record["peers"][name] = status
        say(f"  {name}: {status}", highlight=False)

    contenders = available_peers(cupy, report)
    if wanted is not None:
        contenders = [peer for peer in contenders if peer.name in {OURS, *wanted}]
    limit = 1_000_000 if quick else 1 << 62
    record["copy_bytes_per_second"] = []
    record["cases"] = []
    for workload, requirements in CASES:
        if workload.elements > limit:
            continue
        with_offset = any(OFFSET in requirement for requirement in requirements)
        copy = device_copy(cupy, clock)
        case = run_case(cupy, clock, workload, contenders, say, with_offset=with_offset)
        copy = (copy + device_copy(cupy, clock)) / 2
        record["copy_bytes_per_second"].append(copy)
        if case is None:
            continue
        # Beyond the caches it is the limit.
        if workload.elements >= 100_000_000:
            roof = asdict(Timing(*[case["bytes"] / copy] * 3, 0, 0))
            case["timings"][COPY] = case["gpu_timings"][COPY] = roof
        record["cases"].append(case)
    powers = range(5, 29, 6 if quick else 1)
    record["sweep"] = [
        case
        for power in powers
        if 1 << power <= limit
        and (case := run_case(cupy, clock, one_array(1 << power), contenders, say, 0.2))
    ]
    record["narrow"] = cuda_narrow.run(
        cupy,
        lambda steps: interleaved(clock, steps, 1.0),
        lambda: free_memory(cupy),
        limit,
        say,
    )
    record["requirements"] = [
        *requirements_of(record),
        *cuda_narrow.requirements_of(record["narrow"]),
    ]
    return record


def requirements_of(record: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Hold the figures against what is required of them."""
    cases = {case["name"]: case for case in record["cases"]}
    keys = {"call": "timings", "gpu": "gpu_timings"}

    def row(
        case: str, claim: str, required: float, measured: float | None, *, at_most: bool = False
    ) -> dict[str, Any]:
        met = None
        if measured is not None:
            met = measured <= required if at_most else measured >= required
        return {
            "case": case, "claim": claim, "required": required, "measured": measured, "met": met,
            "other_processors": None,
        }  # fmt: skip

    for workload, wanted in CASES:
        case = cases.get(workload.name)
        for contender, measure, factor, other in wanted:
            timings = {} if case is None else case[keys[measure]]
            medians = {name: timing["median"] for name, timing in timings.items()}
            ours = (OURS, *OFFSETS, COPY)
            others = [m for name, m in medians.items() if name not in ours]
            if others:
                medians["best peer"] = min(others)
            there = {contender, other} <= medians.keys()
            named = "device copy" if other == COPY else other
            yield row(
                workload.name,
                f"{contender}, times as fast as {named} ({measure})",
                factor,
                medians[other] / medians[contender] if there else None,
            )
    case = cases.get(GPT2_SMALL.name)
    cost = None if case is None else case["python_timings"][OURS]["median"] * 1e6
    claim = f"{OURS}, microseconds until the call returns"
    yield row(GPT2_SMALL.name, claim, PYTHON_COST * 1e6, cost, at_most=True)
    launched = None if case is None else case["launches"]
    yield row(GPT2_SMALL.name, f"{OURS}, launches of a step", 1, launched, at_most=True)
