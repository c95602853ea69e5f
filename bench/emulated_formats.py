"""8-bit formats of Adam's moments, fusedstep's and others, emulated in float32."""

from collections.abc import Callable
from dataclasses import dataclass
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
    """Return a float that counts from one, relative to its largest: nearly fusedstep's."""
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
