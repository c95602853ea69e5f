"""What changes between two steps of `fusedstep.torch` on tensors that the step before has seen."""

from __future__ import annotations

import copy
import types
import weakref

import numpy as np
import pytest

import fusedstep as fs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
fst = pytest.importorskip("fusedstep.torch")

SHAPES = ((6, 6), (7,), (), (0, 3), (2, 3, 1))


def parameters():
    generator = torch.Generator().manual_seed(3)
    params = []
    for shape in SHAPES:
        params.append(torch.nn.Parameter(torch.randn(shape, generator=generator)))
        params[-1].grad = torch.randn(shape, generator=generator)
    return params


def exchange_gradients(optimizer, params):
    for p in params:
        p.grad = p.grad * 2


def write_gradients(optimizer, params):
    for p in params:
        p.grad.mul_(-3)


def exchange_memory_of_gradients(optimizer, params):
    for p in params:
        p.grad.data = p.grad.data + 1


def exchange_storage_of_a_gradient(optimizer, params):
    params[0].grad.set_(params[0].grad.t().contiguous().view(-1).clone().view(6, 6))


def transpose_a_gradient(optimizer, params):
    params[0].grad = params[0].grad.t()


def transpose_memory_of_a_gradient(optimizer, params):
    params[0].grad.data = params[0].grad.data.t()


def expand_a_gradient(optimizer, params):
    params[1].grad = torch.tensor(0.5).expand(7)


def negate_a_gradient(optimizer, params):
    params[2].grad.data = torch.complex(torch.tensor(1.0), torch.tensor(2.0)).conj().imag


def leave_a_gradient_out(optimizer, params):
    params[1].grad = None


def leave_a_step_out(optimizer, params):
    params[1].grad, grad = None, params[1].grad
    optimizer.step()
    params[1].grad = grad


def leave_the_first_step_out(optimizer, params):
    params[0].grad, grad = None, params[0].grad
    optimizer.step()
    params[0].grad = grad


def exchange_memory(optimizer, params):
    for p in params:
        p.data = p.data + 1


def transpose_memory(optimizer, params):
    params[0].data = params[0].data.t()


def exchange_storage(optimizer, params):
    with torch.no_grad():
        params[0].set_(params[0].clone())


def write_parameters(optimizer, params):
    with torch.no_grad():
        for p in params:
            p.add_(1)


def swap_tensors(optimizer, params):
    for p in params:
        other = torch.nn.Parameter(p.detach() + 1)
        other.grad = p.grad * 2
        torch.utils.swap_tensors(p, other)


def swap_for_aliases(optimizer, params):
    for p in params:
        other = torch.nn.Parameter(p.data)  # the same memory, a version counter of its own
        other.grad = p.grad
        torch.utils.swap_tensors(p, other)


def exchange_state(optimizer, params):
    for p in params:
        entry = optimizer.state[p]
        entry["exp_avg"] = entry["exp_avg"] + 1


def exchange_entry(optimizer, params):
    optimizer.state[params[1]] = copy.deepcopy(optimizer.state[params[1]])


def forget_state(optimizer, params):
    del optimizer.state[params[0]]


def set_a_count(optimizer, params):
    optimizer.state[params[1]]["step"].fill_(20)


def set_the_last_count(optimizer, params):
    optimizer.state[params[-1]]["step"].fill_(20)


def set_counts_back(optimizer, params):
    for p in params:
        optimizer.state[p]["step"].zero_()


def reorder(optimizer, params):
    optimizer.param_groups[0]["params"].reverse()


def replace_a_parameter(optimizer, params):
    grad = params[0].grad
    params[0] = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(6, 6))
    params[0].grad = grad


def set_lr(optimizer, params):
    optimizer.param_groups[0]["lr"] = 0.5


def add_a_group(optimizer, params):
    params.append(torch.nn.Parameter(torch.ones(5)))
    params[-1].grad = torch.ones(5)
    optimizer.add_param_group({"params": params[-1:], "lr": 0.25})


CHANGES = (
    exchange_gradients, write_gradients, exchange_memory_of_gradients,
    exchange_storage_of_a_gradient, transpose_a_gradient, transpose_memory_of_a_gradient,
    expand_a_gradient, negate_a_gradient, leave_a_gradient_out, leave_a_step_out,
    leave_the_first_step_out, exchange_memory, transpose_memory, exchange_storage,
    write_parameters, swap_tensors, swap_for_aliases, exchange_state, exchange_entry,
    forget_state, set_a_count, set_the_last_count, set_counts_back, reorder,
    replace_a_parameter, set_lr, add_a_group,
)  # fmt: skip


