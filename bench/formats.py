"""Eight bits for Adam's moments: fusedstep's format beside others, by measurement.

``python -m fusedstep.bench.formats`` emulates each format in float32 and measures what one rounding
does to realistic moments, what rounding in every step does to a stream of gradients, whether the
second moment follows when gradients change, and how networks end that are trained so. It prints
tables and writes a JSON record and pictures. `docs/eight_bit.md` has the conclusions.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from . import machine
from .emulated_formats import (
    BETAS,
    BITSANDBYTES,
    BY_NAME,
    CONTENDERS,
    EXACT,
    F32,
    FLASHOPTIM,
    LARGEST_BLOCK,
    NEAREST,
    OURS,
    Array,
    Moments,
    update,
)
from .training import TASKS, TRAINED, measure_training, train_transformer

DRAWN = (OURS, NEAREST.name, BITSANDBYTES, FLASHOPTIM, "square root + 4th root, 64")

Stream = Callable[[np.random.Generator, int, int], Iterator[Array]]  # (rng, elements, steps)
ROW = 96  # elements of a row: rows and blocks do not fall together


def per_row(values: Array, elements: int) -> Array:
    return np.repeat(values, ROW)[:elements]


def heavy_tailed(rng: np.random.Generator, elements: int, steps: int) -> Iterator[Array]:
    """Yield Student's t (3 degrees), with scales log-normal by row and element, and small means."""
    rows = elements // ROW + 1
    scale = 1e-3 * per_row(np.exp(rng.normal(0, 2, rows)), elements)
    scale *= np.exp(rng.normal(0, 0.5, elements))
    mean = 0.2 * rng.normal(size=elements)
    for _ in range(steps):
        yield scale * (rng.standard_t(3, elements) + mean)


def decayed(rng: np.random.Generator, elements: int, steps: int) -> Iterator[Array]:
    """Yield the same, shrinking a thousandfold in the first half, then staying so."""
    for step, g in enumerate(heavy_tailed(rng, elements, steps)):
        yield g * 1e-3 ** min(1.0, 2 * step / steps)


def mostly_zero(rng: np.random.Generator, elements: int, steps: int) -> Iterator[Array]:
    """Yield those of an embedding: rows are touched by Zipf's law, a tenth of them never."""
    rows = elements // ROW + 1
    often = np.minimum(0.5, 1 / (1 + rng.permutation(rows)))
    often[rng.random(rows) < 0.1] = 0
    for _ in range(steps):
        touched = per_row(rng.random(rows) < often, elements)
        yield touched * 1e-3 * rng.normal(size=elements)


def outlier(rng: np.random.Generator, elements: int, steps: int) -> Iterator[Array]:
    """Yield gradients of which one in each 128 is a thousand times the others."""
    scale = 1e-4 * np.exp(rng.normal(0, 0.5, elements))
    scale[::128] *= 1000
    mean = 0.2 * rng.normal(size=elements)
    for _ in range(steps):
        yield scale * (rng.normal(size=elements) + mean)


STREAMS: dict[str, Stream] = {
    "heavy-tailed": heavy_tailed,
    "decayed": decayed,
    "mostly zero": mostly_zero,
    "outlier": outlier,
}


def relative_error(kept: Array, exact: Array) -> dict[str, float]:
    there = exact != 0
    error = np.abs(kept[there] / exact[there] - 1)
    return {
        "median": float(np.median(error)),
        "p99": float(np.percentile(error, 99)),
        "max": float(error.max()),
        "zeroed": float((kept[there] == 0).mean()),
    }


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def measure_once(m: Array, v: Array, step: int) -> dict[str, Any]:
    """Round given moments once."""
    exact = update(m, v, step)
    rows = {}
    for name, exp_avg, exp_avg_sq, _ in CONTENDERS:
        m_kept, v_kept = exp_avg(m.astype(F32), step), exp_avg_sq(v.astype(F32), step)
        kept = update(m_kept.astype(np.float64), v_kept.astype(np.float64), step)
        rows[name] = {
            "exp_avg": relative_error(m_kept, m),
            "exp_avg_sq": relative_error(v_kept, v),
            "update_rms_error": rms(kept - exact) / rms(exact),
            "update_max": float(np.abs(kept).max()),
        }
    return rows


