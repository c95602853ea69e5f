"""Gradients that a step sets to zero once it has read them."""

import numpy as np
import pytest
from helpers import assert_unchanged
from test_clipping import arrays_of, bits, copies, draw, dtype, make, steps  # noqa: F401 (fixtures)

import fusedstep as fs

CUBE = (10, 20, 30)
VIEWS = {
    "C": lambda a: a,
    "Fortran": lambda a: a.reshape(-1).reshape(a.shape, order="F"),
    "slices": lambda a: a[1:-1, 2:9, ::3],
    "every second": lambda a: a[..., ::2],
    "reversed": lambda a: a[::-1, ::-1, ::-1],
    "an axis reversed": lambda a: a[:, ::-1],
    "permuted": lambda a: a.transpose(1, 2, 0)[:, ::2],
    "column": lambda a: a[:, 3, 4],
    "0-d": lambda a: a[1, 2, 3, ...],
    "empty": lambda a: a[:, 3:3],
}


def is_zero(array):
    """Whether it is 0 everywhere, and nowhere -0."""
    return not any(array.tobytes())


@pytest.mark.parametrize("size", [1, 63, 2047, 2048, 2049, 10_000])
def test_steps_as_without_and_zeros_the_gradient(isa, make, dtype, size):  # noqa: F811
    params = draw([size, 5], dtype)
    zeroing, plain = make(copies(params)), make(copies(params))
    for seed in range(2):
        grads = draw([size, 5], dtype, seed)
        assert plain.step(grads) == zeroing.step(grads, zero_grad=True) == (None, False)
        assert all(map(is_zero, grads))
    assert bits(zeroing) == bits(plain)
    assert steps(zeroing) == [2, 2]


@pytest.mark.parametrize("own", [False, True], ids=["params dense", "params alike"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(isa, make, dtype, view, own):  # noqa: F811
    (memory,) = draw([CUBE], dtype)
    gaps = memory.copy()
    view(gaps)[...] = 0
    grads = view(memory)
    params = [view(np.ones(CUBE, dtype)) if own else np.ones(grads.shape, dtype) for _ in range(2)]
    plain, zeroing = map(make, params)
    plain.step(grads)
    zeroing.step(grads, zero_grad=True)
    assert bits(zeroing) == bits(plain)
    assert memory.tobytes() == gaps.tobytes()


@pytest.mark.parametrize("view", [lambda a: a, lambda a: a[:, ::2]], ids=["dense", "view"])
def test_several_threads(isa, dtype, view):  # noqa: F811
    fs.set_num_threads(3)
    (memory,) = draw([(1000, 1000)], dtype)
    gaps = memory.copy()
    view(gaps)[...] = 0
    params = draw([view(memory).shape], dtype, seed=1)
    plain, zeroing = fs.Adam(copies(params)), fs.Adam(copies(params))
    plain.step([view(memory)], clip_norm=1.0)
    info = zeroing.step([view(memory)], clip_norm=1.0, zero_grad=True)
    assert info.grad_norm > 1
    assert bits(zeroing) == bits(plain)
    assert memory.tobytes() == gaps.tobytes()


def test_every_gradient_of_a_call_and_none_where_there_is_none(make, dtype):  # noqa: F811
    sizes = [3, 0, 200, 1]
    grads = draw(sizes, dtype)
    groups = [{"params": draw(sizes, dtype)}, {"params": draw([7], dtype)[0]}]
    optimizer = make(groups)
    optimizer.step([[grads[0], grads[1], None, grads[3]], None], zero_grad=True)
    assert [is_zero(g) for g in grads] == [True, True, False, True]


def test_a_skipped_step_zeros_the_gradients_too(make, dtype):  # noqa: F811
    grads = [*draw([100, 70_000], dtype), draw([(20, 20)], dtype)[0][:, ::2]]
    grads[1][69_999] = np.nan
    optimizer = make([np.ones(g.shape, dtype) for g in grads])
    with assert_unchanged(*arrays_of(optimizer)):
        assert optimizer.step(grads, skip_nonfinite=True, zero_grad=True).skipped
    assert all(map(is_zero, grads))
    assert steps(optimizer) == [0, 0, 0]


def test_gradients_that_interleave_are_separate():
    memory = draw([(10, 6)])[0]
    optimizer = fs.GD([np.ones((10, 3), np.float32) for _ in range(2)])
    optimizer.step([memory[:, ::2], memory[:, 1::2]], zero_grad=True)
    assert is_zero(memory)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("gradients", "text"),
    [
        (
            lambda g: [g[0], g[1], g[2], read_only(g[3])],
            r"^grads\[3\]: the array is read-only, but zero_grad=True writes to it$",
        ),
        (
            lambda g: [g[0], np.broadcast_to(g[1][:1], 10), *g[2:]],
            r"^grads\[1\]: the array is read-only, but zero_grad=True writes to it$",
        ),
        (
            lambda g: [g[0], np.lib.stride_tricks.as_strided(g[1], (10,), (0,)), *g[2:]],
            r"^grads\[1\]: elements of the array overlap .*, but zero_grad=True writes to it",
        ),
        (lambda g: [g[0], g[1], g[0], g[3]], r"grads\[0\] and grads\[2\] are the same array"),
        (
            lambda g: [*g[:2], *(lambda m: (m[:10], m[5:]))(np.ones(15, np.float32))],
            r"grads\[2\] and grads\[3\] overlap in memory",
        ),
    ],
    ids=["read-only", "broadcast", "no stride", "twice", "overlap"],
)
@pytest.mark.filterwarnings("ignore:Numpy has detected that you:DeprecationWarning")
def test_gradients_that_cannot_be_zeroed_change_nothing(make, gradients, text):  # noqa: F811
    grads = gradients(draw([10] * 4))
    optimizer = make(draw([10] * 4, seed=1))
    with assert_unchanged(*arrays_of(optimizer), *grads), pytest.raises(ValueError, match=text):
        optimizer.step(grads, zero_grad=True, clip_norm=1.0)
    assert steps(optimizer) == [0] * 4
    optimizer.step(grads)  # without it they are good


def test_errors_name_gradients_as_they_were_given():
    optimizer = fs.Adam([{"params": {"w": np.ones(3), "b": np.ones(2)}}])
    grads = [{"w": np.ones(3), "b": read_only(np.ones(2))}]
    with pytest.raises(ValueError, match=r"^grads\[0\]\['b'\]: the array is read-only"):
        optimizer.step(grads, zero_grad=True)


@pytest.mark.parametrize("flag", [1, None, "yes"])
def test_zero_grad_is_a_bool(flag):
    grads = np.ones(3)
    with assert_unchanged(grads), pytest.raises(TypeError, match="zero_grad: expected True or"):
        fs.Adam(np.ones(3)).step(grads, zero_grad=flag)
