"""GPU arrays up to the launch: how they are read, what is refused, where a step runs."""

import ctypes
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from fake_gpu import Cupy, CupyArray, DlpackArray, InterfaceArray, float32

import fusedstep as fs
from fusedstep.commands import info

pytest_plugins = ["cuda_on_host"]


@pytest.fixture
def cupy(gpu, monkeypatch):
    fake = Cupy()
    fake.install(monkeypatch)
    return fake


def stepped(host):
    """Return what gd_step makes of `host` with a gradient of ones, on the CPU."""
    params = host.copy()
    fs.gd_step(params, np.ones_like(params), lr=0.1)
    return params


@pytest.mark.parametrize(
    "make",
    [CupyArray, DlpackArray, lambda a: DlpackArray(a, versioned=False), InterfaceArray],
    ids=["cupy", "dlpack", "old dlpack", "interface"],
)
@pytest.mark.parametrize(
    "view", [lambda a: a, lambda a: a.T, lambda a: a[1:, ::2], lambda a: a[0, 0]], ids=repr
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_of_every_library_are_stepped_in_place(dtype, view, make, gpu):
    params = float32(5, 7).astype(dtype)
    expected = params.copy()
    part = view(expected)[...] if view(expected).ndim else expected[0, 0, None]
    part[...] = stepped(part)
    target = view(params) if view(params).ndim else params[0, 0, None].reshape(())
    grads = np.ones_like(target)
    fs.gd_step(make(target), make(grads), lr=0.1)
    assert params.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("stream", "used"), [(0, 1), (1, 1), (0x7F00, 0x7F00)])
def test_a_step_runs_on_cupys_current_stream(stream, used, cupy, gpu):
    cupy.stream = stream
    fs.gd_step([CupyArray(float32(3), 2)], [CupyArray(float32(3), 2)])
    assert cupy.asked == [2]
    assert (gpu.last_device(), gpu.last_stream()) == (2, used)


def test_a_step_runs_on_torchs_current_stream(gpu, monkeypatch):
    module = ModuleType("torch")
    module.Tensor = DlpackArray
    module.cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=0x51))
    monkeypatch.setitem(sys.modules, "torch", module)
    params, grads = DlpackArray(float32(3)), DlpackArray(float32(3))
    fs.gd_step(params, grads)
    assert gpu.last_stream() == 0x51
    assert params.streams == grads.streams == [-1]


def test_other_dlpack_arrays_are_made_ready_for_the_default_stream(gpu):
    params, grads = DlpackArray(float32(3)), DlpackArray(float32(3))
    fs.gd_step(params, grads)
    assert gpu.last_stream() == 1
    assert params.streams == grads.streams == [1]


def test_the_interfaces_own_stream_is_used(gpu):
    fs.gd_step(InterfaceArray(float32(3), stream=0x77), InterfaceArray(float32(3), stream=0x77))
    assert gpu.last_stream() == 0x77


def refused(error, message, params, grads):
    before = [bytes(a.host) if hasattr(a, "host") else a.tobytes() for a in (*params, *grads)]
    with pytest.raises(error, match=re.escape(message)):
        fs.gd_step(params, grads)
    after = [bytes(a.host) if hasattr(a, "host") else a.tobytes() for a in (*params, *grads)]
    assert before == after


def test_arrays_in_different_places_are_refused_by_name(cupy):
    host, gpu0, gpu1 = float32(3), CupyArray(float32(3), 0), CupyArray(float32(3), 1)
    one = "the arrays of a call must be in one place"
    refused(
        ValueError, f"grads[0]: in host memory, but params[0] is on GPU 0; {one}", [gpu0], [host]
    )
    refused(
        ValueError, f"grads[0]: on GPU 0, but params[0] is in host memory; {one}", [host], [gpu0]
    )
    refused(ValueError, f"grads[0]: on GPU 1, but params[0] is on GPU 0; {one}", [gpu0], [gpu1])
    more = CupyArray(float32(4), 1)
    refused(
        ValueError,
        f"params[1]: on GPU 1, but params[0] is on GPU 0; {one}",
        [gpu0, gpu1],
        [CupyArray(float32(3), 0), more],
    )


