"""Bad input: the error names the argument and nothing is written. Unusual good input works."""

import gc
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from helpers import assert_unchanged
from numpy.lib.stride_tricks import as_strided

import fusedstep as fs

SHAPE = (2, 3)
GD_ROLES = ["params", "grads", "momentum_buffer"]
ADAM_ROLES = ["params", "grads", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
# function, its arrays, what else it needs
RULES = {
    "gd": (fs.gd_step, GD_ROLES[:2], {}),
    "momentum": (fs.gd_step, GD_ROLES, {"momentum": 0.9, "step": 2}),
    "adam": (fs.adam_step, ADAM_ROLES[:4], {"step": 2}),
    "amsgrad": (fs.adam_step, ADAM_ROLES, {"step": 2}),
    "adamw": (fs.adamw_step, ADAM_ROLES[:4], {"step": 2}),
}
OPTIMIZERS = {
    "gd": (fs.GD, {}),
    "momentum": (fs.GD, {"momentum": 0.9}),
    "adam": (fs.Adam, {}),
    "amsgrad": (fs.Adam, {"amsgrad": True}),
    "adamw": (fs.AdamW, {}),
}
every_rule = pytest.mark.parametrize("rule", RULES)
both_forms = pytest.mark.parametrize("form", ["single", "list"])


class OnGpu:
    """What a GPU array looks like from here."""

    __cuda_array_interface__ = {"shape": SHAPE, "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012


@pytest.fixture(autouse=True)
def _without_cuda(monkeypatch):
    """As in a build without the CUDA backend; with one, test_gpu_arrays.py looks at GPU arrays."""
    monkeypatch.setitem(sys.modules, "fusedstep._cuda", None)


def random(shape=SHAPE, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).random(shape).astype(dtype)


def arrays_of(rule, **options):
    roles = RULES[rule][1]
    return {role: random(seed=i, **options) for i, role in enumerate(roles)}


def misaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    memory[:] = np.frombuffer(array.tobytes(), np.uint8)
    return memory.view(array.dtype).reshape(array.shape)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def jax_array(array):
    return pytest.importorskip("jax").numpy.asarray(array)


def torch_tensor(array):
    return pytest.importorskip("torch").from_numpy(array)


# what is made of a good array, the error, what the message says
BAD_TYPES = {
    "int32": (lambda a: a.astype(np.int32), TypeError, "int32"),
    "complex": (lambda a: a.astype(np.complex64), TypeError, "complex64"),
    "object": (lambda a: a.astype(object), TypeError, "object"),
    "swapped": (lambda a: a.astype(a.dtype.newbyteorder()), TypeError, "byte-swapped float32"),
    "misaligned": (misaligned, ValueError, "not aligned"),
    "python float": (lambda a: 1.5, TypeError, "got float"),
    "numpy scalar": (lambda a: np.float32(1), TypeError, "a scalar; pass numpy.asarray("),
    "string": (lambda a: "abc", TypeError, "got str"),
    "dict": (lambda a: {"w": a}, TypeError, "pass the dict's values as a list"),
    "generator": (lambda a: (x for x in [a]), TypeError, "got generator"),
    "masked": (lambda a: np.ma.masked_array(a, mask=a > 0.5), TypeError, "masked"),
    "gpu": (lambda a: OnGpu(), TypeError, "no CUDA backend"),
    "jax": (jax_array, TypeError, "jax.Array is immutable"),
    "torch": (torch_tensor, TypeError, "tensor.detach().numpy()"),
}
# Beside its parameter, that is not for the parameter itself.
UNLIKE = {
    "float64": (lambda a: a.astype(np.float64), TypeError, "float64, but its parameter is float32"),
    "transposed": (lambda a: a.T, ValueError, "shape (3, 2), but its parameter has shape (2, 3)"),
    "flat": (lambda a: a.ravel(), ValueError, "shape (6,)"),
    "longer": (lambda a: np.resize(a, (3, 3)), ValueError, "shape (3, 3)"),
    "0-d": (lambda a: np.array(0.0, a.dtype), ValueError, "shape ()"),
    "empty": (lambda a: a[:0], ValueError, "shape (0, 3)"),
}
UNWRITABLE = {
    "read-only": (read_only, ValueError, "read-only"),
    "stride 0": (lambda a: as_strided(a.copy(), a.shape, (0, 4)), ValueError, "overlap in memory"),
    "self-overlapping": (
        lambda a: as_strided(a.copy(), a.shape, (8, 4)),
        ValueError,
        "overlap in memory",
    ),
}
MADE = {**BAD_TYPES, **UNLIKE, **UNWRITABLE}
NONE = {"none": (lambda a: None, TypeError, "got NoneType")}


def bad_arrays(rule):
    """Yield (role, case) for everything that is wrong with one array of a call."""
    for role in RULES[rule][1]:
        cases = list(BAD_TYPES)
        cases += [] if role == "params" else UNLIKE
        cases += [] if role == "grads" else UNWRITABLE
        yield from ((role, case) for case in cases)


def listed(arrays):
    """Return the list form, where the arrays given are the last of three."""
    others = {role: [array.copy(), array.copy()] for role, array in arrays.items()}
    return {role: [*others[role], array] for role, array in arrays.items()}


@contextmanager
def refused(error, *texts, unchanged=()):
    """Fail unless the block raises this very error with these texts and writes nothing."""
    arrays = [a for a in unchanged if isinstance(a, np.ndarray) and a.dtype != object]
    with assert_unchanged(*arrays), pytest.raises(error) as caught:
        yield
    assert caught.type is error
    for text in texts:
        assert text in str(caught.value)


def refuse_call(rule, arrays, error, *texts, **options):
    function, _, needed = RULES[rule]
    flat = [a for v in arrays.values() for a in (v if isinstance(v, list) else [v])]
    with refused(error, *texts, unchanged=flat):
        function(**{**arrays, **needed, **options})


@both_forms
@pytest.mark.parametrize(
    ("rule", "role", "case"), [(rule, *case) for rule in RULES for case in bad_arrays(rule)]
)
def test_function_refuses_an_array(rule, role, case, form):
    make, error, text = MADE[case]
    good = arrays_of(rule)
    bad = {role: make(good[role])}
    if form == "single":
        name, arrays = role, {**good, **bad}
    else:
        name, arrays = f"{role}[2]", listed(good)
        arrays[role][2] = bad[role]
    refuse_call(rule, arrays, error, f"{name}: ", text)


@every_rule
def test_function_refuses_lists_that_do_not_fit(rule):
    for role in RULES[rule][1]:
        good = listed(arrays_of(rule))
        if role != "params":
            refuse_call(rule, {**good, role: good[role][:2]}, ValueError, f"{role}: 2 arrays, but")
            refuse_call(rule, {**good, role: good[role][0]}, TypeError, f"{role}: ", "a list")
        refuse_call(
            rule, {**good, role: [*good[role][:2], [good[role][2]]]}, TypeError, f"{role}[2]: "
        )
        refuse_call(rule, {**good, role: [*good[role][:2], None]}, TypeError, f"{role}[2]: ")


@both_forms
@pytest.mark.parametrize("part", ["same", "partial", "reversed"])
@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        (rule, first, second)
        for rule, (_, roles, _) in RULES.items()
        for i, first in enumerate(roles)
        for second in roles[i + 1 :]
    ],
)
def test_function_refuses_overlap(rule, first, second, part, form):
    arrays = arrays_of(rule)
    if part == "same":
        arrays[second] = arrays[first]
    else:
        memory = random(12)
        arrays[first] = memory[:6].reshape(SHAPE)
        arrays[second] = (memory[5:11] if part == "partial" else memory[5:11][::-1]).reshape(SHAPE)
    if form == "list":
        arrays = listed(arrays)
        first, second = f"{first}[2]", f"{second}[2]"
    text = "are the same array" if part == "same" else "overlap in memory"
    refuse_call(rule, arrays, ValueError, first, second, text)


