"""State and parameters in fewer bytes.

The oracle decodes the state with NumPy, takes the step in float32 (which other tests hold against
the papers), and encodes with NumPy, ml_dtypes or the reference of the 8-bit format: the optimizer
must have the same bits.
"""

import copy
import pickle
import subprocess
import sys
import warnings
from itertools import product

import numpy as np
import pytest
from helpers import assert_unchanged

import fusedstep as fs
from fusedstep import reference_narrow
from fusedstep.narrow import MASTER_WEIGHTS

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
bfloat16 = np.dtype(ml_dtypes.bfloat16)
float16, float32 = np.dtype(np.float16), np.dtype(np.float32)
STATE = (None, "float32", "bfloat16", "8bit")
PARAMETERS = [(float32, None), (float16, "float32"), *((bfloat16, m) for m in MASTER_WEIGHTS)]
SEED = 12345


def bits(array):
    return array.view(f"u{array.dtype.itemsize}")


def every_float32_kind(rng, count):
    """Return float32 of all magnitudes, and every special one."""
    drawn = rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    ties = (rng.integers(0, 2**16, count, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    special = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, -65520, 6e-8, 2e-8]
    )
    largest = np.float32(np.finfo(np.float32).max)
    values = np.concatenate([drawn, ties, special.astype(np.float32), [largest, -largest]])
    values[values == 0] = 0  # a step from 0 leads to 0, never to -0
    return values


def assert_same(actual, expected):
    """Fail unless the bits are equal; which NaN a NaN is is outside the promise."""
    with np.errstate(invalid="ignore"):
        nan = np.isnan(expected.astype(np.float64))
        assert np.array_equal(np.isnan(actual.astype(np.float64)), nan)
    assert np.array_equal(bits(actual)[~nan], bits(expected)[~nan])


@pytest.mark.filterwarnings("ignore:params")
@pytest.mark.parametrize("dtype", [bfloat16, float16])
def test_parameters_round_to_nearest(isa, dtype):
    values = every_float32_kind(np.random.default_rng(0), 20_000)
    param = np.zeros(values.size, dtype)
    fs.gd_step(param, -values, lr=1.0)  # 0 + 1 * value
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same(param, values.astype(dtype))


@pytest.mark.filterwarnings("ignore:params")
@pytest.mark.parametrize("dtype", [bfloat16, float16])
def test_every_gradient_is_read_exactly(isa, dtype):
    grads = np.arange(2**16, dtype=np.uint16).view(dtype)
    param = np.zeros(2**16, np.float32)
    fs.gd_step(param, grads, lr=1.0)
    with np.errstate(invalid="ignore"):
        assert_same(param, 0 - grads.astype(np.float32))


@pytest.mark.parametrize("correction", ["correction16", "correction8"])
def test_parameter_and_correction_are_the_float32(isa, correction):
    values = every_float32_kind(np.random.default_rng(1), 20_000)
    param = np.zeros(values.size, bfloat16)
    optimizer = fs.GD(param, lr=1.0, master_weights=correction)
    optimizer.step(-values)
    kept = optimizer.state[0]["correction"]
    held = read_parameter(param, {"correction": kept})
    if correction == "correction16":
        assert_same(held, values)
    else:
        finite = np.abs(values) < 3.4028e38  # what is nearer to the largest may round to infinity
        assert np.array_equal(np.isnan(held), np.isnan(values))
        error = np.abs(held[finite] - values[finite].astype(np.float64))
        # Half of the last of the 24 bits that are kept.
        assert (error <= 2.0**-16 * np.maximum(np.abs(values[finite]), 2.0**-126)).all()
    assert_same(param, nearest_away(held))


