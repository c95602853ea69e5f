"""Minimise a function and learn handwritten digits: two small programs to learn from.

The first holds every iterate against mathematics. The second draws the loss curves and compares the
time that the updates took with that of the same updates in plain NumPy.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import fusedstep as fs
from fusedstep import reference
from fusedstep.commands import digits, plain_numpy

Array = NDArray[Any]

REQUIRED_ACCURACY = 0.97
BATCH_SIZE = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fusedstep-demo"),
        metavar="DIR",
        help="folder for loss_curves.png (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="train half as long")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")


def main(args: argparse.Namespace) -> int:
    # Everything optional is asked for before the work begins.
    import matplotlib.figure
    import rich.console
    import sklearn.datasets  # noqa: F401

    console = rich.console.Console()
    console.print(
        f"fusedstep {fs.__version__} with {fs.get_isa()} and {fs.get_num_threads()} threads; "
        f"NumPy {np.__version__}\n"
    )
    bowl_ok = check_bowl(args.seed, console)
    runs = learn_digits(15 if args.quick else 30, args.seed, console)
    digits_ok = check_digits(runs, console)

    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "loss_curves.png"
    figure = matplotlib.figure.Figure(figsize=(10, 4.2), layout="constrained")
    draw_curves(runs, figure)
    figure.savefig(path, dpi=150)
    console.print(f"\nLoss curves: {path}")

    if bowl_ok and digits_ok:
        return 0
    console.print("[bold red]The demo FAILED: see the tables above.[/]")
    return 1


# Part 1, functions: minimise sum(theta**2), whose gradient is 2 * theta.

ITERATIONS = 1000
LR = 0.01
# 1000 roundings of float32, 6e-8 each, add up to about 2e-6 where they are random.
BOWL_LIMIT = 1e-5


def bowl_gd(start: Array) -> Iterator[Array]:
    theta = start.copy()
    for _ in range(ITERATIONS):
        fs.gd_step(theta, 2 * theta, lr=LR)
        yield theta


def bowl_adam(start: Array, bias_correction: bool) -> Iterator[Array]:
    theta = start.copy()
    exp_avg, exp_avg_sq = np.zeros_like(theta), np.zeros_like(theta)
    for t in range(1, ITERATIONS + 1):
        grad = 2 * theta
        fs.adam_step(
            theta, grad, exp_avg, exp_avg_sq, step=t, lr=LR, bias_correction=bias_correction
        )
        yield theta


def exact_bowl_gd(start: Array) -> Iterator[Array]:
    theta = start.astype(np.float64)
    for _ in range(ITERATIONS):
        theta, _ = reference.gd(theta, 2 * theta, lr=LR)
        yield theta


def exact_bowl_adam(start: Array, bias_correction: bool) -> Iterator[Array]:
    theta = start.astype(np.float64)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t in range(1, ITERATIONS + 1):
        theta, m, v, _ = reference.adam(
            theta, 2 * theta, m, v, step=t, lr=LR, bias_correction=bias_correction
        )
        yield theta


def closed_form_bowl_gd(start: Array) -> Iterator[Array]:
    for t in range(1, ITERATIONS + 1):
        yield start.astype(np.float64) * (1 - 2 * LR) ** t


def check_bowl(seed: int, console: Any) -> bool:
    """Hold every iterate against the reference and, for GD, the closed form; print a table."""
    from rich.table import Table

    start = np.random.default_rng(seed).standard_normal(100, dtype=np.float32)
    # GD shrinks all numbers alike, so its errors are held against what is left of the largest one;
    # the steps of Adam do not depend on how large the numbers are, so its errors are not.
    trajectories = (
        ("GD", "closed form", bowl_gd(start), closed_form_bowl_gd(start), True),
        ("GD", "reference", bowl_gd(start), exact_bowl_gd(start), True),
        ("Adam", "reference", bowl_adam(start, True), exact_bowl_adam(start, True), False),
        ("uncorrected", "reference", bowl_adam(start, False), exact_bowl_adam(start, False), False),
    )
    table = Table(
        title=f"100 numbers, loss = sum(theta**2), {ITERATIONS} iterations, lr = {LR}",
        caption="error: the largest in any iteration, relative to the largest number then (GD)\n"
        "or at the start (Adam); uncorrected: Adam without bias correction",
    )
    for column in ("optimizer", "against", "first loss", "last loss", "error", "limit", ""):
        table.add_column(column, justify="left" if column in ("optimizer", "against") else "right")

    all_ok = True
    for name, against, thetas, exact_thetas, shrinks in trajectories:
        error, largest = 0.0, np.max(np.abs(start))
        for theta, exact in zip(thetas, exact_thetas, strict=True):
            scale = np.max(np.abs(exact)) if shrinks else largest
            error = max(error, float(np.max(np.abs(theta - exact)) / scale))
        ok = error <= BOWL_LIMIT
        all_ok &= ok
        losses = [f"{np.sum(np.square(x, dtype=np.float64)):.1e}" for x in (start, theta)]
        table.add_row(name, against, *losses, f"{error:.1e}", f"{BOWL_LIMIT:.0e}", verdict(ok))
    console.print(table)
    return all_ok


# Part 2, optimizers: train a network to read handwritten digits.


class Optimizer(Protocol):
    def step(self, grads: digits.Params) -> object: ...


MakeOptimizer = Callable[[digits.Params, Callable[[int], float]], Optimizer]


@dataclass(frozen=True)
class Contest:
    """One optimizer: its peak learning rate, the fused one, and the same in plain NumPy."""

    name: str
    lr: float
    fused: MakeOptimizer
    plain: MakeOptimizer


CONTESTS = (
    Contest("GD", 0.4, fs.GD, plain_numpy.GD),
    Contest(
        "GD with momentum",
        0.1,
        lambda params, lr: fs.GD(params, lr, momentum=0.9),
        lambda params, lr: plain_numpy.GD(params, lr, momentum=0.9),
    ),
    Contest("Adam", 0.002, fs.Adam, plain_numpy.Adam),
)


@dataclass
class History:
    """What one training left behind."""

    losses: list[float] = field(default_factory=list)  # on the training digits, per epoch
    accuracies: list[float] = field(default_factory=list)  # on the test digits, per epoch
    update_seconds: list[float] = field(default_factory=list)  # per step
    seconds: float = 0.0  # all of the training


def train(
    data: digits.Digits, make_optimizer: MakeOptimizer, lr: float, epochs: int, seed: int
) -> Iterator[History]:
    """Train a network; yield its history, still growing, after every epoch."""
    rng = np.random.default_rng(seed)
    params = digits.init_params(rng)
    images, labels = data.train_images, data.train_labels
    batches = -(-len(labels) // BATCH_SIZE)
    # The learning rate falls to zero along a line; t is the number of the step, from 1.
    optimizer = make_optimizer(params, lambda t: lr * (1 - (t - 1) / (epochs * batches)))
    history = History()
    for _ in range(epochs):
        epoch_start = time.perf_counter()
        losses = []
        for batch in np.array_split(rng.permutation(len(labels)), batches):
            loss, grads = digits.loss_and_grads(params, images[batch], labels[batch])
            update_start = time.perf_counter()
            optimizer.step(grads)
            history.update_seconds.append(time.perf_counter() - update_start)
            losses.append(loss)
        history.seconds += time.perf_counter() - epoch_start
        history.losses.append(statistics.fmean(losses))
        history.accuracies.append(digits.accuracy(params, data.test_images, data.test_labels))
        yield history


def learn_digits(epochs: int, seed: int, console: Any) -> dict[str, tuple[History, History]]:
    """Train with every optimizer, fused and in plain NumPy, epoch by epoch in turn."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from threadpoolctl import threadpool_limits

    data = digits.load_digits()
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
    )
    runs = {}
    console.print()
    # Nothing may run into what is timed: no thread that refreshes the display, and none in the
    # matrix products, which are too small to gain from threads and wait long for a busy core.
    with (
        Progress(*columns, console=console, auto_refresh=False) as progress,
        threadpool_limits(1, user_api="blas"),
    ):
        for contest in CONTESTS:
            task = progress.add_task(contest.name, total=epochs, status="")
            trainings = [
                train(data, make_optimizer, contest.lr, epochs, seed)
                for make_optimizer in (contest.fused, contest.plain)
            ]
            for histories in zip(*trainings, strict=True):
                fused = histories[0]
                status = f"loss {fused.losses[-1]:.4f}  test {fused.accuracies[-1]:.1%}"
                progress.update(task, advance=1, status=status, refresh=True)
            runs[contest.name] = histories
    return runs


