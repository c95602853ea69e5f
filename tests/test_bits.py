"""The same bits for every instruction set, thread count, alignment, grouping and layout."""

from functools import partial

import numpy as np
import pytest
from helpers import assert_unchanged

import fusedstep as fs

# How many arrays a rule has, and a step of it over them, with every scalar in use.
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "grad_scale": 0.7}
MOMENTUM = {**OPTIONS, "momentum": 0.9, "nesterov": True, "step": 2}
ADAM = {**OPTIONS, "step": 3}
RULES = {
    "gd": (2, partial(fs.gd_step, **OPTIONS)),
    "momentum": (3, lambda p, g, b: fs.gd_step(p, g, momentum_buffer=b, **MOMENTUM)),
    "adam": (4, partial(fs.adam_step, **ADAM)),
    "adamw": (4, partial(fs.adamw_step, **ADAM)),
    "amsgrad": (5, lambda p, g, m, v, x: fs.adam_step(p, g, m, v, max_exp_avg_sq=x, **ADAM)),
}
SENTINEL = 12345.0


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


def draw(count, shape, dtype):
    """Return `count` arrays; those of second moments, from the fourth on, are not negative."""
    rng = np.random.default_rng(count)
    arrays = [rng.standard_normal(shape).astype(dtype) for _ in range(count)]
    return [abs(array) if k >= 3 else array for k, array in enumerate(arrays)]


def copies(arrays):
    return [array.copy() for array in arrays]


def stepped(step, arrays):
    """Return what a step with one thread of scalar code makes of contiguous copies of `arrays`."""
    isa, threads = fs.get_isa(), fs.get_num_threads()
    fs.set_isa("scalar")
    fs.set_num_threads(1)
    results = [array.copy(order="C") for array in arrays]
    step(*results)
    fs.set_isa(isa)
    fs.set_num_threads(threads)
    return results


def bits(arrays):
    return [array.tobytes() for array in arrays]


def aligned(shape, dtype):
    """Return an array full of sentinels that begins on a cache line."""
    size = int(np.prod(shape))
    memory = np.empty(size * dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + size * dtype.itemsize].view(dtype).reshape(shape)
    array[...] = SENTINEL
    return array


@pytest.mark.parametrize("shift", [0, 5], ids=["alike", "apart"])
def test_every_length_at_every_offset(isa, rule, dtype, shift):
    count, step = rule
    data = draw(count, 64, dtype)
    # Element by element: nothing may depend on where in a vector an element is.
    expected = copies(data)
    fs.set_isa("scalar")
    for i in range(64):
        step(*[array[i : i + 1] for array in expected])
    fs.set_isa(isa)
    rows = aligned((count, 128), dtype)
    for length in range(65):
        for offset in range(16):
            rows[...] = SENTINEL
            starts = [(offset + k * shift) % 16 for k in range(count)]
            views = [row[at : at + length] for row, at in zip(rows, starts, strict=True)]
            for view, values in zip(views, data, strict=True):
                view[...] = values[:length]
            wanted = rows.copy()
            for row, at, values in zip(wanted, starts, expected, strict=True):
                row[at : at + length] = values[:length]
            step(*views)
            assert rows.tobytes() == wanted.tobytes(), (length, starts)


@pytest.mark.parametrize("size", [8192 * 43 - 1, 8192 * 44 + 1, 1_000_003])
def test_every_thread_count(rule, dtype, size):
    count, step = rule
    data = draw(count, size, dtype)
    fs.set_num_threads(1)
    expected = copies(data)
    step(*expected)
    expected = bits(expected)
    for threads in range(2, 9):
        fs.set_num_threads(threads)
        results = copies(data)
        step(*results)
        assert bits(results) == expected, threads


def test_instruction_sets_agree_on_a_large_array(isa, rule, dtype):
    count, step = rule
    data = draw(count, 100_003, dtype)
    results = copies(data)
    step(*results)
    assert bits(results) == bits(stepped(step, data))


@pytest.mark.parametrize("threads", [1, 3])
def test_grouping(isa, rule, dtype, threads):
    count, step = rule
    fs.set_num_threads(threads)
    sizes = [1, 0, 63, 64, 65, 1000, 8192, 8193, 400_003, 5]
    ends = np.cumsum(sizes)[:-1]
    whole = draw(count, sum(sizes), dtype)
    lists = [np.split(array.copy(), ends) for array in whole]
    one_each = [np.split(array.copy(), ends) for array in whole]
    # So that no array begins where the one before ends.
    lists = [copies(arrays) for arrays in lists]

    step(*whole)
    step(*lists)
    for arrays in zip(*one_each, strict=True):
        step(*arrays)
    assert bits(map(np.concatenate, lists)) == bits(whole)
    assert bits(map(np.concatenate, one_each)) == bits(whole)


CUBE = (10, 10, 10)
LAYOUTS = {
    "slices": lambda a: a[1:-1, 2:9, ::3],
    "every second": lambda a: a[..., ::2],
    "rows apart": lambda a: a[:, :, :7],
    "reversed": lambda a: a[::-1, ::-1, ::-1],
    "an axis reversed": lambda a: a[:, ::-1],
    "reversed slices": lambda a: a[::-2, ::3, -2:0:-1],
    "transposed": lambda a: a.T,
    "permuted": lambda a: a.transpose(1, 2, 0)[:, ::2],
    "Fortran": lambda a: a.reshape(-1).reshape(CUBE, order="F"),
    "column": lambda a: a[:, 3, 4],
    "size-1 axes": lambda a: a[3:4, :, None, 5:6],
    "0-d": lambda a: a[1, 2, 3, ...],
    "empty": lambda a: a[:, 3:3],
    "5-d": lambda a: a.reshape(2, 5, 10, 5, 2)[:, ::-2, 1:8, :, ::-1].transpose(3, 0, 4, 2, 1),
}