def measure_transformer_state(steps: int) -> dict[str, Any]:
    """Round the moments of a transformer that was trained in float32."""
    _, moments = train_transformer(BY_NAME[EXACT], 0, steps)
    whole = -(-moments.m.size // LARGEST_BLOCK) * LARGEST_BLOCK
    m, v = np.zeros(whole), np.zeros(whole)
    m[: moments.m.size], v[: moments.v.size] = moments.m, moments.v
    return {"steps": steps, "once": measure_once(m, v, steps)}


def measure_stream(name: str, elements: int, steps: int) -> dict[str, Any]:
    """Follow a stream with exact moments and with each contender's."""
    m, v = np.zeros(elements), np.zeros(elements)
    kept = {c.name: Moments(c, elements) for c in CONTENDERS}
    error, largest = dict.fromkeys(kept, 0.0), dict.fromkeys(kept, 0.0)
    path = {name: np.zeros(elements) for name in kept}
    exact_path, power = np.zeros(elements), 0.0
    gradients = STREAMS[name](np.random.default_rng(0), elements, steps)
    for step, gradient in enumerate(gradients, start=1):
        g = gradient.astype(F32)
        m += (1 - BETAS[0]) * (g - m)
        v += (1 - BETAS[1]) * (g.astype(np.float64) ** 2 - v)
        exact = update(m, v, step)
        counted = step > steps // 2
        exact_path += exact * counted
        power += rms(exact) ** 2 * counted
        for name, moments in kept.items():
            u = moments.update(g)
            if counted:
                path[name] += u
                error[name] += rms(u - exact) ** 2
                largest[name] = max(largest[name], float(np.abs(u).max()))

    each_step = {
        name: {
            "exp_avg_sq": relative_error(kept[name].v, v),
            "update_rms_error": math.sqrt(error[name] / power),
            "path_error": rms(path[name] - exact_path) / rms(exact_path),
            "path_gain": float(path[name] @ exact_path / (exact_path @ exact_path)),
            "update_max": largest[name],
        }
        for name in kept
    }
    return {"steps": steps, "each step": each_step, "once": measure_once(m, v, steps)}


def measure_tracking(
    factor: float, part: str, settle: int, steps: int, elements: int = 4096
) -> dict[str, Any]:
    """Multiply the gradients of all, or of every other, element, and watch the second moment.

    The moments are settled first. Returned are, each 50 steps, the geometric means of the kept over
    the exact second moment, over the elements that changed and over the others.
    """
    changed = np.arange(elements) % 2 == 0
    series: dict[str, list[tuple[int, float, float]]] = {}
    for name, _, keep, _ in CONTENDERS:
        rng = np.random.default_rng(0)
        scale = 1e-3 * np.exp(rng.normal(0, 0.5, elements))
        late = np.where(changed | (part == "all"), factor, 1.0)
        kept, exact = np.zeros(elements, F32), np.zeros(elements)
        series[name] = []
        for step in range(1, settle + steps + 1):
            g = scale * rng.normal(size=elements) * (late if step > settle else 1)
            kept = keep(F32(0.999) * kept + F32(0.001) * g.astype(F32) ** 2, step)
            exact += 0.001 * (g**2 - exact)
            if step >= settle and step % 50 == 0:
                log = np.log(np.maximum(kept / exact, 1e-6))
                moved, rest = (float(np.exp(log[which].mean())) for which in (changed, ~changed))
                series[name].append((step - settle, moved, rest))
    return {"factor": factor, "part": part, "series": series}


def table(title: str, heads: Iterable[str], rows: Iterable[tuple[str, Iterable[float]]]) -> None:
    print(f"\n{title}\n{'':<40}" + "".join(f"{head:>14}" for head in heads))
    for name, figures in rows:
        print(f"{name:<40}" + "".join(f"{figure:>14.3g}" for figure in figures), flush=True)


def print_once(name: str, rows: dict[str, Any]) -> None:
    moment = ("median", "p99", "max", "zeroed")
    table(
        f"{name}: rounded once, relative errors",
        (*(f"m {x}" for x in moment), *(f"v {x}" for x in moment), "u rms", "u max"),
        (
            (contender, (*row["exp_avg"].values(), *row["exp_avg_sq"].values(),
                         row["update_rms_error"], row["update_max"]))
            for contender, row in rows.items()
        ),
    )  # fmt: skip


def print_each_step(name: str, steps: int, rows: dict[str, Any]) -> None:
    table(
        f"{name}: rounded in each of {steps} steps",
        ("v median", "v p99", "v zeroed", "u rms", "u max", "path error", "path gain"),
        (
            (contender, (*(row["exp_avg_sq"][x] for x in ("median", "p99", "zeroed")),
                         *(row[x] for x in ("update_rms_error", "update_max", "path_error",
                                            "path_gain"))))
            for contender, row in rows.items()
        ),
    )  # fmt: skip


def print_tracking(results: list[dict[str, Any]]) -> None:
    table(
        "second moment over the exact one after gradients changed (geometric means)",
        (f"{r['part']} x{r['factor']:g}{of}" for r in results for of in ("", " rest")),
        ((c.name, (x for r in results for x in r["series"][c.name][-1][1:])) for c in CONTENDERS),
    )


def print_training(task: str, result: dict[str, Any]) -> None:
    losses = {name: np.array(x, float) for name, x in result["losses"].items()}  # None: NaN
    exact = losses[EXACT]
    table(
        f"{task}: loss on unseen data after {result['steps']} steps, {len(exact)} seeds "
        f"(float32 from {exact.min():.4f} to {exact.max():.4f})",
        ("mean", "std", "min", "max", "minus float32", "over std", "diverged"),
        (
            (name, (x.mean(), x.std(ddof=1), x.min(), x.max(), (x - exact).mean(),
                    (x - exact).mean() / exact.std(ddof=1), np.isnan(x).sum()))
            for name, x in losses.items()
        ),
    )  # fmt: skip


def draw(record: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    from matplotlib.figure import Figure

    paths = []

    def save(figure: Any, name: str) -> None:
        paths.append(folder / f"{stem}-{name}.png")
        figure.savefig(paths[-1], dpi=130)

    figure = Figure(figsize=(10, 4), layout="constrained")
    parts = [r for r in record["tracking"] if r["part"] == "half"]
    for axes, result in zip(figure.subplots(1, len(parts), sharey=True), parts, strict=True):
        for name in DRAWN:
            steps, changed, rest = zip(*result["series"][name], strict=True)
            (line,) = axes.plot(steps, changed, label=name, lw=2.5 if name == OURS else 1.2)
            axes.plot(steps, rest, ":", color=line.get_color())
        axes.set(
            yscale="log",
            xlabel="steps since",
            title=f"half of a block's gradients x {result['factor']:g}",
        )
        axes.axhline(1, color="black", lw=0.5)
    figure.axes[0].set_ylabel("second moment / exact\n(dotted: those that did not change)")
    figure.axes[0].legend(fontsize=7)
    save(figure, "tracking")

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        result = record["training"][task]
        axes.axhspan(min(result["losses"][EXACT]), max(result["losses"][EXACT]), color="0.9")
        names = []
        for i, name in enumerate(TRAINED):
            losses = [loss for loss in result["losses"][name] if loss is not None]
            diverged = len(result["losses"][name]) - len(losses)
            names.append(
                name.replace(" + ", "\n+ ").replace(", ", "\n")
                + (f"\n{diverged} diverged" if diverged else "")
            )
            axes.plot([i] * len(losses), losses, "o", ms=4, alpha=0.7)
            if losses:
                axes.plot([i - 0.25, i + 0.25], [np.mean(losses)] * 2, "k-", lw=1)
        axes.set_xticks(range(len(TRAINED)), names, fontsize=6)
        axes.set(
            title=f"{task}, {result['steps']} steps, {len(result['losses'][EXACT])} seeds",
            ylabel="loss on unseen data",
        )
    save(figure, "training")
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="for a look: under two minutes")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench-record"),
        metavar="DIR",
        help="folder for the record and the pictures (default: %(default)s)",
    )
    args = parser.parse_args()
    quick = args.quick
    machine.require(
        parser, {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "torch": "torch"}
    )

    seeds = range(2 if quick else 5)
    steps = {"digits": 100, "transformer": 15} if quick else {"digits": 800, "transformer": 300}
    changes = [(part, factor) for part in ("half", "all") for factor in (10.0, 0.1)]

    # One thread for each process, from its first import on.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn) as pool:
        training_jobs = {
            task: [pool.submit(measure_training, task, seed, steps[task]) for seed in seeds]
            for task in reversed(TASKS)
        }
        state_job = pool.submit(measure_transformer_state, 25 if quick else 300)
        stream_jobs = {
            name: pool.submit(measure_stream, name, 2 * LARGEST_BLOCK, 100 if quick else 2000)
            for name in STREAMS
        }
        tracking_jobs = [
            pool.submit(measure_tracking, factor, part, *((500, 200) if quick else (2000, 4000)))
            for part, factor in changes
        ]

        table("formats", ("bytes",), ((c.name, (c.bytes,)) for c in CONTENDERS))
        training = {}
        for task in TASKS:
            runs = [job.result() for job in training_jobs[task]]
            losses = {name: [run[name] for run in runs] for name in TRAINED}
            training[task] = {"steps": steps[task], "losses": losses}
            print_training(task, training[task])
        state = state_job.result()
        print_once("transformer", state["once"])
        streams = {name: job.result() for name, job in stream_jobs.items()}
        for name, result in streams.items():
            print_once(name, result["once"])
            print_each_step(name, result["steps"], result["each step"])
        tracking = [job.result() for job in tracking_jobs]
        print_tracking(tracking)

    record = {
        "date": datetime.date.today().isoformat(),
        "bytes": {contender.name: contender.bytes for contender in CONTENDERS},
        "transformer state": state,
        "streams": streams,
        "tracking": tracking,
        "training": training,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"formats-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    for file in (path, *draw(record, args.output, path.stem)):
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
