"""The loss scale: when it grows, backs off and stays."""

import copy
import math
import pickle

import numpy as np
import pytest
from helpers import assert_unchanged

import fusedstep as fs


def optimizer_of_one():
    return fs.GD(np.ones(3, np.float32), lr=0.5)


def test_grows_after_an_interval_and_backs_off_at_once():
    scaler = fs.LossScaler(1024.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=3)
    course = []
    for skipped in (False, False, False, False, False, True, False, False, False, True, True):
        scaler.update(skipped)
        course.append(scaler.scale)
    grown = 4096.0
    assert course == [1024, 1024, grown, grown, grown, 1024, 1024, 1024, grown, 1024, 256]


def test_the_course_is_pytorchs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")
    numbers = {"growth_factor": 3.0, "backoff_factor": 0.5, "growth_interval": 4}
    theirs = torch.amp.GradScaler("cpu", init_scale=512.0, **numbers)
    ours = fs.LossScaler(512.0, **numbers)
    parameter = torch.nn.Parameter(torch.ones(1))
    torch_optimizer, optimizer = torch.optim.SGD([parameter], lr=0.0), fs.GD(np.ones(1), lr=0.0)
    for bad in np.random.default_rng(0).random(60) < 0.2:
        theirs.scale(torch.ones(1))  # it makes its tensors when it is first used
        parameter.grad = torch.tensor([math.inf if bad else 1.0])
        theirs.step(torch_optimizer)
        theirs.update()
        info = ours.step(optimizer, np.array([math.inf if bad else 1.0]))
        assert info.skipped == bad
        assert ours.state_dict() == theirs.state_dict()
    other = fs.LossScaler()
    other.load_state_dict(theirs.state_dict())
    assert other.state_dict() == ours.state_dict()


def test_steps_with_the_gradients_of_the_unscaled_loss():
    scaled, plain = optimizer_of_one(), optimizer_of_one()
    scaler = fs.LossScaler(2.0**10)
    grads = np.array([3.0, 0.0, 4.0], np.float32)
    assert scaler.step(scaled, 2.0**10 * grads) == (5.0, False)
    plain.step(grads)
    assert (
        scaled.param_groups[0]["params"][0].tolist() == plain.param_groups[0]["params"][0].tolist()
    )


def test_options_reach_the_optimizer():
    optimizer, scaler = optimizer_of_one(), fs.LossScaler(4.0)
    grads = np.array([0.0, 12.0, 16.0], np.float32)
    assert scaler.step(optimizer, grads, clip_norm=1.0, zero_grad=True) == (5.0, False)
    assert not grads.any()
    np.testing.assert_allclose(optimizer.param_groups[0]["params"][0], [1, 0.7, 0.6], rtol=1e-6)
    with pytest.raises(TypeError, match="grad_scale"):
        scaler.step(optimizer, grads, grad_scale=2.0)


def test_a_skipped_step_changes_the_scale_alone():
    optimizer, scaler = optimizer_of_one(), fs.LossScaler(1024.0)
    (params,) = optimizer.param_groups[0]["params"]
    with assert_unchanged(params):
        assert scaler.step(optimizer, np.full(3, np.nan, np.float32)).skipped
    assert (scaler.scale, optimizer.state[0]["step"]) == (512.0, 0)


def test_an_error_leaves_the_scale():
    scaler = fs.LossScaler(1024.0, growth_interval=2)
    before = scaler.state_dict()
    with pytest.raises(ValueError, match="grads: shape"):
        scaler.step(optimizer_of_one(), np.ones(4, np.float32))
    assert scaler.state_dict() == before


def test_the_scale_and_its_reciprocal_stay_float32():
    scaler = fs.LossScaler(growth_interval=1)
    for skipped in (True, False):
        for _ in range(400):
            scaler.update(skipped)
        smallest = np.finfo(np.float32).smallest_normal
        for number in (scaler.scale, 1 / scaler.scale):
            assert smallest <= number < np.finfo(np.float32).max
        scaler.step(optimizer_of_one(), np.zeros(3, np.float32))


