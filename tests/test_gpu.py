"""On a GPU: the bits of the CPU, on the current stream, without waiting. ``pytest -m gpu``."""

import copy
import importlib
import os
import pickle
import warnings
from itertools import product

import numpy as np
import pytest
from helpers import GD_CHOICES, combinations, describe

import fusedstep as fs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:::cupy"),
    # CuPy 14 has another way, which CuPy 13 does not know.
    pytest.mark.filterwarnings("ignore:ExternalStream is deprecated:DeprecationWarning"),
]

ADAM = ("exp_avg", "exp_avg_sq")
ADAM_CHOICES = {
    "betas": ((0.9, 0.999), (0.3, 0.0)),
    "weight_decay": (0.0, 0.1),
    "bias_correction": (True, False),
    "maximize": (False, True),
}
# function, state, options
RULES = {
    "gd": ("gd_step", (), {"weight_decay": 0.01}),
    "momentum": ("gd_step", ("momentum_buffer",), {"momentum": 0.9, "dampening": 0.1}),
    "nesterov": ("gd_step", ("momentum_buffer",), {"momentum": 0.9, "nesterov": True}),
    "adam": ("adam_step", ADAM, {"weight_decay": 0.01, "grad_scale": 0.3}),
    "adamw": ("adamw_step", ADAM, {"maximize": True}),
    "amsgrad": ("adam_step", (*ADAM, "max_exp_avg_sq"), {"bias_correction": False}),
}
every_rule = pytest.mark.parametrize("rule", RULES)
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture(scope="module")
def cupy():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no CUDA toolkit
            module = importlib.import_module("cupy")
        importlib.import_module("fusedstep._cuda")
        count = module.cuda.runtime.getDeviceCount()
    except Exception as error:  # no CuPy, no backend in this build, no driver
        count, reason = 0, f"{type(error).__name__}: {error}"
    else:
        reason = "no GPU"
    if count == 0:
        # `dev.py gpu` is not to report success for tests that did not run.
        (pytest.fail if os.environ.get("FUSEDSTEP_NEEDS_GPU") else pytest.skip)(reason)
    if os.environ.get("FUSEDSTEP_NO_MEMORY_POOL"):
        # Else compute-sanitizer takes an access past an array's end for one to the pool's memory.
        module.cuda.set_allocator(None)
    return module


@pytest.fixture
def busy(cupy):
    """Return a function that makes the current stream wait until the gate it returns is set."""
    kernel = cupy.RawKernel(
        r'extern "C" __global__ void busy(volatile int* gate) { while (*gate == 0) {} }', "busy"
    )
    gates = []

    def hold():
        memory = cupy.cuda.alloc_pinned_memory(4)
        gate = np.frombuffer(memory, np.int32, 1)
        gate[0] = 0
        gates.append((memory, gate))
        kernel((1,), (1,), (np.uintp(memory.ptr),))
        return gate

    cupy.cuda.Device().synchronize()
    yield hold
    for _, gate in gates:
        gate[0] = 1
    cupy.cuda.Device().synchronize()


def random_arrays(names, dtype, sizes, offset=0):
    """Return arrays of many magnitudes, denormals among them, `offset` longer than asked for."""
    rng = np.random.default_rng(0)
    least = -44 if dtype == np.float32 else -320
    result = {}
    with np.errstate(under="ignore"):
        for name in names:
            result[name] = []
            for size in sizes:
                n = int(size) + offset
                array = rng.standard_normal(n) * 10.0 ** rng.uniform(least, 10, n)
                result[name].append(
                    (np.abs(array) if name.endswith("_sq") else array).astype(dtype)
                )
    return result


def same_bits(host, device):
    """Whether two arrays are equal bit for bit; which NaN a NaN is does not matter."""
    got = device.get()
    word = np.uint32 if host.dtype == np.float32 else np.uint64
    return bool(np.all((host.view(word) == got.view(word)) | (np.isnan(host) & np.isnan(got))))


def step_both(cupy, function, arrays, view=lambda a: a, **options):
    """Step host arrays and copies on the GPU through the same views; compare all memory."""
    on_gpu = {name: [cupy.asarray(a) for a in owned] for name, owned in arrays.items()}
    with np.errstate(all="ignore"):
        for memory in (arrays, on_gpu):
            views = {name: [view(a) for a in owned] for name, owned in memory.items()}
            getattr(fs, function)(**views, **options)
    for name, owned in arrays.items():
        for i, (host, device) in enumerate(zip(owned, on_gpu[name], strict=True)):
            assert same_bits(host, device), f"{name}[{i}]"


def options_of(rule, step=3):
    _, state, options = RULES[rule]
    return {**options, **({"step": step} if state else {})}