def check_digits(runs: dict[str, tuple[History, History]], console: Any) -> bool:
    """Print what the trainings reached and how long they took; return whether all did well."""
    from rich.table import Table

    parameters = sum(p.size for p in digits.init_params(np.random.default_rng(0)).values())
    table = Table(
        title=f"Digits: {parameters:,} parameters in 6 arrays, median update and whole training",
        caption=f"required: {REQUIRED_ACCURACY:.0%} of the test digits, by fusedstep",
    )
    for column in ("optimizer", "updates by", "test", "update", "faster", "training", ""):
        left = column in ("optimizer", "updates by")
        table.add_column(column, justify="left" if left else "right")
    all_ok = True
    for name, (fused, plain) in runs.items():
        ok = fused.accuracies[-1] >= REQUIRED_ACCURACY
        all_ok &= ok
        fast, slow = (statistics.median(run.update_seconds) for run in (fused, plain))
        table.add_row(
            name,
            "fusedstep",
            f"{fused.accuracies[-1]:.1%}",
            f"{fast * 1e6:.1f} us",
            f"{slow / fast:.1f}x",
            f"{fused.seconds:.2f} s",
            verdict(ok),
        )
        table.add_row(
            "",
            "NumPy",
            f"{plain.accuracies[-1]:.1%}",
            f"{slow * 1e6:.1f} us",
            "",
            f"{plain.seconds:.2f} s",
            "",
            end_section=True,
        )
    console.print(table)
    return all_ok


def draw_curves(runs: dict[str, tuple[History, History]], figure: Any) -> None:
    """Draw the training loss and the test accuracy of every optimizer over the epochs."""
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    # Blue, orange and green that colour-blind eyes tell apart (Okabe & Ito).
    colors = ("#0072B2", "#D55E00", "#009E73")
    for (name, (fused, _)), color in zip(runs.items(), colors, strict=True):
        epochs = range(1, len(fused.losses) + 1)
        loss_axes.semilogy(epochs, fused.losses, color=color, label=name)
        accuracy_axes.plot(epochs, [100 * a for a in fused.accuracies], color=color)
    loss_axes.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
    loss_axes.legend(frameon=False)

    required = 100 * REQUIRED_ACCURACY
    accuracy_axes.axhline(required, color="0.5", linestyle="--", linewidth=1)
    accuracy_axes.text(
        0.99, required - 0.1, f"required: {required:.0f} %", color="0.4", ha="right", va="top",
        transform=accuracy_axes.get_yaxis_transform(),
    )  # fmt: skip
    accuracy_axes.set(
        title="Test accuracy", xlabel="epoch", ylabel="digits read correctly (%)", ylim=(88, 100)
    )
    for axes in (loss_axes, accuracy_axes):
        axes.set_xlim(1, len(epochs))
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)


def verdict(ok: bool) -> str:
    return "ok" if ok else "[bold red]FAILED[/]"
