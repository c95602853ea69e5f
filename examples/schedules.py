"""Learning-rate schedules: the same training with five of them, through the callable `lr`.

A small network (64-16-10) learns the handwritten digits in 800 steps of Adam with batches of 32
images, with the learning rate

- constant,
- decaying in steps: divided by 10 after a third of the training and after two thirds,
- falling along half a cosine (Loshchilov, Hutter, "SGDR", ICLR 2017, equation 5, one period),
- falling along half a cosine after a linear warm-up over the first 80 steps, or
- falling as the inverse square root of the step after the same warm-up (Vaswani et al.,
  "Attention is all you need", NeurIPS 2017, equation 3),

each with the peaks 0.003, 0.01, 0.03 and 0.1. What is compared is the cross-entropy of all
training images at the end: a median over seeds, which are other first weights and other batches.

What to expect: at a small peak every step counts, and constant is best. The larger the peak, the
more a decay helps, since steps that stay large jump about the minimum. At the largest peak the
first steps wreck some of the networks, unless a warm-up holds them back; with it, both decays end
several times lower than the best constant rate does, and cosine with the least luck involved. None
of this carries over to another network by itself: the point is how little it takes to try.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import fusedstep as fs
from fusedstep.commands import digits

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Schedule = Callable[[int], float]  # from the number of the step to a share of the peak

NETWORK = (64, 16, 10)
STEPS, WARMUP, BATCH_SIZE = 800, 80, 32
PEAKS = (0.003, 0.01, 0.03, 0.1)
RECORD_EVERY = 20


def constant(t: int) -> float:
    return 1.0


def step_decay(t: int) -> float:
    return 0.1 ** (3 * (t - 1) // STEPS)


def cosine(t: int) -> float:
    return (1 + math.cos(math.pi * (t - 1) / STEPS)) / 2


def warmup_cosine(t: int) -> float:
    if t < WARMUP:
        return t / WARMUP
    return (1 + math.cos(math.pi * (t - WARMUP) / (STEPS - WARMUP))) / 2


def warmup_inverse_root(t: int) -> float:
    return min(t / WARMUP, math.sqrt(WARMUP / t))


# With colours that colour-blind eyes tell apart (Okabe & Ito).
SCHEDULES: dict[str, tuple[Schedule, str]] = {
    "constant": (constant, "#000000"),
    "step decay": (step_decay, "#E69F00"),
    "cosine": (cosine, "#56B4E9"),
    "warm-up + cosine": (warmup_cosine, "#D55E00"),
    "warm-up + inverse root": (warmup_inverse_root, "#009E73"),
}


def train(schedule: Schedule, peak: float, seed: int, data: digits.Digits) -> list[float]:
    """Train a network; return its loss on all training images, every 20 steps."""
    rng = np.random.default_rng(seed)
    params = digits.init_params(rng, NETWORK)
    images, labels = data.train_images, data.train_labels
    optimizer = fs.Adam(params, lr=lambda t: peak * schedule(t))
    losses = []
    for t in range(1, STEPS + 1):
        batch = rng.integers(len(labels), size=BATCH_SIZE)
        _, grads = digits.loss_and_grads(params, images[batch], labels[batch])
        optimizer.step(grads)
        if t % RECORD_EVERY == 0:
            losses.append(digits.loss_and_grads(params, images, labels)[0])
    return losses


def print_table(peaks: tuple[float, ...], last: Array, console: Any) -> None:
    """Print the last losses, an array of (schedules, peaks, seeds)."""
    from rich.table import Table

    table = Table(
        title=f"Training loss after {STEPS} steps, by the peak of the learning rate",
        caption=f"median of {last.shape[-1]} seeds; bold: the best of its row",
    )
    table.add_column("schedule")
    for peak in peaks:
        table.add_column(f"{peak:g}", justify="right")
    table.add_column(f"worst at {peaks[-1]:g}", justify="right")
    for name, losses in zip(SCHEDULES, last, strict=True):
        medians = np.median(losses, axis=-1)
        cells = [f"{median:.4f}" for median in medians]
        best = medians.argmin()
        cells[best] = f"[bold]{cells[best]}[/]"
        table.add_row(name, *cells, f"{losses[-1].max():.4f}")
    console.print(table)


def draw(peaks: tuple[float, ...], losses: Array, path: Path) -> None:
    """Draw the schedules, the losses at the largest peak, and the last losses over the peaks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps = range(1, STEPS + 1)
    recorded = range(RECORD_EVERY, STEPS + 1, RECORD_EVERY)
    for (name, (schedule, color)), each in zip(SCHEDULES.items(), losses, strict=True):
        left.plot(steps, [schedule(t) for t in steps], color=color, label=name)
        largest = each[-1]
        middle.plot(recorded, np.median(largest, axis=0), color=color)
        middle.fill_between(
            recorded, *np.quantile(largest, (0.25, 0.75), axis=0), color=color, alpha=0.15,
            linewidth=0,
        )  # fmt: skip
        right.plot(peaks, np.median(each[..., -1], axis=-1), "o-", color=color)
    left.set(title="Schedules", xlabel="step", ylabel="learning rate / peak", ylim=(0, 1.35))
    left.set_yticks((0, 0.25, 0.5, 0.75, 1))
    left.legend(frameon=False, loc="upper center", ncols=2, fontsize="small")
    middle.set(
        title=f"Training, with peak {peaks[-1]:g}", xlabel="step", ylabel="loss", yscale="log"
    )
    right.set(
        title=f"After {STEPS} steps, by peak",
        xlabel="peak of the learning rate",
        ylabel="loss",
        xscale="log",
        yscale="log",
    )
    right.set_xticks(peaks, [f"{peak:g}" for peak in peaks])
    right.minorticks_off()
    for axes in (left, middle, right):
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("fusedstep-demo/schedules.png"))
    parser.add_argument("--seeds", type=int, default=9, help="how many (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only the middle and the largest peak")
    parser.add_argument("--json", action="store_true", help="print every last loss, not the table")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds: expected 1 or more")

    from rich.console import Console
    from rich.progress import track
    from threadpoolctl import threadpool_limits

    data = digits.load_digits()
    peaks = PEAKS[1::2] if args.quick else PEAKS
    runs = [
        (schedule, peak, seed)
        for schedule, _ in SCHEDULES.values()
        for peak in peaks
        for seed in range(args.seeds)
    ]
    # The matrix products are too small to gain from threads.
    with threadpool_limits(1, user_api="blas"):
        shown = track(runs, "Training", console=Console(stderr=True))
        trained = [train(*run, data) for run in shown]
    losses = np.reshape(trained, (len(SCHEDULES), len(peaks), args.seeds, -1))
    last = losses[..., -1]
    draw(peaks, losses, args.output)
    if args.json:
        print(
            json.dumps({"peaks": peaks, "losses": dict(zip(SCHEDULES, last.tolist(), strict=True))})
        )
    else:
        console = Console()
        print_table(peaks, last, console)
        console.print(f"Plot: {args.output}")


if __name__ == "__main__":
    main()
