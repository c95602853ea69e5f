"""The reference itself: values worked out by hand, exact rational arithmetic, and PyTorch."""

from fractions import Fraction
from math import sqrt

import numpy as np
import pytest

from fusedstep import reference

ONE = np.array([1.0], np.float32)
ZERO = np.zeros(1, np.float32)


def array(*values, dtype=np.float32):
    return np.array(values, dtype)


def test_gd_is_p_minus_lr_times_g():
    p, buf = reference.gd(array(1.0, -2.0), array(4.0, 0.5), lr=0.25)
    assert p.tolist() == [0.0, -2.125]
    assert buf is None


def test_gd_scales_then_flips_then_decays_the_gradient():
    # g' = -(4 * 0.5) + 0.5 * 2 = -1, p = 2 - 0.25 * -1
    p, _ = reference.gd(
        array(2.0), array(4.0), lr=0.25, weight_decay=0.5, maximize=True, grad_scale=0.5
    )
    assert p.tolist() == [2.25]


def test_momentum_takes_the_undamped_gradient_first():
    options = {"lr": 0.5, "momentum": 0.5, "dampening": 0.25}
    # The buffer before step 1 is not read.
    p, buf = reference.gd(ONE, array(2.0), array(np.nan), step=1, **options)
    assert (p.tolist(), buf.tolist()) == ([0.0], [2.0])
    # buf = 0.5 * 2 + 0.75 * 4 = 4, p = 0 - 0.5 * 4
    p, buf = reference.gd(p, array(4.0), buf, step=2, **options)
    assert (p.tolist(), buf.tolist()) == ([-2.0], [4.0])


def test_nesterov_looks_ahead():
    # buf = 0.5 * 2 + 4 = 5, direction = 4 + 0.5 * 5 = 6.5
    p, buf = reference.gd(ONE, array(4.0), array(2.0), step=2, lr=0.5, momentum=0.5, nesterov=True)
    assert (p.tolist(), buf.tolist()) == ([-2.25], [5.0])


def test_adam_two_steps_by_hand():
    options = {"lr": 0.1, "betas": (0.5, 0.5), "eps": 0.0}
    # m_hat = 1 / 0.5 = 2, v_hat = 2 / 0.5 = 4
    p, m, v, vmax = reference.adam(ONE, array(2.0), ZERO, ZERO, step=1, **options)
    assert p == pytest.approx(1 - 0.1 * 2 / 2, rel=1e-15)
    assert (m.tolist(), v.tolist(), vmax) == ([1.0], [2.0], None)
    # m = 1, v = 1.5, m_hat = 1 / 0.75, v_hat = 1.5 / 0.75 = 2
    p, m, v, _ = reference.adam(p, array(1.0), m, v, step=2, **options)
    assert float(p[0]) == pytest.approx(0.9 - 0.1 * (4 / 3) / sqrt(2), rel=1e-15)
    assert (m.tolist(), v.tolist()) == ([1.0], [1.5])


def test_adam_eps_is_added_to_the_corrected_root():
    p, *_ = reference.adam(ONE, array(3.0), ZERO, ZERO, lr=1.0, eps=1.0)
    assert float(p[0]) == pytest.approx(1 - 3 / (3 + 1), rel=1e-12)


def test_adam_without_bias_correction():
    p, *_ = reference.adam(
        ONE, array(2.0), ZERO, ZERO, lr=0.5, betas=(0.5, 0.5), eps=0.0, bias_correction=False
    )
    assert float(p[0]) == pytest.approx(1 - 0.5 * 1 / sqrt(2), rel=1e-15)


def test_amsgrad_divides_by_the_largest_uncorrected_moment():
    p, _, v, vmax = reference.adam(
        ONE, array(2.0), ZERO, ZERO, array(8.0), lr=0.1, betas=(0.5, 0.5), eps=0.0
    )
    assert (v.tolist(), vmax.tolist()) == ([2.0], [8.0])
    assert float(p[0]) == pytest.approx(1 - 0.1 * 2 / sqrt(8 / 0.5), rel=1e-15)