def test_two_libraries_on_different_streams_are_refused(cupy):
    cupy.stream = 5
    refused(
        ValueError,
        "grads[0]: its library is using another CUDA stream",
        [CupyArray(float32(3))],
        [DlpackArray(float32(3))],
    )


def test_a_call_after_a_refused_one_is_a_new_call(cupy, gpu):
    refused(ValueError, "one place", [CupyArray(float32(3), 1)], [float32(3)])
    params = float32(3)
    fs.gd_step(params, float32(3))
    cupy.stream = 9
    fs.gd_step(CupyArray(float32(3), 1), CupyArray(float32(3), 1))
    assert (gpu.last_device(), gpu.last_stream()) == (1, 9)


@pytest.mark.parametrize("make", [CupyArray, DlpackArray, InterfaceArray])
def test_dtype_and_shape_are_checked(make, gpu):
    p = float32(3)
    refused(
        TypeError, "grads[0]: float64, but its parameter is float32", [make(p)], [make(np.ones(3))]
    )
    refused(ValueError, "grads[0]: shape (4,), but", [make(p)], [make(float32(4))])
    half = p.astype(np.int8)
    refused(TypeError, "params[0]: int8 parameters are not supported", [make(half)], [make(half)])


class Bare:
    """A producer that has nothing but the interface."""

    def __init__(self, array):
        self.host = array
        self.__cuda_array_interface__ = InterfaceArray(array).__cuda_array_interface__


def test_a_producer_needs_no_other_attributes(gpu):
    p = Bare(float32(3))
    refused(TypeError, "grads[0]: float64, but its parameter is float32", [p], [Bare(np.ones(3))])
    refused(TypeError, "grads[0]: another dtype, but", [p], [Bare(np.ones(3, np.int32))])
    refused(ValueError, "grads[0]: shape (4,), but its parameter has", [p], [Bare(float32(4))])
    fs.gd_step(p, Bare(np.ones(3, np.float32)), lr=0.1)
    assert p.host.tobytes() == stepped(float32(3)).tobytes()
    for kind in (fs.GD, fs.Adam):
        with pytest.raises(TypeError, match="cannot allocate state like a Bare of"):
            kind(p)


@pytest.mark.parametrize("make", [CupyArray, DlpackArray, InterfaceArray])
def test_shared_memory_is_found(make, gpu):
    whole = float32(20)
    grads = [make(float32(10)), make(float32(10))]
    overlap = "params[0] and params[1] overlap in memory"
    refused(ValueError, overlap, [make(whole[:10]), make(whole[5:15])], grads)
    refused(
        ValueError,
        overlap,
        [make(whole[::2]), make(whole[8::-1][:10:1])],
        [grads[0], make(float32(9))],
    )
    fs.gd_step([make(whole[::2]), make(whole[1::2])], grads)  # interleaved, but apart


NEEDS_READ_ONLY_DLPACK = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0",
    reason="NumPy before 2.1 exports no read-only arrays",
)


@pytest.mark.parametrize(
    "make", [pytest.param(DlpackArray, marks=NEEDS_READ_ONLY_DLPACK), InterfaceArray]
)
def test_read_only_arrays_are_refused(make, gpu):
    p = float32(3)
    p.flags.writeable = False
    refused(ValueError, "params[0]: the array is read-only", [make(p)], [make(float32(3))])


def test_a_masked_interface_is_refused(gpu):
    masked = InterfaceArray(float32(3), mask=float32(3))
    refused(TypeError, "params[0]: a masked array", [masked], [masked])


def test_dlpack_in_host_memory_is_no_gpu_array(gpu):
    array = DlpackArray(float32(3), device_type=1)
    refused(TypeError, "numpy.from_dlpack(x) shares its memory", [array], [array])