@every_dtype
@pytest.mark.parametrize("options", combinations(**GD_CHOICES), ids=describe)
def test_every_option_of_gd(options, dtype, cupy):
    names = ("params", "grads", "momentum_buffer")
    for step in (1, 2):
        step_both(
            cupy, "gd_step", random_arrays(names, dtype, [5, 4099]), step=step, lr=0.3, **options
        )


@every_dtype
@pytest.mark.parametrize("options", combinations(**ADAM_CHOICES), ids=describe)
@pytest.mark.parametrize("function", ["adam_step", "adamw_step"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_every_option_of_adam(amsgrad, function, options, dtype, cupy):
    names = ("params", "grads", *ADAM, *(("max_exp_avg_sq",) if amsgrad else ()))
    for step, grad_scale in ((1, 1.0), (1000, 0.3)):
        step_both(
            cupy,
            function,
            random_arrays(names, dtype, [5, 4099]),
            step=step,
            grad_scale=grad_scale,
            **options,
        )


@pytest.mark.parametrize("offset", range(4))
@every_dtype
@every_rule
def test_odd_lengths_and_offsets(rule, dtype, offset, cupy):
    function, state, _ = RULES[rule]
    sizes = [1, 2, 3, 4, 5, 63, 4095, 4096, 4097, 100_003]
    arrays = random_arrays(("params", "grads", *state), dtype, sizes, offset)
    step_both(cupy, function, arrays, lambda a: a[offset:], **options_of(rule))


@every_dtype
@every_rule
def test_streams_that_lie_differently_against_their_boundaries(rule, dtype, cupy):
    function, state, _ = RULES[rule]
    names = ("params", "grads", *state)
    arrays = random_arrays(names, dtype, [10_001], 4)
    on_gpu = {name: [cupy.asarray(a) for a in owned] for name, owned in arrays.items()}
    for memory in (arrays, on_gpu):
        views = {n: [a[i % 4 :][:10_001] for a in memory[n]] for i, n in enumerate(names)}
        with np.errstate(all="ignore"):
            getattr(fs, function)(**views, **options_of(rule))
    for name in names:
        assert same_bits(arrays[name][0], on_gpu[name][0]), name


@every_dtype
@every_rule
def test_strided_views(rule, dtype, cupy):
    function, state, _ = RULES[rule]
    arrays = random_arrays(("params", "grads", *state), dtype, [60 * 70])

    def view(a):
        return a.reshape(60, 70)[::-2, 3::4]

    step_both(cupy, function, arrays, view, **options_of(rule))


@pytest.mark.parametrize("count", [1, 7, 1000, 5000])
@every_rule
def test_lists(rule, count, cupy):
    function, state, _ = RULES[rule]
    sizes = np.random.default_rng(count).integers(0, 200, count)
    arrays = random_arrays(("params", "grads", *state), np.float32, sizes)
    step_both(cupy, function, arrays, **options_of(rule))


@pytest.mark.parametrize(("count", "launches"), [(1, 1), (148, 1), (1361, 1), (1362, 2)])
def test_a_list_is_one_launch(count, launches, cupy):
    backend = importlib.import_module("fusedstep._cuda")
    params, grads = ([cupy.ones(5, cupy.float32) for _ in range(count)] for _ in range(2))
    optimizer = fs.Adam(params)
    before = backend.launch_count()
    optimizer.step(grads)
    assert backend.launch_count() - before == launches


def test_a_list_of_mixed_types_and_steps(cupy):
    names = ("params", "grads", *ADAM)
    single = random_arrays(names, np.float32, [5, 1000, 3])
    double = random_arrays(names, np.float64, [7, 999])
    arrays = {name: single[name] + double[name] for name in names}
    step_both(cupy, "adam_step", arrays, step=[1, 2, 3, 4, 1000])


def test_a_tensor_of_more_than_2_to_the_31_elements(cupy):
    size = 2**31 + 12_345
    free = cupy.cuda.runtime.memGetInfo()[0]
    if free < 2.5 * 4 * size:
        pytest.skip(f"needs {10 * size >> 30} GiB of GPU memory, {free >> 30} are free")
    params = cupy.ones(size, cupy.float32)
    grads = cupy.ones(size, cupy.float32)
    fs.gd_step(params, grads, lr=0.25)
    # The beginning, both sides of 2^31, and the end, then all of it.
    for at in (0, 2**31 - 1, 2**31, 2**31 + 1, size - 1):
        assert float(params[at]) == 0.75
    assert float(params.min()) == float(params.max()) == 0.75
    del params, grads
    cupy.get_default_memory_pool().free_all_blocks()


@pytest.mark.parametrize("null", [True, False], ids=["default stream", "own stream"])
def test_the_result_does_not_depend_on_the_stream(null, cupy):
    arrays = random_arrays(("params", "grads", *ADAM), np.float32, [100_003])
    stream = cupy.cuda.Stream.null if null else cupy.cuda.Stream(non_blocking=True)
    with stream:
        step_both(cupy, "adam_step", arrays, step=2)


def test_a_step_runs_on_the_current_stream_and_waits_for_nothing(cupy, busy):
    arrays = {name: cupy.ones(1000, cupy.float32) for name in ("params", "grads", *ADAM)}
    optimizer = fs.Adam(cupy.ones(1000, cupy.float32))
    grads = cupy.ones(1000, cupy.float32)
    fs.adam_step(**arrays, step=1)  # the kernels are loaded, which waits
    optimizer.step(grads)
    cupy.cuda.Device().synchronize()
    stream, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with stream:
        gate = busy()
        fs.adam_step(**arrays, step=2)
        optimizer.step(grads)
        queued = stream.record()
    with other:  # a step on another stream overtakes it
        fs.adam_step(**{name: cupy.ones(10, cupy.float32) for name in arrays}, step=1)
    other.synchronize()
    assert not queued.done, "the step waited, or ran on another stream"
    gate[0] = 1
    stream.synchronize()
    assert queued.done


def test_a_step_allocates_nothing_on_the_gpu(cupy):
    params = [cupy.ones(100, cupy.float32) for _ in range(2000)]
    grads = [cupy.ones(100, cupy.float32) for _ in range(2000)]
    optimizer = fs.Adam(params)
    optimizer.step(grads)
    cupy.cuda.Device().synchronize()
    before = cupy.cuda.runtime.memGetInfo()[0], cupy.get_default_memory_pool().used_bytes()
    for _ in range(20):
        optimizer.step(grads)
    cupy.cuda.Device().synchronize()
    after = cupy.cuda.runtime.memGetInfo()[0], cupy.get_default_memory_pool().used_bytes()
    assert before == after


def captured(cupy, stream, work):
    with stream:
        stream.begin_capture()
        work()
        graph = stream.end_capture()
    return graph


def test_a_captured_function_repeats_its_step(cupy):
    arrays = random_arrays(("params", "grads", *ADAM), np.float32, [1000])
    on_gpu = {name: cupy.asarray(a) for name, (a,) in arrays.items()}
    start = {name: a.copy() for name, a in on_gpu.items()}
    fs.adam_step(**on_gpu, step=2)  # the kernels are loaded before the capture
    for name, a in start.items():
        on_gpu[name][...] = a
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    graph = captured(cupy, stream, lambda: fs.adam_step(**on_gpu, step=2))
    for _ in range(2):
        graph.launch(stream)
    stream.synchronize()
    with np.errstate(all="ignore"):
        for _ in range(2):
            fs.adam_step(**{name: a for name, (a,) in arrays.items()}, step=2)
    for name in ("params", *ADAM):
        assert same_bits(arrays[name][0], on_gpu[name]), name


KINDS = {
    "gd": (fs.GD, {"weight_decay": 0.1}),
    "momentum": (fs.GD, {"momentum": 0.9, "dampening": 0.3}),
    "adam": (fs.Adam, {"betas": (0.3, 0.95)}),
    "adamw": (fs.AdamW, {"maximize": True}),
    "amsgrad": (fs.Adam, {"amsgrad": True}),
}


@pytest.mark.parametrize("rate", ["number", "float32", "float64"])
@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_optimizer_takes_a_new_step_at_each_replay(kind, dtype, rate, cupy):
    make, options = KINDS[kind]
    host = [np.linspace(-1, 1, n).astype(dtype) for n in (1000, 7)]
    params = [cupy.asarray(a) for a in host]
    grads = [cupy.ones_like(p) for p in params]
    lr = 0.25 if rate == "number" else cupy.full(1, 0.25, rate)
    ours = make(params, lr=lr, capturable=True, **options)
    theirs = make(host, lr=0.25, **options)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    graph = captured(cupy, stream, lambda: ours.step(grads))  # with no step before: nothing ran
    for t in range(1, 6):
        with stream:
            for g in grads:
                g.fill(t / 10)
            if rate != "number":
                lr.fill(0.5 / t)
                theirs.param_groups[0]["lr"] = float(np.dtype(rate).type(0.5 / t))
            graph.launch(stream)
        stream.synchronize()
        theirs.step([np.full_like(a, t / 10) for a in host])
        for i, (a, p) in enumerate(zip(host, params, strict=True)):
            assert same_bits(a, p), f"step {t}, params[{i}]"
    assert ours.state[0]["step"] == 5


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_steps_as_on_the_cpu_and_resumes(kind, capturable, cupy, tmp_path):
    make, options = KINDS[kind]
    host = [np.linspace(-1, 1, n).astype(np.float32).reshape(-1, 2) for n in (1000, 8)]
    params = [cupy.asarray(a) for a in host]
    ours, theirs = make(params, capturable=capturable, **options), make(host, **options)

    def step():
        ours.step([cupy.full_like(p, 0.3) for p in params])
        theirs.step([np.full_like(a, 0.3) for a in host])

    step()
    twin = pickle.loads(pickle.dumps(ours))
    deep = copy.deepcopy(ours)
    ours.save(tmp_path / "state.safetensors")
    step()
    for other in (twin, deep):
        other.step([cupy.full_like(p, 0.3) for p in params])
        for a, p in zip(host, other.param_groups[0]["params"], strict=True):
            assert same_bits(a, p)
    ours.load(tmp_path / "state.safetensors")
    assert ours.state[0]["step"] == 1


def test_state_moves_between_cpu_and_gpu(cupy):
    on_cpu = fs.Adam(np.ones(5, np.float32))
    on_cpu.step(np.ones(5, np.float32))
    on_gpu = fs.Adam(cupy.asarray(on_cpu.param_groups[0]["params"][0]))
    on_gpu.load_state_dict(on_cpu.state_dict())
    on_cpu.step(np.ones(5, np.float32))
    on_gpu.step(cupy.ones(5, cupy.float32))
    back = fs.Adam(np.ones(5, np.float32))
    back.load_state_dict(on_gpu.state_dict())
    assert back.state[0]["step"] == 2
    for key in ADAM:
        assert back.state[0][key].tobytes() == on_cpu.state[0][key].tobytes()


@pytest.fixture
def torch(cupy):
    module = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not module.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return module


@every_dtype
def test_torch_tensors(dtype, torch):
    host = np.linspace(-1, 1, 1001).astype(dtype)
    tensor = torch.tensor(host, device="cuda")
    ours, theirs = fs.Adam(tensor), fs.Adam(host)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(3):
            ours.step(torch.full_like(tensor, 0.3))
            theirs.step(np.full_like(host, 0.3))
    stream.synchronize()
    assert tensor.cpu().numpy().tobytes() == host.tobytes()


def test_torch_runs_on_its_current_stream(torch, cupy, busy):
    tensor, grad = torch.ones(10, device="cuda"), torch.ones(10, device="cuda")
    fs.gd_step(tensor, grad)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), cupy.cuda.ExternalStream(stream.cuda_stream):
        gate = busy()
        fs.gd_step(tensor, grad)
        queued = stream.record_event()
    assert not queued.query()
    gate[0] = 1
    stream.synchronize()


def test_two_libraries_on_one_stream(torch, cupy):
    params, grads = cupy.ones(5, cupy.float32), torch.ones(5, device="cuda")
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        fs.gd_step(params, grads, lr=0.25)
    torch.cuda.synchronize()
    assert params.get().tolist() == [0.75] * 5


def test_errors_change_nothing_and_leave_the_gpu_usable(cupy):
    params, grads = cupy.ones(5, cupy.float32), cupy.ones(5, cupy.float32)
    for bad in (np.ones(5, np.float32), cupy.ones(4, cupy.float32), cupy.ones(5), params):
        with pytest.raises((TypeError, ValueError)):
            fs.gd_step(params, bad)
    assert params.get().tolist() == [1.0] * 5
    fs.gd_step(params, grads, lr=0.25)
    assert params.get().tolist() == [0.75] * 5


def test_arrays_on_two_gpus_are_refused_by_name(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU only")
    arrays = []
    for device, name in product((0, 1), ("params", "grads")):
        with cupy.cuda.Device(device):
            arrays.append((name, cupy.ones(5, cupy.float32)))
    params, grads = ([a for n, a in arrays if n == name] for name in ("params", "grads"))
    with pytest.raises(ValueError, match=r"params\[1\]: on GPU 1, but params\[0\] is on GPU 0"):
        fs.gd_step(params, grads)
    with cupy.cuda.Device(0):  # another GPU's arrays, whatever is current
        fs.gd_step(params[1], grads[1], lr=0.25)
        assert cupy.cuda.Device().id == 0
    assert params[1].get().tolist() == [0.75] * 5


def test_info_names_the_gpu_and_what_it_runs(cupy):
    from fusedstep.commands.info import collect

    cuda = collect()["backends"]["cuda"]
    assert "available" in cuda
    assert "driver for CUDA" in cuda
    assert "machine code" in cuda or "PTX" in cuda
