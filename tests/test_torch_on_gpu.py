"""PyTorch's tensors on a GPU that is not there, up to the launch and by the kernels on the host."""

import copy

import pytest

import fusedstep as fs
from fusedstep import gpu as gpu_library

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
fst = pytest.importorskip("fusedstep.torch")
import fake_torch_cuda  # noqa: E402
from fake_torch_cuda import CudaTensor, on_gpu, on_host  # noqa: E402

pytest_plugins = ["cuda_on_host"]
cuda = fake_torch_cuda.cuda
pytestmark = pytest.mark.filterwarnings("ignore:params")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NARROW = [
    (torch.float32, {}),
    (torch.float32, {"state_dtype": "bfloat16"}),
    (torch.float32, {"state_dtype": "8bit"}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"state_dtype": "bfloat16"}),
    (torch.bfloat16, {"master_weights": "float32"}),
    (torch.bfloat16, {"master_weights": "correction16", "state_dtype": "bfloat16"}),
    (torch.bfloat16, {"master_weights": "correction8", "state_dtype": "8bit"}),
    (torch.bfloat16, {"master_weights": "stochastic", "state_dtype": "8bit"}),
    (torch.float16, {"state_dtype": "8bit"}),
    (torch.float16, {"master_weights": "float32", "state_dtype": "bfloat16"}),
]
every_format = pytest.mark.parametrize(("dtype", "options"), NARROW, ids=str)
VIEWS = {
    "dense": lambda a: a[:910],
    "odd offset": lambda a: a[1:912],
    "rows": lambda a: a[:910].view(70, 13),
    "transposed": lambda a: a[:910].view(70, 13).t(),
    "every second": lambda a: a[::2],
}


def draw(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1821, generator=generator).to(dtype)


def bits(tensor):
    return on_host(tensor).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_functions_step_tensors_where_they_lie(dtype, view, cuda, gpu):
    results = []
    for place in (on_host, on_gpu):
        params, grads = (place(draw(seed, dtype)) for seed in range(2))
        state_dtype = torch.float32 if dtype.itemsize == 2 else dtype
        state = [place(draw(seed, state_dtype).abs()) for seed in (2, 3)]
        launches = gpu.launch_count()
        arrays = [VIEWS[view](a) for a in (params, grads, *state)]
        if place is on_host:
            arrays = [fst._array(a) for a in arrays]
        fs.adam_step(*arrays, step=3)
        assert gpu.launch_count() - launches == (place is on_gpu)
        results.append([bits(a) for a in (params, grads, *state)])
    assert results[0] == results[1]
    assert cuda.asked == [0]
    assert (gpu.last_device(), gpu.last_stream()) == (0, 0x51)


def stepped(place, dtype, options, view="dense", **step_options):
    """Return all memory that an optimizer of arrays has written in three steps, as bytes."""

    def array(memory):
        tensor = VIEWS[view](memory)
        return tensor if place is on_gpu else fst._array(tensor)

    memory = [place(draw(seed, dtype)) for seed in range(2)]
    optimizer = fs.Adam([array(a) for a in memory], lr=0.01, seed=9, **options)
    for step in range(3):
        grads = [place(draw(10 + step, dtype)) for _ in memory]
        optimizer.step([array(g) for g in grads], **step_options)
    state = [
        (gpu_library.to_host(array) if place is on_gpu else array).tobytes()
        for entry in optimizer.state.values()
        for key, array in entry.items()
        if key not in ("step", "memory_order")
    ]
    return [*map(bits, memory + grads), *state]


@pytest.mark.parametrize("view", VIEWS)
@every_format
def test_optimizers_of_arrays_take_tensors_of_every_format(dtype, options, view, cuda, gpu):
    expected = stepped(on_host, dtype, options, view, clip_norm=0.5, zero_grad=True)
    assert stepped(on_gpu, dtype, options, view, clip_norm=0.5, zero_grad=True) == expected
    assert gpu.last_stream() == 0x51


