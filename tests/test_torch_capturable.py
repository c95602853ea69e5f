"""Steps of PyTorch's tensors that a GPU counts, and a GradScaler's, by the kernels on the host."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
fst = pytest.importorskip("fusedstep.torch")
import fake_torch_cuda  # noqa: E402
from fake_torch_cuda import CudaTensor, no_waits, on_gpu, on_host  # noqa: E402

pytest_plugins = ["cuda_on_host"]
cuda = fake_torch_cuda.cuda
pytestmark = pytest.mark.filterwarnings("ignore:params")

PLACES = {"cpu": on_host, "cuda": on_gpu}
KINDS = {
    "plain": ("SGD", {"weight_decay": 0.1}),
    "momentum": ("SGD", {"momentum": 0.9, "dampening": 0.3}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": ("Adam", {"weight_decay": 0.1, "betas": (0.3, 0.95)}),
    "amsgrad": ("Adam", {"amsgrad": True, "maximize": True}),
    "adamw": ("AdamW", {}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
STORAGE = [
    (torch.float32, {}),
    (torch.float64, {}),
    (torch.float16, {"master_weights": "float32"}),
    (torch.bfloat16, {"master_weights": "correction8", "state_dtype": "8bit"}),
    (torch.bfloat16, {"master_weights": "stochastic", "state_dtype": "bfloat16"}),
]
every_storage = pytest.mark.parametrize(("dtype", "storage"), STORAGE, ids=str)
every_way = pytest.mark.parametrize("way", ["fused", "capturable"])
SHAPES = ((5, 3), (7,), (), (64,))


def draw(seed, shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensor):
    return on_host(tensor).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Run:
    """Parameters in a place and an optimizer of them."""

    def __init__(self, place, kind="adam", dtype=torch.float32, shapes=SHAPES, **options):
        self.place, self.dtype = PLACES[place], dtype
        name, own = KINDS[kind]
        if place == "cpu":
            options.pop("capturable", None)
        params = enumerate(shapes)
        self.params = [torch.nn.Parameter(self.place(draw(i, s, dtype))) for i, s in params]
        self.make = lambda: getattr(fst, name)(self.params, **{"lr": 0.01, **own, **options})
        self.optimizer = self.make()

    def set_gradients(self, seed, scale=1.0, without=(), bad=None):
        """Give each parameter a gradient but some, and one of them an element as bad as wished."""
        for i, param in enumerate(self.params):
            gradient = scale * draw(100 * seed + i, param.shape, self.dtype)
            if bad is not None and i == 1:
                gradient[3] = bad
            param.grad = None if i in without else self.place(gradient)

    def step(self, seed, **gradients):
        self.set_gradients(seed, **gradients)
        self.optimizer.step()

    def memory(self):
        """Return the bytes of all parameters and state, the step counts among them."""
        return [
            [bits(p), {k: bits(v) for k, v in self.optimizer.state.get(p, {}).items()}]
            for p in self.params
        ]

    def steps(self):
        return [int(self.optimizer.state[p]["step"]) for p in self.params]


def pair(kind="adam", **options):
    return Run("cpu", kind, **options), Run("cuda", kind, **options)


@every_way
@every_storage
@every_kind
def test_steps_have_the_bits_of_the_cpu(kind, dtype, storage, way, cuda, gpu):
    on_cpu, ours = pair(kind, dtype=dtype, **storage, **{way: True})
    begun, launches = gpu.begun_count(), gpu.launch_count()
    for seed in range(4):
        on_cpu.step(seed)
        with no_waits():
            ours.step(seed)
        assert ours.memory() == on_cpu.memory()
    assert gpu.begun_count() - begun == gpu.launch_count() - launches == 4
    assert gpu.last_stream() == 0x51
    for param in ours.params:
        for key, value in ours.optimizer.state[param].items():
            assert isinstance(value, CudaTensor) == (key != "memory_order"), key


SCALED = [(*s, False) for s in STORAGE]
# A GradScaler does not unscale float16 gradients itself.
SCALED += [(*s, True) for s in STORAGE if s[0] != torch.float16]


@pytest.mark.parametrize(("dtype", "storage", "unscaled"), SCALED, ids=str)
@every_kind
def test_a_grad_scaler(kind, dtype, storage, unscaled, cuda, gpu):
    runs = pair(kind, dtype=dtype, **storage, fused=True)
    scalers = [
        torch.amp.GradScaler(place, init_scale=3.0 * 2**9, growth_interval=2) for place in PLACES
    ]
    course = []
    for seed, bad in enumerate((None, None, float("inf"), None, float("nan"), None, None)):
        for run, scaler in zip(runs, scalers, strict=True):
            scaler.scale(run.place(torch.ones(())))  # it makes its tensors when it is first used
            scale = scaler.get_scale()
            before = run.memory()
            run.set_gradients(seed, scale, bad=bad)
            gradients = [bits(p.grad) for p in run.params]
            with no_waits():
                if unscaled:
                    scaler.unscale_(run.optimizer)
                    for p in run.params:
                        p.grad.mul_(0.5)
                scaler.step(run.optimizer)
                scaler.update()
            if not unscaled:
                assert gradients == [bits(p.grad) for p in run.params]
            if bad is not None:
                assert run.memory() == before
        assert runs[0].memory() == runs[1].memory()
        course.append([scaler.get_scale() / 1536 for scaler in scalers])
    assert course == [[scale] * 2 for scale in (1, 2, 1, 1, 0.5, 0.5, 1)]


@every_kind
def test_a_first_step_that_is_skipped(kind, cuda, gpu):
    """The next one is the first, whose momentum is the gradient."""
    on_cpu, ours = pair(kind, fused=True)
    ours.optimizer.found_inf = on_gpu(torch.ones(()))
    params = [bits(p) for p in ours.params]
    with no_waits():
        ours.step(0)
    assert params == [bits(p) for p in ours.params]
    assert not any(t.any() for entry in ours.optimizer.state.values() for t in entry.values())
    ours.optimizer.found_inf.zero_()
    for seed in range(3):
        on_cpu.step(seed)
        with no_waits():
            ours.step(seed)
        assert ours.memory() == on_cpu.memory()


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["number", "tensor"])
def test_a_scale_from_elsewhere(number, cuda, gpu):
    """Before unscaled gradients are stepped, a program may have set a scale of its own."""
    on_cpu, ours = pair(fused=True)
    for seed in range(2):
        for run in (on_cpu, ours):
            run.optimizer.grad_scale = number(3.0)
            run.step(seed)
        assert ours.memory() == on_cpu.memory()


def test_a_scaler_is_asked_for_its_scale_where_steps_are_not_counted_on_the_gpu(cuda, gpu):
    on_cpu, ours = pair()
    for found_inf in (0.0, 1.0, 0.0):
        for run in (on_cpu, ours):
            run.optimizer.found_inf = run.place(torch.tensor(found_inf))
            run.optimizer.grad_scale = run.place(torch.tensor(8.0))
            run.step(0)
        assert ours.memory() == on_cpu.memory()
    assert ours.steps() == [2] * 4


@pytest.mark.parametrize("failing", range(2))
@pytest.mark.parametrize("skipped", [False, True])
def test_a_step_that_cannot_be_launched_is_not_counted(skipped, failing, cuda, gpu):
    ours = Run("cuda", fused=True)
    for seed in range(2):
        ours.step(seed)
    ours.optimizer.found_inf = on_gpu(torch.tensor(float(skipped)))
    before = ours.memory()
    # It is tried again when all has been bound anew.
    for fails in (failing, failing):
        ours.set_gradients(2)
        ours.optimizer._native = None
        gpu.set_launches_to_failure(fails)
        with pytest.raises(RuntimeError, match="launch failed"):
            ours.optimizer.step()
        assert ours.memory() == before
    del ours.optimizer.found_inf
    on_cpu = Run("cpu")
    for seed in range(3):
        on_cpu.step(seed)
    ours.step(2)
    assert ours.memory() == on_cpu.memory()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_way
@every_kind
def test_lr_is_read_where_the_step_runs(kind, way, dtype, shape, cuda, gpu):
    rates = [place(torch.full(shape, 0.1, dtype=dtype)) for place in PLACES.values()]
    runs = [Run(p, kind, lr=rate, **{way: True}) for p, rate in zip(PLACES, rates, strict=True)]
    for seed in range(3):
        for run, rate in zip(runs, rates, strict=True):
            with no_waits():
                rate.fill_(0.1 / (seed + 1))
                run.step(seed)
        assert runs[0].memory() == runs[1].memory()


PATTERNS = [
    [(), (), ()],
    [(1,), (1,), ()],
    [(), (2,), (), (0, 1), (0, 1), ()],
    [(), (0, 1, 2, 3), ()],
    [(0,), (1,), (2,), (3,), (), (0, 3)],
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@every_kind
def test_parameters_without_a_gradient_keep_their_counts(kind, pattern, cuda, gpu):
    storage = {"master_weights": "stochastic"}  # which has counts in SGD's state, too
    on_cpu, ours = pair(kind, dtype=torch.bfloat16, fused=True, **storage)
    for seed, without in enumerate(pattern):
        on_cpu.step(seed, without=without)
        with no_waits():
            ours.step(seed, without=without)
        assert ours.memory() == on_cpu.memory()


def test_parameters_that_are_stepped_together_have_one_count(cuda, gpu):
    ours = Run("cuda", fused=True)
    for without, begins in (((), 1), ((), 1), ((1,), 1), ((), 2), ((1,), 1), ((0, 2, 3), 1)):
        begun, launches = gpu.begun_count(), gpu.launch_count()
        ours.step(0, without=without)
        assert gpu.begun_count() - begun == begins
        assert gpu.launch_count() - launches == 1
    assert ours.steps() == [5, 4, 5, 5]


def test_groups(cuda, gpu):
    runs = pair(fused=True)
    late = []
    for run in runs:
        run.step(0)
        late.append(torch.nn.Parameter(run.place(draw(9, (6,)))))
        run.optimizer.add_param_group({"params": [late[-1]], "lr": 0.5})
        run.params.append(late[-1])
    for seed in range(1, 4):
        for run in runs:
            run.step(seed, without=(0, 2) if seed == 2 else ())
        assert runs[0].memory() == runs[1].memory()
    assert runs[1].steps() == [3, 4, 3, 4, 3]


def test_a_count_can_be_set_in_the_state(cuda, gpu):
    runs = pair(fused=True)
    for run in runs:
        run.step(0)
        for entry in run.optimizer.state.values():
            entry["step"].fill_(20)
        with no_waits():
            run.step(1)
        for entry in run.optimizer.state.values():  # which is seen without a look at its number
            entry["step"] = run.place(torch.tensor(30.0))
        run.step(2)
    assert runs[0].memory() == runs[1].memory()
    assert runs[1].steps() == [31] * 4


def test_counts_stay_where_they_are(cuda, gpu):
    """A graph may count in them."""
    runs = pair(fused=True)
    counts = []
    for seed in range(4):
        for run in runs:
            if seed == 2:  # bound anew
                for param in run.params:
                    param.data = run.place(on_host(param).clone())
            run.step(seed)
        counts.append([runs[1].optimizer.state[p]["step"] for p in runs[1].params])
    for other in counts[1:]:
        assert all(a is b for a, b in zip(counts[0], other, strict=True))
    assert runs[0].memory() == runs[1].memory()


@pytest.mark.parametrize("places", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")], ids=str)
@every_way
@every_kind
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(kind, way, places, cuda, gpu):
    options = {} if "cpu" in places and way == "capturable" else {way: True}
    unbroken = Run("cpu", kind, **options)
    resumed = Run(places[0], kind, **{way: True} if places[0] == "cuda" else options)
    for seed in range(6):
        if seed in (2, 4):
            state = copy.deepcopy(resumed.optimizer.state_dict())
            params = [on_host(p).clone() for p in resumed.params]
            place = places[seed // 2 % 2]
            resumed = Run(place, kind, **{way: True} if place == "cuda" else options)
            for own, value in zip(resumed.params, params, strict=True):
                on_host(own).copy_(value)
            resumed.optimizer.load_state_dict(state)
        for run in (unbroken, resumed):
            run.step(seed, without=(2,) if seed == 1 else ())
        assert resumed.memory() == unbroken.memory()
        for param in resumed.params:
            for key, value in resumed.optimizer.state[param].items():
                assert isinstance(value, CudaTensor) == isinstance(param, CudaTensor), key


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@every_kind
def test_copies_count_for_themselves(kind, copied, cuda, gpu, monkeypatch):
    # pickle would make a tensor of the memory's own device.
    monkeypatch.setattr(
        CudaTensor, "__reduce_ex__", lambda t, _: (on_gpu, (on_host(t).clone(),)), raising=False
    )
    ours = Run("cuda", kind, fused=True)
    ours.step(0)
    other = copy.copy(ours)
    other.optimizer = copied(ours.optimizer)
    other.params = other.optimizer.param_groups[0]["params"]
    for seed in (1, 2):
        for run in (ours, other):
            run.step(seed)
    assert ours.memory() == other.memory()
    assert not any(a is b for a, b in zip(ours.params, other.params, strict=True))


@pytest.mark.parametrize("theirs", [{"capturable": True}, {"fused": True}], ids=str)
@every_way
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_state_goes_to_pytorch_and_back(name, way, theirs, cuda, gpu):
    """The values after further steps are PyTorch's, which counts in the same tensors."""
    ours = Run("cuda", name.lower(), **{way: True})
    for seed in range(3):
        ours.step(seed)
    reference = copy.copy(ours)
    reference.params = [torch.nn.Parameter(on_gpu(on_host(p).clone())) for p in ours.params]
    groups = [{**g, "params": reference.params} for g in ours.optimizer.param_groups]
    reference.optimizer = getattr(torch.optim, name)(groups, **theirs)
    reference.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    for group in reference.optimizer.param_groups:  # which loading has set as they are here
        group.update({"capturable": False, "fused": None, **theirs})
    for seed in range(3, 6):
        for run in (ours, reference):
            run.step(seed)
    assert reference.steps() == ours.steps() == [6] * 4
    for run in (ours, reference):
        for entry in run.optimizer.state.values():
            assert entry["step"].shape == ()
            assert entry["step"].dtype == torch.float32
            assert isinstance(entry["step"], CudaTensor)
    for p, q in zip(ours.params, reference.params, strict=True):
        torch.testing.assert_close(on_host(p), on_host(q), rtol=1e-5, atol=1e-7)
    back = copy.copy(ours)
    back.params = [torch.nn.Parameter(on_gpu(on_host(p).clone())) for p in reference.params]
    back.optimizer = getattr(fst, name)(back.params, **{way: True})
    back.optimizer.load_state_dict(copy.deepcopy(reference.optimizer.state_dict()))
    for run in (back, reference):
        run.step(6)
    assert back.steps() == [7] * 4
    for p, q in zip(back.params, reference.params, strict=True):
        torch.testing.assert_close(on_host(p), on_host(q), rtol=1e-5, atol=1e-7)


