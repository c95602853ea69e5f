"""`fusedstep.torch` against `torch.optim`, on the inputs of PyTorch's own optimizer tests."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

import fusedstep as fs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
fst = pytest.importorskip("fusedstep.torch")
NAMES = ("SGD", "Adam", "AdamW")
# A step's rounding differs from PyTorch's: relative to the largest element, after 10 steps.
CLOSE = {torch.float32: 2e-6, torch.float64: 1e-14}


def network(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv1d(3, 5, 2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(20, 4)
    ).to(dtype)


def train(model, optimizer, steps=10, after=lambda: None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    losses = []
    for _ in range(steps):
        data = torch.randn(6, 3, 5, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        loss = (model(data) ** 2).mean()
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.item())
    return losses


def assert_close(ours, theirs):
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        scale = q.abs().max().item()
        assert (p - q).abs().max().item() <= CLOSE[p.dtype] * scale


def assert_same(ours, theirs):
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def pair(name, dtype=torch.float32, **options):
    """Return our model and optimizer, and PyTorch's."""
    ours, theirs = network(dtype), network(dtype)
    return (
        (ours, getattr(fst, name)(ours.parameters(), **options)),
        (theirs, getattr(torch.optim, name)(theirs.parameters(), **options)),
    )


def torch_inputs(name, kind, *arguments):
    inputs = pytest.importorskip(
        "torch.testing._internal.common_optimizers", reason="needs expecttest", exc_type=ImportError
    )
    return getattr(inputs, f"optim_{kind}_func_{name.lower()}")(*arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pytorchs_own_inputs(name, dtype):
    inputs = torch_inputs(name, "inputs", "cpu")
    assert len(inputs) >= 5
    for given in inputs:
        (ours, optimizer), (theirs, reference) = pair(name, dtype, **given.kwargs)
        train(ours, optimizer)
        train(theirs, reference)
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_pytorchs_own_inputs_for_graphs(name):
    inputs = [given.kwargs for given in torch_inputs(name, "inputs", "cuda")]
    inputs = [kwargs for kwargs in inputs if kwargs.pop("capturable", False)]
    assert len(inputs) >= 5
    for kwargs in inputs:
        param = torch.zeros(2)
        optimizer = getattr(fst, name)([param], capturable=True, **kwargs)
        param.grad = torch.ones(2)
        with pytest.raises(ValueError, match=r"params\[0\]\[0\]: in host memory, but capturable"):
            optimizer.step()
        assert not optimizer.state
        assert not param.any()
        # Among them are tensors of several dimensions, which PyTorch takes for its graphs alone.
        (ours, optimizer), (theirs, reference) = pair(name)
        for key, value in kwargs.items():
            optimizer.param_groups[0][key] = value
            plain = [float(v) for v in value] if isinstance(value, tuple) else float(value)
            reference.param_groups[0][key] = plain
        train(ours, optimizer)
        train(theirs, reference)
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_pytorchs_own_errors(name):
    errors = torch_inputs(name, "error_inputs", "cpu", torch.float32)
    assert len(errors) >= 6
    for given in errors:
        wrong = given.optimizer_error_input
        params = [torch.zeros(2)] if wrong.params is None else wrong.params
        if wrong.desc == "betas must be either both floats or both Tensors" and "foreach" not in (
            wrong.kwargs
        ):
            getattr(fst, name)(params, **wrong.kwargs)  # there is no reason to refuse them
            continue
        named = "|".join(wrong.kwargs) or "param"
        with pytest.raises((TypeError, ValueError, given.error_type), match=named):
            getattr(fst, name)(params, **wrong.kwargs)


OPTIONS = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"lr": torch.tensor(0.1), "maximize": True}),
    ("Adam", {"lr": torch.tensor(0.01), "weight_decay": 0.1}),
    ("Adam", {"betas": (0.3, 0.9), "amsgrad": True}),
    ("Adam", {"betas": (torch.tensor(0.8), torch.tensor(0.9))}),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01, "maximize": True, "amsgrad": True}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_state_goes_both_ways(name, options):
    (ours, optimizer), (theirs, reference) = pair(name, **options)
    train(ours, optimizer)
    train(theirs, reference)
    assert_close(ours, theirs)
    mine, other = optimizer.state_dict(), reference.state_dict()
    assert mine["param_groups"][0].keys() == other["param_groups"][0].keys()
    for i, entry in other["state"].items():
        assert list(mine["state"][i]) == list(entry)
        for key, value in entry.items():
            assert mine["state"][i][key].dtype == value.dtype
            torch.testing.assert_close(mine["state"][i][key], value, rtol=1e-4, atol=1e-7)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    optimizer.load_state_dict(copy.deepcopy(other))
    reference.load_state_dict(copy.deepcopy(other))
    train(ours, optimizer, seed=2)
    train(theirs, reference, seed=2)
    assert_close(ours, theirs)
    optimizer_2 = getattr(torch.optim, name)(theirs.parameters(), **options)
    theirs.load_state_dict(ours.state_dict())
    optimizer_2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(ours, optimizer, seed=3)
    train(theirs, optimizer_2, seed=3)
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_of_numpy(name, dtype):
    options = {"momentum": 0.9, "lr": 0.1} if name == "SGD" else {"weight_decay": 0.1}
    params = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in ((), (3,), (4, 5), (0, 2))]
    arrays = [p.detach().numpy().copy() for p in params]
    optimizer = getattr(fst, name)(params, **options)
    reference = getattr(fs, name)(arrays, **options)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        reference.step([p.grad.numpy() for p in params])
    for p, array in zip(params, arrays, strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), array)