def test_a_failing_dlpack_names_the_array(gpu):
    class Failing(DlpackArray):
        def __dlpack__(self, **options):
            raise BufferError("requires grad")

    refused(
        TypeError,
        "Failing cannot be read as a GPU array: requires grad",
        [Failing(float32(3))],
        [float32(3)],
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": None},
        {"data": 5},
        {"data": ("x", False)},
        {"strides": "abc"},
        {"strides": (4, 4)},
        {"stream": "x"},
        {"shape": (-3,)},
        {"shape": (-3, -1)},
        {"shape": (2**43,)},
        {"shape": (2**32, 2**32)},
        {"data": (0, False)},
    ],
    ids=repr,
)
def test_a_malformed_interface_names_the_array(changes, gpu):
    array = InterfaceArray(float32(3), **changes)
    message = "params[0]: fake_gpu.InterfaceArray cannot be read as a GPU array"
    refused(TypeError, message, [array], [array])


@pytest.mark.parametrize(
    "changes",
    [
        {"device": -1},
        {"device": -2},
        {"type": 1},
        {"data": 0},
        {"ndim": -1},
        {"ndim": 65},
        {"length": -3},
        {"length": 2**43},
    ],
    ids=repr,
)
@pytest.mark.parametrize("versioned", [False, True])
def test_a_malformed_dlpack_tensor_names_the_array(versioned, changes, gpu):
    before = gpu.launch_count()
    array = DlpackArray(float32(3), versioned=versioned, **changes)
    message = "params[0]: fake_gpu.DlpackArray cannot be read as a GPU array"
    refused(TypeError, message, [array], [array])
    assert gpu.launch_count() == before


@pytest.mark.parametrize("given", [5, None, "abc"])
def test_what_is_no_dlpack_capsule_names_the_array(given, gpu):
    class NoCapsule(DlpackArray):
        def __dlpack__(self, **options):
            return given

    message = "NoCapsule cannot be read as a GPU array: not a DLPack capsule"
    refused(TypeError, message, [NoCapsule(float32(3))], [float32(3)])


def test_an_interface_to_host_memory_is_refused(gpu):
    gpu.set_device_of_pointers(-1)
    array = InterfaceArray(float32(3))
    refused(TypeError, "GPU array: its memory is on no GPU", [array], [array])


def test_a_build_without_cuda_says_so(cupy, monkeypatch):
    monkeypatch.setitem(sys.modules, "fusedstep._cuda", None)
    array = CupyArray(float32(3))
    refused(
        TypeError, "params[0]: cupy.ndarray is a GPU array, but this build of", [array], [array]
    )


def test_a_backend_of_another_build_is_refused(cupy, monkeypatch):
    version = ctypes.c_char_p(b"0.0.0")
    table = (ctypes.c_void_p * 3)(ctypes.cast(version, ctypes.c_void_p).value, None, None)
    new = ctypes.pythonapi.PyCapsule_New
    capsule = new(ctypes.addressof(table), b"fusedstep.GpuBackend", None)
    monkeypatch.setitem(sys.modules, "fusedstep._cuda", SimpleNamespace(backend=capsule))
    array = CupyArray(float32(3))
    refused(TypeError, "fusedstep._cuda is of version 0.0.0", [array], [array])


@pytest.mark.parametrize(
    ("kind", "options"),
    [(fs.GD, {}), (fs.GD, {"momentum": 0.9}), (fs.Adam, {"amsgrad": True}), (fs.AdamW, {})],
)
def test_an_optimizer_steps_gpu_arrays_as_it_steps_numpy_arrays(kind, options, cupy, gpu):
    shapes = [(3, 5), (7,), (0,), (4, 4)]
    results = []
    for wrap in (np.asarray, CupyArray):
        memory = [float32(*shape) for shape in shapes]
        params = [wrap(memory[0]), wrap(memory[1]), wrap(memory[2]), wrap(memory[3][::2, 1:])]
        optimizer = kind(params, **options)
        for step in range(3):
            grads = [wrap(np.full(p.shape, 0.1 + step, np.float32)) for p in params]
            optimizer.step([grads[0], None if step == 1 else grads[1], *grads[2:]])
        state = [a for s in optimizer.state.values() for a in s.values() if not isinstance(a, int)]
        results.append([*memory, *(getattr(a, "host", a) for a in state)])
    assert [a.tobytes() for a in results[0]] == [a.tobytes() for a in results[1]]


