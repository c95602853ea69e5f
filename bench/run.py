"""The benchmark: measure, compare with what is required, write JSON and pictures."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import fusedstep as fs
from fusedstep import _roofline

from . import machine, memory
from .peers import FusedstepFunction, FusedstepOptimizer, NumPy, available_peers
from .timing import Timing, interleaved
from .workloads import GPT2_SMALL, MANY_SMALL, MLP, Workload, one_array

OURS, FUNCTION, RAW = FusedstepOptimizer.name, FusedstepFunction.name, "torch raw op"
ROOF = "roofline"

# Of a workload: (contender, at least this many times as fast as, the other). "best peer" is the
# fastest of those that are not ours.
Requirement = tuple[str, float, str]
CASES: tuple[tuple[Workload, tuple[Requirement, ...]], ...] = (
    (
        one_array(128),
        ((OURS, 30, "torch fused"), (FUNCTION, 5, RAW)),
    ),
    (one_array(10_240), ()),
    (one_array(100_000), ((OURS, 1.4, RAW), (OURS, 2, "DeepSpeed"))),
    (one_array(1_000_000), ((OURS, 1.3, RAW), (OURS, 2, "DeepSpeed"))),
    (one_array(1_000_000, "gd"), ()),
    (one_array(1_000_000, "momentum"), ()),
    (one_array(1_000_000, "adam", "float64"), ()),
    (MANY_SMALL, ((OURS, 150, "torch fused"),)),
    (MLP, ()),
    (GPT2_SMALL, ((OURS, 1.0, "torch fused"),)),
    (
        one_array(64_000_000),
        ((OURS, 0.95, ROOF), (OURS, 1.0, "best peer"), (OURS, 7, NumPy.name)),
    ),
)
SMALL_LATENCY = 1.5e-6  # seconds, of the function at 128 elements
DENORMAL_RATIO = 1.1
CLIP_RATIO = 1.2  # clipping and step, of the plain step, beyond the caches
ZERO_SPEEDUP = 1.1  # a step that zeros its gradients, against a step and a fill
ROOFED = 1_000_000  # elements from which the roofline is measured
LARGE = 16_000_000  # elements: beyond the caches, and too much memory for a copy per contender
QUIET = 0.1  # processors that others may use before a figure counts as disturbed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes, none above a million")
    parser.add_argument("--threads", type=int, metavar="N", help="for every contender")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only these (default: all)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench-record"),
        metavar="DIR",
        help="folder for the JSON record and the pictures (default: %(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    import matplotlib  # noqa: F401  (asked for before the work begins)
    from rich.console import Console

    console = Console(stderr=True)
    if args.device == "cuda":
        return main_cuda(args, console.print)
    if args.threads is not None:
        fs.set_num_threads(args.threads)
    record: dict[str, Any] = machine.describe()
    console.print(f"{record['cpu']}, {record['threads']} threads, {record['isa']}")

    # First, because some peers' libraries make malloc keep what is freed, which hides growth.
    record["memory"] = run_memory(1_000_000 if args.quick else 64_000_000, console.print)

    record["peers"] = {}

    def report(name: str, status: str) -> None:
        record["peers"][name] = status
        console.print(f"  {name}: {status}", highlight=False)

    peers = available_peers(report)
    if args.peers is not None:
        peers = [peer for peer in peers if peer.name in args.peers or peer.name.startswith(OURS)]

    limit = 1_000_000 if args.quick else 1 << 62
    record["cases"] = [
        run_case(workload, peers, console.print)
        for workload, _ in CASES
        if workload.elements <= limit and fits(workload, peers, console.print)
    ]
    record["denormals"] = [
        run_denormals(n, console.print) for n in (100_000, 64_000_000) if n <= limit
    ]
    record["options"] = [
        run_options(n, console.print) for n in (1_000_000, 64_000_000) if n <= limit
    ]
    record["sweep"] = [
        run_case(one_array(1 << power), peers, console.print, budget=0.15)
        for power in range(5, 27, 5 if args.quick else 1)
        if 1 << power <= limit and fits(one_array(1 << power), peers, console.print)
    ]
    record["requirements"] = requirements(record)
    write(record, args.output, "cpu")
    return 0


def main_cuda(args: argparse.Namespace, say: Callable[..., None]) -> int:
    from . import cuda

    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy or the driver is missing, or they do not fit each other
        say(f"bench --device cuda needs CuPy and a GPU: {type(error).__name__}: {error}")
        return 1
    record = cuda.run(cupy, cuda.Clock(cupy), args.quick, args.peers, say)
    write(record, args.output, "gpu")
    return 0


def write(record: dict[str, Any], folder: Path, kind: str) -> None:
    """Write a record and its pictures, and print what was required."""
    from . import plot

    path = machine.write_record(folder, kind, record[kind], record)
    pictures = plot.draw(record, folder, path.stem)
    print_requirements(record["requirements"])
    print("\n".join(f"wrote {file}" for file in (path, *pictures)))


def roofline(workload: Workload) -> Callable[[], object] | None:
    """Return a pass over the streams of a workload's one array, or None if it has several."""
    if len(workload.shapes) != 1:
        return None
    streams = [
        np.ones(workload.elements, workload.dtype)
        for _ in range({"gd": 2, "momentum": 3}.get(workload.rule, 4))
    ]
    read, *written = streams
    threads = fs.get_num_threads()
    # Whichever loop is faster here is the roof.
    best = min((False, True), key=lambda way: min(_roofline.run(written, read, threads, 5, way)))
    return lambda: _roofline.run(written, read, threads, 1, best)