def test_decay_is_an_l2_term_or_decoupled():
    options = {"lr": 0.25, "weight_decay": 0.5, "eps": 0.0}
    # L2: g' = 0 + 0.5 * 1, whose first step has length lr. Decoupled: p * (1 - lr * decay).
    l2, m, *_ = reference.adam(ONE, ZERO, ZERO, ZERO, **options)
    assert float(l2[0]) == pytest.approx(0.75, rel=1e-12)
    assert float(m[0]) == pytest.approx(0.05, rel=1e-12)
    decoupled, m, *_ = reference.adam(
        ONE, ZERO, ZERO, ZERO, decoupled=True, **{**options, "eps": 1e-8}
    )
    assert (decoupled.tolist(), m.tolist()) == ([0.875], [0.0])


def test_inputs_stay_as_they_were():
    arrays = [array(1.0) for _ in range(5)]
    reference.adam(*arrays, step=3, weight_decay=0.1, maximize=True)
    reference.gd(*arrays[:3], step=3, momentum=0.9, nesterov=True)
    assert all(a.tolist() == [1.0] for a in arrays)


@pytest.mark.skipif(
    np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps, reason="longdouble is double here"
)
def test_float64_arrays_are_computed_in_a_wider_type():
    g = 1 / 3
    p, _ = reference.gd(array(1.0, dtype=np.float64), array(g, dtype=np.float64), lr=0.1)
    exact = 1 - Fraction(0.1) * Fraction(g)
    assert abs(Fraction(*p[0].as_integer_ratio()) - exact) < Fraction(1, 2**60)


def test_ulp_error_counts_neighbours():
    exact = array(1.0, 1024.0, -3.0, dtype=np.float64)
    result = np.nextafter(exact.astype(np.float32), np.float32(np.inf))
    assert reference.ulp_error(result, exact).tolist() == [1.0, 1.0, 1.0]
    assert reference.ulp_error(result, exact, scale=4 * abs(exact)).tolist() == [0.25] * 3
    assert reference.ulp_error(array(1.0), array(1 + 2.0**-25, dtype=np.float64)) == 0.25
    tiny = np.finfo(np.float32).smallest_subnormal
    assert reference.ulp_error(array(3 * tiny), array(tiny, dtype=np.float64)) == 2.0


def test_ulp_error_of_what_is_not_finite():
    exact = array(np.inf, np.nan, -np.inf, 1.0, np.inf, np.nan, dtype=np.float64)
    result = array(np.inf, np.nan, np.inf, np.nan, 1.0, 1.0)
    assert reference.ulp_error(result, exact).tolist() == [0, 0, *[np.inf] * 4]


GD_OPTIONS = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "maximize": True},
]


@pytest.mark.parametrize("options", GD_OPTIONS)
def test_gd_agrees_with_pytorch(options):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    p, buf = rng.standard_normal(50), None
    parameter = torch.nn.Parameter(torch.from_numpy(p.copy()))
    optimizer = torch.optim.SGD([parameter], lr=0.1, **options)
    for step in range(1, 6):
        g = rng.standard_normal(50)
        parameter.grad = torch.from_numpy(g)
        optimizer.step()
        p, buf = reference.gd(p, g, buf, step=step, lr=0.1, **options)
    np.testing.assert_allclose(parameter.detach().numpy(), p.astype(float), rtol=1e-13, atol=1e-14)


ADAM_OPTIONS = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"amsgrad": True, "betas": (0.5, 0.7), "eps": 1e-3},
]


@pytest.mark.parametrize("options", ADAM_OPTIONS)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_agrees_with_pytorch(name, options):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    p, m, v = rng.standard_normal(50), np.zeros(50), np.zeros(50)
    parameter = torch.nn.Parameter(torch.from_numpy(p.copy()))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1, **options)
    mine = {"weight_decay": optimizer.defaults["weight_decay"], **options}
    vmax = np.zeros(50) if mine.pop("amsgrad", False) else None
    for step in range(1, 6):
        g = rng.standard_normal(50) / step
        parameter.grad = torch.from_numpy(g)
        optimizer.step()
        p, m, v, vmax = reference.adam(
            p, g, m, v, vmax, step=step, lr=0.1, decoupled=name == "AdamW", **mine
        )
    np.testing.assert_allclose(parameter.detach().numpy(), p.astype(float), rtol=1e-12, atol=1e-14)