@every_format
def test_steps_that_are_counted_on_the_gpu(dtype, options, cuda, gpu):
    expected = stepped(on_host, dtype, options)
    begun = gpu.begun_count()
    assert stepped(on_gpu, dtype, {**options, "capturable": True}) == expected
    assert gpu.begun_count() - begun == 3


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tensors_in_two_places_are_refused(dtype, cuda):
    params, grads = on_gpu(draw(0, dtype)), draw(1, dtype)
    before = bits(params)
    param = torch.nn.Parameter(params)
    param.grad = on_gpu(grads)
    optimizer = fst.Adam([param, torch.nn.Parameter(draw(2, dtype))])
    optimizer.param_groups[0]["params"][1].grad = grads
    with pytest.raises(ValueError, match="the arrays of a call must be in one place"):
        optimizer.step()
    with pytest.raises(ValueError, match="the arrays of a call must be in one place"):
        fs.gd_step(params, fst._array(grads))
    assert bits(params) == before
    assert not optimizer.state


def trained(place, dtype, options, view="dense", name="Adam", steps=3, load=None, memory=None):
    """Return parameters in a place and their optimizer, after a few steps."""
    memory = [place(draw(seed, dtype)) for seed in range(2)] if memory is None else memory
    params = [torch.nn.Parameter(VIEWS[view](a)) for a in memory]
    optimizer = getattr(fst, name)(params, lr=0.01, **options)
    if load is not None:
        optimizer.load_state_dict(copy.deepcopy(load))  # else they share its tensors
    for step in range(steps):
        for number, param in enumerate(params):
            param.grad = VIEWS[view](place(draw(10 * step + number + 5, dtype)))
        optimizer.step()
    return memory, params, optimizer


def state_bits(params, optimizer):
    return [
        {k: bits(v) for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        for p in params
    ]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@every_format
def test_optimizers_in_place_of_pytorchs(dtype, options, name, view, cuda, gpu):
    if name == "SGD":
        options = {**options, "momentum": 0.9}
    host, host_params, on_cpu = trained(on_host, dtype, options, view, name)
    launches = gpu.launch_count()
    device, params, ours = trained(on_gpu, dtype, options, view, name)
    assert gpu.launch_count() - launches == 3
    assert gpu.last_stream() == 0x51
    assert [bits(a) for a in host] == [bits(a) for a in device]
    assert state_bits(host_params, on_cpu) == state_bits(params, ours)
    for param in params:
        for key, value in ours.state[param].items():
            assert isinstance(value, CudaTensor) == (key not in ("step", "memory_order")), key


@pytest.mark.parametrize(
    "saved", [{}, {"state_dtype": "bfloat16"}, {"state_dtype": "8bit"}], ids=str
)
@pytest.mark.parametrize("own", [{}, {"state_dtype": "bfloat16"}, {"state_dtype": "8bit"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_moves_to_the_gpu_and_back_and_between_formats(dtype, own, saved, cuda, gpu):
    started = trained(on_host, dtype, saved, "transposed")
    start = [a.clone() for a in started[0]]
    results = []
    for place in (on_host, on_gpu):
        memory = [place(a.clone()) for a in start]
        load = started[2].state_dict()
        memory, params, optimizer = trained(
            place, dtype, own, "transposed", steps=2, load=load, memory=memory
        )
        results.append((list(map(bits, memory)), state_bits(params, optimizer)))
    assert results[0] == results[1]
    back = trained(
        on_host, dtype, own, "transposed", load=optimizer.state_dict(),
        memory=[on_host(a).clone() for a in memory],
    )  # fmt: skip
    forth = trained(
        on_gpu, dtype, own, "transposed", load=optimizer.state_dict(),
        memory=[on_gpu(on_host(a).clone()) for a in memory],
    )  # fmt: skip
    assert list(map(bits, back[0])) == list(map(bits, forth[0]))
