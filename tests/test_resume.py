"""A resumed run equals the unbroken one bit for bit, and what makes it so: nothing accumulates."""

import copy
import pickle
from decimal import Decimal, localcontext
from itertools import product

import numpy as np
import pytest
from helpers import GD_CHOICES, combinations, describe

import fusedstep as fs

BREAK, STEPS = 5, 12


def warmup(t):
    return 0.01 * min(1, t / 8)


LR = (0.01, warmup)
GD_OPTIONS = combinations(lr=LR, **GD_CHOICES)
ADAM_OPTIONS = combinations(
    lr=LR,
    weight_decay=(0.0, 0.1),
    amsgrad=(False, True),
    maximize=(False, True),
    bias_correction=(True, False),
)
CASES = [(fs.GD, options) for options in GD_OPTIONS]
CASES += [(kind, options) for kind in (fs.Adam, fs.AdamW) for options in ADAM_OPTIONS]


def gradients(t):
    """Return the gradients of step `t`: every third step has none for "b", which falls behind."""
    rng = np.random.default_rng(t)
    return {
        "w": rng.standard_normal((13, 7), np.float32),
        "b": rng.standard_normal(5) if t % 3 else None,
    }


def unbroken(kind, options, steps):
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((13, 7), np.float32), "b": rng.standard_normal(5)}
    optimizer = kind(params, **options)
    for t in range(1, steps + 1):
        optimizer.step(gradients(t), grad_scale=0.5)
    return optimizer


def fresh(optimizer):
    """Return an optimizer that has the saved one's parameters and nothing else that it can load."""
    group = optimizer.param_groups[0]
    params = {
        name: param.copy()
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }
    options = {"amsgrad": group["amsgrad"]} if "amsgrad" in group else {}
    if "momentum" in group:
        options["momentum"] = group["momentum"] / 2
    return type(optimizer)(params, group["lr"] if callable(group["lr"]) else 0.5, **options)


def by_state_dict(optimizer, _):
    resumed = fresh(optimizer)
    resumed.load_state_dict(optimizer.state_dict())
    return resumed


def by_file(optimizer, folder):
    pytest.importorskip("safetensors", reason="safetensors is not installed: no files")
    optimizer.save(folder / "state.safetensors")
    resumed = fresh(optimizer)
    resumed.load(folder / "state.safetensors")
    return resumed


def by_pickle(optimizer, _):
    return pickle.loads(pickle.dumps(optimizer))


def by_deepcopy(optimizer, _):
    return copy.deepcopy(optimizer)


def contents(optimizer):
    """Return everything that a step changes, bit for bit."""
    arrays = [*optimizer.param_groups[0]["params"]]
    steps = []
    for entry in optimizer.state.values():
        steps.append(entry.pop("step"))
        arrays += entry.values()
    return steps, [array.tobytes() for array in arrays]


@pytest.mark.parametrize("resume", [by_state_dict, by_file, by_pickle, by_deepcopy])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=describe)
def test_resumed_equals_unbroken(kind, options, resume, tmp_path):
    first = unbroken(kind, options, BREAK)
    resumed = resume(first, tmp_path)
    # What the first optimizer does from here on is no longer the second one's business.
    first.step(gradients(BREAK))
    for t in range(BREAK + 1, STEPS + 1):
        resumed.step(gradients(t), grad_scale=0.5)
    assert contents(resumed) == contents(unbroken(kind, options, STEPS))


def late(kind, latest, steps):
    """Return an optimizer that has taken `steps` steps since its parameters had taken `latest`."""
    optimizer = unbroken(kind, {"lr": warmup, **LATE_OPTIONS[kind]}, 1)
    saved = optimizer.state_dict()
    for i, entry in saved["state"].items():
        saved["state"][i] = {**entry, "step": latest}
    optimizer.load_state_dict(saved)
    for t in range(1, steps + 1):
        optimizer.step(gradients(t), grad_scale=0.5)
    return optimizer


LATE_OPTIONS = {
    fs.GD: {"momentum": 0.9, "nesterov": True},
    fs.Adam: {"amsgrad": True},
    fs.AdamW: {},
}


@pytest.mark.parametrize("latest", [0, 1, 999, 10**6, 2**40])
@pytest.mark.parametrize("resume", [by_state_dict, by_file, by_pickle, by_deepcopy])
@pytest.mark.parametrize("kind", LATE_OPTIONS)
def test_resumed_late_equals_unbroken(kind, resume, latest, tmp_path):
    resumed = resume(late(kind, latest, BREAK), tmp_path)
    for t in range(BREAK + 1, STEPS + 1):
        resumed.step(gradients(t), grad_scale=0.5)
    expected = contents(late(kind, latest, STEPS))
    assert contents(resumed) == expected
    assert expected[0][0] == latest + STEPS


FUNCTIONS = {fs.GD: fs.gd_step, fs.Adam: fs.adam_step, fs.AdamW: fs.adamw_step}


@pytest.mark.parametrize(("kind", "options"), CASES, ids=describe)
def test_the_functions_continue_what_an_optimizer_began(kind, options):
    optimizer = unbroken(kind, options, BREAK)
    group = optimizer.param_groups[0]
    constants = {k: o for k, o in options.items() if k not in ("lr", "amsgrad")}
    states = optimizer.state
    steps = [entry.pop("step") for entry in states.values()]
    for t in range(BREAK + 1, STEPS + 1):
        # A schedule counts the steps of its group, the correction those of each parameter.
        lr = options["lr"](t) if callable(options["lr"]) else options["lr"]
        for i, (param, grad) in enumerate(zip(group["params"], gradients(t).values(), strict=True)):
            if grad is None:
                continue
            steps[i] += 1
            FUNCTIONS[kind](
                param, grad, **states[i], step=steps[i], lr=lr, grad_scale=0.5, **constants
            )
    expected_steps, expected = contents(unbroken(kind, options, STEPS))
    assert steps == expected_steps
    assert contents(optimizer)[1] == expected


BETAS = (0.0, 0.5, 0.9, 0.999, 0.9999999, 1 - 2.0**-53)
T = (1, 2, 3, 10, 999, 1000, 10**6, 2**40)


def corrections(beta1, beta2, t):
    """Return sqrt(1 - beta2**t) / (1 - beta1**t) as a float64 step has it.

    With all of p, eps = 0 and m, v, g, lr = 1 the moments stay 1 and it is all that is left.
    """
    p, m, v = np.zeros(1), np.ones(1), np.ones(1)
    fs.adam_step(p, np.ones(1), m, v, step=t, lr=1.0, betas=(beta1, beta2), eps=0.0)
    assert m[0] == v[0] == 1
    return -p[0]


@pytest.mark.parametrize("t", T)
@pytest.mark.parametrize(("beta1", "beta2"), [*product(BETAS, BETAS)])
def test_bias_corrections_are_exact_to_the_last_bits(beta1, beta2, t):
    got = corrections(beta1, beta2, t)
    with localcontext(prec=80):
        exact = (1 - Decimal(beta2) ** t).sqrt() / (1 - Decimal(beta1) ** t)
        error = abs(Decimal(got) - exact) / Decimal(np.spacing(float(exact)))
    assert error <= 2


def test_bias_corrections_do_not_depend_on_what_was_asked_before():
    cases = list(product(BETAS, BETAS, T))
    forwards = [corrections(*case) for case in cases]
    backwards = [corrections(*case) for case in reversed(cases)]
    assert forwards == backwards[::-1]
