"""Offloaded optimizers against the ordinary ones, with a device that delays and reorders copies."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_unchanged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from offload_adversary import AdversaryDevice, CopyError

import fusedstep as fs
from fusedstep import _core
from fusedstep.offload import HostDevice, OffloadedOptimizer
from fusedstep.offload.layout import BLOCK, cut, places
from fusedstep.offload.norm import sum_in_pairs

pytestmark = pytest.mark.filterwarnings("ignore:params.*so that a step smaller:UserWarning")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = ((), (5,), (100, 77), (0, 3), (BLOCK * 3 + 17,), (3, BLOCK), (2, 3, 4))
RULES: dict[str, tuple[type[fs.Optimizer], dict[str, Any]]] = {
    "gd": (fs.GD, {"weight_decay": 0.1}),
    "momentum": (fs.GD, {"momentum": 0.9, "nesterov": True}),
    "adam": (fs.Adam, {"lr": 0.01}),
    "adamw": (fs.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}),
}


def arrays(shapes: Any, dtype: Any, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes]


def bits(items: Any) -> list[bytes]:
    return [np.asarray(a).tobytes() for a in items]


def state_bits(optimizer: Any) -> list[Any]:
    return [
        {k: v if k == "step" else (v.dtype.name, v.shape, v.tobytes()) for k, v in entry.items()}
        for entry in optimizer.state.values()
    ]


def pair(
    rule: str, dtype: Any, *, bucket_bytes: int = 20_000, shapes: Any = SHAPES, **options: Any
) -> tuple[Any, Any, Any, Any, AdversaryDevice]:
    """Return parameters and an ordinary optimizer of them, and the same offloaded."""
    optimizer, hyper = RULES[rule]
    own = {k: options.pop(k) for k in ("pin_params", "state_dir", "resume") if k in options}
    plain, ours = arrays(shapes, dtype), arrays(shapes, dtype)
    device = AdversaryDevice()
    offloaded = OffloadedOptimizer(
        optimizer, ours, bucket_bytes=bucket_bytes, device=device, **own, **hyper, **options
    )
    return plain, optimizer(plain, **hyper, **options), ours, offloaded, device


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        (np.float32, {}),
        (np.float64, {}),
        (np.float32, {"state_dtype": "bfloat16"}),
        (np.float32, {"state_dtype": "8bit", "seed": 3}),
        (BFLOAT16, {}),
        (BFLOAT16, {"master_weights": "float32"}),
        (BFLOAT16, {"master_weights": "correction16"}),
        (BFLOAT16, {"master_weights": "correction8", "state_dtype": "8bit"}),
        (BFLOAT16, {"master_weights": "stochastic", "seed": 5}),
        (np.float16, {"master_weights": "float32"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5, "grad_scale": 0.25}], ids=str)
def test_bits_of_the_ordinary_optimizer(rule, dtype, storage, options):
    plain, expected, ours, offloaded, device = pair(rule, dtype, **storage)
    for t in range(4):
        grads: list[Any] = arrays(SHAPES, dtype, seed=t + 1)
        if t == 2:
            grads[2] = grads[4] = None
        assert offloaded.step(grads, **options) == expected.step(grads, **options)
        assert bits(ours) == bits(plain)
    assert state_bits(offloaded) == state_bits(expected)
    assert not device.faults
    assert device.under_way == 0


@st.composite
def jobs(draw: Any) -> dict[str, Any]:
    dtype = draw(st.sampled_from([np.dtype(np.float32), np.dtype(np.float64), BFLOAT16]))
    count = draw(st.integers(1, 6))
    sizes = st.one_of(st.integers(0, 70), st.integers(BLOCK - 1, 3 * BLOCK + 1))
    shapes = []
    for _ in range(count):
        shape = [draw(sizes)]
        if draw(st.booleans()):
            shape.append(draw(st.integers(1, 3)))
        shapes.append(tuple(shape))
    grad_dtypes = [dtype] if dtype == np.float64 else [np.dtype(np.float32), BFLOAT16]
    return {
        "dtype": dtype,
        "shapes": shapes,
        "orders": [draw(st.sampled_from("CF")) for _ in shapes],
        "grad_orders": [draw(st.sampled_from("CF")) for _ in shapes],
        "grad_dtypes": [draw(st.sampled_from(grad_dtypes)) for _ in shapes],
        "bucket_bytes": draw(st.sampled_from([1, 300, 5_000, 40_000, 1 << 24])),
        "structure": draw(st.sampled_from(["list", "dict", "groups"])),
        "rule": draw(st.sampled_from(list(RULES))),
        "pin_params": draw(st.booleans()),
        "clip_norm": draw(st.sampled_from([None, 1e-3, 1e3])),
        "missing": draw(st.sets(st.integers(0, count - 1), max_size=2)),
        "seed": draw(st.integers(0, 2**16)),
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(jobs())
def test_bits_of_random_jobs(job):
    optimizer, hyper = RULES[job["rule"]]

    def made(seed: int, dtypes: Any, orders: str = "orders") -> list[Any]:
        values = arrays(job["shapes"], np.float64, seed)
        return [
            np.asarray(a.astype(dtype), order=order)
            for a, dtype, order in zip(values, dtypes, job[orders], strict=True)
        ]

    def given_as(items: Any, extra: Any = None) -> Any:
        if job["structure"] == "list":
            return items
        if job["structure"] == "dict":
            return {f"p{i}": item for i, item in enumerate(items)}
        half = len(items) // 2
        parts = [items[:half], {str(i): item for i, item in enumerate(items[half:])}]
        parts = [part for part in parts if len(part)]
        return [{"params": part, **extra} for part in parts] if extra is not None else parts

    params = [job["dtype"]] * len(job["shapes"])
    plain, ours = made(job["seed"], params), made(job["seed"], params)
    device = AdversaryDevice(job["seed"], most_seconds=3e-4)
    expected = optimizer(given_as(plain, {"weight_decay": 0.2}), **hyper)
    offloaded = OffloadedOptimizer(
        optimizer, given_as(ours, {"weight_decay": 0.2}), bucket_bytes=job["bucket_bytes"],
        pin_params=job["pin_params"], device=device, **hyper,
    )  # fmt: skip
    for t in range(2):
        grads: list[Any] = made(job["seed"] + t + 1, job["grad_dtypes"], "grad_orders")
        for i in job["missing"]:
            grads[i] = None
        options = {"clip_norm": job["clip_norm"]}
        assert offloaded.step(given_as(grads), **options) == expected.step(
            given_as(grads), **options
        )
    assert bits(ours) == bits(plain)
    assert state_bits(offloaded) == state_bits(expected)
    assert not device.faults


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40_000), st.booleans()), max_size=8),
    st.integers(1, 200_000),
    st.sampled_from([2, 4, 8]),
)
def test_buckets_hold_every_element_once(params, bucket_bytes, itemsize):
    sizes, whole = [n for n, _ in params], [w for _, w in params]
    itemsizes = [itemsize] * len(sizes)
    offsets, end = places(sizes, itemsizes)
    seen = [np.zeros(n, int) for n in sizes]
    last = 0
    for bucket in cut(sizes, itemsizes, whole, bucket_bytes):
        assert last <= bucket.begin < bucket.end <= end
        last = bucket.end
        for piece in bucket.pieces:
            assert piece.start % BLOCK == 0
            assert piece.offset == offsets[piece.param] + piece.start * itemsize
            assert piece.offset % 64 == 0
            assert bucket.begin <= piece.offset
            assert piece.offset + (piece.stop - piece.start) * itemsize <= bucket.end
            assert not whole[piece.param] or piece.stop - piece.start == sizes[piece.param]
            seen[piece.param][piece.start : piece.stop] += 1
        if bucket.end - bucket.begin > bucket_bytes:
            (piece,) = bucket.pieces
            assert whole[piece.param] or piece.stop - piece.start <= BLOCK
    assert all((s == 1).all() for s in seen)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16, np.float16])
def test_sums_of_squares_are_those_of_the_tree(dtype):
    values = arrays([(BLOCK * 2 + 33,), (7,)], dtype)
    sums = np.empty(4)
    _core.sums_of_squares(values, dtype == np.float64, sums)
    cuts = [values[0][:BLOCK], values[0][BLOCK : 2 * BLOCK], values[0][2 * BLOCK :], values[1]]
    exact = [math.fsum(float(x) ** 2 for x in part) for part in cuts]
    assert np.allclose(sums, exact, rtol=1e-13)
    expected = fs.GD(arrays([v.shape for v in values], dtype), lr=0).step(values, clip_norm=1)
    total = sum_in_pairs(np.array([sum_in_pairs(sums[:3]), sums[3]]))
    assert math.sqrt(total) == expected.grad_norm


@pytest.mark.parametrize("past_caches", [False, True])
@pytest.mark.parametrize("size", [0, 1, 15, 63, 64, 65, 1000, 3_000_001])
def test_bytes_are_copied_and_none_beside_them(size, past_caches):
    for begin, offset in ((0, 0), (1, 0), (7, 3), (16, 5)):
        source = np.random.default_rng(0).integers(0, 256, size + 64, np.uint8)
        target = np.full(size + 64, 170, np.uint8)
        _core.copy_bytes(source[offset : offset + size], target[begin : begin + size], past_caches)
        assert (target[begin : begin + size] == source[offset : offset + size]).all()
        assert (target[:begin] == 170).all()
        assert (target[begin + size :] == 170).all()


def test_schedules_and_changed_hyper_parameters():
    def lr(t: int) -> float:
        return 0.1 / t

    plain, ours = arrays(SHAPES, np.float32), arrays(SHAPES, np.float32)
    expected = fs.Adam(plain, lr=lr)
    offloaded = OffloadedOptimizer(fs.Adam, ours, bucket_bytes=9_000, lr=lr)
    for t in range(4):
        if t == 2:
            for optimizer in (expected, offloaded):
                optimizer.param_groups[0]["weight_decay"] = 0.3
        grads = arrays(SHAPES, np.float32, t)
        expected.step(grads)
        offloaded.step(grads)
    assert bits(ours) == bits(plain)


def test_a_missing_hyper_parameter_is_named():
    theta = np.ones(3, np.float32)
    optimizer = OffloadedOptimizer(fs.Adam, theta)
    lr = optimizer.param_groups[0].pop("lr")
    with assert_unchanged(theta), pytest.raises(ValueError, match="lr: missing"):
        optimizer.step(np.ones(3, np.float32))
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step(np.ones(3, np.float32))
    assert optimizer.state[0]["step"] == 1


def test_one_array_is_taken_as_one():
    theta = np.array([1.0, -2.0], np.float32)
    optimizer = OffloadedOptimizer(fs.GD, theta, lr=0.25)
    assert optimizer.step(2 * theta) == (None, False)
    assert theta.tolist() == [0.5, -1.0]
    with pytest.raises(TypeError, match=r"^grads: float64"):
        optimizer.step(np.ones(2))


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_state_goes_to_the_ordinary_optimizer_and_back(dtype, tmp_path):
    storage = {"master_weights": "float32"} if dtype == BFLOAT16 else {}
    plain, expected, ours, offloaded, _ = pair("adam", dtype, **storage)
    for t in range(2):
        grads = arrays(SHAPES, dtype, t)
        expected.step(grads)
        offloaded.step(grads)
    other_plain, other_expected, other_ours, other_offloaded, _ = pair("adam", dtype, **storage)
    for target, source in zip(other_plain + other_ours, ours + plain, strict=True):
        target[...] = source
    other_expected.load_state_dict(offloaded.state_dict())
    expected.save(tmp_path / "plain")
    other_offloaded.load(tmp_path / "plain")
    offloaded.save(tmp_path / "ours")
    other_expected.load(tmp_path / "ours")
    offloaded.load_state_dict(offloaded.state_dict())
    for t in range(2, 4):
        grads = arrays(SHAPES, dtype, t)
        for optimizer in (expected, offloaded, other_expected, other_offloaded):
            optimizer.step(grads)
    assert bits(plain) == bits(ours) == bits(other_plain) == bits(other_ours)
    assert state_bits(expected) == state_bits(other_offloaded)


def test_gradients_come_twice_for_the_norm_and_once_without():
    _, _, _, offloaded, device = pair("adam", np.float32)
    count = len(offloaded._pipeline.buckets)
    assert count > 3
    for options, copies in (({}, 2 * count), ({"clip_norm": 1.0}, 3 * count)):
        before = device.started
        offloaded.step(arrays(SHAPES, np.float32), **options)
        assert device.started - before == copies


def test_pinned_memory_is_bounded():
    shapes = ((1000, 1000), (50_000,))
    for pin_params, rooms in ((False, 6), (True, 3)):
        params, _, _, offloaded, device = pair(
            "adam", np.float32, shapes=shapes, bucket_bytes=100_000, pin_params=pin_params
        )
        offloaded.step(arrays(shapes, np.float32))
        params_bytes = sum(p.nbytes for p in params)
        held = offloaded.memory_bytes()
        assert held["buffers"] <= rooms * 100_000
        assert held["state"] == 2 * params_bytes
        assert params_bytes <= held["params"] <= params_bytes + 128
        assert device.pinned_bytes == held["buffers"] + (held["params"] if pin_params else 0)


def test_wider_gradients_get_wider_buffers():
    plain, expected, ours, offloaded, device = pair("adam", BFLOAT16, master_weights="float32")
    before = device.pinned_bytes
    grads = arrays(SHAPES, np.float32)
    expected.step(grads)
    offloaded.step(grads)
    assert device.pinned_bytes > before
    assert bits(ours) == bits(plain)


def everything(offloaded: Any) -> list[Any]:
    """Return all arrays that a step may write."""
    return [
        *(p for group in offloaded.param_groups for p in group["params"]),
        *(a for own in offloaded._inner._arrays for a in own.values()),
        offloaded._host,
    ]


@pytest.mark.parametrize("how", ["start", "wait"])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}], ids=str)
def test_a_failed_copy_leaves_all_or_says_what_it_wrote(how, options):
    grads = arrays(SHAPES, np.float32, 7)
    _, _, _, offloaded, device = pair("adam", np.float32)
    offloaded.step(grads, **options)
    copies, device.started = device.started, 0
    offloaded.step(grads, **options)
    copies = device.started
    broken = 0
    for number in range(copies):
        plain, expected, ours, offloaded, device = pair("adam", np.float32)
        before = copy.deepcopy(everything(offloaded))
        device.started, device.fail_at = 0, (number, how)
        with pytest.raises(CopyError) as caught:
            offloaded.step(grads, **options)
        assert device.under_way == 0
        assert not device.faults
        device.fail_at = None
        unchanged = bits(everything(offloaded)) == bits(before)
        if offloaded._broken is None:
            assert unchanged
        else:
            broken += 1
            note = caught.value.__notes__[0]
            assert re.match(r"a step was broken off in the middle: [1-9]\d* of \d+ buckets", note)
            for act in (
                lambda o=offloaded: o.step(grads),
                offloaded.state_dict,
                offloaded.refresh,
            ):
                with pytest.raises(RuntimeError, match="broken off in the middle"):
                    act()
            # The way back: parameters, then state.
            for target, source in zip(ours, plain, strict=True):
                target[...] = source
            offloaded.load_state_dict(expected.state_dict())
        assert offloaded.step(grads, **options) == expected.step(grads, **options)
        assert bits(ours) == bits(plain)
    assert 0 < broken < copies


def test_an_interrupted_step_is_remembered(monkeypatch):
    _, _, _, offloaded, device = pair("adam", np.float32)
    upload, uploads = device.upload, []

    def interrupted(pairs: Any, marks: Any) -> Any:
        uploads.append(pairs)
        if len(uploads) == 2:
            raise KeyboardInterrupt
        return upload(pairs, marks)

    monkeypatch.setattr(device, "upload", interrupted)
    with pytest.raises(KeyboardInterrupt):
        offloaded.step(arrays(SHAPES, np.float32))
    with pytest.raises(
        RuntimeError, match=r"2 of \d+ buckets may be new \(params\[5\], params\[6\]\)"
    ):
        offloaded.step(arrays(SHAPES, np.float32))
    assert device.under_way == 0


def test_an_interrupted_wait_is_made_again(monkeypatch):
    _, _, _, offloaded, device = pair("adam", np.float32)
    download, interrupts = device.download, []

    def interrupting(pairs: Any, marks: Any) -> Any:
        made = download(pairs, marks)
        wait = made.wait

        def interrupted() -> None:
            if not interrupts:
                interrupts.append(None)
                raise KeyboardInterrupt
            wait()

        made.wait = interrupted
        return made

    monkeypatch.setattr(device, "download", interrupting)
    with pytest.raises(KeyboardInterrupt):
        offloaded.step(GOOD)
    assert device.under_way == 0
    offloaded.step(GOOD)


def test_an_interrupt_before_the_step_is_counted_is_remembered(monkeypatch):
    _, _, _, offloaded, _ = pair("adam", np.float32)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(offloaded, "_count", interrupted)
    with pytest.raises(KeyboardInterrupt):
        offloaded.step(GOOD)
    with pytest.raises(RuntimeError, match="8 of 8 buckets may be new"):
        offloaded.step(GOOD)


@pytest.mark.parametrize("failing", [0, 2])
def test_a_native_step_that_raises_has_written_nothing(failing):
    _, _, ours, offloaded, _ = pair("adam", np.float32)
    before = copy.deepcopy(ours)

    class Failing:
        steps = ()

        def step(self, *_: Any) -> None:
            raise MemoryError

    steps = offloaded._pipeline.steps
    steps[failing] = steps[failing]._replace(native=Failing())
    with pytest.raises(MemoryError):
        offloaded.step(GOOD)
    assert (bits(ours) == bits(before)) == (failing == 0)
    assert (offloaded._broken is None) == (failing == 0)
    if failing:
        assert f"{failing} of 8 buckets" in offloaded._broken


def test_a_parameter_without_a_gradient_is_not_written():
    _, _, ours, offloaded, _ = pair("adam", np.float32)
    ours[2][...] = 7  # and nobody has called refresh()
    offloaded.step([None if i == 2 else g for i, g in enumerate(GOOD)])
    assert (ours[2] == 7).all()


GOOD = arrays(SHAPES, np.float32)


def changed(i: int, value: Any) -> list[Any]:
    return [value if k == i else g for k, g in enumerate(GOOD)]


@pytest.mark.parametrize(
    ("grads", "options", "error", "message"),
    [
        (GOOD[:-1], {}, ValueError, "grads: 6 gradients, but there are 7 parameters"),
        (GOOD[1], {}, TypeError, "grads: expected a list"),
        (changed(1, GOOD[2]), {}, ValueError, "grads[1]: shape (100, 77), but its parameter has"),
        (changed(6, GOOD[6].astype(np.float64)), {}, TypeError, "grads[6]: float64, but its"),
        (changed(6, [1.0]), {}, TypeError, "grads[6]: expected numpy.ndarray"),
        (GOOD, {"grad_scale": 0}, ValueError, "grad_scale: expected a finite number > 0"),
        (GOOD, {"clip_norm": -1.0}, ValueError, "clip_norm: expected a finite number > 0"),
        (GOOD, {"clip_norm": "1"}, TypeError, "clip_norm"),
        (GOOD, {"skip_nonfinite": 1}, TypeError, "skip_nonfinite"),
        (changed(1, GOOD[1] * np.inf), {"clip_norm": 1.0}, ValueError, "cannot be clipped"),
        (GOOD, {"grad_scale": 1e60}, ValueError, "grad_scale: "),
        (changed(1, GOOD[1] * 1e30), {"clip_norm": 1e-300}, ValueError, "grad_scale: expected"),
    ],
)
def test_bad_input_changes_nothing(grads, options, error, message):
    _, _, _, offloaded, _ = pair("adam", np.float32)
    with assert_unchanged(*everything(offloaded)), pytest.raises(error, match=re.escape(message)):
        offloaded.step(grads, **options)
    assert offloaded.state[0]["step"] == 0
    offloaded.step(GOOD)
    assert offloaded.state[0]["step"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.param_groups[0].update(lr=-1.0), "lr: expected a finite number >= 0"),
        (lambda o: o.param_groups[0].update(lr=lambda t: math.nan), "lr: expected a finite"),
        (lambda o: o.param_groups[0].update(params=list(GOOD)), "param_groups: not the groups"),
        (lambda o: o.param_groups.append({}), "param_groups: not the groups"),
    ],
)
def test_bad_hyper_parameters_change_nothing(change, message):
    _, _, _, offloaded, _ = pair("adam", np.float32)
    held = everything(offloaded)
    change(offloaded)
    with assert_unchanged(*held), pytest.raises(ValueError, match=re.escape(message)):
        offloaded.step(GOOD)


def test_gradients_that_overlap_with_parameters_are_refused():
    _, _, ours, offloaded, _ = pair("adam", np.float32)
    with assert_unchanged(*ours), pytest.raises(ValueError, match=r"grads\[6\]: overlaps params"):
        offloaded.step([None, None, None, None, None, None, ours[6]])


def test_nonfinite_gradients_are_skipped():
    _, _, _, offloaded, _ = pair("adam", np.float32)
    grads = changed(4, np.full_like(GOOD[4], np.nan))
    with assert_unchanged(*everything(offloaded)):
        info = offloaded.step(grads, skip_nonfinite=True)
    assert info.skipped
    assert math.isnan(info.grad_norm)
    assert offloaded.state[0]["step"] == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: OffloadedOptimizer(dict, p), TypeError, "optimizer: expected GD, Adam or AdamW"),
        (lambda p: OffloadedOptimizer(fs.Adam, p, bucket_bytes=0), ValueError, "bucket_bytes: exp"),
        (lambda p: OffloadedOptimizer(fs.Adam, p, lr=-1), ValueError, "lr: expected"),
        (lambda p: OffloadedOptimizer(fs.Adam, p, momentum=1), TypeError, "momentum"),
        (lambda p: OffloadedOptimizer(fs.Adam, p, capturable=True), ValueError, "capturable: a"),
        (lambda p: OffloadedOptimizer(fs.Adam, p, resume=True), ValueError, "resume: needs"),
        (lambda p: OffloadedOptimizer(fs.Adam, []), ValueError, "params: no arrays"),
        (lambda p: OffloadedOptimizer(fs.Adam, "ab"), TypeError, "params: expected"),
        (lambda p: OffloadedOptimizer(fs.Adam, [p[0], 3.0]), TypeError, "params[1]: expected a"),
        (lambda p: OffloadedOptimizer(fs.Adam, [p[0], p[0]]), ValueError, "overlaps params["),
        (lambda p: OffloadedOptimizer(fs.Adam, [np.ones(3, int)]), TypeError, "params[0]: int64"),
        (lambda p: OffloadedOptimizer(fs.Adam, [p[0][:, ::2]]), ValueError, "params[0]: its elem"),
        (
            lambda p: OffloadedOptimizer(fs.Adam, [{"params": p, "nesterov": True}]),
            TypeError,
            "param_groups[0]: unknown hyper-parameter 'nesterov'",
        ),
        (lambda p: OffloadedOptimizer(fs.Adam, [{"lr": 1}]), TypeError, "param_groups[0]: expec"),
        (
            lambda p: OffloadedOptimizer(
                fs.Adam, [np.ones(2, np.float16)], master_weights="correction16"
            ),
            ValueError,
            "params[0]: float16",
        ),
    ],
)
def test_what_cannot_be_made_says_why(make, error, message):
    params = [np.ones((4, 6), np.float32)]
    with assert_unchanged(*params), pytest.raises(error, match=re.escape(message)):
        make(params)


def test_parameters_written_by_others_are_taken_over():
    plain, expected, ours, offloaded, _ = pair("adam", np.float32)
    for _ in range(2):
        for p in (plain[4], ours[4]):
            p *= np.float32(0.5)
        offloaded.refresh()
        offloaded.step(GOOD)
        expected.step(GOOD)
    assert bits(ours) == bits(plain)


def test_a_state_that_does_not_fit_changes_nothing():
    _, _, _, offloaded, _ = pair("adam", np.float32)
    offloaded.step(GOOD)
    other = fs.GD(arrays(SHAPES, np.float32), momentum=0.5)
    other.step(GOOD)
    held = everything(offloaded)
    with assert_unchanged(*held), pytest.raises(ValueError, match="state_dict"):
        offloaded.load_state_dict(other.state_dict())
    offloaded.step(GOOD)


def test_no_copy_of_the_optimizer_is_made():
    optimizer = OffloadedOptimizer(fs.GD, np.ones(3, np.float32))
    for make in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"save\(\) and load\(\)"):
            make(optimizer)


def test_rounding_is_warned_of_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        OffloadedOptimizer(fs.Adam, {"w": np.ones(3, BFLOAT16)})
    (warning,) = caught
    assert "params['w']" in str(warning.message)


def test_loss_scaler_drives_it():
    plain, expected, ours, offloaded, _ = pair("adam", np.float32)
    for optimizer in (expected, offloaded):
        scaler = fs.LossScaler(init_scale=4.0)
        for factor in (4.0, np.inf, 2.0):
            scaler.step(
                optimizer, [np.asarray(np.float32(factor) * g) for g in GOOD], clip_norm=1.0
            )
    assert bits(ours) == bits(plain)
    assert offloaded.state[0]["step"] == 2


def test_the_host_is_a_device():
    plain, expected, _, _, _ = pair("adamw", np.float32)
    ours = arrays(SHAPES, np.float32)
    optimizer, hyper = RULES["adamw"]
    offloaded = OffloadedOptimizer(optimizer, ours, **hyper)
    assert isinstance(offloaded._params.device, HostDevice)
    for t in range(3):
        grads = arrays(SHAPES, np.float32, t)
        expected.step(grads)
        offloaded.step(grads)
    assert bits(ours) == bits(plain)
