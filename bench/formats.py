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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedstep import reference_narrow as narrow

Array = NDArray[Any]
Keep = Callable[[Array, int], Array]  # (moments, step) -> what they are when read again

F32 = np.float32
BETAS, EPS = (0.9, 0.999), 1e-8
LARGEST_BLOCK = 2048


@dataclass(frozen=True)
class Codebook:
    """The nearest of some values, relative to the largest of a block.

    `values` are those of the magnitudes, from 0 to 1; `bounds` where rounding turns from one to the
    next; `scale` what the block's largest magnitude is kept as; `keeps_nonzero` whether what is not
    zero is rounded up to the smallest value rather than to zero.
    """

    block: int
    values: Array
    bounds: Array
    scale: Callable[[Array], Array] = lambda largest: largest
    stochastic: bool = False
    keeps_nonzero: bool = False

    def __call__(self, x: Array, step: int) -> Array:
        blocks = x.reshape(-1, self.block)
        magnitude = np.abs(blocks)
        largest = magnitude.max(axis=1, keepdims=True)
        relative = magnitude / np.where(largest > 0, largest, 1)
        if self.stochastic:
            code = np.searchsorted(self.values, relative, side="right") - 1
            code = np.minimum(code, len(self.values) - 2)
            low, high = self.values[code], self.values[code + 1]
            random = np.random.default_rng(step).random(relative.shape, F32)
            code = code + (relative - low > random * (high - low))
        else:
            code = np.searchsorted(self.bounds, relative, side="right")
        if self.keeps_nonzero:
            code = np.maximum(code, magnitude > 0)
        kept = np.copysign(self.values[code] * self.scale(largest), blocks)
        return kept.astype(F32).reshape(x.shape)


def by_value(block: int, values: Array, **options: Any) -> Codebook:
    values = values.astype(F32)
    return Codebook(block, values, (values[1:] + values[:-1]) / 2, **options)


def companded(block: int, codes: int, expand: Callable[[Array], Array], **options: Any) -> Codebook:
    """Equal steps of a function of the value, whose inverse is `expand`."""
    values, bounds = (np.arange(codes + 1) / codes, (np.arange(codes) + 0.5) / codes)
    return Codebook(block, expand(values).astype(F32), expand(bounds).astype(F32), **options)


def bitsandbytes_map(signed: bool) -> Array:
    """Return bitsandbytes' dynamic map: seven decades, each with twice the values of the last."""
    values = [0.0, 1.0]
    for decade in range(7):
        ends = np.linspace(0.1, 1, (2**decade if signed else 2 ** (decade + 1)) + 1)
        values += list(10.0 ** (decade - 6) * (ends[1:] + ends[:-1]) / 2)
    return np.array(sorted(values))