@pytest.mark.parametrize("value", [0.0, -0.0, np.inf, -np.inf])
@pytest.mark.parametrize(
    "options",
    [
        {"master_weights": "correction16"},
        {"master_weights": "correction8"},
        {"master_weights": "correction8", "state_dtype": "8bit"},
    ],
)
def test_a_parameter_set_by_hand_is_no_nan(isa, options, value):
    values = np.random.default_rng(2).normal(size=5000).astype(np.float32)
    param = values.astype(bfloat16)
    optimizer = fs.Adam(param, lr=lambda step: 1e-3 if step == 1 else 0.0, **options)
    optimizer.step(values)
    correction = optimizer.state[0]["correction"]
    signed = correction.view(f"i{correction.dtype.itemsize}")
    assert (signed < 0).any()
    assert (signed > 0).any()
    param[...] = value
    optimizer.step(values)
    assert (param.astype(np.float32) == value).all()


def nearest_away(values):
    """Round float32 to bfloat16, ties away from zero."""
    kept = ((values.view(np.uint32).astype(np.uint64) + 0x8000) >> 16).astype(np.uint16)
    kept[np.isnan(values)] = 0x7FC0
    return kept.view(bfloat16)


def read_parameter(param, state):
    if "master" in state:
        return state["master"].copy()
    if "correction" not in state:
        return param.astype(np.float32)
    correction = state["correction"]
    width = 8 * correction.dtype.itemsize
    signed = correction.view(f"i{correction.dtype.itemsize}").astype(np.int64)
    high = bits(param).astype(np.int64) << 16
    held = (high + (signed << (16 - width))).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(held), param.astype(np.float32), held)


def written_parameter(value, param, master_weights, step):
    """Return the parameter, and what lies beside it, that hold a float32 value."""
    if param.dtype == np.float32:
        return value, {}
    if master_weights == "float32":
        return value.astype(param.dtype), {"master": value}
    raw = value.view(np.uint32)
    if master_weights == "stochastic":
        drawn = raw + (low_random_bits(value.size, step) >> 16)
        return (drawn >> 16).astype(np.uint16).view(bfloat16), {}
    if master_weights == "correction16":
        return nearest_away(value), {"correction": (raw & 0xFFFF).astype(np.uint16)}
    rounded = raw + np.uint32(0x80)
    high = ((rounded + np.uint32(0x8000)) >> 16).astype(np.uint16)
    return high.view(bfloat16), {"correction": ((rounded >> 8) & 0xFF).astype(np.uint8)}


