"""A hundred steps beside PyTorch's optimizers, with every combination of the options both have."""

import pickle

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


ADAM_SAVED = [
    {"foreach": True},
    {"fused": True, "maximize": True},
    {"amsgrad": True, "betas": (0.3, 0.9)},
    {"lr": torch.tensor(0.02, dtype=torch.float64), "weight_decay": 0.1},
]
SGD_SAVED = [
    {"weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.5, "maximize": True},
    {"momentum": 0.9, "nesterov": True, "fused": True},
    {"momentum": 0.5, "lr": torch.tensor(0.02, dtype=torch.float64), "foreach": True},
]
SAVED = [(name, options) for name in ("Adam", "AdamW") for options in ADAM_SAVED]
SAVED += [("SGD", options) for options in SGD_SAVED]


@pytest.mark.parametrize(("name", "options"), SAVED, ids=str)
def test_arrays_go_on_from_what_pytorch_saved(name, options):
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal(s) for n, s in (("a", (4, 3)), ("b", 5), ("unused", 2))}
    tensors = {n: torch.nn.Parameter(torch.from_numpy(a.copy())) for n, a in params.items()}
    reference = getattr(torch.optim, name)(tensors.items(), **options)
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
    # What decides which state there is has to be the same.
    own = {key: value for key, value in options.items() if key in ("amsgrad", "momentum")}
    optimizer = getattr(fs, name)(params, **own)
    optimizer.load_state_dict(reference.state_dict())
    counted = int("momentum" in options) if name == "SGD" else 3  # SGD counts no steps
    assert [entry["step"] for entry in optimizer.state.values()] == [counted, counted, 0]
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


def test_a_momentum_of_none_which_older_pytorch_saved_is_none():
    saved = torch.optim.SGD([torch.ones(3)], lr=0.5).state_dict()
    saved["state"] = {0: {"momentum_buffer": None}}
    for options in ({}, {"momentum": 0.9}):
        optimizer = fs.SGD([np.ones(3)], **options)
        saved["param_groups"][0]["momentum"] = options.get("momentum", 0)
        optimizer.load_state_dict(saved)
        assert optimizer.state[0]["step"] == 0
        assert optimizer.param_groups[0]["lr"] == 0.5


def without_momentum(saved):
    saved["param_groups"][0]["momentum"] = 0.0


def with_entry(**entry):
    return lambda saved: saved["state"][1].update(entry)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (without_momentum, ValueError, "make it with the same momentum"),
        (lambda saved: saved["param_groups"][0].update(elsewhere=1), ValueError, "'elsewhere'"),
        (lambda saved: saved["param_groups"][0].update(momentum=-1.0), ValueError, "momentum"),
        (lambda saved: saved["param_groups"][0].pop("nesterov"), ValueError, "no 'nesterov'"),
        (lambda saved: saved["param_groups"][0]["params"].pop(), ValueError, "1 parameters"),
        (lambda saved: saved["state"].update({1: None}), TypeError, "state.1.: expected a dict"),
        (with_entry(momentum_buffer=torch.ones(5)), ValueError, "shape"),
        (with_entry(momentum_buffer=torch.ones(4, dtype=torch.float64)), TypeError, "float64"),
        (with_entry(momentum_buffer=None, step=1), ValueError, "no 'momentum_buffer'"),
        (with_entry(step=-1), ValueError, "step: "),
        (with_entry(exp_avg=torch.ones(4)), ValueError, "'exp_avg' is no state of this GD"),
    ],
)
def test_state_of_pytorchs_sgd_that_does_not_fit_changes_nothing(change, error, text):
    tensors = [torch.nn.Parameter(torch.ones(n)) for n in (3, 4)]
    reference = torch.optim.SGD(tensors, lr=0.1, momentum=0.9)
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    reference.step()
    optimizer = fs.SGD([np.ones(n, np.float32) for n in (3, 4)], lr=0.5, momentum=0.5)
    optimizer.step([np.full(n, 2, np.float32) for n in (3, 4)])
    saved = reference.state_dict()
    change(saved)
    before = pickle.dumps(optimizer)
    with pytest.raises(error, match=text):
        optimizer.load_state_dict(saved)
    assert pickle.dumps(optimizer) == before
