"""Narrow arrays on a GPU, whose kernels' source is run on the host: the bits of the CPU."""

import copy
import pickle
import sys
from itertools import product

import numpy as np
import pytest
from fake_gpu import CupyArray, DlpackArray, InterfaceArray, float32

import fusedstep as fs
from fusedstep.narrow import MASTER_WEIGHTS

pytest_plugins = ["cuda_on_host"]

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
bfloat16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": bfloat16, "float16": np.dtype(np.float16)}
STATE = (None, "bfloat16", "8bit")
PARAMETERS = [
    ("float32", None), ("bfloat16", None), ("float16", None), ("float16", "float32"),
    *(("bfloat16", master) for master in MASTER_WEIGHTS),
]  # fmt: skip
RULES = {
    "gd": (fs.GD, {"weight_decay": 0.1}),
    "nesterov": (fs.GD, {"momentum": 0.9, "nesterov": True}),
    "adam": (fs.Adam, {"maximize": True}),
    "adamw": (fs.AdamW, {}),
    "amsgrad": (fs.Adam, {"amsgrad": True}),
}
SIZES = (0, 1, 3, 63, 64, 65, 130, 1000, 4096, 9001)
# How a parameter lies in memory that is twice as long.
VIEWS = {
    "dense": lambda a: a[: a.size // 2],
    "odd offset": lambda a: a[1 : a.size // 2 + 1],
    "every second": lambda a: a[: a.size // 2 * 2 : 2],
    "reversed": lambda a: a[: a.size // 2][::-1],
    "rows": lambda a: a[: a.size // 2 // 6 * 12].reshape(6, -1)[:, ::2],
    "columns": lambda a: a[: a.size // 2 // 6 * 6].reshape(-1, 6).T,
}

pytestmark = pytest.mark.filterwarnings("ignore:params")


def draw(rng, size, dtype):
    with np.errstate(all="ignore"):
        values = rng.standard_normal(size) * 10.0 ** rng.uniform(-9, 4, size)
        values[rng.random(size) < 0.01] = 0
        values[rng.random(size) < 0.002] = np.inf
        return values.astype(dtype)


def same_bits(host, other):
    """Whether arrays have the same bits, but for which NaN a NaN is."""
    assert host.dtype == other.dtype
    with np.errstate(invalid="ignore"):
        nan = np.isnan(host.astype(np.float64)) & np.isnan(other.astype(np.float64))
    word = f"u{host.dtype.itemsize}"
    return bool(np.all((host.view(word) == other.view(word)) | nan))


def assert_same_state(on_gpu, on_cpu):
    for i, state in on_cpu.state.items():
        own = on_gpu.state[i]
        assert own.keys() == state.keys()
        assert own["step"] == state["step"]
        for key, array in state.items():
            if key != "step":
                assert same_bits(array, own[key].host), f"state[{i}][{key!r}]"


class Pair:
    """Optimizers of the same parameters in host memory and on a GPU, and the memory of those."""

    def __init__(self, make, dtype, view="dense", sizes=SIZES, seed=0, **options):
        self.rng = np.random.default_rng(seed)
        self.view = VIEWS[view]
        self.cpu = [draw(self.rng, 2 * size, dtype) for size in sizes]
        self.gpu = [a.copy() for a in self.cpu]
        capturable = options.pop("capturable", False)
        self.on_cpu = make([self.view(a) for a in self.cpu], lr=0.01, seed=9, **options)
        self.on_gpu = make(
            [CupyArray(self.view(a)) for a in self.gpu],
            lr=0.01, seed=9, capturable=capturable, **options,
        )  # fmt: skip

    def gradients(self, dtype, view=None):
        view = self.view if view is None else VIEWS[view]
        memory = [draw(self.rng, a.size, dtype) for a in self.cpu]
        return [view(g) for g in memory], [CupyArray(view(g.copy())) for g in memory]

    def step(self, dtype, view=None, **options):
        host, device = self.gradients(dtype, view)
        with np.errstate(all="ignore"):
            infos = self.on_cpu.step(host, **options), self.on_gpu.step(device, **options)
        for i, (a, b) in enumerate(zip(self.cpu, self.gpu, strict=True)):
            assert same_bits(a, b), f"params[{i}]"
        for i, (a, b) in enumerate(zip(host, device, strict=True)):
            assert same_bits(np.ascontiguousarray(a), np.ascontiguousarray(b.host)), f"grads[{i}]"
        assert_same_state(self.on_gpu, self.on_cpu)
        return infos


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_dtype", STATE)
@pytest.mark.parametrize(("dtype", "master_weights"), PARAMETERS)
def test_steps_have_the_bits_of_the_cpu(dtype, master_weights, state_dtype, rule, gpu):
    make, options = RULES[rule]
    options = {**options, "master_weights": master_weights, "state_dtype": state_dtype}
    for number, view in enumerate(VIEWS):
        gpu.set_most_blocks(1 + number)
        pair = Pair(make, DTYPES[dtype], view, seed=number, **options)
        for grad in DTYPES.values():
            pair.step(grad)


@pytest.mark.parametrize("rule", ["nesterov", "adam"])
@pytest.mark.parametrize("state_dtype", STATE)
@pytest.mark.parametrize(("dtype", "master_weights"), PARAMETERS)
def test_gradients_of_another_layout_have_the_bits_of_the_cpu(
    dtype, master_weights, state_dtype, rule, gpu
):
    make, options = RULES[rule]
    options = {**options, "master_weights": master_weights, "state_dtype": state_dtype}
    vectors = ("dense", "odd offset", "every second", "reversed")
    for own, view in product(("dense", "odd offset", "every second"), vectors):
        pair = Pair(make, DTYPES[dtype], own, **options)
        for grad in ("bfloat16", "float32"):
            pair.step(DTYPES[grad], view, zero_grad=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_dtype", STATE)
@pytest.mark.parametrize(("dtype", "master_weights"), PARAMETERS)
def test_a_step_that_the_gpu_counts_draws_the_same_random_bits(
    dtype, master_weights, state_dtype, rule, gpu
):
    make, options = RULES[rule]
    options = {**options, "master_weights": master_weights, "state_dtype": state_dtype}
    pair = Pair(make, DTYPES[dtype], sizes=(5, 200), capturable=True, **options)
    for grad in DTYPES.values():  # those of the parameter's type, and of another
        pair.step(grad)


@pytest.mark.parametrize("rule", ["nesterov", "adam", "amsgrad"])
@pytest.mark.parametrize(
    ("dtype", "master_weights"), [("float32", None), ("bfloat16", "correction8")]
)
def test_blocks_that_have_no_codes_have_the_bits_of_the_cpu(dtype, master_weights, rule, gpu):
    make, options = RULES[rule]
    options = {**options, "master_weights": master_weights, "state_dtype": "8bit"}
    grad = np.zeros(7 * 64 - 3, DTYPES[dtype])
    grad[64:128] = -0.0
    grad[[130, 200, 260, 330, 390]] = [1.0, 1e-38, 1e30, -np.inf, np.nan]
    param, other = np.ones_like(grad), np.ones_like(grad)
    on_cpu, on_gpu = make(param, **options), make(CupyArray(other), **options)
    with np.errstate(over="ignore"):
        for _ in range(2):
            on_cpu.step(grad)
            on_gpu.step(CupyArray(grad.copy()))
            assert same_bits(param, other)
            assert_same_state(on_gpu, on_cpu)
    units = next(array for key, array in on_cpu.state[0].items() if key.endswith("_units"))
    assert (units == 0).tolist() == [True, True, False, False, False, False, False]
    assert np.isnan(units).tolist() == [False, False, False, False, False, True, True]


def test_the_units_of_a_nan_are_nan(gpu):
    param = np.ones(200, np.float32)
    grad = np.ones(200, np.float32)
    grad[70] = np.nan
    optimizer = fs.Adam(CupyArray(param), state_dtype="8bit")
    optimizer.step(CupyArray(grad))
    for key in ("exp_avg", "exp_avg_sq"):
        units = optimizer.state[0][key + "_units"].host
        assert np.isnan(units).tolist() == [False, True, False, False]
        assert not optimizer.state[0][key].host[64:128].any()


@pytest.mark.parametrize(
    ("dtype", "options", "count", "launches"),
    [
        ("float32", {"state_dtype": "8bit"}, 815, 1),
        ("bfloat16", {"master_weights": "correction8", "state_dtype": "8bit"}, 815, 1),
        ("bfloat16", {"master_weights": "float32", "state_dtype": "bfloat16"}, 740, 1),
        ("bfloat16", {"master_weights": "float32", "state_dtype": "bfloat16"}, 741, 2),
    ],
)
def test_a_list_is_one_launch(dtype, options, count, launches, gpu):
    pair = Pair(fs.Adam, DTYPES[dtype], sizes=(70,) * count, **options)
    before = gpu.launch_count()
    pair.step(DTYPES[dtype])
    assert gpu.launch_count() - before == launches


def test_a_mixed_list_is_a_launch_for_each_way_of_storing(gpu):
    dtypes = (np.dtype(np.float32), bfloat16, np.dtype(np.float64))
    memory = [draw(np.random.default_rng(0), 100, dtype) for dtype in dtypes * 3]
    expected = [a.copy() for a in memory]
    ours, theirs = fs.Adam([CupyArray(a) for a in memory]), fs.Adam(expected)
    grads = [np.ones_like(a) for a in memory]
    before = gpu.launch_count()
    ours.step([CupyArray(g) for g in grads])
    assert gpu.launch_count() - before == 3
    theirs.step(grads)
    for a, b in zip(memory, expected, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("make", [CupyArray, DlpackArray, InterfaceArray])
def test_the_functions_take_narrow_arrays_of_every_library(make, gpu):
    for dtype in (np.float16, bfloat16):
        if dtype == bfloat16 and make is not CupyArray:
            continue  # NumPy exports it neither way
        param, grad = float32(100).astype(dtype), float32(100).astype(dtype)
        expected = param.copy()
        fs.gd_step(expected, grad, lr=0.1)
        fs.gd_step(make(param), make(grad), lr=0.1)
        assert same_bits(param, expected)


def test_an_interface_has_no_bfloat16(gpu):
    param = InterfaceArray(float32(3).astype(bfloat16))
    with pytest.raises(TypeError, match=r"^params: bfloat16 parameters are not supported"):
        fs.gd_step(param, param)


@pytest.mark.parametrize("code", [2, 4])
def test_16_bit_floats_of_dlpack_are_told_apart(code, gpu):
    dtype = bfloat16 if code == 4 else np.dtype(np.float16)
    values, grads = float32(100).astype(dtype), float32(100).astype(dtype)
    expected = values.copy()
    fs.gd_step(expected, grads, lr=0.1)
    half = [a.view(np.float16) for a in (values, grads)]  # what NumPy exports
    fs.gd_step(*(DlpackArray(a, code=code) for a in half), lr=0.1)
    assert same_bits(values, expected)


def test_dtypes_are_checked(gpu):
    param = CupyArray(float32(70))
    for grad in (np.float64, np.int8, np.uint16, ">f4"):
        with pytest.raises(TypeError, match=r"^grads: .*but its parameter is float32"):
            fs.Adam(param, state_dtype="8bit").step(CupyArray(np.ones(70, grad)))
    with pytest.raises(TypeError, match=r"state_dtype: '8bit' is for float32, .*is float64"):
        fs.Adam(CupyArray(np.ones(3)), state_dtype="8bit")
    with pytest.raises(TypeError, match=r"^exp_avg: int8, but its parameter is float32"):
        fs.adam_step(param, CupyArray(float32(70)), CupyArray(np.zeros(70, np.int8)),
                     CupyArray(np.zeros(70, np.float32)), step=1)  # fmt: skip


OPTIONS = {
    "8bit": ("float32", {"state_dtype": "8bit"}),
    "bfloat16": ("float32", {"state_dtype": "bfloat16"}),
    **{m: ("bfloat16", {"master_weights": m, "state_dtype": "8bit"}) for m in MASTER_WEIGHTS},
    "float16": ("float16", {"master_weights": "float32"}),
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
@pytest.mark.parametrize("kept", OPTIONS)
def test_narrow_state_is_saved_and_loaded(kept, way, capturable, gpu, tmp_path, monkeypatch):
    dtype, options = OPTIONS[kept]
    pair = Pair(fs.Adam, DTYPES[dtype], sizes=(5, 130), capturable=capturable, **options)
    pair.step(DTYPES[dtype])
    old = pair.on_gpu
    if way in ("pickle", "deepcopy"):
        monkeypatch.setattr(
            CupyArray, "__reduce__", lambda a: (CupyArray, (a.host.copy(),)), raising=False
        )
        monkeypatch.setattr(sys.modules["cupy"], "ndarray", CupyArray)
        pair.on_gpu = pickle.loads(pickle.dumps(old)) if way == "pickle" else copy.deepcopy(old)
        pair.gpu = [p.host for p in pair.on_gpu.param_groups[0]["params"]]
        pair.cpu = [a[: a.size // 2].copy() for a in pair.cpu]
        fresh = fs.Adam(pair.cpu, lr=0.01, seed=9, **options)
        fresh.load_state_dict(pair.on_cpu.state_dict())
        pair.on_cpu, pair.view = fresh, lambda a: a
    else:
        pair.on_gpu = fs.Adam(
            [CupyArray(pair.view(a)) for a in pair.gpu],
            lr=0.01, seed=9, capturable=capturable, **options,
        )  # fmt: skip
        if way == "file":
            pytest.importorskip("safetensors", reason="safetensors is not installed")
            old.save(tmp_path / "state")
            pair.on_gpu.load(tmp_path / "state")
        else:
            pair.on_gpu.load_state_dict(old.state_dict())
    assert_same_state(pair.on_gpu, pair.on_cpu)
    pair.step(DTYPES[dtype])


@pytest.mark.parametrize(
    ("options", "lead"),
    [
        ({"master_weights": "float32"}, 3),
        ({"master_weights": "correction16", "state_dtype": "bfloat16"}, 3),
        ({"master_weights": "correction8"}, 3),
        ({"master_weights": "correction8", "state_dtype": "8bit"}, 0),  # in blocks
        ({"master_weights": "stochastic", "state_dtype": "bfloat16"}, 0),
    ],
    ids=str,
)
def test_narrow_state_lies_as_its_parameter_where_that_is_in_no_blocks(options, lead, gpu):
    memory = np.zeros(200, bfloat16)
    first = 3 - memory.ctypes.data % 16 // 2 & 7
    optimizer = fs.Adam(CupyArray(memory[first : first + 150]), **options)
    for key, array in optimizer.state[0].items():
        if key != "step" and not key.endswith("units"):
            assert array.data.ptr % 16 == lead * array.dtype.itemsize % 16, key


@pytest.mark.parametrize(("saved", "own"), list(product((None, "bfloat16", "8bit"), repeat=2)))
def test_state_is_converted_as_on_the_cpu(saved, own, gpu):
    pair = Pair(fs.Adam, DTYPES["float32"], sizes=(5, 130), state_dtype=saved)
    pair.step(DTYPES["float32"])
    on_gpu = fs.Adam([CupyArray(pair.view(a)) for a in pair.gpu], state_dtype=own)
    on_cpu = fs.Adam([pair.view(a) for a in pair.cpu], state_dtype=own)
    with np.errstate(all="ignore"):
        on_gpu.load_state_dict(pair.on_gpu.state_dict())
        on_cpu.load_state_dict(pair.on_gpu.state_dict())  # from a GPU to the host
    assert_same_state(on_gpu, on_cpu)