def plain_float(exponent_bits: int, mantissa_bits: int) -> Array:
    """Return a float without subnormals, relative to its largest; code 0 is zero."""
    steps = 2**mantissa_bits
    codes = np.arange(1, 2**exponent_bits * steps)
    values = np.exp2(codes // steps) * (1 + codes % steps / steps)
    return np.concatenate([[0], values / values[-1]])


def from_one(exponent_bits: int, mantissa_bits: int) -> Array:
    """Return a float that counts from one, relative to its largest: fusedstep's kind."""
    steps = 2**mantissa_bits
    codes = np.arange(2**exponent_bits * steps)
    values = np.exp2(codes // steps) * (1 + codes % steps / steps) - 1
    return values / values[-1]


def half_precision(largest: Array) -> Array:
    return np.maximum(largest, F32(1e-12)).astype(np.float16).astype(F32)


def half_precision_root(largest: Array) -> Array:
    return half_precision(np.sqrt(largest)) ** 2


def ours(fmt: narrow.Format) -> Keep:
    def keep(x: Array, step: int) -> Array:
        return narrow.decode(*narrow.encode(x, fmt, step=step), fmt)

    return keep


def unrounded(x: Array, step: int) -> Array:
    return x


class Contender(NamedTuple):
    name: str
    exp_avg: Keep
    exp_avg_sq: Keep
    bytes: float  # per parameter, of both moments with their scales


def square(x: Array) -> Array:
    return x**2


def fourth_power(x: Array) -> Array:
    return x**4


def softsign_inverse(x: Array) -> Array:
    return x / (2 - x)


def floats(
    m: tuple[int, int], v: tuple[int, int], kind: Callable[[int, int], Array], *, block: int = 64,
    stochastic: bool = False,
) -> Contender:  # fmt: skip
    rounding = "stochastic" if stochastic else "nearest"
    plain = " plain" if kind is plain_float else ""
    name = f"e{m[0]}m{m[1]} + e{v[0]}m{v[1]}{plain}, {block}, {rounding}"
    return Contender(
        name,
        by_value(block, kind(*m), stochastic=stochastic),
        by_value(block, kind(*v), stochastic=stochastic, keeps_nonzero=True),
        2 + 8 / block,
    )


OURS, EXACT = "fusedstep", "float32"
BITSANDBYTES, FLASHOPTIM = "bitsandbytes, 256", "FlashOptim, 32"
NEAREST = floats((3, 4), (4, 4), from_one)
CONTENDERS = (
    Contender(EXACT, unrounded, unrounded, 8),
    Contender(OURS, ours(narrow.EXP_AVG), ours(narrow.EXP_AVG_SQ), 2 + 8 / narrow.BLOCK),
    Contender(
        BITSANDBYTES,
        by_value(256, bitsandbytes_map(True)),
        by_value(256, bitsandbytes_map(False)),
        2 + 8 / 256,
    ),
    Contender(
        "bitsandbytes, 2048",
        by_value(2048, bitsandbytes_map(True)),
        by_value(2048, bitsandbytes_map(False)),
        2 + 8 / 2048,
    ),
    Contender(
        FLASHOPTIM,
        companded(32, 127, softsign_inverse, scale=half_precision),
        companded(32, 255, square, scale=half_precision_root),
        2 + 4 / 32,
    ),
    Contender(
        "linear, 64",
        companded(64, 127, lambda x: x),
        companded(64, 255, lambda x: x),
        2 + 8 / 64,
    ),
    Contender(
        "linear + square root, 64",
        companded(64, 127, lambda x: x),
        companded(64, 255, square, keeps_nonzero=True),
        2 + 8 / 64,
    ),
    Contender(
        "square root + 4th root, 64",
        companded(64, 127, square),
        companded(64, 255, fourth_power, keeps_nonzero=True),
        2 + 8 / 64,
    ),
    Contender(
        "square root + 4th root, 64, stochastic",
        companded(64, 127, square, stochastic=True),
        companded(64, 255, fourth_power, keeps_nonzero=True, stochastic=True),
        2 + 8 / 64,
    ),
    floats((4, 3), (5, 3), plain_float),
    floats((4, 3), (5, 3), plain_float, stochastic=True),
    NEAREST,
    floats((4, 3), (4, 4), from_one, stochastic=True),
    floats((3, 4), (5, 3), from_one, stochastic=True),
    floats((3, 4), (3, 5), from_one, stochastic=True),
    floats((3, 4), (4, 4), from_one, block=32, stochastic=True),
    floats((3, 4), (4, 4), from_one, block=128, stochastic=True),
    floats((3, 4), (4, 4), from_one, block=256, stochastic=True),
)
BY_NAME = {contender.name: contender for contender in CONTENDERS}
TRAINED = (EXACT, OURS, NEAREST.name, BITSANDBYTES, FLASHOPTIM)
DRAWN = (OURS, NEAREST.name, BITSANDBYTES, FLASHOPTIM, "square root + 4th root, 64")


class Moments:
    """Adam's moments of one flat array, kept as a contender keeps them; updates are not rounded."""

    def __init__(self, contender: Contender, elements: int) -> None:
        self.contender, self.step = contender, 0
        self.m, self.v = np.zeros(elements, F32), np.zeros(elements, F32)

    def update(self, g: Array) -> Array:
        """Take a gradient in and return the update, before the learning rate."""
        self.step += 1
        m = self.m + F32(1 - BETAS[0]) * (g - self.m)
        v = F32(BETAS[1]) * self.v + F32(1 - BETAS[1]) * g * g
        self.m = self.contender.exp_avg(m, self.step)
        self.v = self.contender.exp_avg_sq(v, self.step)
        return update(m, v, self.step)


def update(m: Array, v: Array, step: int) -> Array:
    m_hat = m / m.dtype.type(1 - BETAS[0] ** step)
    v_hat = v / v.dtype.type(1 - BETAS[1] ** step)
    direction: Array = m_hat / (np.sqrt(v_hat) + v.dtype.type(EPS))
    return direction


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


def digits_loss(contender: Contender, seed: int, steps: int) -> float:
    """Train the network of `python -m fusedstep demo` and return its loss on unseen digits."""
    from fusedstep.commands import digits

    data = digits.load_digits()
    rng = np.random.default_rng(seed)
    params = digits.init_params(rng)
    flat = Flat({name: p.size for name, p in params.items()})
    moments = Moments(contender, flat.elements)
    for step in range(steps):
        batch = rng.integers(len(data.train_labels), size=64)
        _, grads = digits.loss_and_grads(params, data.train_images[batch], data.train_labels[batch])
        u = moments.update(flat.join(grads))
        for name, part in flat.split(u):
            params[name] -= F32(learning_rate(1e-3, step, steps)) * part.reshape(params[name].shape)
    loss, _ = digits.loss_and_grads(params, data.test_images, data.test_labels)
    return loss


def transformer_loss(contender: Contender, seed: int, steps: int) -> float:
    return train_transformer(contender, seed, steps)[0]


def train_transformer(contender: Contender, seed: int, steps: int) -> tuple[float, Moments]:
    """Train a small transformer on the prose of Python's help; return its loss on unseen text."""
    import torch

    context, batch_size, width = 64, 16, 72
    data, letters = help_text()
    split = len(data) * 9 // 10
    torch.manual_seed(seed)
    model = transformer(letters, context, width)
    params = dict(model.named_parameters())
    flat = Flat({name: p.numel() for name, p in params.items()})
    moments = Moments(contender, flat.elements)

    def loss_at(starts: Array) -> Any:
        text = torch.from_numpy(data[starts[:, np.newaxis] + np.arange(context + 1)])
        scores = model(text[:, :-1])
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), text[:, 1:].flatten())

    rng = np.random.default_rng(seed)
    for step in range(steps):
        model.zero_grad()
        loss_at(rng.integers(split - context - 1, size=batch_size)).backward()
        u = moments.update(flat.join({name: p.grad.numpy() for name, p in params.items()}))
        rate = F32(learning_rate(3e-3, step, steps))
        for name, part in flat.split(u):
            values = params[name].detach().numpy()
            values -= rate * part.reshape(values.shape)
    with torch.no_grad():
        unseen = np.arange(split, len(data) - context - 1, context)
        loss = np.mean([float(loss_at(part)) for part in np.array_split(unseen, 8)])
    return float(loss), moments