@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "8bit"])
@pytest.mark.parametrize("master_weights", ["float32", "correction16", "correction8", "stochastic"])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_bits_of_numpy(name, state_dtype, master_weights):
    options = {"state_dtype": state_dtype, "master_weights": master_weights, "seed": 3}
    if name == "SGD":
        options["momentum"] = 0.9
    params = [torch.nn.Parameter(torch.randn(s).bfloat16()) for s in ((200,), (4, 5))]
    arrays = [as_array(p).copy() for p in params]
    optimizer = getattr(fst, name)(params, lr=0.1, **options)
    reference = getattr(fs, name)(arrays, lr=0.1, **options)
    for step in range(8):
        for p in params:
            p.grad = torch.randn_like(p)
        if step == 4:  # saved and loaded, or pickled, the state keeps its dtypes and bits
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = getattr(fst, name)(params, lr=0.1, **options)
            optimizer.load_state_dict(saved)
        optimizer.step()
        reference.step([as_array(p.grad) for p in params])
    for p, array in zip(params, arrays, strict=True):
        np.testing.assert_array_equal(as_array(p).view(np.uint16), array.view(np.uint16))
    for entry, expected in zip(optimizer.state.values(), reference.state.values(), strict=True):
        for key, value in entry.items():
            if key == "step":
                assert value == expected["step"]
            else:
                np.testing.assert_array_equal(as_array(value), expected[key])


def as_array(tensor):
    import ml_dtypes

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def two(lrs, o):
    return [lrs.ConstantLR(o, 0.5, total_iters=3), lrs.ExponentialLR(o, 0.9)]


SCHEDULERS = {
    "LambdaLR": lambda lrs, o: lrs.LambdaLR(o, lambda i: 0.9**i),
    "MultiplicativeLR": lambda lrs, o: lrs.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda lrs, o: lrs.StepLR(o, 3),
    "MultiStepLR": lambda lrs, o: lrs.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda lrs, o: lrs.ConstantLR(o, 0.5, total_iters=4),
    "LinearLR": lambda lrs, o: lrs.LinearLR(o, total_iters=5),
    "ExponentialLR": lambda lrs, o: lrs.ExponentialLR(o, 0.9),
    "SequentialLR": lambda lrs, o: lrs.SequentialLR(o, two(lrs, o), milestones=[4]),
    "CosineAnnealingLR": lambda lrs, o: lrs.CosineAnnealingLR(o, 4),
    "ChainedScheduler": lambda lrs, o: lrs.ChainedScheduler(two(lrs, o)),
    "ReduceLROnPlateau": lambda lrs, o: lrs.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda lrs, o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda lrs, o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda lrs, o: lrs.OneCycleLR(o, 0.1, total_steps=12),
    "PolynomialLR": lambda lrs, o: lrs.PolynomialLR(o, total_iters=8),
    "SWALR": lambda lrs, o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=4),
}


def test_every_scheduler_is_tested():
    lrs = torch.optim.lr_scheduler
    assert {*lrs.__all__, "SWALR"} - {"LRScheduler"} == set(SCHEDULERS)