def fits(workload: Workload, peers: Iterable[Any], say: Callable[..., None]) -> bool:
    """Whether there is memory for two moments per contender, and temporaries, of a workload."""
    arrays = 2 * sum(workload.rule in peer.rules for peer in peers) + 12
    needed = arrays * workload.elements * np.dtype(workload.dtype).itemsize
    available = machine.available_memory()
    if workload.elements < LARGE or available is None or needed < available:
        return True
    say(f"{workload.name}: skipped, needs {needed >> 20} MiB of memory; try --peers")
    return False


def updates(step: Callable[[], object], result: Callable[[], list[Any]]) -> bool:
    """Whether a step changes every array."""
    before = [array.flat[0] for array in result()]
    step()
    return all(a != array.flat[0] for a, array in zip(before, result(), strict=True))


def run_case(
    workload: Workload, peers: Iterable[Any], say: Callable[..., None], budget: float = 1.0
) -> dict[str, Any]:
    """Time every contender on a workload."""
    grads = workload.grads()
    contenders: dict[str, Callable[[], object]] = {}
    large = workload.elements >= LARGE
    shared = workload.params() if large else None
    for peer in peers:
        if workload.rule in peer.rules and workload.dtype in peer.dtypes:
            params = workload.params() if shared is None else shared
            step, result = peer.make(params, grads, workload.rule)
            if updates(step, result):
                contenders[peer.name] = step
            else:
                say(f"{workload.name}: {peer.name} does not update its parameters, not timed")
    # It is a limit where the arrays are larger than the caches of one core.
    roof = roofline(workload) if workload.elements >= ROOFED else None
    if roof is not None:
        contenders[ROOF] = roof
    others = machine.Others()
    timings = interleaved(contenders, budget)
    disturbance = others.processors()
    say(f"{workload.name}: " + ", ".join(f"{k} {seconds(t)}" for k, t in timings.items()))
    return {
        "name": workload.name,
        "elements": workload.elements,
        "arrays": len(workload.shapes),
        "rule": workload.rule,
        "dtype": workload.dtype,
        "bytes": workload.bytes_moved,
        "other_processors": disturbance,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def run_denormals(elements: int, say: Callable[..., None]) -> dict[str, Any]:
    """Time Adam whose moments have decayed into denormals against moments of ordinary size."""
    contenders = {}
    for name, moment in (("normal", 1e-3), ("denormal", 1e-40)):
        p, g = np.ones(elements, np.float32), np.zeros(elements, np.float32)
        if name == "normal":
            g[:] = 1e-3
        m, v = np.full_like(p, moment), np.full_like(p, moment)
        contenders[name] = lambda p=p, g=g, m=m, v=v: fs.adam_step(p, g, m, v, step=1000)
    others = machine.Others()
    timings = interleaved(contenders, 1.0)
    disturbance = others.processors()
    ratio = timings["denormal"].median / timings["normal"].median
    say(f"denormal moments, {elements:,}: {ratio:.2f} times the normal time")
    return {
        "elements": elements,
        "ratio": ratio,
        "other_processors": disturbance,
        "timings": {k: asdict(t) for k, t in timings.items()},
    }


def run_options(elements: int, say: Callable[..., None]) -> dict[str, Any]:
    """Time what a step can do to its gradients on the way, against the plain step."""
    params, grads = np.ones(elements, np.float32), np.ones(elements, np.float32)
    # The decay keeps the moments of zeroed gradients from becoming denormals.
    optimizer = fs.Adam(params, lr=1e-9, weight_decay=1e-3)

    def step_and_fill() -> None:
        optimizer.step(grads)
        grads.fill(0)

    contenders = {
        "step": lambda: optimizer.step(grads),
        "clip_norm": lambda: optimizer.step(grads, clip_norm=1.0),
        "step and fill": step_and_fill,
        "zero_grad": lambda: optimizer.step(grads, zero_grad=True),
    }
    others = machine.Others()
    timings = interleaved(contenders, 1.0)
    disturbance = others.processors()
    say(f"options, {elements:,}: " + ", ".join(f"{k} {seconds(t)}" for k, t in timings.items()))
    return {
        "elements": elements,
        "clip_ratio": timings["clip_norm"].median / timings["step"].median,
        "zero_speedup": timings["step and fill"].median / timings["zero_grad"].median,
        "other_processors": disturbance,
        "timings": {k: asdict(t) for k, t in timings.items()},
    }


def run_memory(elements: int, say: Callable[..., None]) -> dict[str, Any]:
    """Measure what a step of ours, and one of NumPy by hand, takes beyond its arrays."""
    workload = one_array(elements)
    result: dict[str, Any] = {"elements": elements}
    for peer in (FusedstepOptimizer(), NumPy()):
        step, _ = peer.make(workload.params(), workload.grads(), "adam")
        result[peer.name] = {
            "python_peak": memory.python_peak(step),
            "peak_growth": memory.peak_growth(step),
        }
    small, _ = FusedstepOptimizer().make(MANY_SMALL.params(), MANY_SMALL.grads(), "adam")
    result[OURS]["heap_growth_1000_steps_of_1000_arrays"] = memory.heap_growth(small, 1000)
    say(f"extra memory: {result}")
    return result


def requirements(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures against what is required of them."""
    cases = {case["name"]: case["timings"] for case in record["cases"]}
    others = {case["name"]: case["other_processors"] for case in record["cases"]}
    rows = []

    def row(
        case: str,
        claim: str,
        required: float,
        measured: float | None,
        at_most: bool,
        disturbance: float | None = 0.0,
    ) -> None:
        met = (
            None
            if measured is None
            else bool(measured <= required if at_most else measured >= required)
        )
        rows.append(
            {
                "case": case,
                "claim": claim,
                "required": required,
                "measured": measured,
                "met": met,
                "other_processors": disturbance,
            }
        )

    for workload, wanted in CASES:
        timings = cases.get(workload.name, {})
        peers = [t["median"] for name, t in timings.items() if name not in (OURS, FUNCTION, ROOF)]
        medians = {name: timing["median"] for name, timing in timings.items()}
        if peers:
            medians["best peer"] = min(peers)
        for contender, factor, other in wanted:
            measured = (
                medians[other] / medians[contender]
                if {contender, other} <= medians.keys()
                else None
            )
            claim = f"{contender}, times as fast as {other}"
            row(workload.name, claim, factor, measured, False, others.get(workload.name))
        if workload.elements == 128 and FUNCTION in medians:
            row(
                workload.name,
                f"{FUNCTION}, microseconds",
                SMALL_LATENCY * 1e6,
                medians[FUNCTION] * 1e6,
                True,
                others.get(workload.name),
            )
    for denormal in record["denormals"]:
        row(
            f"adam float32 {denormal['elements']:,}",
            "denormal moments, times the normal time",
            DENORMAL_RATIO,
            denormal["ratio"],
            True,
            denormal["other_processors"],
        )
    for options in record["options"]:
        case, disturbance = f"adam float32 {options['elements']:,}", options["other_processors"]
        if options["elements"] >= LARGE:
            claim = "clip_norm, times the plain step"
            row(case, claim, CLIP_RATIO, options["clip_ratio"], True, disturbance)
        claim = "zero_grad, times as fast as step and fill"
        row(case, claim, ZERO_SPEEDUP, options["zero_speedup"], False, disturbance)
    ours = record["memory"][OURS]
    for key in ours:
        row(
            f"adam float32 {record['memory']['elements']:,}",
            f"{key}, bytes (64 KiB of noise allowed)",
            65536,
            ours[key],
            True,
        )
    return rows


def print_requirements(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.3g}"
        verdict = {None: "", True: "met", False: "MISSED"}[row["met"]]
        if verdict and (row["other_processors"] or 0.0) > QUIET:
            verdict += f" (DISTURBED: others used {row['other_processors']:.1f} processors)"
        print(
            f"{row['case']:<28} {row['claim']:<58} {row['required']:>8.4g} {measured:>12} {verdict}"
        )


def seconds(timing: Timing) -> str:
    value = timing.median
    for unit, scale in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"
