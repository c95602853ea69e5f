"""The 8-bit blockwise moments, in NumPy: what every kernel must reproduce bit for bit.

A block of 64 elements shares one float32 `unit`. An element x is kept as y = origin + |x| / unit,
and y as a float with four bits of mantissa, less the bits of 2: uniform steps of unit / 8 near
zero, 16 steps to each doubling of y above. Of a first moment, whose origin is 2, zero is code 0;
of a second one it is the smallest value above zero. `docs/eight_bit.md` says why.

Rounding is stochastic. Its random bits come from a counter, not from a state: block and step decide
them, so they are the same for any order, grouping or sharding of the work.

- Stochastic rounding: Croci et al., *Stochastic rounding: implementation, error analysis and
  applications*, Royal Society Open Science 9 (2022), section 2.
- The generator is SplitMix64: Steele, Lea & Flood, *Fast Splittable Pseudorandom Number
  Generators*, OOPSLA 2014, figure 17; within a block, Weyl's sequence of the golden ratio, of which
  it flips bits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK", "EXP_AVG", "EXP_AVG_SQ", "Format", "decode", "encode", "random_bits"]

Array = NDArray[Any]

BLOCK = 64
MIN_UNIT = np.float32(2.0**-112)  # keeps 1 / unit and the smallest nonzero moment normal

_TWO = np.int32(0x40000000)  # the bits of 2.0
_OVERFLOW = np.uint32(0x7F7FFFF0)  # 16 ulp below infinity: so that what is finite decodes finite
_SIGN = np.uint32(0x80000000)
_SHIFT = 19  # bits of a float32's mantissa beyond the four kept
_GOLDEN_64 = 0x9E3779B97F4A7C15
_GOLDEN_32 = 0x9E3779B9


@dataclass(frozen=True)
class Format:
    """How one moment is kept in 8 bits.

    Attributes
    ----------
    dtype : dtype
        Of the codes: int8 (a bit for the sign and 3 of exponent) or uint8 (4 bits of exponent).
    origin : float32
        The `y` of zero: what is below 2 is cut to code 0.
    inverse_span : float32
        The unit of a block whose largest magnitude is 1: 1 / (`y` of the largest code - origin),
        and a little more, so that no `y` comes out larger than that of the largest code.
    """

    dtype: np.dtype[Any]
    origin: np.float32
    inverse_span: np.float32

    @property
    def signed(self) -> bool:
        return self.dtype == np.int8

    @property
    def largest_code(self) -> int:
        return int(np.iinfo(self.dtype).max)


# The smallest float32 that are at least (1 + 2**-23) / (496 - 2) and / (126976 - 1.9375).
EXP_AVG = Format(np.dtype(np.int8), np.float32(2), np.int32(0x3B04A9FB).view(np.float32))
EXP_AVG_SQ = Format(np.dtype(np.uint8), np.float32(1.9375), np.int32(0x3704218E).view(np.float32))


def decode(codes: Array, units: Array, fmt: Format) -> Array:
    """Return the moments that 8-bit codes stand for.

    Parameters
    ----------
    codes : array of `fmt.dtype`, shape (n,)
    units : array of float32, shape (ceil(n / 64),)
    fmt : Format
        `EXP_AVG` or `EXP_AVG_SQ`.

    Returns
    -------
    array of float32, shape (n,)
        NaN throughout a block whose unit is NaN.
    """
    code = codes.view(np.uint8).astype(np.int32)
    negative = np.zeros(codes.shape, np.bool_)
    if fmt.signed:
        code, negative = code & 0x7F, code > 0x7F
    unit = np.repeat(units, BLOCK)[: codes.size]
    y = ((code << _SHIFT) + _TWO).view(np.float32)
    # A product of 5 and 24 bits, and its difference, are exact in float64: rounded once.
    x: Array = (y.astype(np.float64) * unit - fmt.origin * unit).astype(np.float32)
    return np.where(negative & (x != 0), -x, x)


def encode(
    x: Array, fmt: Format, *, step: int, seed: int = 0, first_block: int = 0
) -> tuple[Array, Array]:
    """Round moments to 8 bits.

    Parameters
    ----------
    x : array of float32, shape (n,)
        Where `fmt` is `EXP_AVG_SQ`, a sign, which no second moment has, makes NaN of a block.
    fmt : Format
        `EXP_AVG` or `EXP_AVG_SQ`.
    step : int
        Number of the optimizer's step, from 1.
    seed : int
        Of the stochastic rounding.
    first_block : int
        Where `x` begins in its tensor, in blocks.

    Returns
    -------
    codes : array of `fmt.dtype`, shape (n,)
    units : array of float32, shape (ceil(n / 64),)
        NaN, with codes of zero, for a block in which anything is NaN, infinite or within 16 ulp
        of infinite. Zero, with codes of zero, for a block of zeros.
    """
    blocks = -(-x.size // BLOCK)
    padded = np.zeros(blocks * BLOCK, np.float32)
    padded[: x.size] = x
    bits = padded.view(np.uint32).reshape(blocks, BLOCK)
    if fmt.signed:
        bits = bits & ~_SIGN

    # As integers, NaN is above infinity and that above the rest: the maximum loses nothing.
    top = bits.max(axis=1, initial=0)
    finite = top < _OVERFLOW
    largest = np.where(finite, top, 0).astype(np.uint32).view(np.float32)
    units = np.maximum(largest * fmt.inverse_span, MIN_UNIT)

    magnitude = np.where(finite[:, np.newaxis], bits, 0).astype(np.uint32).view(np.float32)
    y = _fma(magnitude, (np.float32(1) / units)[:, np.newaxis], fmt.origin)
    random = random_bits(blocks, step=step, seed=seed, first_block=first_block)
    # In the bits of a float a step of the mantissa is a step of the value, so that adding uniform
    # bits below the cut and cutting rounds up as often as the fraction that is cut says.
    codes = (y.view(np.int32) - _TWO + (random >> (32 - _SHIFT)).astype(np.int32)) >> _SHIFT
    codes = np.maximum(codes, 0).astype(np.uint8)
    if fmt.signed:
        codes |= (padded.view(np.uint32).reshape(codes.shape) >> 24 & 0x80).astype(np.uint8)
    codes[~finite | (top == 0)] = 0
    units[~finite] = np.nan
    units[top == 0] = 0
    return codes.ravel()[: x.size].view(fmt.dtype), units


def random_bits(blocks: int, *, step: int, seed: int = 0, first_block: int = 0) -> Array:
    """Return the 32 random bits of every element, of which rounding takes the topmost 19.

    Parameters
    ----------
    blocks : int
        How many blocks.
    step, seed, first_block
        As in `encode`. Both moments are rounded with the same bits.

    Returns
    -------
    array of uint32, shape (blocks, 64)
    """
    stream = _mix(np.array([(seed + step * _GOLDEN_64) % 2**64], np.uint64))
    block = np.arange(first_block + 1, first_block + blocks + 1, dtype=np.uint64)
    word = _mix(stream + block * np.uint64(_GOLDEN_64)) >> np.uint64(32)
    lanes = np.arange(BLOCK, dtype=np.uint32) * np.uint32(_GOLDEN_32)
    return word.astype(np.uint32)[:, np.newaxis] ^ lanes


def _fma(a: Array, b: Array, c: np.float32) -> Array:
    """Return a * b + c, for a * b >= 0 and c > 0, rounded once to float32."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact: 24 bits times 24 bits
    addend = np.float64(c)
    total = product + addend
    # What the sum lost (Knuth's two-sum). Making the last bit of an inexact sum odd keeps the
    # second rounding, to float32, from taking it for a tie.
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    total = total.view(np.int64)
    even = total % 2 == 0
    total = total + np.where(even & (lost > 0), 1, 0) - np.where(even & (lost < 0), 1, 0)
    rounded: Array = total.view(np.float64).astype(np.float32)
    return rounded


def _mix(z: Array) -> Array:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = z ^ (z >> np.uint64(31))
    return mixed
