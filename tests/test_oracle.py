"""Every rule, with every option, on every instruction set, against the reference.

Before each step the reference is given the kernel's own rounded state, so what is measured is the
error of one step. Some parameters are zero: what they become is the update alone, with nothing to
hide its error.
"""

import numpy as np
import pytest
from helpers import assert_unchanged, combinations, describe

import fusedstep as fs
from fusedstep import reference

# Largest accepted error of each result, in units in the last place of the largest term of its sum.
# Measured with these data: at most 2.8 and 2.5; 4.3, 3.2, 5.1 and 5.1.
GD_ULP = (3.0, 3.0)  # params, momentum_buffer
ADAM_ULP = (4.5, 3.5, 5.5, 5.5)  # params, exp_avg, exp_avg_sq, max_exp_avg_sq

SIZE = 1003  # not a multiple of any vector
STEPS = (1, 2, 3, 4, 1000)
LR = 0.01
COMMON = {"weight_decay": (0.0, 0.1), "maximize": (False, True), "grad_scale": (1.0, 0.3)}
GD_OPTIONS = combinations(
    momentum=(0.0, 0.9), dampening=(0.0, 0.3), nesterov=(False, True), **COMMON
)
ADAM_OPTIONS = combinations(
    betas=((0.9, 0.999), (0.3, 0.95), (0.0, 0.99)), bias_correction=(True, False), **COMMON
)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    dtype = np.dtype(request.param)
    if np.finfo(reference.wide_dtype(dtype)).eps >= np.finfo(dtype).eps:
        pytest.skip("longdouble is double here: no reference for float64")
    return dtype


def draw(rng, dtype, maximize):
    """Return parameters, a third of them zero, and gradients of many magnitudes."""
    p = rng.standard_normal(SIZE) * 10.0 ** rng.uniform(-4, 1, SIZE)
    p[::3] = 0
    g = rng.standard_normal(SIZE) * 10.0 ** rng.uniform(-4, 2, SIZE)
    g[::7] = 0
    # Nothing cancels in g + weight_decay * p: the root of the second moment would carry that error
    # into the update, where the largest term does not allow for it.
    sign = -1 if maximize else 1
    g[p != 0] = (sign * np.copysign(g, p))[p != 0]
    return p.astype(dtype), g.astype(dtype)


def check(results, rule, before, options, bounds):
    exact = rule(*before, **options)
    # The magnitude of the largest terms: the reference with nothing that cancels.
    scale = rule(*map(np.abs, before), **{**options, "maximize": False, "lr": -LR})
    for i, result in enumerate(results):
        assert reference.ulp_error(result, exact[i], scale[i]).max() <= bounds[i]


@pytest.mark.parametrize("options", GD_OPTIONS, ids=describe)
def test_gd(options, dtype, isa):
    rng = np.random.default_rng(0)
    # Whatever is in the buffer must not be read at step 1.
    state = [np.full(SIZE, np.nan, dtype)] if options["momentum"] else []
    for step in STEPS:
        p, g = draw(rng, dtype, options["maximize"])
        before = [p.copy(), g, *(a.copy() for a in state)]
        given = {**options, "step": step, "lr": LR}
        with assert_unchanged(g):
            fs.gd_step(p, g, momentum_buffer=state[0] if state else None, **given)
        check([p, *state], reference.gd, before, given, GD_ULP)


@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=describe)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("rule", ["adam", "adamw"])
def test_adam(rule, amsgrad, options, dtype, isa):
    rng = np.random.default_rng(0)
    take_step = {"adam": fs.adam_step, "adamw": fs.adamw_step}[rule]
    state = [np.zeros(SIZE, dtype) for _ in range(3 if amsgrad else 2)]
    for step in STEPS:
        p, g = draw(rng, dtype, options["maximize"])
        before = [p.copy(), g, *(a.copy() for a in state)]
        given = {**options, "step": step, "lr": LR, "eps": 1e-4}
        with assert_unchanged(g):
            take_step(p, g, *state[:2], max_exp_avg_sq=state[2] if amsgrad else None, **given)
        given["decoupled"] = rule == "adamw"
        check([p, *state], reference.adam, before, given, ADAM_ULP)
