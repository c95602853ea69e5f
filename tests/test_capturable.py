"""Steps that are counted on the GPU, run on the host: the bits of those that the CPU counts."""

import copy
import pickle
import re
import sys

import numpy as np
import pytest
from fake_gpu import CupyArray, float32

import fusedstep as fs

pytest_plugins = ["cuda_on_host"]

KINDS = {
    "gd": (fs.GD, {"weight_decay": 0.1}),
    "momentum": (fs.GD, {"momentum": 0.9, "dampening": 0.3}),
    "nesterov": (fs.GD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (fs.Adam, {"weight_decay": 0.1, "betas": (0.3, 0.95)}),
    "adamw": (fs.AdamW, {"maximize": True}),
    "amsgrad": (fs.Adam, {"amsgrad": True}),
    "uncorrected": (fs.Adam, {"bias_correction": False}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def scalar(value, dtype=np.float64):
    return CupyArray(np.array([value], dtype))


@every_dtype
@every_kind
def test_steps_have_the_bits_of_the_cpu(kind, dtype, gpu):
    make, options = KINDS[kind]
    memory = [float32(5).astype(dtype), float32(3, 2).astype(dtype)]
    expected = [a.copy() for a in memory]
    ours = make([CupyArray(a) for a in memory], lr=0.25, capturable=True, **options)
    theirs = make(expected, lr=0.25, **options)
    for t in range(1, 6):
        grads = [np.full_like(a, t / 10) for a in memory]
        ours.step([CupyArray(g) for g in grads], grad_scale=0.5)
        theirs.step(grads, grad_scale=0.5)
        assert [a.tobytes() for a in memory] == [a.tobytes() for a in expected]
    assert ours.state[1]["step"] == 5
    for key, array in theirs.state[0].items():
        if key != "step":
            assert ours.state[0][key].host.tobytes() == array.tobytes()


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.9, 0.999, 1 - 1e-9])
def test_scalars_of_late_steps_have_the_bits_of_the_cpu(beta, gpu):
    for step in (1, 2, 3, 1000, 12345678, 2**40 + 1):
        memory = float32(3)
        expected = memory.copy()
        ours = fs.Adam(CupyArray(memory), betas=(beta, beta), capturable=True)
        theirs = fs.Adam(expected, betas=(beta, beta))
        for optimizer in (ours, theirs):
            saved = optimizer.state_dict()
            saved["state"][0] = {**saved["state"][0], "step": step - 1}
            optimizer.load_state_dict(saved)
        ours.step(CupyArray(float32(3)))
        theirs.step(float32(3))
        assert memory.tobytes() == expected.tobytes()
        assert ours.state[0]["step"] == step


@every_dtype
def test_lr_is_read_where_the_step_runs(dtype, gpu):
    memory = float32(3)
    expected = memory.copy()
    lr = scalar(0.5, dtype)
    ours = fs.Adam(CupyArray(memory), lr=lr, capturable=True)
    theirs = fs.Adam(expected)
    for value in (0.5, 0.125, 0.1):
        lr.host[:] = value
        theirs.param_groups[0]["lr"] = float(lr.host[0])
        ours.step(CupyArray(float32(3)))
        theirs.step(float32(3))
        assert memory.tobytes() == expected.tobytes()


def test_each_group_has_its_count_and_one_launch_takes_all(gpu):
    first, second = float32(3), float32(4)
    expected = [first.copy(), second.copy()]
    ours = fs.Adam([{"params": CupyArray(first), "lr": 0.5}], capturable=True)
    theirs = fs.Adam([{"params": expected[0], "lr": 0.5}])
    for optimizer, wrap in ((ours, CupyArray), (theirs, np.asarray)):
        optimizer.step([wrap(float32(3))])
        optimizer.add_param_group({"params": wrap(second if optimizer is ours else expected[1])})
    launches, begun = gpu.launch_count(), gpu.begun_count()
    for optimizer, wrap in ((ours, CupyArray), (theirs, np.asarray)):
        optimizer.step([wrap(float32(3)), wrap(float32(4))])
    assert gpu.launch_count() - launches == 1
    assert gpu.begun_count() - begun == 2
    assert [s["step"] for s in ours.state.values()] == [2, 1]
    assert [first.tobytes(), second.tobytes()] == [a.tobytes() for a in expected]


def test_making_the_optimizer_loads_its_kernels(gpu):
    before = gpu.loaded_count()
    fs.Adam([CupyArray(float32(3)), CupyArray(float32(3))], capturable=True)
    assert gpu.loaded_count() > before


def refused(error, message, optimizer, *arguments):
    before = [array.host.tobytes() for array in optimizer.param_groups[0]["params"]]
    with pytest.raises(error, match=re.escape(message)):
        optimizer.step(*arguments)
    assert before == [array.host.tobytes() for array in optimizer.param_groups[0]["params"]]
    assert optimizer.state[0]["step"] == 0


def test_what_cannot_be_captured_is_refused(gpu):
    params = [CupyArray(float32(3)), CupyArray(float32(3))]
    grads = [CupyArray(float32(3)), CupyArray(float32(3))]
    optimizer = fs.Adam(params, capturable=True)
    refused(ValueError, "grads[1]: None, but capturable=True", optimizer, [grads[0], None])
    for lr, error, message in (
        (lambda t: 0.1, TypeError, "lr: expected a number, got function"),
        (scalar(0.1, np.float16), TypeError, "lr: float16; a GPU array is to be"),
        (CupyArray(np.zeros(2)), ValueError, "lr: shape (2,); a GPU array is to have one element"),
        (CupyArray(np.zeros(9, np.uint8)[1:].view(float)), ValueError, "lr: not aligned"),
        (CupyArray(np.zeros(1), 1), ValueError, "lr: on GPU 1, but params[0] is on GPU 0"),
        (-1.0, ValueError, "lr: expected a finite number >= 0"),
    ):
        optimizer.param_groups[0]["lr"] = lr
        refused(error, message, optimizer, grads)
    with pytest.raises(TypeError, match="lr: a callable needs the number of the step"):
        fs.Adam(params, lr=lambda t: 0.1, capturable=True)
    with pytest.raises(ValueError, match=r"params: in host memory, but capturable=True"):
        fs.Adam(float32(3), capturable=True)
    with pytest.raises(TypeError, match="capturable: expected True or False, got int"):
        fs.Adam(params, capturable=1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (fs.GD, {"lr": 1e300}, "lr: 1e+300 is too large for float32"),
        (fs.Adam, {"eps": 1e300}, "eps: 1e+300 is too large for float32"),
        (fs.Adam, {"lr": 1e38}, "lr: lr / (1 - beta1 ** step) is too large for float32"),
        (fs.AdamW, {"weight_decay": 1e300}, "weight_decay: 1e+300 is too large for float32"),
    ],
)
def test_numbers_that_float32_cannot_hold_are_refused(kind, options, message, gpu):
    begun = gpu.begun_count()
    optimizer = kind([CupyArray(float32(3))], capturable=True, **options)
    refused(ValueError, message, optimizer, [CupyArray(float32(3))])
    assert gpu.begun_count() == begun