# In 2.7 and 2.8 PyTorch's own SequentialLR gives it.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(name, scheduler, tensor_lr):
    options = {"momentum": 0.9} if name == "SGD" else {}
    # PyTorch computes a step's scalars in the type of a tensor lr.
    dtype = torch.float32 if tensor_lr else torch.float64
    (ours, optimizer), (theirs, reference) = pair(name, dtype, **options)
    for own in (optimizer, reference):
        own.param_groups[0]["lr"] = torch.tensor(0.05) if tensor_lr else 0.05
    rates = [], []
    for model, own, seen in zip((ours, theirs), (optimizer, reference), rates, strict=True):
        schedule = SCHEDULERS[scheduler](torch.optim.lr_scheduler, own)
        arguments = [1.0] if scheduler == "ReduceLROnPlateau" else []  # a loss that stays

        def after(schedule=schedule, arguments=arguments, own=own, seen=seen):
            schedule.step(*arguments)
            seen.append(float(own.param_groups[0]["lr"]))

        train(model, own, after=after)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    assert_close(ours, theirs)


def test_hooks_closures_and_groups():
    (ours, optimizer), (theirs, reference) = pair("AdamW")
    calls = []
    for own in (optimizer, reference):
        own.register_step_pre_hook(lambda *_: calls.append("before"))
        own.register_step_post_hook(lambda *_: calls.append("after"))
    late = [torch.nn.Parameter(torch.ones(7)) for _ in range(2)]
    for model, own, extra in ((ours, optimizer, late[0]), (theirs, reference, late[1])):
        train(model, own, 2)
        own.add_param_group({"params": [extra], "lr": 0.5})
        extra.grad = torch.arange(7.0)

        def closure(model=model, extra=extra):
            loss = sum((p**2).sum() for p in model.parameters())
            for p in model.parameters():
                p.grad = None
            loss.backward()
            return loss

        assert own.step(closure).item() > 0
    assert calls == ["before", "after"] * 6
    assert_close(ours, theirs)
    assert torch.allclose(*late)
    assert late[0][1] != 1


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_state_dicts(name):
    calls = {}
    for library in (fst, torch.optim):
        model = network()
        optimizer = getattr(library, name)(model.parameters(), lr=0.01)
        seen = calls[library] = []

        def halved(_, saved, seen=seen):
            seen.append("before load")
            groups = [{**group, "lr": group["lr"] / 2} for group in saved["param_groups"]]
            return {**saved, "param_groups": groups}

        optimizer.register_state_dict_pre_hook(lambda _, s=seen: s.append("before save"))
        optimizer.register_state_dict_post_hook(lambda _, d: {**d, "more": len(d)})
        optimizer.register_load_state_dict_pre_hook(halved)
        optimizer.register_load_state_dict_post_hook(lambda _, s=seen: s.append("after load"))
        train(model, optimizer, 2)
        saved = optimizer.state_dict()
        assert saved["more"] == 2
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.005
        train(model, optimizer, 2)
    assert calls[fst] == calls[torch.optim] == ["before save", "before load", "after load"]