def low_random_bits(count, step):
    """Return the 32 random bits by which parameters are rounded."""
    mix, golden = reference_narrow._mix, 0x9E3779B97F4A7C15
    stream = mix(np.array([(SEED + step * golden) % 2**64], np.uint64))
    block = np.arange(1, -(-count // 64) + 1, dtype=np.uint64)
    start = mix(stream + block * np.uint64(golden)).astype(np.uint32)
    lanes = np.arange(64, dtype=np.uint32) * np.uint32(0x9E3779B9)
    return (start[:, np.newaxis] ^ lanes).ravel()[:count]


def read_moment(state, key):
    if key + "_units" not in state:
        return state[key].astype(np.float32)
    codes, units = state[key], state[key + "_units"]
    fmt = reference_narrow.EXP_AVG_SQ if "_sq" in key else reference_narrow.EXP_AVG
    return reference_narrow.decode(codes, units, fmt).astype(np.float32)


def written_moment(value, like, key, step):
    if key + "_units" not in like:
        return {key: value.astype(like[key].dtype)}
    fmt = reference_narrow.EXP_AVG_SQ if "_sq" in key else reference_narrow.EXP_AVG
    codes, units = reference_narrow.encode(value, fmt, step=step, seed=SEED)
    return {key: codes, key + "_units": units}


def expected_step(optimizer, param, grad, master_weights, step, keys, run):
    """Return what a step is to leave in the parameter and the state."""
    state = optimizer.state[0]
    value = read_parameter(param, state)
    moments = [read_moment(state, key) for key in keys]
    run(value, grad.astype(np.float32), moments, step)
    new_param, beside = written_parameter(value, param, master_weights, step)
    new_state = dict(beside)
    for key, moment in zip(keys, moments, strict=True):
        new_state |= written_moment(moment, state, key, step)
    return new_param, new_state


def adam(value, grad, moments, step):
    m, v, *largest = moments
    fs.adam_step(
        value, grad, m, v, step=step, lr=0.01, max_exp_avg_sq=largest[0] if largest else None
    )


def nesterov(value, grad, moments, step):
    fs.gd_step(
        value, grad, lr=0.01, momentum=0.9, nesterov=True, momentum_buffer=moments[0], step=step
    )


RULES = {
    "adam": (fs.Adam, {}, ("exp_avg", "exp_avg_sq"), adam),
    "amsgrad": (fs.Adam, {"amsgrad": True}, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), adam),
    "nesterov": (fs.GD, {"momentum": 0.9, "nesterov": True}, ("momentum_buffer",), nesterov),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_dtype", STATE)
@pytest.mark.parametrize(("dtype", "master_weights"), PARAMETERS)
@pytest.mark.parametrize("grad_dtype", [float32, bfloat16, float16])
def test_a_step_has_the_bits_of_the_reference(
    isa, dtype, master_weights, grad_dtype, state_dtype, rule
):
    optimizer_class, options, keys, run = RULES[rule]
    rng = np.random.default_rng(7)
    for size in (1, 63, 64, 65, 1000):
        param = (rng.standard_normal(size) * 10.0 ** rng.uniform(-3, 1, size)).astype(dtype)
        optimizer = optimizer_class(
            param,
            lr=0.01,
            **options,
            state_dtype=state_dtype,
            master_weights=master_weights,
            seed=SEED,
        )
        for step in (1, 2, 3):
            grad = (rng.standard_normal(size) * 10.0 ** rng.uniform(-3, 1, size)).astype(grad_dtype)
            grad[::5] = 0
            new_param, new_state = expected_step(
                optimizer, param, grad, master_weights, step, keys, run
            )
            optimizer.step(grad)
            state = optimizer.state[0]
            assert_same(param, new_param)
            for key, array in new_state.items():
                assert_same(state[key], array)


def two_steps(make, param, grads, **options):
    optimizer = fs.Adam(param, lr=0.01, seed=SEED, **options)
    for grad in grads:
        optimizer.step(make(grad))
    return [param, *optimizer.state[0].values()][0:1] + [
        a for k, a in optimizer.state[0].items() if k != "step"
    ]


@pytest.mark.parametrize("options", [
    {"state_dtype": "8bit", "master_weights": "correction8"},
    {"state_dtype": "bfloat16", "master_weights": "stochastic"},
    {"state_dtype": {"exp_avg": "8bit"}, "master_weights": "float32"},
])  # fmt: skip
def test_threads_and_layouts_do_not_matter(isa, options):
    rng = np.random.default_rng(3)
    values = rng.standard_normal((300, 701)).astype(bfloat16)
    gradients = [rng.standard_normal((300, 701)).astype(bfloat16) for _ in range(2)]
    fs.set_num_threads(1)
    expected = two_steps(lambda g: g, values.copy(), gradients, **options)
    for threads in (2, 3, 8):
        fs.set_num_threads(threads)
        actual = two_steps(lambda g: g, values.copy(), gradients, **options)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)

    wide = np.zeros((300, 1402), bfloat16)
    sliced = wide[:, ::2]
    sliced[...] = values
    apart = lambda g: np.repeat(g, 2, axis=1)[:, ::2]  # noqa: E731
    for make, param in (
        (apart, values.copy()),
        (lambda g: g, sliced),
        (apart, sliced := np.ascontiguousarray(sliced) * 0 + values),
    ):
        actual = two_steps(make, param, gradients, **options)
        for a, b in zip(actual, expected, strict=True):
            assert_same(np.ascontiguousarray(a).reshape(b.shape), b)
    assert not wide[:, 1::2].astype(np.float32).any()


# The greatest NaN of each sign, which rounding up would make zeros of, and some others.
NANS = np.array([0x7FFF, 0xFFFF, 0x7FC0, 0x7F81, 0xFF81], np.uint16).view(bfloat16)


@pytest.mark.parametrize("where", ["param", "grad", "exp_avg"])
@pytest.mark.parametrize("options", [
    {"state_dtype": "bfloat16", "master_weights": None},
    {"state_dtype": None, "master_weights": None},
    {"state_dtype": "8bit", "master_weights": "stochastic"},
    {"state_dtype": "8bit", "master_weights": "correction8"},
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:params")
def test_a_nan_stays_a_nan_in_every_layout(isa, options, where):
    rng = np.random.default_rng(11)
    count, at = 256, slice(70, 70 + NANS.size)
    values = {key: rng.standard_normal(count).astype(bfloat16) for key in ("param", "grad")}
    if where in values:
        values[where][at] = NANS
    results = []
    for stride in (1, 2):  # in one pass, and by way of tiles
        param, grad = (np.zeros((count, stride), bfloat16)[:, 0] for _ in range(2))
        param[:], grad[:] = values["param"], values["grad"]
        optimizer = fs.Adam(param, lr=0.01, seed=SEED, **options)
        if where == "exp_avg":
            state = optimizer.state[0]
            if "exp_avg_units" in state:
                state["exp_avg_units"][1] = np.uint32(0x7FFFFFFF).view(float32)
            else:
                state["exp_avg"][at] = NANS
        optimizer.step(grad)
        results.append(param.copy())
    fused, tiled = results
    assert np.isnan(fused[at].astype(float32)).all()
    finite = ~np.isnan(tiled.astype(float32))
    assert finite.sum() >= count - 64
    assert np.array_equal(np.isnan(fused.astype(float32)), ~finite)
    assert_same(fused[finite], tiled[finite])


@pytest.mark.parametrize("options", [
    {"state_dtype": "bfloat16", "master_weights": None},
    {"state_dtype": "8bit", "master_weights": "stochastic"},
    {"state_dtype": "8bit", "master_weights": "correction8"},
])  # fmt: skip
@pytest.mark.parametrize("other", [
    np.array([0x7FFFFFFF], np.uint32).view(float32),  # what CUDA makes
    np.array([0xFFFFFFFF], np.uint32).view(float32),
    np.array([0x7FFF], np.uint16).view(float16),
], ids=["float32", "negative", "float16"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:params")
def test_clipping_by_a_norm_of_nan_makes_no_numbers(isa, options, other):
    param = np.ones(256, bfloat16)
    optimizer = fs.Adam([param, np.ones(1, float32)], **options)
    optimizer.step([np.ones(256, bfloat16), other], clip_norm=1.0)
    assert np.isnan(param.astype(float32)).all()


def test_reversed_and_transposed_parameters_keep_their_order():
    rng = np.random.default_rng(4)
    values = rng.standard_normal((40, 50)).astype(np.float32)
    gradients = [rng.standard_normal((40, 50)).astype(np.float32) for _ in range(3)]
    for view in (lambda a: a[::-1], lambda a: a.T, lambda a: a[:, ::-1].T):
        plain = values.copy()
        optimizer = fs.Adam(view(plain), lr=0.01, state_dtype="8bit")
        for grad in gradients:  # of changing layouts
            optimizer.step(np.ascontiguousarray(view(grad)))
            optimizer.step(view(grad.copy()))
        again = values.copy()
        same = fs.Adam(view(again), lr=0.01, state_dtype="8bit")
        for grad in gradients:
            same.step(view(grad))
            same.step(view(grad))
        assert_same(plain, again)


def test_stochastic_rounding_is_right_on_average():
    count = 100_000
    param = np.ones(count, bfloat16)
    optimizer = fs.GD(param, lr=1.0, master_weights="stochastic", seed=1)
    optimizer.step(np.full(count, -(2.0**-9), np.float32))  # a quarter of the spacing at 1
    above = (param.astype(np.float32) > 1).mean()
    assert set(np.unique(param.astype(np.float32))) == {1.0, 1.0 + 2.0**-7}
    assert abs(above - 0.25) < 0.005
    other = np.ones(count, bfloat16)
    fs.GD(other, lr=1.0, master_weights="stochastic", seed=2).step(
        np.full(count, -(2.0**-9), np.float32)
    )
    assert not np.array_equal(bits(param), bits(other))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
@pytest.mark.parametrize(("dtype", "master_weights"), PARAMETERS)
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy", "file"])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(
    dtype, master_weights, state_dtype, way, tmp_path
):
    rng = np.random.default_rng(5)
    start = rng.standard_normal(130).astype(dtype)
    gradients = [rng.standard_normal(130).astype(np.float32) for _ in range(6)]
    options = {"state_dtype": state_dtype, "master_weights": master_weights, "seed": 9}
    unbroken = start.copy()
    whole = fs.Adam(unbroken, lr=0.01, **options)
    for grad in gradients:
        whole.step(grad)

    param = start.copy()
    optimizer = fs.Adam(param, lr=0.01, **options)
    for grad in gradients[:3]:
        optimizer.step(grad)
    if way == "pickle":
        optimizer = pickle.loads(pickle.dumps(optimizer))
    elif way == "deepcopy":
        optimizer = copy.deepcopy(optimizer)
    else:
        param = param.copy()
        resumed = fs.Adam(param, lr=0.01, **options)
        if way == "file":
            pytest.importorskip("safetensors", reason="safetensors is not installed")
            optimizer.save(tmp_path / "state")
            resumed.load(tmp_path / "state")
        else:
            resumed.load_state_dict(optimizer.state_dict())
        optimizer = resumed
    param = optimizer.param_groups[0]["params"][0]
    for grad in gradients[3:]:
        optimizer.step(grad)
    assert_same(param, unbroken)
    for key, array in whole.state[0].items():
        if key == "step":
            assert optimizer.state[0][key] == array
        else:
            assert_same(optimizer.state[0][key], array)


@pytest.mark.parametrize(("saved", "own"), list(product(["float32", "bfloat16", "8bit"], repeat=2)))
def test_state_is_converted_when_it_is_loaded(saved, own):
    rng = np.random.default_rng(6)
    param = np.asfortranarray(rng.standard_normal((30, 20)).astype(np.float32))
    old = fs.Adam(param, state_dtype=saved)
    for _ in range(3):
        old.step(rng.standard_normal((30, 20)).astype(np.float32))
    new = fs.Adam(param.copy(order="F"), state_dtype=own)
    new.load_state_dict(old.state_dict())
    assert new.state[0]["step"] == 3
    for key in ("exp_avg", "exp_avg_sq"):
        before, after = (
            read_moment(o.state[0], key).reshape(param.T.shape).T
            if key + "_units" in o.state[0]
            else o.state[0][key].astype(np.float32)
            for o in (old, new)
        )
        block = np.abs(before).max()
        tolerance = {"float32": 0.0, "bfloat16": 2.0**-8, "8bit": 2.0**-4}[own]
        if saved == own:
            tolerance = 0.0
        assert (
            np.abs(after - before) <= tolerance * np.abs(before) + tolerance * block / 200
        ).all()
        assert np.array_equal(np.sign(after)[after != 0], np.sign(before)[after != 0])


def of_bits(*values):
    return np.array(values, np.uint32).view(float32)


# A block each: zeros and denormals, both ends of the scales, what has no codes, and what is at the
# boundary of codes of a unit near 1.
UNUSUAL = [
    of_bits(0x00000000, 0x80000000),
    of_bits(0x80000000, 0x3F800000, 0x00000001),
    of_bits(0x80000001, 0x00000001),
    of_bits(0x007FFFFF, 0x00800000, 0x80000003),
    np.array([2.0**-104, 2.0**-112, -(2.0**-113), 2.0**-116, 2.0**-118], float32),
    *(of_bits(top, 0x3F800000, 0xFE000000) for top in (0x7F7FFFEE, 0x7F7FFFEF, 0xFF7FFFEF)),
    *(of_bits(top, 0xBF800000) for top in (0x7F7FFFF0, 0xFF7FFFF0, 0x7F7FFFFF)),
    *(of_bits(top, 0x80000000) for top in (0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000)),
    *(of_bits(top, 0xBF800000) for top in (0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF)),
    *(
        np.nextafter(np.array([largest, 1 / 16, 1 / 8, 3 / 16, 2, -2, -4], float32), to)
        for largest in (494, 126974.0625)
        for to in np.array([-np.inf, 0, np.inf], float32)
    ),
]


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_unusual_state_is_rounded_as_in_the_reference(isa, key):
    values = np.concatenate([np.resize(block, 64) for block in UNUSUAL])[:-3]
    if key == "exp_avg_sq":
        values = abs(values)
    optimizer = fs.Adam(np.zeros_like(values), state_dtype="8bit")
    saved = fs.Adam(np.zeros_like(values)).state_dict()
    saved["state"][0][key][...] = values
    optimizer.load_state_dict(saved)
    fmt = reference_narrow.EXP_AVG_SQ if key == "exp_avg_sq" else reference_narrow.EXP_AVG
    codes, units = reference_narrow.encode(values, fmt, step=0)
    state = optimizer.state[0]
    assert state[key].tobytes() == codes.tobytes()
    assert state[key + "_units"].tobytes() == units.tobytes()


UNITS = [
    *of_bits(0, 0x07800000, 0x3F800000, 0x7F800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF),
    *np.array([0.7e-9, 6.9e35, 1e38, 2e38, -1.0], float32),  # the last gives second moments a sign
]


@pytest.mark.parametrize("layout", ["dense", "strided"])
@pytest.mark.parametrize(("dtype", "master_weights"), [(float32, None), (bfloat16, "correction8")])
def test_every_code_is_read_as_in_the_reference(isa, dtype, master_weights, layout):
    size = 256 * len(UNITS)
    param = np.zeros((size, 2), dtype)[:, 0] if layout == "strided" else np.zeros(size, dtype)
    options = {"state_dtype": "8bit", "master_weights": master_weights, "seed": SEED}
    optimizer = fs.Adam(param, lr=0.01, **options)
    state = optimizer.state[0]
    for key in ("exp_avg", "exp_avg_sq"):
        state[key].view(np.uint8)[:] = np.tile(np.arange(256), len(UNITS))
        state[key + "_units"][:] = np.repeat(UNITS, 4)
    state["exp_avg_units"][-4:] = 1
    grad = np.zeros(size, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        _, expected = expected_step(
            optimizer, param, grad, master_weights, 1, ("exp_avg", "exp_avg_sq"), adam
        )
    optimizer.step(grad)
    for key in ("exp_avg", "exp_avg_sq"):
        assert state[key].tobytes() == expected[key].tobytes()
        assert state[key + "_units"].tobytes() == expected[key + "_units"].tobytes()


def test_a_second_moment_of_negative_zero_is_one_of_zero():
    param = np.ones(70, np.float32)
    saved = copy.deepcopy(fs.Adam(param).state_dict())
    saved["state"][0]["exp_avg_sq"][:] = [-0.0] * 35 + [1.0] * 35
    optimizer = fs.Adam(param, state_dtype="8bit")
    optimizer.load_state_dict(saved)
    moment = read_moment(optimizer.state[0], "exp_avg_sq")
    assert np.allclose(moment[:35], 2.0**-21, rtol=0.1)  # the smallest beside the others
    assert np.allclose(moment[35:], 1.0, rtol=0.1)


def test_a_pytorch_state_loads():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    parameter = torch.nn.Parameter(torch.arange(10.0))
    old = torch.optim.Adam([parameter], lr=0.1)
    parameter.grad = torch.arange(10.0) - 5
    old.step()
    entry = old.state_dict()["state"][0]
    new = fs.Adam(parameter.detach().numpy().copy(), lr=0.1, state_dtype="8bit")
    state = {k: v.numpy() for k, v in entry.items()}
    new.load_state_dict({"state": {0: state}, "param_groups": new.state_dict()["param_groups"]})
    assert new.state[0]["step"] == 1
    assert np.allclose(read_moment(new.state[0], "exp_avg"), state["exp_avg"], atol=0.02, rtol=0.04)


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_a_non_finite_gradient_is_seen_in_its_block_alone(special):
    param = np.zeros(200, np.float32)
    optimizer = fs.Adam(param, state_dtype="8bit")
    grad = np.ones(200, np.float32)
    grad[70] = special
    optimizer.step(grad)
    for key in ("exp_avg", "exp_avg_sq"):
        moment = read_moment(optimizer.state[0], key)
        assert np.isnan(moment[64:128]).all()
        assert np.isfinite(moment[:64]).all()
        assert np.isfinite(moment[128:]).all()


def test_zeros_stay_zeros_and_a_second_moment_never_becomes_zero():
    rng = np.random.default_rng(8)
    param = np.zeros(640, np.float32)
    optimizer = fs.Adam(param, state_dtype="8bit")
    for _ in range(20):
        grad = (rng.standard_normal(640) * 10.0 ** rng.uniform(-15, 2, 640)).astype(np.float32)
        grad[128:192] = 0
        optimizer.step(grad)
        state = optimizer.state[0]
        touched = np.ones(640, bool)
        touched[128:192] = False
        assert (read_moment(state, "exp_avg_sq")[touched] > 0).all()
        for key in ("exp_avg", "exp_avg_sq"):
            assert not state[key][~touched].any()
            assert state[key + "_units"][2].tobytes() == bytes(4)
        assert not param[~touched].any()
        assert np.isfinite(param).all()


def test_state_of_five_bytes_for_each_parameter():
    count = 1 << 16
    param = np.zeros(count, bfloat16)
    optimizer = fs.Adam(param, state_dtype="8bit", master_weights="correction8")
    arrays = [a for key, a in optimizer.state[0].items() if key != "step"]
    assert param.nbytes + sum(a.nbytes for a in arrays) <= 5.2 * count


def test_a_narrow_parameter_without_anything_beside_it_warns_once():
    for dtype in (bfloat16, float16):
        with pytest.warns(UserWarning, match="step smaller than the spacing") as caught:
            fs.Adam([np.zeros(3, dtype), np.zeros(3, dtype)])
        assert len(caught) == 1
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fs.Adam(np.zeros(3, bfloat16), master_weights="stochastic")


def test_a_seed_may_be_numpy_s():
    rng = np.random.default_rng(0)
    seed = rng.integers(2**63)
    gradient = rng.standard_normal(70).astype(np.float32)
    params = [np.zeros(70, bfloat16), np.zeros(70, bfloat16)]
    for param, own in zip(params, (seed, int(seed)), strict=True):
        fs.GD(param, lr=0.01, master_weights="stochastic", seed=own).step(gradient)
    assert_same(*params)


F32 = np.zeros(70, np.float32)


@pytest.mark.parametrize(
    ("options", "param", "error", "message"),
    [
        ({"state_dtype": "int8"}, F32, ValueError, "state_dtype: expected one of float32"),
        ({"state_dtype": {"velocity": "8bit"}}, F32, ValueError, "state_dtype: 'velocity' is no"),
        ({"state_dtype": {"exp_avg": "4bit"}}, F32, ValueError, "got '4bit'"),
        ({"state_dtype": "8bit"}, np.zeros(3), TypeError, "params is float64"),
        ({"master_weights": "float64"}, F32, ValueError, "master_weights: expected one of"),
        (
            {"master_weights": "correction16"},
            np.zeros(3, np.float16),
            ValueError,
            "params: float16, which only master_weights='float32'",
        ),
        ({"seed": -1}, F32, ValueError, "seed: expected an integer from 0"),
        ({"seed": 1.5}, F32, ValueError, "seed: expected an integer from 0"),
    ],
)
def test_what_cannot_be_stored_is_refused(options, param, error, message):
    with assert_unchanged(param), pytest.raises(error, match=message):
        fs.Adam(param, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.update(exp_avg=s["exp_avg"][:-1]), ValueError, r"\['exp_avg'\]: shape"),
        (
            lambda s: s.update(exp_avg_units=s["exp_avg_units"][:-1]),
            ValueError,
            r"\['exp_avg_units'\]: shape \(1,\), but \(2,\)",
        ),
        (
            lambda s: s.update(exp_avg=s["exp_avg"].view(np.uint8)),
            TypeError,
            r"\['exp_avg'\]: uint8, but int8",
        ),
        (lambda s: s.pop("exp_avg_sq"), ValueError, "no 'exp_avg_sq'"),
        (lambda s: s["exp_avg_units"].__setitem__(0, -1), ValueError, "a unit never is"),
        (
            lambda s: (
                s.pop("exp_avg_sq_units"),
                s.update(exp_avg_sq=np.full(70, -1, np.float32)),
            ),
            ValueError,
            r"\['exp_avg_sq'\]: negative",
        ),
        (lambda s: s.update(master=np.zeros(70)), ValueError, "'master' is no state"),
        (
            lambda s: s.update(exp_avg=np.zeros(70)),
            TypeError,
            "float64, but int8 is expected",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, error, message):
    param = np.ones(70, np.float32)
    optimizer = fs.Adam(param, state_dtype="8bit")
    optimizer.step(np.ones(70, np.float32))
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved["state"][0])
    arrays = [a for key, a in optimizer.state[0].items() if key != "step"]
    with assert_unchanged(param, *arrays), pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)


@pytest.mark.filterwarnings("ignore:params")
@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        (None, "float32", "no 'master'; make the optimizer with the master_weights"),
        ("float32", None, "'master' is no state of this GD; make the optimizer with the master_"),
        ("correction16", "correction8", r"\['correction'\]: uint16"),
    ],
)
def test_state_of_other_master_weights_is_refused(saved, own, message):
    old = fs.GD(np.ones(70, bfloat16), momentum=0.9, master_weights=saved)
    old.step(np.ones(70, np.float32))
    new = fs.GD(np.ones(70, bfloat16), momentum=0.9, master_weights=own)
    with pytest.raises((TypeError, ValueError), match=message):
        new.load_state_dict(old.state_dict())
    assert new.state[0]["step"] == 0


@pytest.mark.parametrize("grad_dtype", [float32, bfloat16, float16])
@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_clipping_and_zeroing_with_narrow_arrays(isa, grad_dtype, state_dtype):
    rng = np.random.default_rng(11)
    values = rng.standard_normal(1000).astype(bfloat16)
    grads = rng.standard_normal(1000).astype(grad_dtype)
    norm = np.sqrt((grads.astype(np.float64) ** 2).sum())
    options = {"state_dtype": state_dtype, "master_weights": "correction8", "seed": SEED}
    clipped, scaled = values.copy(), values.copy()
    optimizer = fs.Adam(clipped, lr=0.01, **options)
    cleared = grads.copy()
    info = optimizer.step(cleared, clip_norm=2.0, zero_grad=True)
    assert info.grad_norm == pytest.approx(norm, rel=1e-12)
    assert not cleared.astype(np.float32).any()
    other = fs.Adam(scaled, lr=0.01, **options)
    other.step(grads, grad_scale=2.0 / (info.grad_norm + 1e-6))
    assert_same(clipped, scaled)

    grads[500] = np.inf
    before = [clipped, *(a for key, a in optimizer.state[0].items() if key != "step")]
    with assert_unchanged(*before):
        assert optimizer.step(grads, skip_nonfinite=True).skipped
    assert optimizer.state[0]["step"] == 1


def test_float64_gradients_of_narrow_parameters_are_refused():
    param = np.ones(3, bfloat16)
    optimizer = fs.Adam(param, master_weights="float32")
    with assert_unchanged(param), pytest.raises(TypeError, match=r"grads: float64.*bfloat16"):
        optimizer.step(np.ones(3))
    with pytest.raises(TypeError, match="grads: float16"):
        fs.gd_step(np.ones(3), np.ones(3, np.float16))


def test_the_functions_warn_once_of_what_rounding_loses():
    program = """
import warnings, ml_dtypes, numpy as np, fusedstep as fs
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        fs.gd_step(np.ones(3, ml_dtypes.bfloat16), np.ones(3, np.float32))
print(len(caught), caught[0].message)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("1 params: a step smaller than the spacing")
