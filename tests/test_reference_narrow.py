"""The reference of the 8-bit moments: values by hand, exact rational arithmetic, statistics."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusedstep.reference_narrow import (
    BLOCK,
    EXP_AVG,
    EXP_AVG_SQ,
    MIN_UNIT,
    Format,
    decode,
    encode,
    random_bits,
)

BOTH = pytest.mark.parametrize("fmt", [EXP_AVG, EXP_AVG_SQ], ids=["exp_avg", "exp_avg_sq"])
LIMITS = np.finfo(np.float32)


def floats(values):
    return np.array(values, np.float32)


def all_codes(fmt: Format):
    return np.arange(256, dtype=np.uint8).view(fmt.dtype)


def size_and_sign(code: int, fmt: Format) -> tuple[int, int]:
    """Return a code without its sign, and whether it is -1 or 1, from a byte's value."""
    if fmt is EXP_AVG:
        return code & 0x7F, -1 if code & 0x80 else 1
    return code, 1


def exact_y(size: int) -> Fraction:
    """Return origin + |x| / unit of a code by definition: 16 steps to each doubling, from 2."""
    return Fraction(2) ** (1 + size // 16) * (1 + Fraction(size % 16, 16))


def origin(fmt: Format) -> Fraction:
    return Fraction(2) if fmt is EXP_AVG else Fraction(31, 16)


def round_to_float32(value: Fraction) -> Fraction:
    """Return the nearest float32, ties to even, of a positive normal number."""
    exponent = 0
    while value >= 2 ** (exponent + 1):
        exponent += 1
    while value < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (exponent - 23)
    return round(value / step) * step  # round() of a Fraction is to even


def tensor(rng: np.random.Generator, n: int, fmt: Format):
    """Moments of very different magnitudes, some of them zero."""
    x = np.exp(rng.normal(0, 4, n)) * rng.choice([0.0, 1.0], n, p=[0.1, 0.9])
    if fmt is EXP_AVG:
        x *= rng.choice([-1.0, 1.0], n)
    return x.astype(np.float32)


def test_splitmix64_gives_its_published_sequence():
    # The first outputs of the generator seeded with 0 are the mixes of its increments. Here step 0
    # of seed 0 mixes to 0, and block k adds k + 1 increments.
    words = random_bits(3, step=0)[:, 0]
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert words.tolist() == [word >> 32 for word in published]


def test_random_bits_within_a_block_are_multiples_of_the_golden_ratio_with_bits_flipped():
    bits = random_bits(1, step=7)[0].astype(np.uint64)
    assert ((bits ^ bits[0]) == np.arange(64, dtype=np.uint64) * 0x9E3779B9 % 2**32).all()


def test_random_bits_differ_by_step_seed_and_block_and_are_uniform():
    draws = np.concatenate(
        [random_bits(50, step=t, seed=s)[:, 0] for t in range(1, 21) for s in range(10)]
    )
    assert len(np.unique(draws)) > len(draws) - 3  # of 10,000 in 2**32
    counts = np.bincount(draws >> 28, minlength=16)
    assert abs(counts - len(draws) / 16).max() < 5 * np.sqrt(len(draws) / 16)


def test_codes_worked_out_by_hand():
    codes = np.array([0, 1, 15, 16, 17, 32, 127, 128, 129, 255], np.uint8).view(np.int8)
    expected = [0, 1 / 8, 15 / 8, 2, 9 / 4, 6, 494, 0, -1 / 8, -494]
    assert decode(codes, floats([1]), EXP_AVG).tolist() == expected
    codes = np.array([0, 1, 16, 255], np.uint8)
    assert decode(codes, floats([2]), EXP_AVG_SQ).tolist() == [1 / 8, 3 / 8, 33 / 8, 253948.125]


@BOTH
def test_every_code_decodes_to_its_definition(fmt):
    unit = floats([0.7e-9])
    codes = all_codes(fmt)
    decoded = decode(codes, np.repeat(unit, -(-codes.size // BLOCK)), fmt)
    unit = Fraction(float(unit[0]))
    below = Fraction(float(np.float32(float(origin(fmt) * unit))))
    for code, x in zip(codes.view(np.uint8).tolist(), decoded.tolist(), strict=True):
        size, sign = size_and_sign(code, fmt)
        exact = exact_y(size) * unit - below
        assert exact == 0 or x * sign == float(round_to_float32(exact * 2**64) / 2**64)
        assert exact != 0 or (x == 0 and not np.signbit(x))


@BOTH
def test_encode_follows_its_definition_in_exact_arithmetic(fmt):
    rng = np.random.default_rng(0)
    x = np.concatenate([tensor(rng, 6 * BLOCK, fmt), floats([1e-42, 3e-45, 2e-38]), x_near_codes()])
    if fmt is EXP_AVG_SQ:
        x = abs(x)
    codes, units = encode(x, fmt, step=3, seed=5)
    random = random_bits(len(units), step=3, seed=5).ravel()
    for i, value in enumerate(x.tolist()):
        unit = float(units[i // BLOCK])
        inverse = Fraction(float(np.float32(1) / np.float32(unit)))
        y = round_to_float32(origin(fmt) + abs(Fraction(value)) * inverse)
        assert y <= exact_y(fmt.largest_code)
        expected = 0
        if y >= 2:
            lower = max(size for size in range(fmt.largest_code + 1) if exact_y(size) <= y)
            fraction = (y - exact_y(lower)) / (exact_y(lower + 1) - exact_y(lower))
            expected = lower + (fraction + Fraction(int(random[i]) >> 13, 2**19) >= 1)
        assert size_and_sign(int(codes.view(np.uint8)[i]), fmt) == (
            expected,
            -1 if np.signbit(value) and fmt is EXP_AVG else 1,
        ), (i, value)


def x_near_codes():
    """Return values at codes, at ties and one ulp beside them, where the unit is near 1."""
    grid = floats([1 / 16, 1 / 8, 3 / 16, 15 / 8, 2, 17 / 8, 4, 6, 10, 15, 30, 200, 400])
    near = np.concatenate([grid, np.nextafter(grid, floats(0)), np.nextafter(grid, floats(1e9))])
    return np.concatenate([near, floats([494])])


@BOTH
def test_units_follow_their_definition(fmt):
    rng = np.random.default_rng(1)
    x = tensor(rng, 50 * BLOCK, fmt)
    _, units = encode(x, fmt, step=1)
    largest = abs(x).reshape(-1, BLOCK).max(axis=1)
    assert (units == largest * fmt.inverse_span).all()
    wanted = (1 + Fraction(1, 2**23)) / (exact_y(fmt.largest_code) - origin(fmt))
    below = np.nextafter(fmt.inverse_span, np.float32(0))
    assert Fraction(float(below)) < wanted <= Fraction(float(fmt.inverse_span))


@BOTH
@given(scale=st.integers(-149, 127), mantissa=st.floats(1, 2 - 2.0**-16, width=32))
def test_the_largest_of_a_block_is_kept(fmt, scale, mantissa):
    x = np.zeros(BLOCK, np.float32)
    x[5] = np.ldexp(np.float32(mantissa), scale)
    codes, units = encode(x, fmt, step=1)
    decoded = decode(codes, units, fmt)
    assert np.delete(decoded, 5) == pytest.approx(0 if fmt is EXP_AVG else units[0] / 16, rel=1e-5)
    if units[0] > MIN_UNIT:
        # Within a few ulp, but for one draw in 100,000 that rounds down.
        assert decoded[5] == pytest.approx(x[5], rel=1e-6)
    else:
        assert abs(decoded[5] - x[5]) <= x[5] / 16 + MIN_UNIT / 8


@BOTH
def test_the_error_is_below_one_step(fmt):
    rng = np.random.default_rng(2)
    x = tensor(rng, 200 * BLOCK, fmt)
    codes, units = encode(x, fmt, step=1)
    decoded = decode(codes, units, fmt).astype(np.float64)
    unit = np.repeat(units, BLOCK).astype(np.float64)
    step = np.exp2(np.floor(np.log2(2 + abs(x) / unit))) / 16 * unit
    assert (abs(decoded - x) <= step * (1 + 1e-6)).all()


@BOTH
def test_rounding_is_unbiased(fmt):
    rng = np.random.default_rng(3)
    x = tensor(rng, 4 * BLOCK, fmt)
    steps = 2000
    decoded = np.array(
        [decode(*encode(x, fmt, step=step), fmt) for step in range(1, steps + 1)], np.float64
    )
    unit = np.repeat(encode(x, fmt, step=1)[1], BLOCK)
    if fmt is EXP_AVG_SQ:  # below the smallest code it is biased upwards, by design
        fair = x >= unit / 16
        decoded, x, unit = decoded[:, fair], x[fair], unit[fair]
    error = decoded.mean(axis=0) - x
    step = np.exp2(np.floor(np.log2(2 + abs(x) / unit))) / 16 * unit
    # A draw's standard deviation is at most half a step.
    assert (abs(error) < 5 * 0.5 / np.sqrt(steps) * step).all()


@BOTH
def test_a_decoded_block_encodes_to_itself(fmt):
    # With a unit that is a power of two nothing rounds, whatever the random bits are.
    codes = all_codes(fmt)
    codes[::BLOCK] = fmt.largest_code
    units = np.full(codes.size // BLOCK, 0.5, np.float32)
    for step in range(1, 50):
        again, new_units = encode(decode(codes, units, fmt), fmt, step=step)
        moved = decode(again, units, fmt) != decode(codes, units, fmt)
        # The unit comes out an ulp or two larger, which can leave a value just short of its code.
        assert new_units == pytest.approx(units, rel=4e-7)
        assert moved.mean() < 0.02
        assert (
            abs(again[moved].view(np.uint8).astype(int) - codes[moved].view(np.uint8)) <= 1
        ).all()


@BOTH
def test_zeros_stay_zeros(fmt):
    codes, units = encode(np.zeros(3 * BLOCK, np.float32), fmt, step=9)
    # As memory fresh from calloc, which is a valid state of zeros.
    assert codes.tobytes() == bytes(codes.nbytes)
    assert units.tobytes() == bytes(units.nbytes)
    decoded = decode(codes, units, fmt)
    assert decoded.tobytes() == bytes(decoded.nbytes)


def test_negative_zero_becomes_zero():
    codes, units = encode(floats([-0.0, 1.0]), EXP_AVG, step=1)
    assert decode(codes, units, EXP_AVG)[:1].tobytes() == bytes(4)


@given(
    x=hnp.arrays(np.float32, st.integers(0, 200), elements=st.floats(0, 2.0**127, width=32)),
    step=st.integers(1, 10**6),
)
def test_a_second_moment_is_zero_only_where_all_of_its_block_was(x, step):
    decoded = decode(*encode(x, EXP_AVG_SQ, step=step), EXP_AVG_SQ)
    blocks = np.concatenate([x, np.zeros(-x.size % BLOCK, np.float32)]).reshape(-1, BLOCK)
    zero = np.repeat((blocks == 0).all(axis=1), BLOCK)[: x.size]
    assert ((decoded == 0) == zero).all()
    assert np.isfinite(decoded).all()
    assert (decoded[decoded != 0] >= LIMITS.tiny).all()


@given(
    x=hnp.arrays(
        np.float32,
        st.integers(0, 200),
        elements=st.floats(-(2.0**127), 2.0**127, width=32),
    ),
    step=st.integers(1, 10**6),
)
def test_a_first_moment_keeps_its_sign_or_becomes_zero(x, step):
    decoded = decode(*encode(x, EXP_AVG, step=step), EXP_AVG)
    assert ((np.sign(decoded) == np.sign(x)) | (decoded == 0)).all()
    assert np.isfinite(decoded).all()
    assert (abs(decoded[decoded != 0]) >= LIMITS.tiny).all()


@BOTH
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan, LIMITS.max])
def test_what_is_not_finite_makes_its_block_nan(fmt, bad):
    x = np.ones(2 * BLOCK + 10, np.float32)
    x[BLOCK + 3] = bad
    codes, units = encode(x, fmt, step=1)
    assert np.isnan(units).tolist() == [False, True, False]
    assert not codes[BLOCK : 2 * BLOCK].any()
    decoded = decode(codes, units, fmt)
    assert np.isnan(decoded[BLOCK : 2 * BLOCK]).all()
    assert decoded[:BLOCK] == pytest.approx(1)
    assert decoded[2 * BLOCK :] == pytest.approx(1)
    # And stays NaN from step to step.
    assert np.isnan(encode(decoded, fmt, step=2)[1]).tolist() == [False, True, False]


@BOTH
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 200])
def test_a_partial_block_is_as_if_filled_up_with_zeros(fmt, n):
    x = tensor(np.random.default_rng(4), n, fmt)
    filled = np.concatenate([x, np.zeros(-n % BLOCK, np.float32)])
    codes, units = encode(x, fmt, step=2)
    filled_codes, filled_units = encode(filled, fmt, step=2)
    assert codes.shape == (n,)
    assert units.tobytes() == filled_units.tobytes()
    assert codes.tobytes() == filled_codes[:n].tobytes()


@BOTH
def test_shards_give_the_codes_of_the_whole(fmt):
    x = tensor(np.random.default_rng(5), 5 * BLOCK + 7, fmt)
    whole_codes, whole_units = encode(x, fmt, step=4, seed=1)
    shards = [(0, 2), (2, 3), (3, 6)]
    parts = [
        encode(x[a * BLOCK : b * BLOCK], fmt, step=4, seed=1, first_block=a) for a, b in shards
    ]
    assert np.concatenate([codes for codes, _ in parts]).tobytes() == whole_codes.tobytes()
    assert np.concatenate([units for _, units in parts]).tobytes() == whole_units.tobytes()


def test_a_moving_average_follows_a_change_of_half_its_block():
    # Rounding to nearest cannot: 0.1 % is less than half a step of any 8-bit code.
    v = np.full(BLOCK, 1e-6, np.float32)
    square = np.where(np.arange(BLOCK) % 2 == 0, 1e-6, 1e-8).astype(np.float32)
    for step in range(1, 8001):
        v = np.float32(0.999) * v + np.float32(0.001) * square
        v = decode(*encode(v, EXP_AVG_SQ, step=step), EXP_AVG_SQ)
    assert np.log(v / square).mean() == pytest.approx(0, abs=0.1)
    assert abs(np.log(v / square)).max() < 0.8