@every_rule
def test_function_refuses_overlap_between_parameters(rule):
    arrays = listed(arrays_of(rule))
    twice = {**arrays, "params": [*arrays["params"][:2], arrays["params"][0]]}
    refuse_call(rule, twice, ValueError, "params[0]", "params[2]", "same array")
    other = RULES[rule][1][-1]
    crossed = {**arrays, "grads": [*arrays["grads"][:2], arrays["params"][0][::-1, ::-1]]}
    refuse_call(rule, crossed, ValueError, "params[0]", "grads[2]", "overlap")
    if other != "grads":
        crossed = {**arrays, other: [arrays["params"][2], *arrays[other][1:]]}
        refuse_call(rule, crossed, ValueError, "params[2]", f"{other}[0]", "same array")


BAD_STEPS = [
    (0, ValueError),
    (-1, ValueError),
    (2**63, ValueError),
    (10**40, ValueError),
    (1.0, TypeError),
    (np.float32(1), TypeError),
    ("1", TypeError),
    (1j, TypeError),
]


@pytest.mark.parametrize(("step", "error"), BAD_STEPS)
@every_rule
def test_function_refuses_a_step(rule, step, error):
    arrays = arrays_of(rule)
    refuse_call(rule, arrays, error, "step: expected an integer >= 1", step=step)
    refuse_call(rule, listed(arrays), error, "step: ", step=step)
    refuse_call(rule, listed(arrays), error, "step[2]: ", step=[1, 1, step])
    refuse_call(rule, arrays, TypeError, "step: ", step=[1])
    refuse_call(rule, listed(arrays), ValueError, "step: 2 integers, but", step=(1, 1))
    if rule != "gd":
        refuse_call(rule, arrays, TypeError, "step: ", step=None)