def check_views(step, layouts):
    """Step views of cubes: they become what contiguous copies do, and their gaps stay."""
    count = len(layouts)
    for dtype in (np.float32, np.float64):
        cubes = draw(count, CUBE, dtype)
        views = [layout(cube) for layout, cube in zip(layouts, cubes, strict=True)]
        wanted = copies(cubes)
        for layout, cube, result in zip(layouts, wanted, stepped(step, views), strict=True):
            layout(cube)[...] = result
        step(*views)
        assert bits(cubes) == bits(wanted)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_views(isa, rule, layout):
    count, step = rule
    check_views(step, [layout] * count)


SAME_SHAPE = [
    lambda a: a,
    lambda a: a.T,
    lambda a: a[::-1],
    lambda a: a.transpose(1, 2, 0),
    LAYOUTS["Fortran"],
    lambda a: a[:, ::-1, ::-1],
]


@pytest.mark.parametrize("first", range(len(SAME_SHAPE)))
def test_arrays_of_different_orders(isa, rule, first):
    count, step = rule
    check_views(step, [SAME_SHAPE[(first + k) % len(SAME_SHAPE)] for k in range(count)])


@pytest.mark.parametrize("shape", [(1,), (10, 1), (10,), (10, 1, 10)])
def test_broadcast_gradient(isa, rule, dtype, shape):
    count, step = rule
    arrays = draw(count, CUBE, dtype)
    arrays[1] = np.broadcast_to(np.random.default_rng(9).standard_normal(shape).astype(dtype), CUBE)
    expected = stepped(step, arrays)
    with assert_unchanged(arrays[1]):
        step(*arrays)
    assert bits(arrays) == bits(expected)


def test_large_views_with_several_threads(isa, rule, dtype):
    count, step = rule
    fs.set_num_threads(3)
    parents = draw(count, (1001, 901), dtype)
    views = [parent[::2, ::-1].T for parent in parents]
    wanted = copies(parents)
    for parent, result in zip(wanted, stepped(step, views), strict=True):
        parent[::2, ::-1].T[...] = result
    step(*views)
    assert bits(parents) == bits(wanted)


def test_special_values(isa, rule, dtype):
    count, step = rule
    limits = np.finfo(dtype)
    positive = [0, 1, limits.smallest_subnormal, limits.tiny / 2, limits.tiny, limits.max, np.inf]
    values = np.array([*positive, *np.negative(positive), np.nan], dtype)
    rng = np.random.default_rng(0)
    arrays = list(rng.choice(values, (count, 20_011)))
    expected = stepped(step, arrays)
    step(*arrays)
    for result, wanted in zip(arrays, expected, strict=True):
        # Which NaN it is, is not promised.
        assert (np.isnan(result) == np.isnan(wanted)).all()
        result[np.isnan(result)] = wanted[np.isnan(wanted)] = np.nan
    assert bits(arrays) == bits(expected)
    assert all(np.isfinite(a).any() and np.isnan(a).any() for a in arrays)


@pytest.mark.parametrize("share", [0.03, 0.5, 1.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_around_denormals(maker, isa, rule, share, threads):
    """A kernel that goes around denormals, which Intel's processors need, has the same bits."""
    count, step = rule
    rng = np.random.default_rng(1)
    fs.set_num_threads(threads)
    for first_exponent, last_exponent in ((0, 139), (80, 139), (0, 255)):
        arrays = []
        for k in range(count):
            size = 30_011
            exponents = rng.integers(first_exponent, last_exponent + 1, size)
            exponents[rng.random(size) < share] = 0
            exponents[12_000:20_000] = 127  # where the quick way is taken again
            mantissas = rng.integers(0, 1 << 23, size) >> rng.integers(0, 23, size)
            bits_of = (exponents << 23 | mantissas).astype(np.uint32)
            bits_of[rng.random(size) < 0.1] = 0
            if k < 3:
                bits_of |= rng.integers(0, 2, size).astype(np.uint32) << np.uint32(31)
            arrays.append(bits_of.view(np.float32))
        expected = stepped(step, arrays)
        # Each at an offset of its own.
        results = [np.append(np.zeros(k, np.float32), a)[k:] for k, a in enumerate(arrays)]
        step(*results)
        for result, wanted in zip(results, expected, strict=True):
            # Which NaN it is, is not promised.
            assert (np.isnan(result) == np.isnan(wanted)).all()
            result[np.isnan(result)] = wanted[np.isnan(wanted)] = np.nan
        assert bits(results) == bits(expected)


def test_the_root_of_every_mantissa(isa):
    """A kernel may find roots by other means than the processor's, but not others."""
    mantissas = np.arange(1 << 23, dtype=np.uint32)
    exponents = [127, 128, *range(0, 256, 15), 46, 47, 48, 254]
    v = np.concatenate(
        [mantissas | np.uint32(e << 23) for e in exponents[:2]]
        + [mantissas[::4099] | np.uint32(e << 23) for e in exponents[2:]]
    ).view("f4")
    v = np.concatenate([v, np.float32([0.0, np.inf])])
    p, g, m = np.zeros_like(v), np.zeros_like(v), np.ones_like(v)
    fs.set_isa(isa)
    # In float32 this beta2 is 1, so that v stays.
    fs.adam_step(p, g, m, v, lr=1.0, betas=(0.5, 1 - 1e-12), eps=0.0, step=1, bias_correction=False)
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(p, -(np.float32(0.5) / np.sqrt(v)))
