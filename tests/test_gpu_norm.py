"""Clipping, skipping and zeroing on a GPU, whose kernels' source is run on the host."""

import gc
import math
import pickle
import weakref

import numpy as np
import pytest
from fake_gpu import Cupy, CupyArray, InterfaceArray, float32
from test_clipping import OPTIMIZERS, SIZES, draw

import fusedstep as fs

pytest_plugins = ["cuda_on_host"]

VIEWS = {
    "dense": lambda a: a,
    "every second": lambda a: a[::2],
    "reversed": lambda a: a[::-1],
    "odd offset": lambda a: a[1:],
    "rows": lambda a: a[: a.size // 6 * 6].reshape(6, -1)[:, ::2],
    "columns": lambda a: a[: a.size // 6 * 6].reshape(-1, 6).T,
}
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def memory_of(optimizer):
    """Return the bytes of all that an optimizer on either side may write."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [s for own in optimizer.state.values() for k, s in own.items() if k != "step"]
    return [getattr(a, "host", a).tobytes() for a in params + states]


def steps(optimizer):
    return [own["step"] for own in optimizer.state.values()]


def made(kind, sizes, dtype=np.float32, view=lambda a: a, **options):
    """Return an optimizer of arrays in host memory, and one of the same on a GPU."""
    params = draw(sizes, dtype)
    on_cpu = OPTIMIZERS[kind]([view(p.copy()) for p in params])
    on_gpu = OPTIMIZERS[kind]([CupyArray(view(p.copy())) for p in params], **options)
    return on_cpu, on_gpu


def step_both(on_cpu, on_gpu, grads, view=lambda a: a, **options):
    host = [None if g is None else view(g.copy()) for g in grads]
    device = [None if g is None else CupyArray(view(g.copy())) for g in grads]
    with np.errstate(all="ignore"):
        infos = on_cpu.step(host, **options), on_gpu.step(device, **options)
    assert infos[0] == infos[1] or math.isnan(infos[0].grad_norm)
    assert infos[0].skipped == infos[1].skipped
    for a, b in zip(host, device, strict=True):
        assert a is b is None or a.tobytes() == b.host.tobytes()
    return infos


@every_optimizer
@every_dtype
@pytest.mark.parametrize("view", VIEWS)
def test_clipping_has_the_bits_of_the_cpu(view, dtype, kind, gpu):
    sizes = [size + 12 for size in SIZES]
    for number, zero_grad in enumerate((False, True)):
        gpu.set_most_blocks(1 + 2 * number)
        on_cpu, on_gpu = made(kind, [*sizes, 0], dtype, VIEWS[view])
        for seed, clip_norm in enumerate((1e-3, 1e9, 2.0)):
            grads = draw([*sizes, 0], dtype, seed=seed)
            step_both(
                on_cpu, on_gpu, grads, VIEWS[view],
                clip_norm=clip_norm, grad_scale=0.7, zero_grad=zero_grad,
            )  # fmt: skip
            assert memory_of(on_cpu) == memory_of(on_gpu)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 4096, 32 * 4096, 32 * 4096 + 1, 33 * 4096 * 32])
def test_long_gradients_are_added_in_the_same_tree(size, gpu):
    on_cpu, on_gpu = made("gd", [size])
    gpu.set_most_blocks(7)
    step_both(on_cpu, on_gpu, draw([size], seed=1), clip_norm=1.0)
    assert memory_of(on_cpu) == memory_of(on_gpu)


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 148, 1362, 1363, 5000])
def test_many_gradients_are_added_in_the_same_tree(count, gpu):
    sizes = np.random.default_rng(count).integers(1, 9000 if count < 100 else 40, count)
    on_cpu, on_gpu = made("gd", sizes)
    step_both(on_cpu, on_gpu, draw(sizes, seed=1), clip_norm=1.0)
    assert memory_of(on_cpu) == memory_of(on_gpu)


def test_gradients_of_every_type_and_layout_in_one_norm(gpu):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
    params, grads, views = [], [], []
    for number, view in enumerate([*VIEWS.values()] * 4):
        dtype = dtypes[number % 4]
        params.append(draw([5000], np.float64 if dtype == np.float64 else np.float32)[0])
        grads.append(draw([5000], dtype, seed=number)[0])
        views.append(view)
    both = []
    for wrap in (lambda a: a, CupyArray):
        optimizer = fs.Adam([wrap(v(p.copy())) for v, p in zip(views, params, strict=True)])
        given = [v(g.copy()) for v, g in zip(views, grads, strict=True)]
        info = optimizer.step([wrap(g) for g in given], clip_norm=1.0, zero_grad=True)
        both.append((info, memory_of(optimizer), [g.tobytes() for g in given]))
    assert both[0] == both[1]
    assert not any(any(g) for g in both[0][2])


def test_gradients_of_none_and_empty_ones_have_no_place(gpu):
    on_cpu, on_gpu = made("adam", [100, 200, 0, 300])
    grads = draw([100, 200, 0, 300], seed=1)
    grads[1] = None
    info = step_both(on_cpu, on_gpu, grads, clip_norm=1.0)[0]
    assert info.grad_norm > 0
    assert memory_of(on_cpu) == memory_of(on_gpu)
    assert steps(on_gpu) == [1, 0, 1, 1]
    for optimizer in (on_cpu, on_gpu):
        assert optimizer.step([None] * 4, clip_norm=1.0) == (0.0, False)
    empty = fs.Adam(CupyArray(np.ones(0)))
    assert empty.step(CupyArray(np.ones(0)), clip_norm=1.0) == (0.0, False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_optimizer
@every_dtype
def test_a_norm_that_is_not_finite_clips_as_on_the_cpu(dtype, kind, bad, gpu):
    on_cpu, on_gpu = made(kind, [100, 50], dtype)
    grads = draw([100, 50], dtype, seed=1)
    grads[0][7] = bad
    step_both(on_cpu, on_gpu, grads, clip_norm=1.0)
    for ours, theirs in zip(memory_of(on_gpu), memory_of(on_cpu), strict=True):
        assert np.array_equal(
            np.frombuffer(ours, dtype), np.frombuffer(theirs, dtype), equal_nan=True
        )


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("view", VIEWS)
@every_optimizer
@every_dtype
def test_a_skipped_step_is_skipped_on_the_gpu(dtype, kind, view, clip_norm, zero_grad, gpu):
    view = VIEWS[view]
    on_cpu, on_gpu = made(kind, [1000, 5000], dtype, view, capturable=True)
    for number, bad in enumerate((None, np.nan, np.inf, None, -np.inf, None)):
        grads = draw([1000, 5000], dtype, seed=number)
        if bad is not None:
            view(grads[1])[..., -1] = bad
        options = {"clip_norm": clip_norm, "skip_nonfinite": True, "zero_grad": zero_grad}
        info = step_both(on_cpu, on_gpu, grads, view, **options)[1]
        assert info.skipped == (bad is not None)
        assert memory_of(on_cpu) == memory_of(on_gpu)
        assert steps(on_cpu) == steps(on_gpu)
    assert steps(on_gpu) == [3, 3]


@pytest.mark.parametrize("storage", ["8bit", "bfloat16"])
@pytest.mark.parametrize("master_weights", ["stochastic", "correction8"])
def test_skipping_and_clipping_of_narrow_arrays(master_weights, storage, gpu):
    dtype = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16
    options = {"master_weights": master_weights, "state_dtype": storage, "seed": 3}
    params = draw([1000, 77], dtype)
    on_cpu = fs.Adam([p.copy() for p in params], **options)
    on_gpu = fs.Adam([CupyArray(p.copy()) for p in params], capturable=True, **options)
    for number in range(5):
        grads = draw([1000, 77], dtype, seed=number)
        if number % 2:
            grads[1][76] = np.inf
        step_both(on_cpu, on_gpu, grads, clip_norm=3.0, skip_nonfinite=True, zero_grad=True)
        assert memory_of(on_cpu) == memory_of(on_gpu)
    assert steps(on_gpu) == [3, 3]


def test_groups_that_the_gpu_counts_are_skipped_together(gpu):
    params, grads = draw([10, 20]), draw([10, 20], seed=1)
    optimizer = fs.Adam([{"params": CupyArray(p)} for p in params], capturable=True)
    optimizer.step([CupyArray(g) for g in grads], skip_nonfinite=True)
    grads[0][3] = np.nan
    assert optimizer.step([CupyArray(g) for g in grads], skip_nonfinite=True).skipped
    optimizer.add_param_group({"params": CupyArray(np.ones(9000, np.float32))})
    grads[0][3] = 0
    grads.append(np.ones(9000, np.float32))
    assert not optimizer.step([CupyArray(g) for g in grads], skip_nonfinite=True).skipped
    assert steps(optimizer) == [2, 2, 1]


@every_optimizer
def test_zeroing_alone(kind, gpu):
    on_cpu, on_gpu = made(kind, SIZES)
    norms = gpu.norm_count()
    assert step_both(on_cpu, on_gpu, draw(SIZES, seed=1), zero_grad=True)[1] == (None, False)
    assert memory_of(on_cpu) == memory_of(on_gpu)
    assert gpu.norm_count() == norms


def test_gradients_that_cannot_be_zeroed_change_nothing(gpu):
    (param,), (grad,) = draw([10]), draw([10], seed=1)
    read_only = grad.copy()
    read_only.flags.writeable = False
    optimizer = fs.GD([CupyArray(param), CupyArray(param.copy())], capturable=True)
    before = memory_of(optimizer)
    for grads, text in (
        ([InterfaceArray(grad.copy()), InterfaceArray(read_only)], r"^grads\[1\]: .* read-only"),
        ([CupyArray(grad), CupyArray(grad)], "overlap in memory"),
    ):
        with pytest.raises(ValueError, match=text):
            optimizer.step(grads, zero_grad=True, skip_nonfinite=True)
    assert memory_of(optimizer) == before
    assert steps(optimizer) == [0, 0]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"clip_norm": 0}, ValueError, "clip_norm: expected a finite number > 0, got 0.0"),
        ({"clip_norm": "1"}, TypeError, "clip_norm: expected a number, got str"),
        ({"skip_nonfinite": 1}, TypeError, "skip_nonfinite: expected True or False, got int"),
        ({"zero_grad": None}, TypeError, "zero_grad: expected True or False, got NoneType"),
        ({"skip_nonfinite": True}, ValueError, "skip_nonfinite: on a GPU, which alone knows"),
    ],
)
def test_bad_options_change_nothing(options, error, text, gpu):
    optimizer = fs.Adam(CupyArray(float32(10)), lr=lambda t: 1 / 0)
    before = memory_of(optimizer)
    launches = gpu.launch_count()
    with pytest.raises(error, match=text):
        optimizer.step(CupyArray(float32(10)), **options)
    assert memory_of(optimizer) == before
    assert gpu.launch_count() == launches


def test_a_norm_that_cannot_be_loaded_leaves_no_half_step(gpu):
    optimizer = fs.Adam(CupyArray(float32(10)))
    before = memory_of(optimizer)
    gpu.set_norm_is_refused(1)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(CupyArray(float32(10)), clip_norm=1.0, zero_grad=True)
    assert memory_of(optimizer) == before
    assert steps(optimizer) == [0]
    optimizer.step(CupyArray(float32(10)))


@pytest.fixture
def transfers(monkeypatch):
    """Return a list that each copy to the host lengthens."""
    done = []
    get = CupyArray.get
    monkeypatch.setattr(CupyArray, "get", lambda array: done.append(array) or get(array))
    return done


def test_what_a_step_reports_is_copied_when_it_is_read(gpu, transfers):
    (grad,) = draw([5000], seed=1)
    expected = fs.GD(np.ones(5000, np.float32)).step(grad, clip_norm=1.0).grad_norm
    optimizer = fs.GD(CupyArray(np.ones(5000, np.float32)), capturable=True)
    info = optimizer.step(CupyArray(grad), clip_norm=1.0)
    assert not transfers
    assert info.grad_norm == expected
    assert len(transfers) == 1
    assert not info.skipped
    assert tuple(info) == (info[0], info[1]) == (expected, False)
    assert len(info) == 2
    assert repr(info) == f"StepInfo(grad_norm={expected}, skipped=False)"
    assert pickle.loads(pickle.dumps(info)) == info
    assert hash(info) == hash((expected, False))
    assert len(transfers) == 1


def test_a_report_that_is_read_late_is_that_of_its_step(gpu, transfers):
    optimizer = fs.GD(CupyArray(np.ones(10, np.float32)))
    grads = [np.full(10, k, np.float32) for k in range(1, 9)]
    infos = [optimizer.step(CupyArray(g), clip_norm=1.0) for g in grads]
    assert not transfers
    for info, grad in reversed(list(zip(infos, grads, strict=True))):
        assert info.grad_norm == pytest.approx(np.linalg.norm(grad))


@pytest.mark.parametrize("read", [False, True])
def test_the_memory_of_a_report_is_used_again(read, gpu, monkeypatch):
    optimizer = fs.GD(CupyArray(np.ones(10, np.float32)), capturable=True)
    optimizer.step(CupyArray(np.ones(10, np.float32)), clip_norm=1.0)
    monkeypatch.setattr(fs.gpu, "zeros", None)  # nothing is allocated from here on
    kept = []
    for _ in range(5):
        info = optimizer.step(CupyArray(np.ones(10, np.float32)), skip_nonfinite=True)
        if read:
            kept.append(info)
            assert not info.skipped
    del info
    gc.collect()
    optimizer.step(CupyArray(np.ones(10, np.float32)), clip_norm=1.0)


def test_replays_of_a_captured_step_leave_other_reports_alone(gpu, monkeypatch):
    library, memory, allocate = Cupy(capturing=True), [], fs.gpu.zeros
    library.install(monkeypatch)
    monkeypatch.setattr(fs.gpu, "zeros", lambda *args: memory.append(allocate(*args)) or memory[-1])
    optimizer = fs.GD(CupyArray(np.ones(10, np.float32)), capturable=True)
    allocated = len(memory)
    captured = optimizer.step(CupyArray(np.ones(10, np.float32)), clip_norm=1.0)
    assert len(memory) == allocated  # a capture is no time for that
    library.capturing = False
    (place,) = (array for array in memory if array.size == 3 and array.host.any())

    def replay(norm, skipped):
        place.host[:1] = np.array([norm]).view(np.int64)
        place.host[2] = skipped

    grads = [np.full(10, k, np.float32) for k in range(1, 5)]
    infos = [optimizer.step(CupyArray(g), clip_norm=1.0) for g in grads]
    for outcome in ((2.0, False), (np.inf, True)):
        replay(*outcome)
        assert captured == outcome
    assert not captured.is_known
    for info, grad in zip(infos, grads, strict=True):
        assert info.grad_norm == pytest.approx(np.linalg.norm(grad))
    del captured  # the graph is still there
    info = optimizer.step(CupyArray(grads[1]), clip_norm=1.0)
    replay(7.0, skipped=False)
    assert info == infos[1]


def test_memory_in_a_graph_outlives_a_larger_one(gpu, monkeypatch):
    library = Cupy()
    library.install(monkeypatch)
    optimizer = fs.GD([{"params": CupyArray(np.ones(10, np.float32))}], capturable=True)
    prepare, used = fs.gpu.Norm.prepare, []

    def spy(norm):
        info, memory = prepare(norm)
        used.extend(map(weakref.ref, memory))
        return info, memory

    monkeypatch.setattr(fs.gpu.Norm, "prepare", spy)
    for library.capturing in (False, True):
        used.clear()
        optimizer.step([CupyArray(np.ones(10, np.float32)) for _ in optimizer.state], clip_norm=1.0)
        optimizer.add_param_group({"params": CupyArray(np.ones(10, np.float32))})
        gc.collect()
        assert {memory() is not None for memory in used} == {library.capturing}


def test_a_loss_scaler_backs_off_and_grows(gpu):
    optimizer = fs.Adam(CupyArray(float32(10)), capturable=True)
    scaler = fs.LossScaler(init_scale=8.0, growth_interval=1)
    assert scaler.step(optimizer, CupyArray(np.full(10, np.inf, np.float32))).skipped
    assert scaler.scale == 4.0
    assert not scaler.step(optimizer, CupyArray(float32(10))).skipped
    assert scaler.scale == 8.0
    assert steps(optimizer) == [1]


def test_a_library_that_cannot_allocate_is_named(gpu):
    optimizer = fs.GD(InterfaceArray(float32(3)))
    with pytest.raises(TypeError, match=r"cannot allocate state like a InterfaceArray of fake_gpu"):
        optimizer.step(InterfaceArray(float32(3)), clip_norm=1.0)
    optimizer.step(InterfaceArray(float32(3)), zero_grad=True)
