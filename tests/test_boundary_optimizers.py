"""Bad input to an optimizer: the error names the argument and nothing is written."""

import numpy as np
import pytest
from boundary_cases import (
    ACCEPTED,
    BAD_TYPES,
    MADE,
    NONE,
    OPTIMIZERS,
    RULES,
    SHAPE,
    UNLIKE,
    UNWRITABLE,
    bad_hypers,
    every_rule,
    grouped,
    random,
    refused,
    refused_by,
    take,
)
from helpers import assert_unchanged

import fusedstep as fs

pytestmark = pytest.mark.usefixtures("without_cuda")


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
