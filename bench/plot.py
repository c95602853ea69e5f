"""The pictures of a record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .peers import PEERS
from .workloads import GPT2_SMALL, MANY_SMALL, MLP

ROOF = "roofline"
# One colour for each contender in all pictures (Okabe & Ito and a few more); ours stands out.
COLORS = dict(
    zip(
        [peer.name for peer in PEERS],
        (
            "#D55E00",
            "#E69F00",
            "#999999",
            "#CC79A7",
            "#8B5A2B",
            "#0072B2",
            "#56B4E9",
            "#4B0082",
            "#009E73",
            "#000000",
        ),
        strict=True,
    )
)
COLORS["CuPy"] = COLORS["NumPy"]


def draw(record: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draw bandwidth and latency against size, and many tensors; return the files."""
    from matplotlib.figure import Figure

    paths = []
    pictures: tuple[tuple[str, Callable[[Any, dict[str, Any]], None]], ...] = (
        ("bandwidth", draw_bandwidth),
        ("latency", draw_latency),
        ("tensors", draw_tensors),
    )
    for name, painter in pictures:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        painter(figure.subplots(), record)
        figure.suptitle(
            f"float32 Adam, {machine_of(record)}",
            fontsize=9,
        )
        paths.append(folder / f"{stem}-{name}.png")
        figure.savefig(paths[-1], dpi=130)
    return paths


def machine_of(record: dict[str, Any]) -> str:
    if "gpu" in record:
        return f"{record['gpu']}, CUDA {record['toolkit']}"
    return f"{record['cpu']}, {record['threads']} threads, {record['isa']}"


def series(
    record: dict[str, Any], timings: str = "timings"
) -> dict[str, tuple[list[int], list[float]]]:
    """Return sizes and medians of each contender over the sweep."""
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for case in record["sweep"]:
        for name, timing in case[timings].items():
            if name != ROOF:
                sizes, medians = lines.setdefault(name, ([], []))
                sizes.append(case["elements"])
                medians.append(timing["median"])
    return lines


def style(name: str) -> dict[str, Any]:
    ours = name.startswith("fusedstep")
    return {
        "color": COLORS[name],
        "label": name,
        "linewidth": 2.2 if ours else 1.1,
        "zorder": 3 if ours else 2,
    }


def draw_bandwidth(axes: Any, record: dict[str, Any]) -> None:
    # On a GPU, of steps in a row; otherwise small sizes show the latency of waiting for the GPU.
    timings = "gpu_timings" if "gpu" in record else "timings"
    for name, (sizes, medians) in series(record, timings).items():
        axes.loglog(
            sizes, [28e-9 * n / t for n, t in zip(sizes, medians, strict=True)], **style(name)
        )
    roofs = [case for case in record["cases"] if case["rule"] == "adam" and ROOF in case["timings"]]
    if roofs:
        largest = max(roofs, key=lambda case: case["elements"])
        roof = largest["bytes"] / largest[timings][ROOF]["median"] / 1e9
        axes.axhline(
            roof, color="0.3", linestyle="--", linewidth=1, label=f"memory roof {roof:.0f} GB/s"
        )
    for level, size in record["caches"].items():
        elements = size / 16  # p, g, m and v of 4 bytes each
        axes.axvline(elements, color="0.8", linewidth=1, zorder=1)
        axes.annotate(
            f" {level}",
            (elements, 1),
            xycoords=("data", "axes fraction"),
            va="top",
            color="0.5",
            fontsize=8,
        )
    axes.set(xlabel="elements", ylabel="GB/s (28 bytes an element)", title="Bandwidth against size")
    axes.grid(color="0.93", which="major")
    axes.legend(fontsize=7, frameon=False, loc="lower right", ncols=2)


def draw_latency(axes: Any, record: dict[str, Any]) -> None:
    for name, (sizes, medians) in series(record).items():
        small = [(n, t * 1e6) for n, t in zip(sizes, medians, strict=True) if n <= 1 << 15]
        axes.loglog(*zip(*small, strict=True), **style(name))
    axes.set(xlabel="elements", ylabel="microseconds a step", title="Latency of small steps")
    axes.grid(color="0.93", which="major")
    axes.legend(fontsize=7, frameon=False, ncols=2)


def draw_tensors(axes: Any, record: dict[str, Any]) -> None:
    wanted = [workload.name for workload in (MLP, MANY_SMALL, GPT2_SMALL)]
    cases = [case for case in record["cases"] if case["name"] in wanted]
    names = [name for name in COLORS if any(name in case["timings"] for case in cases)]
    width = 0.85 / len(names)
    for j, name in enumerate(names):
        bars = [
            (
                i + j * width,
                case["timings"][name]["median"] / case["timings"]["fusedstep"]["median"],
            )
            for i, case in enumerate(cases)
            if name in case["timings"]
        ]
        drawn = axes.bar(*zip(*bars, strict=True), width=width, color=COLORS[name], label=name)
        axes.bar_label(drawn, fmt="%.3g", fontsize=6, rotation=90, padding=2)
    axes.set_xticks([i + 0.4 for i in range(len(cases))], [case["name"] for case in cases])
    axes.set(
        yscale="log", ylabel="time, in that of fusedstep", title="Many tensors (lower is better)"
    )
    axes.margins(y=0.2)
    axes.legend(fontsize=7, frameon=False, ncols=2)
