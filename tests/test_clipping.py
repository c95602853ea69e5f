"""The norm of the gradients, clipping by it, and skipping a step when it is not finite."""

import math
import pickle

import numpy as np
import pytest
from helpers import assert_unchanged

import fusedstep as fs

LANES, BLOCK = 32, 4096
SIZES = [1, 31, 32, 33, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK - 1, 5 * BLOCK + 77, 100_003]
OPTIMIZERS = {
    "gd": lambda p, **o: fs.GD(p, lr=0.1, **o),
    "momentum": lambda p, **o: fs.GD(p, lr=0.1, momentum=0.9, **o),
    "adam": lambda p, **o: fs.Adam(p, lr=0.1, **o),
    "adamw": lambda p, **o: fs.AdamW(p, lr=0.1, **o),
    "amsgrad": lambda p, **o: fs.Adam(p, lr=0.1, amsgrad=True, **o),
}


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


def draw(shapes, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    # Of all sizes, so that the order of the additions shows in the last bits.
    return [(rng.standard_normal(s) * 10.0 ** rng.uniform(-3, 3, s)).astype(dtype) for s in shapes]


def copies(arrays):
    return [None if array is None else array.copy() for array in arrays]


def exact_norm(grads):
    return math.sqrt(math.fsum(x * x for g in grads for x in g.astype(np.float64).flat))


def norm_of(grads, params=None, **options):
    """Return the norm that a step reports; the parameters are copies."""
    params = copies(grads) if params is None else params
    return fs.GD(params, lr=0.0).step(grads, skip_nonfinite=True, **options).grad_norm


def arrays_of(optimizer):
    """Return all that the optimizer may write, of every parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [s for own in optimizer.state.values() for k, s in own.items() if k != "step"]
    return params + states


def bits(optimizer):
    return [array.tobytes() for array in arrays_of(optimizer)]


def steps(optimizer):
    return [own["step"] for own in optimizer.state.values()]


def in_pairs(values):
    values = list(values)
    while len(values) > 1:
        last = values[-1:] if len(values) % 2 else []
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=False)] + last
    return values[0] if values else 0.0


def documented_norm(grads):
    """Return the norm of float32 gradients, summed as docs/design.md says."""
    sums = []
    for grad in grads:
        blocks = []
        for begin in range(0, grad.size, BLOCK):
            block = grad[begin : begin + BLOCK].astype(np.float64)
            rows = np.pad(block, (0, -block.size % LANES)).reshape(-1, LANES)
            # The squares are exact, so that adding them rounds as fma does.
            blocks.append(in_pairs(np.add.accumulate(rows * rows, axis=0)[-1]))
        if blocks:
            sums.append(in_pairs(blocks))
    return math.sqrt(in_pairs(sums))


@pytest.mark.parametrize("grad_scale", [1.0, 0.375])
def test_norm_is_right(isa, dtype, grad_scale):
    for size in SIZES:
        grads = draw([size], dtype)
        wanted = grad_scale * exact_norm(grads)
        assert norm_of(grads, grad_scale=grad_scale) == pytest.approx(wanted, rel=1e-14)
    grads = draw(SIZES, dtype)
    assert norm_of(grads) == pytest.approx(exact_norm(grads), rel=1e-14)


def test_norm_is_summed_as_documented(isa, maker):
    for size in SIZES:
        grads = draw([size])
        assert norm_of(grads) == documented_norm(grads), size
    for count in range(1, len(SIZES) + 1):
        grads = draw([*SIZES[:count], 0, 5])
        assert norm_of(grads) == documented_norm(grads)


def test_every_block_counts_where_it_belongs(isa, maker):
    rng = np.random.default_rng(0)
    for _ in range(40):
        grad = rng.standard_normal(9 * BLOCK + 77).astype(np.float32)
        # Blocks of very different weight, so that it shows where each is added.
        weights = np.ldexp(1.0, rng.permutation(10) * -3)
        grad *= np.repeat(weights, BLOCK)[: grad.size].astype(np.float32)
        assert norm_of([grad]) == documented_norm([grad])


def test_norm_is_the_same_bits_for_every_instruction_set_and_thread_count(isa, maker, dtype):
    fs.set_isa("scalar")
    fs.set_num_threads(1)
    cases = [draw([1_000_003], dtype), draw([*SIZES, 400_001, 3], dtype)]
    wanted = [norm_of(grads) for grads in cases]
    fs.set_isa(isa)
    for threads in range(1, 9):
        fs.set_num_threads(threads)
        assert [norm_of(grads) for grads in cases] == wanted, threads


def test_norm_is_the_same_bits_for_every_grouping(make, dtype):
    shapes = [(7, 5), (0,), (BLOCK + 3,), (2, 3, 4), (1,), (50_000,)]
    # With both types among them, which are stepped apart.
    params = draw(shapes, dtype) + draw(shapes, np.float64, seed=1)
    grads = draw(shapes, dtype, seed=2) + draw(shapes, np.float64, seed=3)
    options = {"clip_norm": 3.0, "grad_scale": 0.5}
    whole = make(copies(params))
    info = whole.step(grads, **options)
    for cut in (1, 4, 8):
        groups = [{"params": copies(params[:cut])}, {"params": copies(params[cut:])}]
        split = make(groups)
        assert split.step([grads[:cut], grads[cut:]], **options) == info
        assert bits(split)[: len(params)] == bits(whole)[: len(params)]
    named = make({str(i): p for i, p in enumerate(copies(params))})
    assert named.step({str(i): g for i, g in enumerate(grads)}, **options) == info


def test_norm_is_the_same_bits_for_groups_of_different_rules(dtype):
    params, grads = draw([100, 200, 5000], dtype), draw([100, 200, 5000], dtype, seed=1)
    momenta = [0.9, 0.0, 0.9]
    groups = [{"params": p, "momentum": m} for p, m in zip(params, momenta, strict=True)]
    info = fs.GD(groups).step(grads, clip_norm=1.0)
    assert info.grad_norm == norm_of(grads)


LAYOUTS = {
    "rows apart": lambda a: a[:, :, :7],
    "slices": lambda a: a[1:-1, 2:9, ::3],
    "every second": lambda a: a[..., ::2],
    "column": lambda a: a[:, 3, 4],
    "0-d": lambda a: a[1, 2, 3, ...],
    "empty": lambda a: a[:, 3:3],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_norm_of_views(isa, dtype, layout):
    view = layout(draw([(20, 20, 40)], dtype)[0])
    for params in (view.copy(), layout(np.ones((20, 20, 40), dtype))):
        assert norm_of([view], [params]) == norm_of([view.copy()])


@pytest.mark.parametrize("order", ["C", "F"])
def test_norm_follows_the_parameters_memory(isa, dtype, order):
    (grad,) = draw([(100, 90)], dtype)
    params = np.ones((100, 90), dtype, order=order)
    wanted = norm_of([grad.reshape(-1, order=order).copy()])
    for same in (grad, np.asfortranarray(grad), grad[::-1].copy()[::-1]):
        assert norm_of([same], [params]) == wanted


def test_norm_of_a_large_view_with_several_threads(isa):
    view = draw([(1001, 901)])[0][::2, ::3]
    fs.set_num_threads(3)
    assert norm_of([view]) == norm_of([view.copy()])


def test_denormals_count(isa, dtype):
    tiny = np.full(1000, np.finfo(np.float32).smallest_subnormal, dtype)
    assert norm_of([tiny]) == pytest.approx(exact_norm([tiny]), rel=1e-14)
    assert norm_of([tiny]) > 0


def test_squares_of_float64_overflow(isa):
    assert norm_of([np.full(3, 1e154)]) == math.inf
    assert norm_of([np.full(3, 1e153)]) == pytest.approx(math.sqrt(3) * 1e153)


def test_gradients_of_none_are_left_out():
    grads = draw([100, 200, 300])
    info = fs.Adam(copies(grads)).step([grads[0], None, grads[2]], clip_norm=1.0)
    assert info.grad_norm == norm_of([grads[0], grads[2]])
    assert fs.Adam(copies(grads)).step([None] * 3, clip_norm=1.0) == (0.0, False)
    assert fs.Adam(np.ones(0)).step(np.ones(0), clip_norm=1.0) == (0.0, False)


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("clip_norm", [1e-4, 1.0, 1e9])
def test_clipping_is_a_factor_of_the_scale(isa, make, dtype, options, clip_norm):
    params, grads = draw([1000, 5000], dtype), draw([1000, 5000], dtype, seed=1)
    clipped, scaled = make(copies(params), **options), make(copies(params), **options)
    for grad_scale in (0.5, 0.7):
        norm = norm_of(grads, grad_scale=grad_scale)
        info = clipped.step(grads, grad_scale=grad_scale, clip_norm=clip_norm)
        scaled.step(grads, grad_scale=grad_scale * min(1.0, clip_norm / (norm + 1e-6)))
        assert info == (norm, False)
    assert bits(clipped) == bits(scaled)
    assert steps(clipped) == [2, 2]


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clips_as_pytorch_does(clip_norm, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")
    shapes = [(30, 20), (20,), (5000,)]
    params = draw(shapes, dtype)
    theirs = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in params]
    optimizer, torch_optimizer = fs.Adam(params, lr=0.01), torch.optim.Adam(theirs, lr=0.01)
    for step in range(3):
        grads = draw(shapes, dtype, seed=10 + step)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = torch.from_numpy(grad.copy())
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
        torch_optimizer.step()
        info = optimizer.step(grads, clip_norm=clip_norm)
        close = 1e-5 if dtype == "float32" else 1e-12
        assert info.grad_norm == pytest.approx(norm.item(), rel=close)
    for ours, parameter in zip(params, theirs, strict=True):
        np.testing.assert_allclose(ours, parameter.detach().numpy(), rtol=close, atol=close)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_norm_that_is_not_finite_clips_as_in_pytorch(isa, dtype, bad):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")
    grads = draw([100], dtype)
    grads[0][7] = bad
    theirs = torch.nn.Parameter(torch.ones(100, dtype=getattr(torch, dtype.name)))
    theirs.grad = torch.from_numpy(grads[0].copy())
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.SGD([theirs], lr=0.5).step()
    params = np.ones(100, dtype)
    info = fs.GD(params, lr=0.5).step(grads[0], clip_norm=1.0)
    assert not math.isfinite(info.grad_norm)
    assert not info.skipped
    np.testing.assert_array_equal(params, theirs.detach().numpy())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 37, 4999])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_skipped_step_changes_nothing(isa, make, dtype, bad, place, clip_norm):
    params, grads = draw([1000, 5000], dtype), draw([1000, 5000], dtype, seed=1)
    optimizer, other = make(copies(params)), make(copies(params))
    wrong = copies(grads)
    wrong[1][place] = bad
    for gradients in (grads, wrong, grads, wrong):
        before, counts = bits(optimizer), steps(optimizer)
        info = optimizer.step(gradients, clip_norm=clip_norm, skip_nonfinite=True)
        assert info.skipped == (gradients is wrong)
        assert math.isfinite(info.grad_norm) != info.skipped
        if info.skipped:
            assert bits(optimizer) == before
            assert steps(optimizer) == counts
        else:
            other.step(gradients, clip_norm=clip_norm)
    assert bits(optimizer) == bits(other)
    assert steps(optimizer) == [2, 2]


def test_without_skipping_a_nan_is_stepped():
    params = np.ones(3, np.float32)
    optimizer = fs.GD(params, lr=0.5)
    assert optimizer.step(np.array([1, np.nan, 1], np.float32)) == (None, False)
    np.testing.assert_array_equal(params, np.array([0.5, np.nan, 0.5], np.float32))


def test_a_schedule_is_asked_again_after_a_skipped_step():
    asked = []
    optimizer = fs.Adam(np.ones(3), lr=lambda t: asked.append(t) or 0.1)
    for grads in (np.ones(3), np.full(3, np.nan), np.ones(3)):
        optimizer.step(grads, skip_nonfinite=True)
    assert asked == [1, 2, 2]


def test_step_info():
    optimizer = fs.Adam(np.ones(2))
    plain = optimizer.step(np.ones(2))
    assert plain == fs.StepInfo(grad_norm=None, skipped=False)
    assert optimizer.step(np.ones(2)) is plain
    assert optimizer.step(np.ones(2), zero_grad=True) == plain
    info = optimizer.step(np.array([3.0, 4.0]), clip_norm=1.0)
    assert (info.grad_norm, info.skipped) == (5.0, False)
    assert repr(info) == "StepInfo(grad_norm=5.0, skipped=False)"
    assert pickle.loads(pickle.dumps(info)) == info
    with pytest.raises(AttributeError):
        info.skipped = True


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"clip_norm": 0}, ValueError, "clip_norm: expected a finite number > 0, got 0.0"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm: expected a finite number > 0, got -1.0"),
        ({"clip_norm": np.inf}, ValueError, "clip_norm: expected a finite number > 0, got inf"),
        ({"clip_norm": np.nan}, ValueError, "clip_norm: expected a finite number > 0, got nan"),
        ({"clip_norm": "1"}, TypeError, "clip_norm: expected a number, got str"),
        ({"clip_norm": lambda t: 1.0}, TypeError, "clip_norm: expected a number, got function"),
        ({"skip_nonfinite": 1}, TypeError, "skip_nonfinite: expected True or False, got int"),
        ({"skip_nonfinite": None}, TypeError, "skip_nonfinite: expected True or False, got"),
        ({"grad_scale": 0.0, "clip_norm": 1.0}, ValueError, "grad_scale: expected a finite number"),
    ],
    ids=str,
)
def test_bad_options_change_nothing(make, options, error, text):
    params, grads = draw([10, 20]), draw([10, 20], seed=1)
    optimizer = make(params)
    optimizer.step(grads)
    with assert_unchanged(*arrays_of(optimizer), *grads), pytest.raises(error, match=text):
        optimizer.step(grads, **options)
    assert steps(optimizer) == [1, 1]


def test_bad_gradients_change_nothing_with_every_option(make):
    params, grads = draw([10, 20]), draw([10, 20], seed=1)
    optimizer = make(params)
    options = {"clip_norm": 1.0, "skip_nonfinite": True, "zero_grad": True}
    for wrong, error, text in (
        ([grads[0], grads[1][:19]], ValueError, r"grads\[1\]: shape"),
        ([grads[0], grads[1].astype(np.float64)], TypeError, r"grads\[1\]: float64"),
        (
            [grads[0], params[1]],
            ValueError,
            r"grads\[1\] and params\[1\]|params\[1\] and grads\[1\]",
        ),
        ([grads[0]], ValueError, "1 arrays, but there are 2"),
    ):
        with assert_unchanged(*arrays_of(optimizer), *grads), pytest.raises(error, match=text):
            optimizer.step(wrong, **options)
    assert steps(optimizer) == [0, 0]