@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize("skipped", [False, True])
def test_a_step_that_cannot_be_launched_is_not_counted(skipped, failing, gpu):
    memory = [float32(5), float32(4)]
    expected = [a.copy() for a in memory]
    ours = fs.Adam([{"params": CupyArray(a)} for a in memory], capturable=True)
    theirs = fs.Adam([{"params": a} for a in expected])
    grads = [float32(5), float32(4)]
    for optimizer, wrap in ((ours, CupyArray), (theirs, np.asarray)):
        optimizer.step([wrap(g) for g in grads])
    options = {"skip_nonfinite": True} if skipped else {}
    bad = [np.full_like(g, np.inf) if skipped else g for g in grads]
    gpu.set_launches_to_failure(failing)  # of the two groups' counts and the step itself
    with pytest.raises(RuntimeError, match="launch failed"):
        ours.step([CupyArray(g) for g in bad], **options)
    assert [s["step"] for s in ours.state.values()] == [1, 1]
    assert [a.tobytes() for a in memory] == [a.tobytes() for a in expected]
    for optimizer, wrap in ((ours, CupyArray), (theirs, np.asarray)):
        optimizer.step([wrap(g) for g in grads])
    assert [s["step"] for s in ours.state.values()] == [2, 2]
    assert [a.tobytes() for a in memory] == [a.tobytes() for a in expected]


