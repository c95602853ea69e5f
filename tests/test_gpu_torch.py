"""On a GPU: PyTorch's optimizers, a GradScaler and graphs, without waiting. ``pytest -m gpu``."""

import copy

import pytest
from test_gpu import busy, cupy, torch  # noqa: F401 (fixtures)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:::cupy"),
    pytest.mark.filterwarnings("ignore:ExternalStream is deprecated:DeprecationWarning"),
]

KINDS = {
    "plain": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9, "dampening": 0.3}),
    "adam": ("Adam", {"weight_decay": 0.1}),
    "adamw": ("AdamW", {"amsgrad": True}),
}
SHAPES = ((1001,), (30, 7), (), (4096,))
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])


class Run:
    """Parameters on a device and our optimizer of them."""

    def __init__(self, torch, device, kind, dtype="float32", **options):  # noqa: F811
        import fusedstep.torch as fst

        self.torch, self.device, self.dtype = torch, device, getattr(torch, dtype)
        name, own = KINDS[kind]
        if dtype == "bfloat16":
            own = {**own, "master_weights": "float32"}
        if device == "cpu":
            options.pop("capturable", None)
        self.params = [
            torch.nn.Parameter(self.draw(seed, shape)) for seed, shape in enumerate(SHAPES)
        ]
        self.optimizer = getattr(fst, name)(self.params, **{"lr": 0.01, **own, **options})

    def draw(self, seed, shape):
        generator = self.torch.Generator().manual_seed(seed)
        values = self.torch.randn(shape, generator=generator)
        return values.to(self.dtype).to(self.device)

    def set_gradients(self, seed, scale=1.0, without=(), bad=None):
        for i, param in enumerate(self.params):
            gradient = scale * self.draw(100 * seed + i, param.shape)
            if bad is not None and i == 1:
                gradient[3] = bad
            if i in without:
                param.grad = None
            elif param.grad is None:
                param.grad = gradient
            else:
                param.grad.copy_(gradient)  # where a graph reads it

    def step(self, seed, **gradients):
        self.set_gradients(seed, **gradients)
        self.optimizer.step()

    def memory(self):
        self.torch.cuda.synchronize()
        tensors = [{"param": p.detach(), **self.optimizer.state.get(p, {})} for p in self.params]
        return [
            {
                key: value.detach().cpu().reshape(-1).view(self.torch.uint8).tolist()
                for key, value in own.items()
            }
            for own in tensors
        ]


def runs_of(torch, *arguments, **options):  # noqa: F811
    return [Run(torch, device, *arguments, **options) for device in ("cpu", "cuda")]


@every_dtype
@every_kind
def test_a_grad_scaler(kind, dtype, torch):  # noqa: F811
    runs = runs_of(torch, kind, dtype, fused=True)
    scalers = [
        torch.amp.GradScaler(r.device, init_scale=3.0 * 2**9, growth_interval=2) for r in runs
    ]
    for seed, bad in enumerate((float("inf"), None, None, float("nan"), None)):
        for run, scaler in zip(runs, scalers, strict=True):
            scaler.scale(torch.ones((), device=run.device))
            run.set_gradients(seed, scaler.get_scale(), bad=bad)
            torch.cuda.set_sync_debug_mode("error")
            try:
                if seed == 2:
                    scaler.unscale_(run.optimizer)
                scaler.step(run.optimizer)
                scaler.update()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if seed > 0:  # state comes on the CPU with the first step that is taken
            assert runs[0].memory() == runs[1].memory()
        assert scalers[0].get_scale() == scalers[1].get_scale()


def test_a_step_with_a_grad_scaler_waits_for_nothing(torch, cupy, busy):  # noqa: F811
    run = Run(torch, "cuda", "adam", fused=True)
    run.optimizer.found_inf = torch.zeros((), device="cuda")
    run.optimizer.grad_scale = torch.full((), 8.0, device="cuda")
    run.step(0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), cupy.cuda.ExternalStream(stream.cuda_stream):
        gate = busy()
        run.optimizer.step()
        queued = stream.record_event()
    assert not queued.query()
    gate[0] = 1
    stream.synchronize()
    assert all(entry["step"].item() == 2 for entry in run.optimizer.state.values())


@pytest.mark.parametrize("on_gpu", [False, True])
@every_dtype
@every_kind
def test_a_captured_step_is_a_new_one_at_each_replay(kind, dtype, on_gpu, torch):  # noqa: F811
    runs = runs_of(torch, kind, dtype, capturable=True)
    rate = torch.tensor(0.01, dtype=torch.float64, device="cuda")
    if on_gpu:
        runs[1].optimizer.param_groups[0]["lr"] = rate
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs[1].step(0)
    torch.cuda.current_stream().wait_stream(stream)
    runs[0].step(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runs[1].optimizer.step()
    for seed in range(1, 5):
        if on_gpu:
            rate.fill_(0.01 / seed)
            runs[0].optimizer.param_groups[0]["lr"] = 0.01 / seed
        runs[1].set_gradients(seed)
        graph.replay()
        runs[0].step(seed)
        assert runs[0].memory() == runs[1].memory()
    runs[1].step(5)  # without the graph, which goes on from there
    runs[0].step(5)
    runs[1].set_gradients(6)
    graph.replay()
    runs[0].step(6)
    assert runs[0].memory() == runs[1].memory()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_graph_needs_counts_on_the_gpu(torch):  # noqa: F811
    run = Run(torch, "cuda", "adam")
    run.step(0)
    before = run.memory()
    with (
        pytest.raises(RuntimeError, match="make the optimizer with capturable=True"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        run.optimizer.step()
    assert run.memory() == before


@every_kind
def test_parameters_without_a_gradient_keep_their_counts(kind, torch):  # noqa: F811
    runs = runs_of(torch, kind, fused=True)
    for seed, without in enumerate(((1,), (), (2,), (0, 1), (0, 1, 2, 3), ())):
        for run in runs:
            run.step(seed, without=without)
        assert runs[0].memory() == runs[1].memory()


@pytest.mark.parametrize("theirs", [{"capturable": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
def test_state_goes_to_pytorch_and_back(kind, theirs, torch):  # noqa: F811
    name, options = KINDS[kind]
    ours = Run(torch, "cuda", kind, **theirs)
    for seed in range(3):
        ours.step(seed)
    params = [torch.nn.Parameter(p.detach().clone()) for p in ours.params]
    reference = getattr(torch.optim, name)(params, lr=0.01, **options, **theirs)
    reference.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    for seed in range(3, 6):
        ours.step(seed)
        for own, param in zip(ours.params, params, strict=True):
            param.grad = own.grad.clone()
        reference.step()
    torch.testing.assert_close(ours.params, params, rtol=1e-5, atol=1e-7)
    ours.optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    ours.step(6)
    for param, entry in ours.optimizer.state.items():
        assert entry["step"].device == param.device
        assert (entry["step"].item(), entry["step"].shape) == (7, ())
