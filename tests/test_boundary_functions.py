"""Bad input to a function: the error names the argument and nothing is written.

Unusual good input works.
"""

import numpy as np
import pytest
from boundary_cases import (
    ACCEPTED,
    BAD_ADAM,
    MADE,
    RULES,
    SHAPE,
    arrays_of,
    bad_arrays,
    bad_hypers,
    both_forms,
    copies,
    every_rule,
    listed,
    random,
    refuse_call,
    refused,
    take,
)

import fusedstep as fs

pytestmark = pytest.mark.usefixtures("without_cuda")


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
