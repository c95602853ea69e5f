"""On a GPU: narrow arrays, clipping, skipping and zeroing, as on the CPU. ``pytest -m gpu``."""

import copy
import math
import pickle

import numpy as np
import pytest
from test_cuda_formats import DTYPES, PARAMETERS, RULES, SIZES, STATE, VIEWS, draw, same_bits
from test_gpu import busy, captured, cupy, torch  # noqa: F401 (fixtures)

import fusedstep as fs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:::cupy"),
    pytest.mark.filterwarnings("ignore:params"),
]


class Pair:
    """Optimizers of the same parameters in host memory and on a GPU, and the memory of those."""

    def __init__(self, cupy, make, dtype, view="dense", sizes=SIZES, **options):  # noqa: F811
        self.cupy, self.view = cupy, VIEWS[view]
        self.rng = np.random.default_rng(0)
        self.cpu = [draw(self.rng, 2 * size, dtype) for size in sizes]
        self.gpu = [self.on_gpu_memory(a) for a in self.cpu]
        capturable = options.pop("capturable", False)
        self.on_cpu = make([self.view(a) for a in self.cpu], lr=0.01, seed=9, **options)
        self.on_gpu = make(
            [self.view(a) for a in self.gpu], lr=0.01, seed=9, capturable=capturable, **options
        )

    def on_gpu_memory(self, array):
        """Return a copy on the GPU; bfloat16 travels as its bits."""
        word = f"u{array.dtype.itemsize}"
        return self.cupy.asarray(array.view(word)).view(array.dtype)

    def gradients(self, dtype, bad=None):
        memory = [draw(self.rng, a.size, dtype) for a in self.cpu]
        for g in memory:
            g[np.isinf(g.astype(np.float64))] = 1
        if bad is not None:
            memory[-1][4] = bad  # in every view
        return memory, [self.on_gpu_memory(g) for g in memory]

    def step(self, dtype, bad=None, view=None, **options):
        host, device = self.gradients(dtype, bad)
        view = self.view if view is None else VIEWS[view]
        with np.errstate(all="ignore"):
            infos = (
                self.on_cpu.step([view(g) for g in host], **options),
                self.on_gpu.step([view(g) for g in device], **options),
            )
        self.check()
        for i, (a, b) in enumerate(zip(host, device, strict=True)):
            assert same_bits(a, b.get()), f"grads[{i}]"
        return infos

    def check(self):
        for i, (a, b) in enumerate(zip(self.cpu, self.gpu, strict=True)):
            assert same_bits(a, b.get()), f"params[{i}]"
        for i, state in self.on_cpu.state.items():
            own = self.on_gpu.state[i]
            assert own["step"] == state["step"]
            for key, array in state.items():
                if key != "step":
                    assert same_bits(array, own[key].get()), f"state[{i}][{key!r}]"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_dtype", STATE)
@pytest.mark.parametrize(("dtype", "master_weights"), PARAMETERS)
def test_narrow_arrays(dtype, master_weights, state_dtype, rule, cupy):  # noqa: F811
    make, options = RULES[rule]
    options = {**options, "master_weights": master_weights, "state_dtype": state_dtype}
    for number, view in enumerate(VIEWS):
        capturable = number % 2 == 1
        pair = Pair(cupy, make, DTYPES[dtype], view, capturable=capturable, **options)
        for grad in DTYPES.values():
            pair.step(grad)


@pytest.mark.parametrize("views", [("dense", "odd offset"), ("odd offset", "dense")], ids=str)
@pytest.mark.parametrize("state_dtype", STATE)
@pytest.mark.parametrize(("dtype", "master_weights"), PARAMETERS)
def test_gradients_that_lie_differently(dtype, master_weights, state_dtype, views, cupy):  # noqa: F811
    options = {"state_dtype": state_dtype, "master_weights": master_weights}
    pair = Pair(cupy, fs.Adam, DTYPES[dtype], views[0], **options)
    for _ in range(2):
        pair.step(DTYPES[dtype], view=views[1], zero_grad=True)