def test_an_lr_on_the_gpu_stays_where_a_callable_was_saved(gpu):
    plain = fs.Adam(float32(3), lr=lambda t: 0.1)
    plain.step(float32(3))
    lr = scalar(0.5)
    optimizer = fs.Adam(CupyArray(float32(3)), lr=lr, capturable=True)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.host[0] == 0.5
    assert optimizer.state[0]["step"] == 1


def test_counts_that_differ_within_a_group_are_refused(gpu):
    plain = fs.Adam([float32(3), float32(3)])
    plain.step([float32(3), None])
    optimizer = fs.Adam([CupyArray(float32(3)), CupyArray(float32(3))], capturable=True)
    with pytest.raises(ValueError, match="step counts from 0 to 1, but capturable=True has one"):
        optimizer.load_state_dict(plain.state_dict())


def pickled(optimizer, make):
    return pickle.loads(pickle.dumps(optimizer))


def copied(optimizer, make):
    return copy.deepcopy(optimizer)


def saved(optimizer, make):
    new = make()
    for target, own in zip(
        new.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True
    ):
        target.host[...] = own.host
    new.load_state_dict(optimizer.state_dict())
    return new


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("way", [pickled, copied, saved])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(way, capturable, gpu, monkeypatch):
    def make():
        params = [CupyArray(float32(5)), CupyArray(float32(3, 2))]
        return fs.Adam(params, amsgrad=True, capturable=capturable)

    def reduce(array):
        return CupyArray, (array.host.copy(), array.data.device_id)

    monkeypatch.setattr(CupyArray, "__reduce__", reduce, raising=False)
    # pickle looks the class up by its name
    monkeypatch.setattr(sys.modules["cupy"], "ndarray", CupyArray)
    grads = [CupyArray(float32(5)), CupyArray(float32(3, 2))]
    unbroken = make()
    unbroken.step(grads)
    resumed = way(unbroken, make)
    for optimizer in (unbroken, resumed):
        optimizer.step(grads)
        optimizer.step(grads)
    assert resumed.capturable == capturable
    for own, other in zip(unbroken.state.values(), resumed.state.values(), strict=True):
        assert own["step"] == other["step"] == 3
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert own[key].host.tobytes() == other[key].host.tobytes()
            assert own[key] is not other[key]
    for own, other in zip(*(o.param_groups[0]["params"] for o in (unbroken, resumed)), strict=True):
        assert own.host.tobytes() == other.host.tobytes()
        assert own is not other


@pytest.mark.parametrize("capturable", [False, True])
def test_a_file_goes_from_gpu_to_cpu_and_back(capturable, gpu, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "state.safetensors"
    lr = scalar(0.5) if capturable else 0.5
    first = fs.Adam([CupyArray(float32(5))], lr=lr, capturable=capturable)
    first.step([CupyArray(float32(5))])
    first.save(path)
    on_cpu = fs.Adam([float32(5)])
    on_cpu.load(path)
    assert on_cpu.param_groups[0]["lr"] == 0.5
    assert on_cpu.state[0]["step"] == 1
    assert on_cpu.state[0]["exp_avg"].tobytes() == first.state[0]["exp_avg"].host.tobytes()
    on_cpu.step([float32(5)])
    on_cpu.param_groups[0]["lr"] = 0.25
    on_cpu.save(path)
    first.load(path)
    assert first.state[0]["step"] == 2
    assert first.state[0]["exp_avg"].host.tobytes() == on_cpu.state[0]["exp_avg"].tobytes()
    if capturable:  # in place, where a graph reads it
        assert first.param_groups[0]["lr"] is lr
        assert lr.host[0] == 0.25
    else:
        assert first.param_groups[0]["lr"] == 0.25
