"""Steps of many arrays: what is checked at once, and in several threads, is checked as well."""

import threading

import numpy as np
import pytest
from helpers import assert_unchanged

import fusedstep as fs

COUNT = 600


@pytest.fixture(autouse=True, params=[1, 2, 3])
def threads(request):
    before = fs.get_num_threads()
    fs.set_num_threads(request.param)
    yield
    fs.set_num_threads(before)


def arrays(seed, sizes=(64,) * COUNT):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size).astype(np.float32) for size in sizes]


def state_arrays(optimizer):
    return [
        a for entry in optimizer.state.values() for a in entry.values() if isinstance(a, np.ndarray)
    ]


def steps_of(optimizer):
    return [entry["step"] for entry in optimizer.state.values()]


def stepped_alone(params, grads, steps):
    """Return what each array becomes in an optimizer of its own."""
    for p, g in zip(params, grads, strict=True):
        optimizer = fs.Adam(p)
        for _ in range(steps):
            optimizer.step(g)
    return b"".join(p.tobytes() for p in params)


@pytest.mark.parametrize(
    "sizes",
    [(64,) * COUNT, tuple(i % 7 * 40 for i in range(COUNT)), (0,) * COUNT, (0, 20_000, 0) * 70],
    ids=["small", "mixed", "empty", "long"],
)
def test_many_arrays_have_the_bits_of_one(sizes):
    params, grads = arrays(0, sizes), arrays(1, sizes)
    expected = stepped_alone([p.copy() for p in params], grads, 3)
    optimizer = fs.Adam(params)
    for _ in range(3):
        optimizer.step(grads)
    assert b"".join(p.tobytes() for p in params) == expected


def test_groups_have_their_own_settings():
    params, grads = arrays(0), arrays(1)
    expected = [p.copy() for p in params]
    groups = [{"params": params[:250]}, {"params": params[250:], "lr": 0.5, "weight_decay": 0.1}]
    together = fs.Adam(groups)
    alone = [
        fs.Adam(expected[:250]),
        fs.Adam(expected[250:], lr=0.5, weight_decay=0.1),
    ]
    for _ in range(3):
        together.step([grads[:250], grads[250:]])
        alone[0].step(grads[:250])
        alone[1].step(grads[250:])
    for p, e in zip(params, expected, strict=True):
        assert p.tobytes() == e.tobytes()


def gradient_of_another_shape(optimizer, params, grads, i):
    grads[i] = np.zeros(63, np.float32)


def gradient_whose_shape_was_set(optimizer, params, grads, i):
    grads[i].shape = (8, 8)


def gradient_of_another_dtype(optimizer, params, grads, i):
    grads[i] = np.zeros(64, np.int32)


def gradient_that_is_no_array(optimizer, params, grads, i):
    grads[i] = [0.0] * 64


def gradient_in_a_parameter(optimizer, params, grads, i):
    grads[i] = params[(i + 1) % COUNT][:]


def parameter_made_read_only(optimizer, params, grads, i):
    params[i].flags.writeable = False


def parameter_whose_shape_was_set(optimizer, params, grads, i):
    params[i].shape = (8, 8)


def parameter_exchanged(optimizer, params, grads, i):
    optimizer.param_groups[0]["params"][i] = params[i].copy()


def parameter_removed(optimizer, params, grads, i):
    del optimizer.param_groups[0]["params"][i]


def gradient_removed(optimizer, params, grads, i):
    del grads[i]


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
@pytest.mark.parametrize("i", [0, COUNT // 2, COUNT - 1])
@pytest.mark.parametrize(
    "spoil",
    [
        gradient_of_another_shape,
        gradient_whose_shape_was_set,
        gradient_of_another_dtype,
        gradient_that_is_no_array,
        gradient_in_a_parameter,
        parameter_made_read_only,
        parameter_whose_shape_was_set,
        parameter_exchanged,
        parameter_removed,
        gradient_removed,
    ],
)
def test_one_that_is_refused_changes_nothing(spoil, i):
    params, grads = arrays(0), arrays(1)
    optimizer = fs.Adam(params)
    for _ in range(2):
        optimizer.step(grads)
    spoil(optimizer, params, grads, i)
    with (
        assert_unchanged(*params, *state_arrays(optimizer)),
        pytest.raises((TypeError, ValueError), match=r"grads|params"),
    ):
        optimizer.step(grads)
    assert set(steps_of(optimizer)) == {2}


@pytest.mark.parametrize("i", [0, COUNT // 2, COUNT - 1])
def test_gradients_need_not_stay_as_they_were(i):
    params, grads = arrays(0), arrays(1)
    expected = [p.copy() for p in params]
    optimizer, alone = fs.Adam(params), [fs.Adam(p) for p in expected]
    for step in range(5):
        given = [g.copy() for g in grads] if step == 1 else list(grads)
        if step == 2:
            given[i] = None
        elif step == 3:
            given[i] = np.repeat(grads[i], 2)[::2]
        optimizer.step(given)
        for one, g in zip(alone, given, strict=True):
            one.step(g)
    assert steps_of(optimizer) == [4 if k == i else 5 for k in range(COUNT)]
    assert b"".join(p.tobytes() for p in params) == b"".join(p.tobytes() for p in expected)


def test_gradients_are_held_during_a_long_step():
    sizes = (5000,) * COUNT
    params, grads = arrays(0, sizes), arrays(1, sizes)
    expected = stepped_alone([p.copy() for p in params], grads, 20)
    given = [g.copy() for g in grads]
    done = threading.Event()

    def exchange():
        while not done.is_set():
            for i, g in enumerate(grads):
                given[i] = g.copy()

    other = threading.Thread(target=exchange)
    other.start()
    try:
        optimizer = fs.Adam(params)
        for _ in range(20):
            optimizer.step(given)
    finally:
        done.set()
        other.join()
    assert b"".join(p.tobytes() for p in params) == expected