def help_text() -> tuple[Array, int]:
    """Return the topics of Python's `help()` as numbers of letters, and how many there are."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics.values())
    letters, data = np.unique(list(text), return_inverse=True)
    return data.astype(np.int64), len(letters)


def transformer(letters: int, context: int, width: int) -> Any:
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.letter, self.place = nn.Embedding(letters, width), nn.Embedding(context, width)
            layer = nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), False)
            self.scores = nn.Linear(width, letters)
            self.mask = nn.Transformer.generate_square_subsequent_mask(context)

        def forward(self, text: torch.Tensor) -> torch.Tensor:
            x = self.letter(text) + self.place.weight
            scores: torch.Tensor = self.scores(self.layers(x, mask=self.mask, is_causal=True))
            return scores

    return Model()


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Return a rate that rises over the first twentieth and falls as a cosine."""
    return peak * min(1.0, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Flat:
    """Many arrays in one, each beginning a block of its own in every format that is trained."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.places: dict[str, slice] = {}
        self.elements = 0
        for name, size in sizes.items():
            self.places[name] = slice(self.elements, self.elements + size)
            self.elements += -(-size // 256) * 256

    def join(self, arrays: dict[str, Array]) -> Array:
        flat = np.zeros(self.elements, F32)
        for name, place in self.places.items():
            flat[place] = arrays[name].ravel()
        return flat

    def split(self, flat: Array) -> Iterator[tuple[str, Array]]:
        return ((name, flat[place]) for name, place in self.places.items())


TASKS: dict[str, Callable[[Contender, int, int], float]] = {
    "digits": digits_loss,
    "transformer": transformer_loss,
}


def measure_training(task: str, seed: int, steps: int) -> dict[str, float | None]:
    """Return the last loss of every contender that is trained with, None where it diverged."""
    losses = {}
    with np.errstate(all="ignore"):
        for name in TRAINED:
            loss = TASKS[task](BY_NAME[name], seed, steps)
            losses[name] = loss if math.isfinite(loss) else None
    return losses


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