@pytest.mark.parametrize("offset", range(5))
def test_state_lies_against_its_boundaries_as_its_parameter(offset, cupy, gpu):
    results = []
    for wrap in (np.asarray, CupyArray):
        memory = np.concatenate([float32(4), float32(3, 7).ravel()])
        # NumPy's memory may begin anywhere.
        first = offset - memory.ctypes.data % 16 // 4 & 3
        params = wrap(memory[first : first + 21].reshape(3, 7))
        optimizer = fs.Adam(params, amsgrad=True)
        optimizer.step(wrap(float32(3, 7)))
        state = [a for a in optimizer.state[0].values() if not isinstance(a, int)]
        results.append([memory, *(getattr(a, "host", a) for a in state)])
    assert len(state) == 3
    for array in state:
        assert array.shape == (3, 7)
        assert array.data.ptr % 16 == params.data.ptr % 16 == offset * 4 % 16
    assert [a.tobytes() for a in results[0]] == [a.tobytes() for a in results[1]]


def test_an_optimizer_joins_the_stream_that_is_current_at_each_step(cupy, gpu):
    optimizer = fs.Adam(CupyArray(float32(3), 2))
    for stream in (3, 4):
        cupy.stream = stream
        optimizer.step(CupyArray(float32(3), 2))
        assert (gpu.last_device(), gpu.last_stream()) == (2, stream)


def test_an_optimizer_is_in_one_place(cupy):
    one = re.escape("the arrays of a call must be in one place")
    with pytest.raises(
        ValueError, match=rf"params\[1\]: on GPU 1, but params\[0\] is on GPU 0; {one}"
    ):
        fs.GD([CupyArray(float32(3)), CupyArray(float32(3), 1)])
    params = CupyArray(float32(3)), float32(3)
    grads = float32(3), CupyArray(float32(3))
    for param, grad in zip(params, grads, strict=True):
        optimizer = fs.Adam(param)
        before = bytes(getattr(param, "host", param))
        with pytest.raises(ValueError, match=one):
            optimizer.step(grad)
        assert optimizer.state[0]["step"] == 0
        assert bytes(getattr(param, "host", param)) == before


def test_an_optimizer_finds_overlaps_on_the_gpu(cupy):
    whole = float32(12)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] overlap in memory"):
        fs.GD([CupyArray(whole[:6]), CupyArray(whole[5:])])
    optimizer = fs.GD(CupyArray(whole[::2]))
    with pytest.raises(ValueError, match=r"params and grads overlap in memory"):
        optimizer.step(CupyArray(whole[:6]))
    optimizer.step(CupyArray(whole[1::2]))


def test_an_optimizer_says_for_which_libraries_it_allocates_state(gpu):
    with pytest.raises(TypeError, match=r"cannot allocate state like a InterfaceArray of fake_gpu"):
        fs.Adam(InterfaceArray(float32(3)))


def test_kernels_that_cannot_be_loaded_leave_no_half_step(gpu):
    def arrays():
        return [CupyArray(float32(3)), CupyArray(np.ones(3))]

    params, grads, fresh = arrays(), arrays(), arrays()
    optimizer = fs.Adam(params)
    gpu.set_refused_dtype(1)
    for step in (lambda: fs.gd_step(params, grads), lambda: optimizer.step(grads)):
        with pytest.raises(RuntimeError, match="out of memory"):
            step()
    for param, untouched in zip(params, fresh, strict=True):
        assert param.host.tobytes() == untouched.host.tobytes()
    assert [state["step"] for state in optimizer.state.values()] == [0, 0]
    gpu.set_refused_dtype(-1)
    optimizer.step(grads)
    assert [state["step"] for state in optimizer.state.values()] == [1, 1]