OPTIONS = {
    "clip": {"clip_norm": 1.0},
    "zero": {"zero_grad": True},
    "skip": {"skip_nonfinite": True},
    "all": {"clip_norm": 1.0, "skip_nonfinite": True, "zero_grad": True, "grad_scale": 0.7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("rule", RULES)
def test_clipping_skipping_and_zeroing(rule, dtype, view, options, cupy):  # noqa: F811
    make, kind = RULES[rule]
    storage = {"master_weights": "float32"} if dtype == "float16" else {}
    sizes = (6, 70, 4096, 4097, 50_001)
    pair = Pair(cupy, make, np.dtype(dtype), view, sizes, capturable=True, **kind, **storage)
    skips = "skip_nonfinite" in options
    for bad in (None, np.inf if skips else None, None):
        infos = pair.step(np.dtype(dtype), bad, **options)
        assert infos[0] == infos[1]
        assert infos[1].skipped == (bad is not None)


@pytest.mark.parametrize("count", [1, 33, 148, 5000])
def test_the_norm_of_a_list(count, cupy):  # noqa: F811
    sizes = [int(n) for n in np.random.default_rng(count).integers(1, 200, count)]
    pair = Pair(cupy, fs.GD, np.dtype(np.float32), sizes=sizes)
    infos = pair.step(np.dtype(np.float32), clip_norm=1.0)
    assert infos[0] == infos[1]


@pytest.mark.parametrize("count", [1, 7, 1000, 5000])
def test_lists_of_narrow_arrays(count, cupy):  # noqa: F811
    sizes = [int(n) for n in np.random.default_rng(count).integers(0, 200, count)]
    pair = Pair(
        cupy, fs.Adam, DTYPES["bfloat16"], sizes=sizes,
        state_dtype="8bit", master_weights="correction8",
    )  # fmt: skip
    pair.step(DTYPES["bfloat16"], clip_norm=1.0, zero_grad=True)


def test_narrow_arrays_of_more_than_2_to_the_31_elements(cupy):  # noqa: F811
    size = 2**31 + 12_345
    free = cupy.cuda.runtime.memGetInfo()[0]
    if free < 5 * size:
        pytest.skip(f"needs {5 * size >> 30} GiB of GPU memory, {free >> 30} are free")
    params, grads = cupy.ones(size, cupy.float16), cupy.ones(size, cupy.float16)
    info = fs.GD(params, lr=0.25).step(grads, clip_norm=1e6, zero_grad=True)
    assert info == (math.sqrt(size), False)
    assert float(params.min()) == float(params.max()) == 0.75
    assert float(grads.min()) == float(grads.max()) == 0
    del params, grads
    cupy.get_default_memory_pool().free_all_blocks()


def test_the_norm_of_a_long_array(cupy):  # noqa: F811
    grads = np.random.default_rng(0).standard_normal(50_000_003, dtype=np.float32)
    ours = fs.GD(cupy.zeros(grads.size, cupy.float32)).step(cupy.asarray(grads), clip_norm=1.0)
    assert ours == fs.GD(np.zeros_like(grads)).step(grads, clip_norm=1.0)


def test_a_step_with_a_norm_waits_for_nothing(cupy, busy):  # noqa: F811
    optimizer = fs.Adam(cupy.ones(100_000, cupy.float32), capturable=True)
    grads = cupy.ones(100_000, cupy.float32)
    options = {"clip_norm": 1.0, "skip_nonfinite": True, "zero_grad": True}
    optimizer.step(grads, **options)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        gate = busy()
        info = optimizer.step(grads, **options)
        queued = stream.record()
        assert not queued.done, "the step waited, or ran on another stream"
        gate[0] = 1
        assert info == (0.0, False)  # which waits: the gradient was zeroed


def test_a_step_with_a_norm_allocates_nothing_on_the_gpu(cupy):  # noqa: F811
    params = [cupy.ones(100, cupy.float32) for _ in range(2000)]
    grads = [cupy.ones(100, cupy.float32) for _ in range(2000)]
    optimizer = fs.Adam(params, capturable=True)
    for _ in range(2):
        info = optimizer.step(grads, clip_norm=1.0, skip_nonfinite=True)
    cupy.cuda.Device().synchronize()
    before = cupy.cuda.runtime.memGetInfo()[0], cupy.get_default_memory_pool().used_bytes()
    for _ in range(20):
        info = optimizer.step(grads, clip_norm=1.0, skip_nonfinite=True)
    cupy.cuda.Device().synchronize()
    after = cupy.cuda.runtime.memGetInfo()[0], cupy.get_default_memory_pool().used_bytes()
    assert before == after
    assert not info.skipped


@pytest.mark.parametrize("master_weights", ["stochastic", "correction8"])
def test_a_captured_step_skips_and_draws_anew_at_each_replay(master_weights, cupy):  # noqa: F811
    dtype = DTYPES["bfloat16"]
    pair = Pair(
        cupy, fs.Adam, dtype, sizes=(1000, 7), capturable=True,
        state_dtype="8bit", master_weights=master_weights,
    )  # fmt: skip
    options = {"clip_norm": 1.0, "skip_nonfinite": True, "zero_grad": True}
    device = pair.gradients(dtype)[1]
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    infos = []
    graph = captured(
        cupy,
        stream,
        lambda: infos.append(pair.on_gpu.step([pair.view(g) for g in device], **options)),
    )
    for bad in (None, np.inf, None, np.nan, None):
        host, fresh = pair.gradients(dtype, bad)
        with stream:
            for target, values in zip(device, fresh, strict=True):
                target.view(np.uint16)[...] = values.view(np.uint16)
            graph.launch(stream)
        stream.synchronize()
        with np.errstate(all="ignore"):
            skipped = pair.on_cpu.step([pair.view(g) for g in host], **options).skipped
        assert skipped == (bad is not None)
        with stream:  # what it reports is that of this replay
            assert infos[0].skipped == skipped
        pair.check()
    assert pair.on_gpu.state[0]["step"] == 3


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
@pytest.mark.parametrize(("dtype", "master_weights"), PARAMETERS)
def test_narrow_state_resumes(dtype, master_weights, state_dtype, cupy, tmp_path):  # noqa: F811
    pair = Pair(
        cupy, fs.Adam, DTYPES[dtype], sizes=(5, 200),
        state_dtype=state_dtype, master_weights=master_weights,
    )  # fmt: skip
    pair.step(DTYPES[dtype])
    old = pair.on_gpu
    old.save(tmp_path / "state.safetensors")
    for other in (pickle.loads(pickle.dumps(old)), copy.deepcopy(old)):
        for i, state in old.state.items():
            for key, array in state.items():
                if key != "step":
                    assert same_bits(array.get(), other.state[i][key].get()), key
    pair.on_gpu = fs.Adam(
        [pair.view(a) for a in pair.gpu], lr=0.01, seed=9,
        state_dtype=state_dtype, master_weights=master_weights,
    )  # fmt: skip
    pair.on_gpu.load(tmp_path / "state.safetensors")
    pair.check()
    pair.step(DTYPES[dtype])


@pytest.mark.parametrize("state_dtype", STATE)
@pytest.mark.parametrize(("dtype", "master_weights"), PARAMETERS)
def test_narrow_torch_tensors(dtype, master_weights, state_dtype, torch):  # noqa: F811
    rng = np.random.default_rng(0)
    host, grads = draw(rng, 1000, DTYPES[dtype]), draw(rng, 1000, DTYPES[dtype])

    def tensor(array):
        word = np.int16 if array.dtype.itemsize == 2 else np.int32
        return torch.tensor(array.view(word), device="cuda").view(getattr(torch, dtype))

    param = tensor(host)
    options = {"state_dtype": state_dtype, "master_weights": master_weights, "seed": 9}
    ours, theirs = (fs.Adam(p, capturable=p is param, **options) for p in (param, host))
    with np.errstate(all="ignore"):
        for _ in range(3):
            infos = [o.step(g, clip_norm=1.0) for o, g in ((ours, tensor(grads)), (theirs, grads))]
    assert infos[0] == infos[1] or np.isnan(infos[1].grad_norm)
    assert same_bits(fs.gpu.to_host(param), host)
    for key, array in theirs.state[0].items():
        if key != "step":
            assert same_bits(fs.gpu.to_host(ours.state[0][key]), array), key


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("state_dtype", STATE)
@pytest.mark.parametrize(("dtype", "master_weights"), PARAMETERS)
def test_torch_optimizers(dtype, master_weights, state_dtype, name, torch):  # noqa: F811
    import fusedstep.torch as fst

    kind = getattr(torch, dtype)
    values, grads = (torch.randn(1001, generator=torch.manual_seed(i)).to(kind) for i in range(2))
    options = {"momentum": 0.9} if name == "SGD" else {}
    options |= {"state_dtype": state_dtype, "master_weights": master_weights, "seed": 9}
    results = []
    for device in ("cpu", "cuda"):
        param = torch.nn.Parameter(values.clone().to(device)[1:])
        optimizer = getattr(fst, name)([param], lr=0.01, **options)
        for _ in range(3):
            param.grad = grads.to(device)[1:]
            optimizer.step()
        state = {k: v for k, v in optimizer.state[param].items() if isinstance(v, torch.Tensor)}
        tensors = {"param": param.detach(), **state}
        results.append({k: v.cpu().reshape(-1).view(torch.uint8) for k, v in tensors.items()})
    assert results[0].keys() == results[1].keys()
    for key, tensor in results[0].items():
        assert torch.equal(tensor, results[1][key]), key
