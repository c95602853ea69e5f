"""Knowledge distillation: a small network learns more from a large one than from labels.

A teacher of 50,826 parameters learns the handwritten digits from all 1347 training images and
their labels. A student of 1210, 42 times smaller, then sees some of these images. It learns

- from their labels,
- from their labels smoothed (nine tenths for the right digit, one tenth spread over all), or
- from the teacher's probabilities for them, softened by a temperature of 8, and no labels.

The students of a seed start from the same weights and see the same batches for the same number of
steps, with the learning rate (of 0.003, 0.01 and 0.03) that suits the labels best: only the targets
differ. Each seed is another split into training and test images, another teacher and other
students. What is compared is the share of test images that they read correctly.

What to expect: with a tenth of the images, the student of the teacher is several points better
than the student of the labels. Smoothing alone does not do that: the teacher says which digits an
image resembles, and it knows that from all the labels. So distillation pays where a teacher has
learned from far more than the student gets to see; with all the images it pays nothing here.

Sources: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015
(arXiv:1503.02531), section 2 for the loss, section 6 for soft targets where examples are few.
Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR 2016, section 7,
for smoothed labels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import fusedstep as fs
from fusedstep.commands import digits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

TEACHER, STUDENT = digits.LAYER_SIZES, (64, 16, 10)
TEACHER_LR, STUDENT_LR = 0.002, 0.01
STEPS, BATCH_SIZE = 1000, 32
TEMPERATURE = 8.0
SMOOTHING = 0.1
FEW, COUNTS = 135, (68, 135, 270, 540, 1347)  # images that the student sees
# Orange, green and blue that colour-blind eyes tell apart (Okabe & Ito).
COLORS = {"labels": "#D55E00", "smoothed labels": "#009E73", "teacher": "#0072B2"}


def soften(scores: Array, temperature: float) -> Array:
    """Return the probabilities of the digits; the higher the temperature, the more even."""
    probabilities: Array = np.exp(digits.log_softmax(scores / temperature))
    return probabilities


def train(
    layer_sizes: tuple[int, ...],
    images: Array,
    targets: Array,
    *,
    lr: float,
    seed: tuple[int, int],
    temperature: float = 1.0,
) -> digits.Params:
    """Train a network to give the images these probabilities at this temperature."""
    rng = np.random.default_rng(seed)
    params = digits.init_params(rng, layer_sizes)
    optimizer = fs.Adam(params, lr=lambda t: lr * (1 - (t - 1) / STEPS))
    for _ in range(STEPS):
        batch = rng.integers(len(images), size=BATCH_SIZE)
        activations = digits.forward(params, images[batch])
        # The gradient of temperature**2 times the mean cross-entropy with respect to the scores.
        error = soften(activations[-1], temperature) - targets[batch]
        optimizer.step(digits.backward(params, activations, error * (temperature / BATCH_SIZE)))
    return params


def run(seed: int, counts: tuple[int, ...]) -> tuple[float, list[list[float]]]:
    """Return test accuracies (%): the teacher's, and the students' by what they learn from."""
    data = digits.load_digits(seed)
    labels = np.eye(10, dtype=np.float32)[data.train_labels]

    def accuracy(params: digits.Params) -> float:
        return 100 * digits.accuracy(params, data.test_images, data.test_labels)

    teacher = train(TEACHER, data.train_images, labels, lr=TEACHER_LR, seed=(seed, 0))
    answers = soften(digits.forward(teacher, data.train_images)[-1], TEMPERATURE)
    smoothed = (1 - SMOOTHING) * labels + SMOOTHING / 10

    def learn_from(targets: Array, temperature: float) -> list[float]:
        return [
            accuracy(
                train(
                    STUDENT,
                    data.train_images[:count],
                    targets[:count],
                    lr=STUDENT_LR,
                    seed=(seed, 1),
                    temperature=temperature,
                )
            )
            for count in counts
        ]

    students = [learn_from(labels, 1), learn_from(smoothed, 1), learn_from(answers, TEMPERATURE)]
    return accuracy(teacher), students


def print_table(counts: tuple[int, ...], teachers: Array, students: Array, console: Any) -> None:
    from rich.table import Table

    table = Table(
        title=f"A teacher reads {spread(teachers)} % of the test digits, its students:",
        caption=f"mean ± standard deviation of {len(teachers)} seeds; gain of teacher over\n"
        "labels: in points, and in brackets in how many seeds",
    )
    for column in ("images", *COLORS, "gain"):
        table.add_column(column, justify="right")
    for i, count in enumerate(counts):
        gains = students[:, 2, i] - students[:, 0, i]
        table.add_row(
            str(count),
            *(spread(accuracies) for accuracies in students[:, :, i].T),
            f"{spread(gains)} ({np.count_nonzero(gains > 0)})",
        )
    console.print(table)


def spread(values: Array) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def draw(counts: tuple[int, ...], teachers: Array, students: Array, path: Path) -> None:
    """Draw the accuracies over the number of images and, where these are few, seed by seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.axhline(teachers.mean(), color="0.5", linestyle="--", linewidth=1)
    left.annotate(
        "the teacher itself", (counts[0], teachers.mean()), (0, 3), textcoords="offset points",
        color="0.4",
    )  # fmt: skip
    means, deviations = students.mean(axis=0), students.std(axis=0, ddof=1)
    for (source, color), mean, deviation in zip(COLORS.items(), means, deviations, strict=True):
        left.plot(counts, mean, "o-", color=color, label=source)
        left.fill_between(
            counts, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0
        )
    left.set(
        title="Students, by what they learn from (mean and standard deviation)",
        xlabel="images that the student sees",
        ylabel="test digits read correctly (%)",
        xscale="log",
    )
    left.set_xticks(counts, [str(count) for count in counts])
    left.minorticks_off()
    left.legend(frameon=False, loc="lower right")

    few = students[:, :, counts.index(FEW)]
    right.plot(range(len(COLORS)), few.T, color="0.8", linewidth=1)
    for i, color in enumerate(COLORS.values()):
        right.plot(np.full(len(few), i), few[:, i], "o", color=color)
    right.set(title=f"{FEW} images, seed by seed", xlim=(-0.4, len(COLORS) - 0.6))
    right.set_xticks(range(len(COLORS)), COLORS)
    for axes in (left, right):
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("fusedstep-demo/distill.png"))
    parser.add_argument("--seeds", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"only with {FEW} images")
    parser.add_argument("--json", action="store_true", help="print every accuracy, not the table")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds: a spread needs 2 or more")

    from rich.console import Console
    from rich.progress import track
    from threadpoolctl import threadpool_limits

    counts = (FEW,) if args.quick else COUNTS
    # The matrix products are too small to gain from threads.
    with threadpool_limits(1, user_api="blas"):
        seeds = track(range(args.seeds), "Training", console=Console(stderr=True))
        runs = [run(seed, counts) for seed in seeds]
    teachers, students = (np.array(column) for column in zip(*runs, strict=True))
    draw(counts, teachers, students, args.output)
    if args.json:
        by_source = dict(zip(COLORS, students.swapaxes(0, 1).tolist(), strict=True))
        print(json.dumps({"images": counts, "teachers": teachers.tolist(), "students": by_source}))
    else:
        console = Console()
        print_table(counts, teachers, students, console)
        console.print(f"Plot: {args.output}")


if __name__ == "__main__":
    main()
