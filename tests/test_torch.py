"""A hundred steps beside PyTorch's optimizers, with every combination of the options both have."""

import numpy as np
import pytest
from helpers import GD_CHOICES, combinations, describe

import fusedstep as fs
from fusedstep import narrow

torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")

SIZE = 1003
STEPS = 100
# |mine - theirs| <= TOLERANCE * epsilon * (1 + |theirs|), the 1 for sums of terms of that size that
# cancel. Measured: 6.5 for SGD, 2 for Adam and AdamW.
TOLERANCE = 10

GD_OPTIONS = combinations(**GD_CHOICES)
ADAM_OPTIONS = combinations(
    betas=((0.9, 0.999), (0.3, 0.95), (0.0, 0.99)),
    eps=(1e-8, 1e-3),
    weight_decay=(0.0, 0.1),
    amsgrad=(False, True),
    maximize=(False, True),
)
CASES = [("SGD", options) for options in GD_OPTIONS]
CASES += [(name, options) for name in ("Adam", "AdamW") for options in ADAM_OPTIONS]


@pytest.fixture(autouse=True)
def _one_torch_thread():
    """Keep PyTorch's threads from spinning against each other where cores are few."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("implementation", ["default", "foreach", "fused"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=describe)
def test_agrees_with_pytorch(name, options, implementation, dtype):
    rng = np.random.default_rng(0)
    theirs = torch.nn.Parameter(torch.from_numpy(rng.standard_normal(SIZE).astype(dtype)))
    mine = theirs.detach().numpy().copy()
    chosen = {} if implementation == "default" else {implementation: True}
    torch_optimizer = getattr(torch.optim, name)([theirs], lr=0.01, **options, **chosen)
    optimizer = getattr(fs, name)(mine, lr=0.01, **options)
    for _ in range(STEPS):
        g = rng.standard_normal(SIZE).astype(dtype)
        theirs.grad = torch.from_numpy(g.copy())  # foreach Nesterov writes to it
        torch_optimizer.step()
        optimizer.step(g)

    close = dict.fromkeys(("rtol", "atol"), TOLERANCE * np.finfo(dtype).eps)
    np.testing.assert_allclose(mine, theirs.detach().numpy(), **close)
    torch_state = {k: s for k, s in torch_optimizer.state.get(theirs, {}).items() if s is not None}
    step = torch_state.pop("step", torch.tensor(STEPS))
    state = optimizer.state[0]
    assert state.pop("step") == int(step) == STEPS
    assert state.keys() == torch_state.keys()
    for key, array in state.items():
        np.testing.assert_allclose(array, torch_state[key].numpy(), **close)


@pytest.mark.parametrize("transposed", [False, True])
def test_8_bit_moments_load_beside_a_tensor_as_beside_an_array(transposed):
    def zeros(library):
        array = library.zeros((3, 70), dtype=library.float32)
        return array.T if transposed else array

    saved = fs.Adam(zeros(np), state_dtype="8bit")
    saved.step(np.random.default_rng(0).standard_normal(zeros(np).shape, np.float32))
    for key in ("exp_avg", "exp_avg_sq"):
        ours, theirs = (
            narrow.converted(saved.state[0], key, {key: zeros(library)}, zeros(library), "")[key]
            for library in (np, torch)
        )
        assert ours.any()
        assert ours.tolist() == theirs.tolist()


SAVED = {
    "foreach": {"foreach": True},
    "fused": {"fused": True, "maximize": True},
    "amsgrad": {"amsgrad": True, "betas": (0.3, 0.9)},
    "tensor lr": {"lr": torch.tensor(0.02, dtype=torch.float64), "weight_decay": 0.1},
}


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("saved", SAVED)
def test_arrays_go_on_from_what_pytorch_saved(name, saved):
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal(s) for n, s in (("a", (4, 3)), ("b", 5), ("unused", 2))}
    tensors = {n: torch.nn.Parameter(torch.from_numpy(a.copy())) for n, a in params.items()}
    reference = getattr(torch.optim, name)(tensors.items(), **SAVED[saved])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(reference, 0.1, 9, cycle_momentum=False)

    def gradients():
        grads = {n: rng.standard_normal(a.shape) for n, a in params.items()}
        return {**grads, "unused": None}

    def step_reference(grads):
        for n, g in grads.items():
            tensors[n].grad = None if g is None else torch.from_numpy(g)
        reference.step()

    for _ in range(3):
        step_reference(gradients())
        scheduler.step()
    for n, tensor in tensors.items():
        params[n][...] = tensor.detach().numpy()
    optimizer = getattr(fs, name)(params, amsgrad=saved == "amsgrad")
    optimizer.load_state_dict(reference.state_dict())
    assert [entry["step"] for entry in optimizer.state.values()] == [3, 3, 0]
    for _ in range(3):
        grads = gradients()
        optimizer.step(grads)
        step_reference(grads)
    for n, tensor in tensors.items():
        np.testing.assert_allclose(params[n], tensor.detach().numpy(), rtol=1e-12, atol=1e-14)
    assert optimizer.state_dict()["param_groups"][0].keys() == {
        *optimizer.defaults, "params", "param_names",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "other"), [("Adam", "AdamW"), ("AdamW", "Adam")])
def test_what_pytorch_saved_of_another_decay_is_refused(name, other):
    reference = getattr(torch.optim, other)([torch.ones(3)])
    optimizer = getattr(fs, name)([np.ones(3)], weight_decay=0.5)
    saved = reference.state_dict()
    with pytest.raises(ValueError, match=f"decoupled_weight_decay: .*which {other} has and {name}"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    del saved["param_groups"][0]["decoupled_weight_decay"]  # as PyTorch saved before 2.7
    saved["param_groups"][0]["elsewhere"] = 1
    with pytest.raises(ValueError, match="unknown 'elsewhere'"):
        optimizer.load_state_dict(saved)
    del saved["param_groups"][0]["elsewhere"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weight_decay"] == saved["param_groups"][0]["weight_decay"]