def test_a_graph_needs_counts_on_the_gpu(cuda, gpu):
    cuda.capturing = True
    refused = Run("cuda")
    before = refused.memory()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="make the optimizer with capturable=True"):
            refused.step(0)
        assert refused.memory() == before
        cuda.capturing = False
        refused.step(0)
        before = refused.memory()
        cuda.capturing = True
    for options in ({"kind": "adam", "capturable": True}, {"kind": "plain"}):
        with no_waits():
            Run("cuda", **options).step(0)


BAD = {
    "found_inf": (torch.zeros(2), ValueError, r"found_inf: .*\(2,\); expected one float32"),
    "grad_scale": (torch.ones(3), ValueError, r"grad_scale: .*\(3,\); expected one float32"),
    "lr": (torch.zeros(2), ValueError, r"lr: shape \(2,\); a GPU array is to have one element"),
    "lr ": (torch.tensor(1).half(), TypeError, r"lr: torch\.float16; a GPU array is to be"),
    "eps": (-1.0, ValueError, "eps: expected a finite number >= 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_gpu_cannot_count_by_is_refused(name, cuda, gpu):
    value, error, message = BAD[name]
    if isinstance(value, torch.Tensor):
        value = on_gpu(value)
    ours = Run("cuda", capturable=True)
    ours.step(0)
    before = ours.memory()
    group = ours.optimizer.param_groups[0]
    where = group if name.strip() in group else ours.optimizer.__dict__
    kept = dict(where)
    where[name.strip()] = value
    with pytest.raises(error, match=message):
        ours.step(1)
    assert ours.memory() == before
    where.clear()
    where.update(kept)
    ours.step(1)
    assert ours.steps() == [2] * 4


def test_counts_that_no_state_has(cuda, gpu):
    """That of momentum, whose first step is another than those after it."""
    runs = pair("momentum", fused=True)
    for seed in range(4):
        for run in runs:
            if seed == 2:
                run.optimizer.state.clear()
            run.step(seed)
        assert runs[0].memory() == runs[1].memory()
    other = Run("cuda", "momentum", fused=True)
    other.optimizer.found_inf = on_gpu(torch.ones(()))
    other.step(0)
    del other.optimizer.found_inf
    other.optimizer.load_state_dict(copy.deepcopy(runs[1].optimizer.state_dict()))
    for own, param in zip(other.params, runs[1].params, strict=True):
        on_host(own).copy_(on_host(param))
    for run in (runs[0], other):
        run.step(4)
    assert runs[0].memory() == other.memory()