def test_global_hooks_and_profiles():
    from torch.optim import optimizer as hooks

    seen = []
    handles = [
        hooks.register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        hooks.register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ]
    model = network()
    optimizer = fst.AdamW(model.parameters())
    try:
        train(model, optimizer, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["before", "after"]
    with torch.autograd.profiler.profile() as profile:
        train(model, optimizer, 1)
    assert "Optimizer.step#AdamW.step" in [event.name for event in profile.function_events]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    model = network()
    optimizer = fst.SGD(model.parameters(), momentum=0.9)
    train(model, optimizer, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in model.parameters():
        assert p.grad is None if set_to_none else not p.grad.any()


def test_gradients_of_none_leave_parameters():
    (ours, optimizer), (theirs, reference) = pair("Adam")
    for model, own in ((ours, optimizer), (theirs, reference)):
        first = next(model.parameters())
        first.requires_grad_(False)
        train(model, own, 3)
        assert first not in own.state
        first.requires_grad_(True)
        train(model, own, 3)
        assert own.state[first]["step"] == 3
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(name, fused):
    (ours, optimizer), (theirs, reference) = pair(name, fused=fused)
    for model, own in ((ours, optimizer), (theirs, reference)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i in range(6):
            own.zero_grad()
            data = torch.full((2, 3, 5), float("inf") if i == 3 else 0.1 * i + 0.1)
            scaler.scale((model(data) ** 2).mean()).backward()
            if i % 2:
                scaler.unscale_(own)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(own)
            scaler.update()
        assert scaler.get_scale() == 512
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_by_themselves(name, copied):
    model = network()
    optimizer = getattr(fst, name)(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    model_2, optimizer_2 = copied((model, optimizer))
    assert train(model, optimizer, seed=5) == train(model_2, optimizer_2, seed=5)
    assert_same(model, model_2)


def test_moved_parameters_and_state_are_seen():
    (ours, optimizer), (theirs, reference) = pair("AdamW")
    for model, own in ((ours, optimizer), (theirs, reference)):
        train(model, own, 2)
        for p in model.parameters():
            p.data = p.data.clone()
        train(model, own, 2)
        for entry in own.state.values():
            entry["exp_avg"] = torch.zeros_like(entry["exp_avg"])
            entry["step"].fill_(20)
        train(model, own, 2)
        own.state.clear()
        train(model, own, 2)
        own.param_groups[0]["params"].pop()
        train(model, own, 2)
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_saved_as_pytorch_saves(name):
    (ours, optimizer), (theirs, reference) = pair(name)
    train(ours, optimizer, 3)
    train(theirs, reference, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    reference.load_state_dict(torch.load(file, weights_only=True))
    for model, own in ((ours, optimizer), (theirs, reference)):
        train(model, own, 3, seed=4)
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_load_changes_nothing(name):
    model = network()
    optimizer = getattr(fst, name)(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    wrong["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(wrong)
    torch.testing.assert_close(optimizer.state_dict(), before)


def averaged(model):
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_compiled_models():
    (ours, optimizer), (theirs, reference) = pair("AdamW")
    train(torch.compile(ours, backend="eager"), optimizer)
    train(torch.compile(theirs, backend="eager"), reference)
    assert_close(ours, theirs)


def test_averaged_models():
    (ours, optimizer), (theirs, reference) = pair("AdamW", lr=0.01)
    averages = averaged(ours), averaged(theirs)
    train(ours, optimizer, after=lambda: averages[0].update_parameters(ours))
    train(theirs, reference, after=lambda: averages[1].update_parameters(theirs))
    assert_close(*averages)
    assert not torch.equal(next(averages[0].parameters()), next(ours.parameters()))


def test_parameters_of_two_modules():
    ours, theirs = ((torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for _ in range(2))
    for pair_of_layers, library in ((ours, fst), (theirs, torch.optim)):
        torch.manual_seed(0)
        for layer in pair_of_layers:
            layer.reset_parameters()
        pair_of_layers[1].weight = pair_of_layers[0].weight
        model = torch.nn.Sequential(*pair_of_layers)
        optimizer = library.AdamW(model.parameters())
        for _ in range(4):
            optimizer.zero_grad()
            (model(torch.ones(3, 4)) ** 2).sum().backward()
            optimizer.step()
        assert len(optimizer.state) == 3
    assert_close(torch.nn.Sequential(*ours), torch.nn.Sequential(*theirs))


def test_stepped_inside_the_backward_pass():
    (ours, _), (theirs, reference) = pair("SGD", lr=0.1)
    for p in ours.parameters():
        own = fst.SGD([p], lr=0.1)

        def step(p, own=own):
            own.step()
            own.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    train(ours, torch.optim.SGD([torch.zeros(1)]))
    train(theirs, reference)
    assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_parameters():
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 2))
    optimizer = fst.AdamW(model.parameters())
    optimizer.step()
    model(torch.ones(4, 5)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 2)])
def test_gradients_that_are_negative_views(shape):
    """Their memory holds the negative of what they are; autograd makes them of one element."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    q = torch.nn.Parameter(torch.zeros(shape))
    optimizer, reference = fst.SGD([p], lr=1.0), torch.optim.SGD([q], lr=1.0)
    for step in range(3):
        grad = torch.randn(shape)
        if step > 0:
            grad = torch.complex(grad, grad).conj().imag
            assert grad.is_neg()
        p.grad = q.grad = grad
        optimizer.step()
        reference.step()
    assert torch.equal(p, q)
    p.data = torch.complex(p.data, p.data).conj().imag
    with pytest.raises(TypeError, match=r"params\[0\]\[0\]: a view .* resolve_neg"):
        optimizer.step()


def test_inference_mode():
    with torch.inference_mode():
        made_there = torch.ones(3)
    normal = torch.ones(3, requires_grad=True)
    for p in (made_there, normal):
        optimizer = fst.AdamW([p], lr=0.1)
        with torch.inference_mode():
            p.grad = torch.ones(3)
            optimizer.step()
        assert (p < 1).all()
        assert not any(value.is_inference() for value in optimizer.state[p].values())
        p.grad = torch.ones(3)
        before = p.detach().clone()
        if p is normal:
            optimizer.step()
            assert (p < before).all()
        else:
            with pytest.raises(RuntimeError, match=r"params\[0\]\[0\]: made in inference mode"):
                optimizer.step()
            assert torch.equal(p, before)


def test_layouts():
    for make in (
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(6, 4).t(),
        lambda: torch.randn(8, 6)[::2, ::3],
    ):
        torch.manual_seed(0)
        p = make().requires_grad_()
        q = p.detach().clone().requires_grad_()
        optimizer, reference = fst.Adam([p]), torch.optim.Adam([q])
        for _ in range(3):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            optimizer.step()
            reference.step()
        torch.testing.assert_close(p, q)


def test_autograd_sees_the_step():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fst.SGD([p], lr=0.1)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.zeros(2, dtype=torch.complex64), r"params\[0\]\[0\]: torch.complex64"),
        (torch.zeros(2).to_sparse(), r"params\[0\]\[0\]: .*only dense"),
        (torch.zeros(2, device="meta"), r"params\[0\]\[0\]: on device 'meta'"),
        (
            torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
            r"params\[0\]\[0\]: a nested tensor; only dense",
        ),
        (torch._neg_view(torch.ones(2)), r"params\[0\]\[0\]: a view .* resolve_neg"),
        (torch.zeros(2, dtype=torch.int32), r"params\[0\]\[0\]: int32"),
    ],
)
def test_refused_parameters(param, message):
    with pytest.raises(TypeError, match=message):
        fst.Adam([param])
    optimizer = fst.Adam([torch.zeros(2)])
    with pytest.raises(TypeError, match=message.replace("[0", "[1", 1)):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("before", [0, 2])
def test_refused_gradients_change_nothing(before):
    params = {"a": torch.ones(3, requires_grad=True), "b": torch.ones(4, requires_grad=True)}
    optimizer = fst.Adam(params.items())
    for _ in range(before):
        for p in params.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
    saved = copy.deepcopy(([*params.values()], optimizer.state_dict()["state"]))
    params["b"].grad = torch.ones(4).to_sparse()
    params["a"].grad = torch.ones(3)
    with pytest.raises(TypeError, match=r"grads\[0\]\['b'\]: .*only dense"):
        optimizer.step()
    params["b"].grad = params["b"].detach()
    with pytest.raises(ValueError, match="overlap"):
        optimizer.step()
    torch.testing.assert_close(([*params.values()], optimizer.state_dict()["state"]), saved)


@pytest.mark.parametrize("name", NAMES)
def test_ways_to_step(name):
    kind = getattr(fst, name)
    accepted = inspect.signature(getattr(torch.optim, name)).parameters
    assert [key for key in inspect.signature(kind).parameters if key in accepted] == [*accepted]
    for way in {"foreach", "capturable", "differentiable", "fused"} & set(accepted):
        kind([torch.zeros(2)], **{way: False})
        with pytest.raises(TypeError, match=f"{way}: expected True, False or None, got 2"):
            kind([torch.zeros(2)], **{way: 2})
        if way in ("fused", "capturable"):
            continue
        for params in ([torch.zeros(2)], [{"params": [torch.zeros(2)], way: True}]):
            options = {} if isinstance(params[0], dict) else {way: True}
            with pytest.raises(ValueError, match=f"{way}=True: not supported"):
                kind(params, **options)


def test_an_old_pytorch_is_refused_by_name():
    code = "import torch; torch.__version__ = '2.6.0+cpu'; import fusedstep.torch"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "fusedstep.torch needs PyTorch 2.7 or newer, not 2.6.0+cpu"
    assert result.stderr.rstrip().endswith(f"ImportError: {message}")


def test_fusedstep_does_not_import_torch():
    code = "import sys, fusedstep; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