NOT_NUMBERS = [(value, TypeError) for value in ("1", None, [1.0], 1j, lambda t: 0.1)]
NOT_FINITE = [(value, ValueError) for value in (np.nan, np.inf, -np.inf)]
NEGATIVE = [(-1e-9, ValueError)]
NOT_BETA = [*NEGATIVE, (1.0, ValueError), (2.0, ValueError)]
NOT_FLAGS = [(value, TypeError) for value in (1, 0.0, None, "yes")]
BAD_COMMON = {
    "lr": NEGATIVE + NOT_FINITE + NOT_NUMBERS,
    "weight_decay": NEGATIVE + NOT_FINITE + NOT_NUMBERS,
    "grad_scale": [(0.0, ValueError), *NEGATIVE, *NOT_FINITE, *NOT_NUMBERS],
    "maximize": NOT_FLAGS,
}
BAD_GD = {
    **BAD_COMMON,
    "momentum": NEGATIVE + NOT_FINITE + NOT_NUMBERS,
    "dampening": NOT_FINITE + NOT_NUMBERS,
    "nesterov": NOT_FLAGS,
}
BAD_ADAM = {
    **BAD_COMMON,
    "eps": NEGATIVE + NOT_FINITE + NOT_NUMBERS,
    "bias_correction": NOT_FLAGS,
    "betas": [
        *(((beta, 0.9), error) for beta, error in NOT_BETA + NOT_FINITE + NOT_NUMBERS[:-1]),
        *(((0.9, beta), error) for beta, error in NOT_BETA + NOT_FINITE + NOT_NUMBERS[:-1]),
        *((value, TypeError) for value in (0.9, "ab", (0.9,), (0.9, 0.9, 0.9), None, {0.9, 0.8})),
    ],
}


def bad_hypers(rule):
    return BAD_GD if "adam" not in rule and rule != "amsgrad" else BAD_ADAM


@every_rule
def test_function_refuses_hyper_parameters(rule):
    for name, values in bad_hypers(rule).items():
        for value, error in values:
            refuse_call(rule, arrays_of(rule), error, name, **{name: value})
            refuse_call(rule, listed(arrays_of(rule)), error, name, **{name: value})


TOO_LARGE = {"lr": 1e39, "weight_decay": 1e39, "grad_scale": 1e39}
TOO_LARGE_GD = {**TOO_LARGE, "dampening": -1e39, "momentum": 1e39}
TOO_LARGE_ADAM = {**TOO_LARGE, "eps": 1e39}


@every_rule
def test_function_refuses_what_float32_cannot_hold(rule):
    values = TOO_LARGE_ADAM if bad_hypers(rule) is BAD_ADAM else TOO_LARGE_GD
    if rule == "gd":
        values = TOO_LARGE
    for name, value in values.items():
        refuse_call(rule, arrays_of(rule), ValueError, f"{name}: ", "float32", **{name: value})
        # The same number is fine in float64.
        RULES[rule][0](**{**arrays_of(rule, dtype=np.float64), **RULES[rule][2], name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e38, "betas": (0.99, 0.9), "step": 1},
        {"lr": 1e38, "weight_decay": 1e38},
    ],
)
def test_function_refuses_a_quotient_that_float32_cannot_hold(options):
    refuse_call("adamw", arrays_of("adamw"), ValueError, "too large for float32", **options)


def test_mixed_types_are_refused_whole():
    # 1e39 fits the first two arrays and not the last.
    wide, narrow = arrays_of("adam", dtype=np.float64), arrays_of("adam")
    arrays = {role: [wide[role], narrow[role]] for role in wide}
    refuse_call("adam", arrays, ValueError, "lr: ", "float32", lr=1e39)


@every_rule
def test_function_refuses_unknown_keywords(rule):
    refuse_call(rule, arrays_of(rule), TypeError, "learning_rate", learning_rate=0.1)