def test_without_a_driver_a_step_says_so(monkeypatch):
    cuda = pytest.importorskip("fusedstep._cuda", reason="this build has no CUDA backend")
    if cuda.info()["driver"] != "none":
        pytest.skip("there is a CUDA driver")
    Cupy().install(monkeypatch)
    params = CupyArray(float32(3))
    before = params.host.copy()
    with pytest.raises(RuntimeError, match="no NVIDIA driver is loaded"):
        fs.gd_step(params, CupyArray(float32(3)))
    assert params.host.tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("code", "driver", "text"),
    [
        (35, "none", "no NVIDIA driver is loaded on this machine"),
        (35, "11.4", "the NVIDIA driver supports CUDA 11.4, but fusedstep was built with CUDA"),
        (100, "13.0", "the driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (101, "13.0", "there is no such GPU for this process"),
        (209, "13.0", "this build holds no code for this GPU"),
        (222, "13.0", "this build holds no code for this GPU"),
        (700, "13.0", "work queued earlier failed on the GPU, by fusedstep or another library"),
        (719, "13.0", "this process cannot use the GPU any more"),
    ],
)
def test_errors_of_cuda_say_what_to_do(code, driver, text):
    cuda = pytest.importorskip("fusedstep._cuda", reason="this build has no CUDA backend")
    message = cuda.error_text(code, driver)
    assert re.match(r"CUDA: .* \(cudaError\w+\): ", message)
    assert text in message


BUILT = ["75-real", "80-real", "86-real", "89-real", "90-real", "100-real", "120"]


@pytest.mark.parametrize(
    ("capability", "code"),
    [
        ("7.5", "machine code for 75"),
        ("8.0", "machine code for 80"),
        ("8.7", "machine code for 86"),
        ("8.9", "machine code for 89"),
        ("9.0", "machine code for 90"),
        ("10.0", "machine code for 100"),
        ("10.3", "machine code for 100"),
        ("12.0", "machine code for 120"),
        ("12.1", "machine code for 120"),
        ("13.0", "PTX for 120, compiled at first use"),
        ("11.0", "nothing: this build has no code for it"),
        ("7.0", "nothing: this build has no code for it"),
    ],
)
def test_info_says_which_code_a_gpu_runs(capability, code):
    assert info.code_for(capability, BUILT) == code


@pytest.mark.parametrize(
    ("built", "code"),
    [
        (["native"], "what 'native' stood for when it was built"),
        (["all-major"], "what 'all-major' stood for when it was built"),
        (["native", "90-real"], "machine code for 90"),
        (["90a-real"], "machine code for 90"),
        (["80-real", "100a"], "nothing: this build has no code for it"),
    ],
)
def test_info_takes_architectures_by_any_name(built, code):
    assert info.code_for("9.0", built) == code


def test_info_describes_the_backend():
    cuda = {"architectures": "90-real", "toolkit": "13.0", "driver": "12.4", "error": None}
    cuda["devices"] = [{"name": "H200", "compute_capability": "9.0"}]
    assert info.describe_cuda(cuda) == (
        "available; built with CUDA 13.0 for 90-real; driver for CUDA 12.4; "
        "H200, compute capability 9.0, runs machine code for 90"
    )
    cuda["error"] = "why"
    assert info.describe_cuda(cuda).startswith("unavailable; ")
    assert info.describe_cuda(cuda).endswith("; why")


def test_info_says_why_the_backend_does_not_load(monkeypatch):
    def fail(name):
        raise ImportError("libsomething.so: cannot open shared object file")

    monkeypatch.setattr(info.importlib, "import_module", fail)
    assert info.collect()["backends"]["cuda"] == (
        "does not load: libsomething.so: cannot open shared object file"
    )