@pytest.fixture(params=[True, False], ids=["known", "unknown"])
def pytorch(request, monkeypatch):
    """PyTorch with tensors as they are known to be, and with others, of which arrays are made."""
    if not request.param:
        monkeypatch.setattr(torch, "empty", lambda *_, **__: types.SimpleNamespace(_cdata=1))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_seen(change, pytorch):
    ours, theirs = parameters(), parameters()
    optimizer = fst.AdamW(ours, lr=0.1)
    reference = torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    for params, own in ((ours, optimizer), (theirs, reference)):
        own.step()
        own.step()
        change(own, params)
        for _ in range(3):
            before = [p._version for p in params]
            own.step()
            if own is optimizer:
                stepped = [p.grad is not None for p in params]
                assert [p._version - b for p, b in zip(params, before, strict=True)] == stepped
    assert len(optimizer.state) == len(reference.state)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
        entry, expected = optimizer.state[p], reference.state[q]
        assert entry.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(entry[key], value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (lambda params: torch.ones(2, 3, 1).to_sparse(), "sparse"),
        (lambda params: params[0].data[0].view(2, 3, 1), "overlap"),
    ],
    ids=["sparse", "memory of a parameter"],
)
def test_a_refused_step_leaves_no_trace(gradient, message):
    params = parameters()
    optimizer = fst.AdamW(params)
    optimizer.step()
    optimizer.step()
    params[-1].grad = None
    params[-1].grad = gradient(params)
    before = [(p.detach().clone(), p._version) for p in params]
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    for p, (values, version) in zip(params, before, strict=True):
        assert torch.equal(p, values)
        assert p._version == version
    after = optimizer.state_dict()
    assert after.keys() == state.keys()
    for index, entry in state["state"].items():
        for key, value in entry.items():
            assert torch.equal(after["state"][index][key], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:.*step smaller than the spacing:UserWarning")
def test_a_usual_step_makes_nothing_anew(dtype, monkeypatch):
    params = parameters()
    for p in params:
        p.data, p.grad = p.data.to(dtype), None
        p.grad = torch.ones_like(p)
    arrays = []
    make_array = fst._array
    monkeypatch.setattr(fst, "_array", lambda tensor: arrays.append(tensor) or make_array(tensor))
    optimizer = fst.AdamW(params)
    optimizer.step()
    assert arrays
    arrays.clear()
    native = optimizer._native
    for _ in range(3):
        optimizer.step()
        for p in params:
            p.grad = p.grad.clone()
    assert optimizer._native is native
    assert not arrays


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(
    "sizes", [[5], [64] * 2000, [2**20 + 1]], ids=["one thread", "shared", "without the GIL"]
)
def test_a_step_is_counted_once_and_raises_each_version_once(sizes, threads):
    fs.set_num_threads(threads)
    params = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer = fst.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p._version for p in params]
    for _ in range(20):
        optimizer.step()
    assert {p._version - version for p, version in zip(params, before, strict=True)} == {20}
    assert all(optimizer.state[p]["step"] == 21 for p in params)
    assert all(torch.equal(p, p[:1].expand_as(p)) for p in params)
    assert len({p[0].item() for p in params}) == 1


def test_versions_that_cannot_be_raised(monkeypatch):
    """They say so, and the step that was taken is not taken again."""

    def refuse(_):
        raise RuntimeError("no versions")

    params, expected = parameters(), parameters()
    monkeypatch.setattr(torch._C, "_increment_version", refuse)
    optimizer = fst.AdamW(params)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no versions"):
            optimizer.step()
    monkeypatch.undo()
    reference = fst.AdamW(expected)
    for _ in range(2):
        reference.step()
    assert all(map(torch.equal, params, expected))


@pytest.mark.parametrize("odd", [0, 150, 299])
def test_one_of_many_has_taken_another_number_of_steps(odd):
    ours, theirs = ([torch.nn.Parameter(torch.ones(64)) for _ in range(300)] for _ in range(2))
    optimizer, reference = fst.AdamW(ours), torch.optim.AdamW(theirs, foreach=False)
    for params, own in ((ours, optimizer), (theirs, reference)):
        for left_out in (False, True, False, False):
            for i, p in enumerate(params):
                p.grad = None if left_out and i == odd else torch.ones(64)
            own.step()
        counts = [int(own.state[p]["step"]) for p in params]
        assert counts == [4 - (i == odd) for i in range(300)]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=0)


def add_to(optimizer, param):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})


def fail_to_step(optimizer, param):
    param.grad = param.data
    with pytest.raises(ValueError, match="overlap"):
        optimizer.step()
    param.grad = None


@pytest.mark.parametrize("forget", [add_to, fail_to_step])
def test_memory_that_a_parameter_leaves_is_not_kept(forget):
    array = np.ones(1000, np.float32)
    left = weakref.ref(array)
    param = torch.nn.Parameter(torch.from_numpy(array))
    del array
    param.grad = torch.ones(1000)
    optimizer = fst.AdamW([param])
    optimizer.step()
    forget(optimizer, param)
    assert left() is not None
    param.data = torch.ones(1000)
    assert left() is None


@pytest.mark.parametrize("state", [None, "bfloat16"])
def test_a_default_device_is_not_where_steps_are_counted(state):
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    saved = {"step": 2.0, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    with torch.device("meta"):
        optimizer = fst.AdamW([param], state_dtype=state)
        optimizer.step()
        assert optimizer.state[param]["step"].item() == 1
        optimizer.state[param] = saved
        optimizer.step()
        assert optimizer.state[param]["step"].item() == 3