def test_momentum_needs_its_buffer_and_step():
    p, g, b = random(), random(seed=1), random(seed=2)
    with refused(ValueError, "momentum_buffer: needed", unchanged=[p, g]):
        fs.gd_step(p, g, momentum=0.9, step=1)
    with refused(TypeError, "step: needed", unchanged=[p, g, b]):
        fs.gd_step(p, g, momentum=0.9, momentum_buffer=b)
    for options in ({"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}):
        with refused(ValueError, "nesterov: ", unchanged=[p, g, b]):
            fs.gd_step(p, g, nesterov=True, momentum_buffer=b, step=1, **options)


# Accepted


def take(rule, arrays, **options):
    function, _, needed = RULES[rule]
    function(**{**arrays, **needed, **options})


def copies(arrays):
    return {role: np.array(a, copy=True, order="C", subok=False) for role, a in arrays.items()}


def interleaved(rule, **_):
    matrix = random((6, len(RULES[rule][1])))
    return {role: matrix[:, i] for i, role in enumerate(RULES[rule][1])}


def one_buffer(rule, **_):
    roles = RULES[rule][1]
    flat = random(6 * len(roles))
    return {role: flat[6 * i : 6 * i + 6].reshape(SHAPE) for i, role in enumerate(roles)}


def memmap(rule, path):
    arrays = {}
    for role, array in arrays_of(rule).items():
        arrays[role] = np.memmap(path / role, np.float32, "w+", shape=SHAPE)
        arrays[role][...] = array
    return arrays


def only_grads(change):
    return lambda rule, **_: {
        role: change(a) if role == "grads" else a for role, a in arrays_of(rule).items()
    }


def every_array(change):
    return lambda rule, **_: {role: change(a) for role, a in arrays_of(rule).items()}


ACCEPTED = {
    "interleaved columns": interleaved,
    "one buffer": one_buffer,
    "memmap": memmap,
    "matrix": every_array(lambda a: a.view(np.matrix)),
    "empty": every_array(lambda a: a[:0].copy()),
    "0-d": every_array(lambda a: np.array(a[0, 0])),
    "10-d": every_array(lambda a: a.reshape(1, 2, 1, 1, 3, 1, 1, 1, 1, 1)),
    "reversed": every_array(lambda a: a[::-1, ::-1]),
    "every other": every_array(lambda a: np.repeat(a, 2, axis=1)[:, ::2]),
    "read-only gradient": only_grads(read_only),
    "broadcast gradient": only_grads(lambda a: np.broadcast_to(a[:1], SHAPE)),
    "self-overlapping gradient": only_grads(lambda a: as_strided(a, SHAPE, (4, 4))),
    "fortran gradient": only_grads(np.asfortranarray),
}


@pytest.mark.parametrize("case", ACCEPTED)
@every_rule
def test_function_accepts(rule, case, tmp_path):
    arrays = ACCEPTED[case](rule, path=tmp_path)
    expected = copies(arrays)
    gradient = arrays["grads"].tobytes()
    take(rule, arrays, weight_decay=0.1, grad_scale=0.5)
    take(rule, expected, weight_decay=0.1, grad_scale=0.5)
    for role, array in arrays.items():
        assert array.tobytes() == expected[role].tobytes(), role
    assert arrays["grads"].tobytes() == gradient
    if arrays["params"].size:
        assert arrays["params"].tobytes() != random(arrays["params"].shape).tobytes()


@every_rule
def test_one_gradient_serves_two_parameters(rule):
    one, two = arrays_of(rule), arrays_of(rule)
    expected = copies(one)
    two["grads"] = one["grads"]
    take(rule, {role: [one[role], two[role]] for role in one})
    take(rule, expected)
    assert all(one[role].tobytes() == two[role].tobytes() for role in one)
    assert all(one[role].tobytes() == expected[role].tobytes() for role in one)


def test_numbers_of_other_kinds_are_accepted():
    p, expected = random(), random()
    fs.gd_step(p, random(seed=1), lr=np.float32(0.5), grad_scale=2, maximize=np.bool_(True))
    fs.gd_step(expected, random(seed=1), lr=0.5, grad_scale=2.0, maximize=True)
    assert p.tobytes() == expected.tobytes()
    fs.gd_step([], [])
    fs.adam_step([p], (random(),), [random()], (random(),), step=np.array(3), betas=[0.5, 0.5])


# Optimizers


def grouped(rule, **options):
    """Return an optimizer of three groups after one step, and good gradients for the next."""
    make, own = OPTIMIZERS[rule]
    groups = [
        {"params": random(7)},
        {"params": {"w": random(seed=1), "b": random(3, np.float64, 2)}, "lr": 0.5},
        {"params": [random(4, seed=3), random(seed=4)]},
    ]
    optimizer = make(groups, **own, **options)
    grads = [
        random(7, seed=5),
        {"w": random(seed=6), "b": random(3, np.float64, 7)},
        [random(4, seed=8), random(seed=9)],
    ]
    optimizer.step(grads)
    return optimizer, grads


@contextmanager
def refused_by(optimizer, error, *texts):
    arrays = [p for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state
    arrays += [a for entry in state.values() for key, a in entry.items() if key != "step"]
    steps = [entry["step"] for entry in state.values()]
    with refused(error, *texts, unchanged=arrays):
        yield
    assert [entry["step"] for entry in optimizer.state.values()] == steps


@pytest.mark.parametrize("case", [*BAD_TYPES, *UNLIKE])
@every_rule
def test_optimizer_refuses_a_gradient(rule, case):
    make, error, text = MADE[case]
    optimizer, grads = grouped(rule)
    with refused_by(optimizer, error, "grads[2][1]: ", text):
        optimizer.step([*grads[:2], [grads[2][0], make(grads[2][1])]])
    with refused_by(optimizer, error, "grads[1]['w']: ", text):
        optimizer.step([grads[0], {**grads[1], "w": make(grads[1]["w"])}, grads[2]])
    optimizer.step(grads)


@pytest.mark.parametrize("case", [*BAD_TYPES, *UNWRITABLE, *NONE])
@every_rule
def test_optimizer_refuses_a_parameter(rule, case):
    make, error, text = {**MADE, **NONE}[case]
    optimizer, own = OPTIMIZERS[rule]
    good, bad = random(), make(random())
    with refused(error, "params[1][2]: ", text, unchanged=[good]):
        optimizer([{"params": good}, {"params": [random(), random(), bad]}], **own)
    with refused(error, "params['w']: ", text):
        optimizer({"b": random(), "w": bad}, **own)
    grown, grads = grouped(rule)
    with refused_by(grown, error, "params[3]['w']: ", text):
        grown.add_param_group({"params": {"b": random(), "w": bad}})
    assert len(grown.param_groups) == 3
    grown.step(grads)


def wrong_structures():
    good = {0: random(7), 1: {"w": random(), "b": random(3, np.float64)}, 2: [random(4), random()]}
    a, d, s = good.values()
    yield "an array", a, TypeError, "grads: expected a list with one entry for each"
    yield "a dict", d, TypeError, "grads: expected a list"
    yield "two groups", [a, d], ValueError, "grads: 2 entries"
    yield "list for dict", [a, list(d.values()), s], TypeError, "grads[1]: expected a dict"
    yield "dict for list", [a, d, {"w": s[0]}], TypeError, "grads[2]: expected a list"
    yield "array for list", [a, d, s[0]], TypeError, "grads[2]: expected a list"
    yield "list for array", [[a], d, s], TypeError, "grads[0]: "
    yield "short list", [a, d, s[:1]], ValueError, "grads[2]: 1 arrays, but"
    yield "long list", [a, d, [*s, a]], ValueError, "grads[2]: 3 arrays, but"
    yield "missing name", [a, {"w": d["w"]}, s], ValueError, "grads[1]: no gradient for"
    yield "extra name", [a, {**d, "c": a}, s], ValueError, "grads[1]: 'c' is not a parameter"
    yield "other name", [a, {"w": a, "c": a}, s], ValueError, "grads[1]: no gradient for"
    yield "a number in a name's place", [a, {**d, 0: a}, s], ValueError, "grads[1]: 0 is not"
    yield "generator", (g for g in good.values()), TypeError, "grads: expected a list"


@pytest.mark.parametrize("case", list(wrong_structures()), ids=lambda case: case[0])
@every_rule
def test_optimizer_refuses_a_structure(rule, case):
    _, grads, error, text = case
    optimizer, good = grouped(rule)
    with refused_by(optimizer, error, text):
        optimizer.step(grads)
    optimizer.step(good)


def test_a_generator_is_no_parameter_list():
    with refused(TypeError, "params", "generator"):
        fs.Adam(p for p in [random()])
    for empty in ([], {}, ()):
        with refused(ValueError, "params: no arrays"):
            fs.Adam(empty)
    with refused(TypeError, "params: names must be strings"):
        fs.Adam({0: random()})


@every_rule
def test_optimizer_refuses_overlap(rule):
    make, own = OPTIMIZERS[rule]
    flat = random(13)
    with refused(ValueError, "params[0]", "params[1]", "same array", unchanged=[flat]):
        make([flat, flat], **own)
    with refused(ValueError, "params[0]", "params[1][1]", "overlap", unchanged=[flat]):
        make([{"params": flat[:6]}, {"params": [random(), flat[5:]]}], **own)
    optimizer, grads = grouped(rule)
    first = optimizer.param_groups[0]["params"][0]
    with refused_by(optimizer, ValueError, "params", "overlap"):
        optimizer.add_param_group({"params": [random(), first[1:3]]})
    last = optimizer.param_groups[2]["params"][1]
    for grad in (first[:6].reshape(SHAPE), last[::-1], last):
        with refused_by(optimizer, ValueError, "params", "grads[2][1]"):
            optimizer.step([*grads[:2], [grads[2][0], grad]])
    for key, state in list(optimizer.state[4].items())[1:]:
        with refused_by(optimizer, ValueError, f"{key}[2][1]", "grads[2][1]"):
            optimizer.step([*grads[:2], [grads[2][0], state]])
    optimizer.step(grads)


@every_rule
def test_optimizer_refuses_a_gradient_around_an_empty_parameter(rule):
    make, own = OPTIMIZERS[rule]
    flat = random(12)
    optimizer = make([flat[:10], flat[5:6][:0]], **own)
    with refused_by(optimizer, ValueError, "params[0]", "grads[0]"):
        optimizer.step([flat[1:11], np.empty(0, np.float32)])
    optimizer = make([flat[:3], flat[4:10], flat[5:6][:0]], **own)
    with refused_by(optimizer, ValueError, "params[1]", "grads[0]"):
        optimizer.step([flat[6:9], random(6), np.empty(0, np.float32)])


@every_rule
def test_optimizer_refuses_hyper_parameters(rule):
    make, own = OPTIMIZERS[rule]
    optimizer, grads = grouped(rule)
    last = optimizer.param_groups[-1]
    for name, values in bad_hypers(rule).items():
        if rule == "gd" and name == "momentum":
            continue  # test_momentum_cannot_come_later
        for value, error in values:
            if name == "grad_scale":
                with refused_by(optimizer, error, name):
                    optimizer.step(grads, grad_scale=value)
                continue
            if callable(value):
                continue
            with refused(error, "param_groups[0]: ", name):
                make(random(), **{**own, name: value})
            with refused_by(optimizer, error, "param_groups[3]: ", name):
                optimizer.add_param_group({"params": random(), name: value})
            before, last[name] = last[name], value
            with refused_by(optimizer, error, "param_groups[2]: ", name):
                optimizer.step(grads)
            last[name] = before
    assert len(optimizer.param_groups) == 3
    optimizer.step(grads)


@every_rule
def test_optimizer_refuses_what_float32_cannot_hold(rule):
    optimizer, grads = grouped(rule)
    with refused_by(optimizer, ValueError, "grad_scale: ", "float32"):
        optimizer.step(grads, grad_scale=1e39)
    optimizer.param_groups[-1]["lr"] = 1e39
    with refused_by(optimizer, ValueError, "lr: ", "float32"):
        optimizer.step(grads)


@every_rule
def test_optimizer_refuses_unknown_keywords(rule):
    make, own = OPTIMIZERS[rule]
    with refused(TypeError, "learning_rate"):
        make(random(), **own, learning_rate=0.1)
    with refused(TypeError, "param_groups[1]: unknown hyper-parameter 'learning_rate'"):
        make([{"params": random()}, {"params": random(), "learning_rate": 1}], **own)
    with refused(TypeError, "param_groups[0]: expected a dict with 'params'"):
        make([{"lr": 0.1}], **own)
    with refused(TypeError, "base class"):
        fs.Optimizer(random(), {})


def resized(array):
    array.resize((8, 8), refcheck=False)


def frozen(array):
    array.flags.writeable = False


@pytest.mark.filterwarnings("ignore:Setting the (shape|dtype) :DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (resized, "changed after the optimizer"),
        (frozen, "read-only"),
        (lambda a: setattr(a, "shape", (3, 2)), "changed after the optimizer"),
        (lambda a: setattr(a, "dtype", np.int32), "changed after the optimizer"),
    ],
    ids=["resized", "frozen", "reshaped", "retyped"],
)
@every_rule
def test_optimizer_refuses_a_parameter_that_changed(rule, change, text):
    make, own = OPTIMIZERS[rule]
    first, last = random(), random(seed=1)
    optimizer = make([first, last], **own)
    optimizer.step([random(), random()])
    change(last)
    with refused_by(optimizer, ValueError, "params[1]: ", text):
        optimizer.step([random(), random(last.shape)])
    with refused_by(optimizer, ValueError, "params[1]: ", text):
        optimizer.step([random(), random()])
    if change is not resized:  # a gradient may get the memory that the parameter has left
        optimizer.step([random(), None])


@every_rule
def test_optimizer_refuses_an_exchanged_parameter(rule):
    make, own = OPTIMIZERS[rule]
    first, last = random(), random(seed=1)
    optimizer = make([first, last], **own)
    optimizer.param_groups[0]["params"][1] = last.copy()
    with refused_by(optimizer, ValueError, "param_groups[0]['params']"):
        optimizer.step([random(), random()])


@pytest.mark.filterwarnings("ignore:Setting the strides:DeprecationWarning")
@every_rule
def test_optimizer_refuses_changed_strides(rule):
    make, own = OPTIMIZERS[rule]
    param = np.zeros((4, 8), np.float32)[:, ::2]
    optimizer = make(param, **own)
    param.strides = (32, 4)
    with refused_by(optimizer, ValueError, "params: ", "changed after the optimizer"):
        optimizer.step(np.ones((4, 4), np.float32))


def test_betas_are_no_schedules():
    with refused(TypeError, "betas[0]"):
        fs.Adam(random(), betas=(lambda t: 0.9, 0.999))


def test_names_come_with_a_dict():
    with refused(TypeError, "param_groups[0]", "dict"):
        fs.Adam([{"params": [random()], "param_names": ["w"]}])


@every_rule
def test_optimizer_refuses_tampered_groups(rule):
    optimizer, grads = grouped(rule)
    groups = optimizer.param_groups
    lr = groups[2].pop("lr")
    with refused_by(optimizer, ValueError, "param_groups[2]: lr: missing"):
        optimizer.step(grads)
    groups[2]["lr"] = lr
    for wrong in (tuple(groups), groups[:2], [*groups, groups[0]], None):
        optimizer.param_groups = wrong
        with (
            refused(ValueError, "param_groups: expected a list of 3 groups"),
            assert_unchanged(*(p for group in groups for p in group["params"])),
        ):
            optimizer.step(grads)
    optimizer.param_groups = groups
    groups[2], kept = "a string", groups[2]
    with refused(TypeError, "param_groups[2]: expected a dict"):
        optimizer.step(grads)
    groups[2] = kept
    optimizer.param_groups = [dict(group) for group in groups]
    optimizer.step(grads)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_amsgrad_cannot_change(amsgrad):
    optimizer, grads = grouped("amsgrad" if amsgrad else "adam")
    optimizer.param_groups[-1]["amsgrad"] = not amsgrad
    with refused_by(optimizer, ValueError, "param_groups[2]: amsgrad: cannot change"):
        optimizer.step(grads)


def test_momentum_cannot_come_later():
    optimizer, grads = grouped("gd")
    optimizer.param_groups[-1]["momentum"] = 0.9
    with refused_by(optimizer, ValueError, "param_groups[2]: momentum: ", "without momentum"):
        optimizer.step(grads)


@pytest.mark.parametrize("case", ACCEPTED)
@every_rule
def test_optimizer_accepts(rule, case, tmp_path):
    make, own = OPTIMIZERS[rule]
    arrays = ACCEPTED[case](rule, path=tmp_path)
    param, grad = arrays["params"], arrays["grads"]
    param_copy, grad_copy = (np.array(a, subok=False) for a in (param, grad))
    optimizer, expected = make([param], **own), make([param_copy], **own)
    for _ in range(3):
        optimizer.step([grad])
        expected.step([grad_copy])
    assert param.tobytes() == param_copy.tobytes()
    for key, value in optimizer.state[0].items():
        other = expected.state[0][key]
        assert np.shape(value) == np.shape(other)
        assert np.array_equal(value, other)


@every_rule
def test_an_empty_array_inside_another_overlaps_with_nothing(rule):
    flat = random(12)
    inside = flat[5:6][:0]
    assert inside.ctypes.data == flat.ctypes.data + 20
    # Interleaved columns make the check look at every pair.
    matrix = random((6, len(RULES[rule][1])))
    arrays = {
        role: [flat if role == "params" else random(12), inside, matrix[:, i]]
        for i, role in enumerate(RULES[rule][1])
    }
    take(rule, arrays)
    make, own = OPTIMIZERS[rule]
    optimizer = make([flat, np.empty(0, np.float32)], **own)
    optimizer.step([random(12), inside])


# Code of the user's that runs while a call is being checked, in a process of its own: it may crash
# or hang.
HOSTILE = {
    "a key's comparison shortens the list of groups": """
class Key(str):
    def __hash__(self):
        return hash("w")

    def __eq__(self, other):
        del grads[1:]
        return str.__eq__(self, other)

optimizer = fs.GD([{"params": {"w": ones(4)}}, *({"params": ones(4)} for _ in range(50))])
grads = [{Key("w"): ones(4)}, *(ones(4) for _ in range(50))]
with pytest.raises((IndexError, ValueError)):
    optimizer.step(grads)
assert {entry["step"] for entry in optimizer.state.values()} == {0}
""",
    "a key's comparison empties the dict": """
class Key:
    def __hash__(self):
        return 12345

    def __eq__(self, other):
        grads.clear()
        return False

optimizer = fs.GD({"w": ones(4)})
grads = {"w": ones(4)}
grads[Key()] = ones(4)
with pytest.raises(ValueError, match="is not a parameter"):
    optimizer.step(grads)
""",
    "a gradient's attribute steps its optimizer": """
class Gradient:
    @property
    def __cuda_array_interface__(self):
        optimizer.step(ones(4))

optimizer = fs.GD(ones(4))
with pytest.raises((TypeError, RuntimeError)):
    optimizer.step(Gradient())
optimizer.step(ones(4))
""",
    "a gradient's attribute loads into its optimizer": """
class Gradient:
    @property
    def __cuda_array_interface__(self):
        optimizer.load_state_dict(optimizer.state_dict())

optimizer = fs.GD(ones(4))
with pytest.raises((TypeError, RuntimeError)):
    optimizer.step(Gradient())
optimizer.step(ones(4))
""",
    "a step's __index__ frees an array": """
class Step:
    def __index__(self):
        params[0].resize(0, refcheck=False)
        return 1

params = [ones(4096), ones(4)]
with pytest.raises(ValueError, match="shape"):
    fs.gd_step(params, [ones(4096), ones(4)], step=[1, Step()])
""",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_code_neither_crashes_nor_hangs(case):
    setting = "import numpy as np, pytest, fusedstep as fs\n"
    setting += "ones = lambda n: np.ones(n, np.float32)\n"
    done = subprocess.run(
        [sys.executable, "-c", setting + HOSTILE[case]],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env={**os.environ, "PYTHONMALLOC": "debug"},  # the use of freed memory shows
    )
    assert done.returncode == 0, done.stderr


# Lifetimes


@every_rule
def test_calls_leak_no_references(rule):
    function, _, needed = RULES[rule]
    good = listed(arrays_of(rule))
    bad = {**good, "grads": [*good["grads"][:2], good["grads"][2].astype(np.float64)]}
    lr = float("1e-3")
    watched = [a for arrays in (*good.values(), *bad.values()) for a in (arrays, *arrays)] + [lr]

    def call():
        function(**good, **needed, lr=lr)
        with pytest.raises(TypeError, match=r"grads\[2\]"):
            function(**bad, **needed, lr=lr)

    assert_no_growth(call, watched, 5000)


@every_rule
def test_optimizers_leak_no_references(rule):
    optimizer, grads = grouped(rule)
    bad = [*grads[:2], [grads[2][0], grads[2][1].astype(np.float64)]]
    watched = [*grads, *grads[1].values(), *grads[2], bad, bad[2], bad[2][1]]
    watched += [p for group in optimizer.param_groups for p in group["params"]]

    def call():
        with pytest.raises(TypeError, match=r"grads\[2\]"):
            optimizer.step(bad)
        optimizer.step(grads)

    assert_no_growth(call, watched, 5000)


@every_rule
def test_a_refused_step_keeps_no_gradient(rule):
    optimizer, grads = grouped(rule)
    good = random(7)
    before = sys.getrefcount(good)
    with pytest.raises(ValueError, match=r"grads\[2\]"):
        optimizer.step([good, grads[1], grads[2][:1]])
    assert sys.getrefcount(good) == before


def assert_no_growth(call, watched, times):
    call()
    gc.collect()
    before = [sys.getrefcount(x) for x in watched]
    blocks = sys.getallocatedblocks()
    for _ in range(times):
        call()
    gc.collect()
    assert [sys.getrefcount(x) for x in watched] == before
    assert sys.getallocatedblocks() - blocks < times / 10