def test_trains_where_plain_float16_gradients_vanish():
    rng = np.random.default_rng(0)
    x, wanted = rng.standard_normal((256, 8)), rng.standard_normal(8)
    theta = np.zeros(8, np.float32)
    optimizer, scaler = fs.GD(theta, lr=1e8), fs.LossScaler(2.0**50, growth_interval=50)
    skipped = 0
    for _ in range(300):
        # Of a loss so small that its gradients are below float16's denormals.
        gradient = 1e-9 * (x.T @ (x @ theta - wanted @ x.T)) / len(x)
        assert not np.float16(gradient).any()
        with np.errstate(over="ignore"):
            half = np.float16(scaler.scale * gradient)
        skipped += scaler.step(optimizer, half.astype(np.float32)).skipped
    assert skipped > 0
    np.testing.assert_allclose(theta, wanted, atol=0.01)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_copies_go_on_by_themselves(duplicate):
    scaler = fs.LossScaler(8.0, growth_interval=2)
    scaler.update(False)
    other = duplicate(scaler)
    assert other.state_dict() == scaler.state_dict()
    other.update(False)
    assert (other.scale, scaler.scale) == (16.0, 8.0)


def test_state_round_trip():
    scaler = fs.LossScaler(8.0, 3.0, 0.3, 5)
    scaler.update(True)
    scaler.update(False)
    state = scaler.state_dict()
    assert state == {
        "scale": 8.0 * 0.3,
        "growth_factor": 3.0,
        "backoff_factor": 0.3,
        "growth_interval": 5,
        "_growth_tracker": 1,
    }
    other = fs.LossScaler()
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert repr(other) == repr(scaler)
    assert "growth_interval=5" in repr(scaler)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("init_scale", 0.0, ValueError),
        ("init_scale", 2.0**127, ValueError),
        ("init_scale", math.nan, ValueError),
        ("init_scale", "8", TypeError),
        ("growth_factor", 1.0, ValueError),
        ("growth_factor", math.inf, ValueError),
        ("growth_factor", None, TypeError),
        ("backoff_factor", 1.0, ValueError),
        ("backoff_factor", 0.0, ValueError),
        ("growth_interval", 0, ValueError),
        ("growth_interval", 2.5, ValueError),
        ("growth_interval", math.inf, ValueError),
    ],
)
def test_bad_numbers_are_refused_by_name(name, value, error):
    with pytest.raises(error, match=f"^{name}: expected a number"):
        fs.LossScaler(**{name: value})
    key = "scale" if name == "init_scale" else name
    scaler = fs.LossScaler()
    before = scaler.state_dict()
    with pytest.raises(error, match=f"^state_dict: {key}: expected a number"):
        scaler.load_state_dict({**before, key: value})
    assert scaler.state_dict() == before


def test_a_state_of_something_else_is_refused():
    scaler = fs.LossScaler()
    before = scaler.state_dict()
    for wrong, text in (({}, "no '_growth_tracker'"), ({**before, "x": 1}, "unknown 'x'")):
        with pytest.raises(ValueError, match=f"^state_dict: {text}"):
            scaler.load_state_dict(wrong)
    with pytest.raises(ValueError, match=r"^state_dict: _growth_tracker: expected a number whole"):
        scaler.load_state_dict({**before, "_growth_tracker": -1})
    assert scaler.state_dict() == before


@pytest.mark.parametrize("skipped", [None, 1, "no", fs.StepInfo(1.0, False)])
def test_an_update_takes_true_or_false(skipped):
    scaler = fs.LossScaler()
    with pytest.raises(TypeError, match="skipped: expected True or False, got "):
        scaler.update(skipped)
    assert scaler.state_dict() == fs.LossScaler().state_dict()
    scaler.update(np.bool_(True))
    assert scaler.scale == 2.0**15
