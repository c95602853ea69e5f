"""Offloaded optimizers of PyTorch's parameters, and steps that begin in the backward pass."""

from __future__ import annotations

import copy
import re
import threading
import time
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from offload_adversary import AdversaryDevice, CopyError  # noqa: E402

import fusedstep as fs  # noqa: E402
import fusedstep.offload  # noqa: E402
import fusedstep.torch as fst  # noqa: E402
from fusedstep.offload.torch import HostTensors, OffloadedOptimizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:params.*so that a step smaller:UserWarning")


class Net(torch.nn.Module):
    """Convolutions in channels-last order, a weight that is used twice, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.embed = torch.nn.Parameter(torch.randn(40, 288) / 17)
        self.hidden = torch.nn.Linear(40, 40)
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Any) -> Any:
        h = torch.relu(self.conv(x).flatten(1))
        return torch.tanh(self.hidden(h @ self.embed.T)) @ self.embed


def net(dtype: Any = None) -> Any:
    torch.manual_seed(0)
    return Net().to(dtype or torch.float32)


def loss_of(model: Any, t: int) -> Any:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(t))
    return model(x.to(model.embed.dtype)).square().mean()


def adversary(seed: int = 0) -> AdversaryDevice:
    return AdversaryDevice(seed, HostTensors())


def assert_same(a: Any, b: Any) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p.nan_to_num(), q.nan_to_num()), name


def made(model: Any, optimizer: Any = fs.AdamW, **options: Any) -> OffloadedOptimizer:
    options = {"bucket_bytes": 10_000, "lr": 0.01, **options}
    return OffloadedOptimizer(optimizer, model.named_parameters(), **options)


STORAGE = [
    (torch.float32, {}),
    (torch.float64, {}),
    (torch.bfloat16, {"master_weights": "float32"}),
    (torch.bfloat16, {"master_weights": "stochastic", "state_dtype": "8bit", "seed": 2}),
]


@pytest.mark.parametrize(("dtype", "storage"), STORAGE, ids=str)
@pytest.mark.parametrize("overlap", [False, True])
def test_bits_of_fusedstep_torch(overlap, dtype, storage):
    plain, ours = net(dtype), net(dtype)
    expected = fst.AdamW(plain.parameters(), lr=0.01, **storage)
    device = adversary()
    offloaded = made(ours, device=device, **storage)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (expected, offloaded)]
    for t in range(4):
        expected.zero_grad()
        offloaded.zero_grad()
        loss_of(plain, t).backward()
        if overlap:
            with offloaded.overlap():
                loss_of(ours, t).backward()
        else:
            loss_of(ours, t).backward()
        expected.step()
        assert offloaded.step() == (None, False)
        for scheduler in schedulers:
            scheduler.step()
        assert_same(ours, plain)
    assert not device.faults
    assert device.under_way == 0


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.02}, {"grad_scale": 0.5}], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_a_step_in_the_backward_pass_has_the_same_bits(options, seed):
    plain, ours = net(), net()
    expected, offloaded = made(plain, bucket_bytes=1 << 20), made(ours, device=adversary(seed))
    for t in range(3):
        expected.zero_grad()
        offloaded.zero_grad()
        for backward in range(3):  # accumulated over three backward passes
            loss_of(plain, 10 * t + backward).backward()
        for backward in range(2):
            loss_of(ours, 10 * t + backward).backward()
        with offloaded.overlap(**options):
            loss_of(ours, 10 * t + 2).backward()
        info = expected.step(**options)
        if options.get("clip_norm"):
            assert info.grad_norm > 2 * options["clip_norm"]  # it does clip
        assert offloaded.step() == info
        assert_same(ours, plain)


def test_buckets_leave_while_the_backward_pass_runs():
    model = net()
    device = adversary()
    offloaded = made(model, device=device, bucket_bytes=6_000)
    before = device.started
    left = []

    def wait(_: Any) -> None:
        end = time.monotonic() + 10
        while device.started == before and time.monotonic() < end:
            time.sleep(1e-3)
        left.append(device.started > before)

    model.conv.weight.register_hook(wait)
    with offloaded.overlap():
        loss_of(model, 0).backward()
    assert left == [True]
    offloaded.step()


def test_a_bucket_does_not_wait_for_frozen_parameters():
    weight = torch.nn.Parameter(torch.ones(3))
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    offloaded = OffloadedOptimizer(fs.GD, [weight, frozen], lr=0.5)
    with offloaded.overlap():
        (weight * frozen).sum().backward()
        assert offloaded._core._pending[0]._sent == {0}
    offloaded.step()
    assert weight.tolist() == [0.5] * 3
    assert frozen.tolist() == [1.0] * 3


def test_nothing_is_stepped_before_the_norm_is_known():
    model = net()
    offloaded = made(model)
    before = copy.deepcopy(model)
    with offloaded.overlap(clip_norm=1.0):
        loss_of(model, 0).backward()
    assert_same(model, before)
    offloaded.step()
    assert not torch.equal(model.embed, before.embed)


def test_several_backward_passes_with_a_norm_are_squared_anew():
    plain, ours = net(), net()
    expected, offloaded = made(plain), made(ours, device=adversary())
    with offloaded.overlap(clip_norm=0.05):
        for t in range(3):
            loss_of(ours, t).backward()
    ours.embed.grad.mul_(2)  # and what is done to them afterwards is seen
    ours.hidden.bias.grad = torch.ones(40)
    ours.conv.bias.grad = None
    for t in range(3):
        loss_of(plain, t).backward()
    plain.embed.grad.mul_(2)
    plain.hidden.bias.grad = torch.ones(40)
    plain.conv.bias.grad = None
    assert offloaded.step() == expected.step(clip_norm=0.05)
    assert_same(ours, plain)


@pytest.mark.parametrize("clip_norm", [None, 0.02])
def test_a_gradient_that_no_backward_pass_has_made(clip_norm):
    plain, ours = net(), net()
    expected, offloaded = made(plain), made(ours, bucket_bytes=6_000)
    with offloaded.overlap(clip_norm=clip_norm):
        loss_of(ours, 0).backward()
    loss_of(plain, 0).backward()
    for model in (plain, ours):
        model.frozen.grad = torch.ones(4)
    assert offloaded.step() == expected.step(clip_norm=clip_norm)
    assert_same(ours, plain)


def test_a_second_backward_pass_in_a_step_is_refused():
    model = net()
    offloaded = made(model)
    with (  # noqa: PT012
        pytest.raises(RuntimeError, match=r"accumulated a second time .* only the last one"),
        offloaded.overlap(),
    ):
        loss_of(model, 0).backward()
        # A loss that needs values of parameters may fail before, as steps have changed them.
        model.embed.sum().backward()
    with pytest.raises(RuntimeError, match="broken off in the middle"):
        offloaded.step()


def exchange(model: Any) -> None:
    """Give a parameter another gradient, of the same version."""
    version = model.embed.grad._version
    model.embed.grad = torch.zeros_like(model.embed)
    while model.embed.grad._version < version:
        model.embed.grad.zero_()
    assert model.embed.grad._version == version


@pytest.mark.parametrize(
    "change",
    [
        lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01),
        lambda m: m.embed.grad.zero_(),
        lambda m: m.zero_grad(),
        exchange,
    ],
)
def test_gradients_changed_after_they_were_used_are_noticed(change):
    model = net()
    offloaded = made(model)
    with offloaded.overlap():
        loss_of(model, 0).backward()
    change(model)
    with pytest.raises(RuntimeError, match=r"changed after the step had used it; give grad_scale"):
        offloaded.step()
    with pytest.raises(RuntimeError, match="broken off in the middle"):
        offloaded.step()


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        raise ArithmeticError("in the backward pass")


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_backward_pass_that_fails(clip_norm):
    model = net()
    device = adversary()
    offloaded = made(model, device=device, bucket_bytes=6_000)
    before = copy.deepcopy(model)
    model.conv.register_forward_hook(lambda module, given, out: Failing.apply(out))
    with (
        pytest.raises(ArithmeticError) as caught,
        offloaded.overlap(clip_norm=clip_norm),
    ):
        loss_of(model, 0).backward()
    assert not [t for t in threading.enumerate() if t.name == "fusedstep-offload"]
    assert device.under_way == 0
    if clip_norm is None:
        assert "broken off in the middle" in caught.value.__notes__[0]
        model.load_state_dict(before.state_dict())
        offloaded.load_state_dict(made(net()).state_dict())
    assert_same(model, before)
    plain = net()
    model.conv._forward_hooks.clear()
    for m in (model, plain):
        m.zero_grad()
        loss_of(m, 1).backward()
    offloaded.step()
    made(plain).step()
    assert_same(model, plain)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_copy_that_fails_in_the_backward_pass(clip_norm):
    for number in range(8):
        model = net()
        device = adversary()
        offloaded = made(model, device=device)
        before = copy.deepcopy(model)
        device.fail_at = device.started + number, "wait"
        with offloaded.overlap(clip_norm=clip_norm):
            loss_of(model, 0).backward()
        with pytest.raises(CopyError) as caught:
            offloaded.step()
        assert device.under_way == 0
        assert not device.faults
        if offloaded._core._broken:
            assert "broken off in the middle" in caught.value.__notes__[0]
        else:
            assert_same(model, before)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_an_interrupt_waits_for_what_is_under_way(clip_norm, monkeypatch):
    model = net()
    device = adversary()
    offloaded = made(model, device=device)
    before = copy.deepcopy(model)
    with offloaded.overlap(clip_norm=clip_norm):
        loss_of(model, 0).backward()
    thread = offloaded._core._pending[0]._thread
    join, calls = thread.join, []

    def interrupted() -> None:
        calls.append(None)
        if len(calls) == 1:
            raise KeyboardInterrupt
        join()

    monkeypatch.setattr(thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        offloaded.step()
    assert not thread.is_alive()
    assert device.under_way == 0
    if clip_norm is None:
        assert "broken off in the middle" in offloaded._core._broken
    else:
        assert_same(model, before)
        offloaded.step(clip_norm=clip_norm)


def test_an_overlap_must_be_finished_before_anything_else():
    model = net()
    offloaded = made(model)
    with offloaded.overlap():
        loss_of(model, 0).backward()
    for act in (
        offloaded.state_dict,
        lambda: offloaded.load_state_dict({"state": {}, "param_groups": []}),
        lambda: offloaded.overlap().__enter__(),
        offloaded.refresh,
    ):
        with pytest.raises(RuntimeError, match=re.escape("call step() first")):
            act()
    with pytest.raises(ValueError, match=re.escape("options are overlap()'s")):
        offloaded.step(clip_norm=1.0)
    offloaded.step()
    offloaded.state_dict()


def test_a_backward_pass_after_the_step_is_refused():
    model = net()
    offloaded = made(model)
    with offloaded.overlap(clip_norm=1.0):
        loss_of(model, 0).backward()
        offloaded.step()
        with pytest.raises(RuntimeError, match="went on after the step was finished"):
            loss_of(model, 1).backward()


def test_bad_options_of_an_overlap_change_nothing():
    model = net()
    offloaded = made(model)
    before = copy.deepcopy(model)
    for options in ({"clip_norm": -1.0}, {"grad_scale": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))), offloaded.overlap(**options):
            raise AssertionError("the block must not run")
    assert_same(model, before)
    loss_of(model, 0).backward()
    offloaded.step()


def test_nonfinite_gradients_are_skipped_after_an_overlap():
    model = net()
    offloaded = made(model)
    before = copy.deepcopy(model)
    with offloaded.overlap(skip_nonfinite=True):
        (loss_of(model, 0) * torch.inf).backward()
    assert offloaded.step().skipped
    assert_same(model, before)
    assert offloaded.state_dict()["state"][0]["step"] == 0


def test_the_graph_notices_parameters_that_changed_too_early():
    weight = torch.nn.Parameter(torch.ones(3))
    offloaded = OffloadedOptimizer(fs.GD, [weight], lr=1.0)
    x = torch.ones(3, requires_grad=True)
    # A use that autograd does not count among those of the weight.
    loss = (x * weight.detach()).sum() + weight.square().sum()
    with offloaded.overlap():
        weight.square().sum().backward()
    offloaded.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("dtype", "storage"), STORAGE, ids=str)
def test_state_goes_to_other_optimizers_and_back(dtype, storage, tmp_path):
    plain, ours, other = net(dtype), net(dtype), net(dtype)
    expected = fst.AdamW(plain.named_parameters(), lr=0.01, **storage)
    offloaded = made(ours, **storage)

    def step(pairs: Any, t: int) -> None:
        for model, optimizer in pairs:
            optimizer.zero_grad()
            loss_of(model, t).backward()
            optimizer.step()

    step([(plain, expected), (ours, offloaded)], 0)
    torch.save(offloaded.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state")
    other.load_state_dict(ours.state_dict())
    third = made(other, lr=0.5, **storage)
    third.load_state_dict(saved)
    assert third.param_groups[0]["lr"] == 0.01
    expected.load_state_dict(saved)
    step([(plain, expected), (ours, offloaded), (other, third)], 1)
    offloaded.load_state_dict(expected.state_dict())
    step([(plain, expected), (ours, offloaded), (other, third)], 2)
    assert_same(ours, plain)
    assert_same(other, plain)


@pytest.mark.parametrize(("name", "options"), [("AdamW", {}), ("SGD", {"momentum": 0.9})])
def test_state_of_torch_optim_is_taken_and_given(name, options):
    theirs, ours = net(), net()
    reference = getattr(torch.optim, name)(theirs.parameters(), lr=0.01, **options)
    loss_of(theirs, 0).backward()
    reference.step()
    ours.load_state_dict(theirs.state_dict())
    offloaded = OffloadedOptimizer(getattr(fs, name), ours.parameters(), lr=0.5, **options)
    offloaded.load_state_dict(reference.state_dict())
    assert offloaded.param_groups[0]["lr"] == 0.01
    back = getattr(torch.optim, name)(copy.deepcopy(ours).parameters())
    back.load_state_dict(offloaded.state_dict())
    for model, optimizer in ((theirs, reference), (ours, offloaded)):
        model.zero_grad()
        loss_of(model, 1).backward()
        optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-6)


def test_a_scheduler_is_resumed():
    def made_with_scheduler() -> Any:
        model = net()
        optimizer = made(model)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    model, optimizer, scheduler = made_with_scheduler()
    loss_of(model, 0).backward()
    optimizer.step()
    scheduler.step()
    _, other, _ = made_with_scheduler()
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["initial_lr"] == 0.01
    assert other.param_groups[0]["lr"] == 0.005
    torch.optim.lr_scheduler.StepLR(other, 1, 0.5, last_epoch=1)


@pytest.mark.parametrize("change", ["in place", "exchanged", "load_state_dict"])
def test_parameters_changed_between_steps_are_noticed(change):
    plain, ours = net(), net()
    expected, offloaded = fst.AdamW(plain.parameters(), lr=0.01), made(ours)
    for t in range(2):
        for model, optimizer in ((plain, expected), (ours, offloaded)):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            optimizer.step()
            with torch.no_grad():
                if change == "in place":
                    model.embed.mul_(0.5)
                elif change == "exchanged":
                    model.embed.data = model.embed.data * 0.5
                else:
                    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
    for model, optimizer in ((plain, expected), (ours, offloaded)):
        loss_of(model, 3).backward()
        optimizer.step()
    assert_same(ours, plain)


def test_parameters_of_another_shape_are_refused():
    model = net()
    offloaded = made(model)
    loss_of(model, 0).backward()
    model.embed.data = torch.ones(3)
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(ValueError, match=r"params\[0\]\['embed'\]: torch.float32 of shape \(3,\)"):
        offloaded.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_grad_scaler_drives_it():
    plain, ours = net(), net()
    expected, offloaded = made(plain), made(ours)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for t in range(2):
        for model in (plain, ours):
            model.zero_grad()
        loss_of(plain, t).backward()
        expected.step()
        scaler.scale(loss_of(ours, t)).backward()
        scaler.step(offloaded)
        scaler.update()
        assert_same(ours, plain)
    ours.zero_grad()
    scaler.scale(loss_of(ours, t) * torch.inf).backward()
    scaler.step(offloaded)
    assert_same(ours, plain)


def test_closures_and_hooks():
    plain, ours = net(), net()
    expected, offloaded = made(plain), made(ours)
    seen: list[Any] = []
    offloaded.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(optimizer))

    def closure() -> Any:
        offloaded.zero_grad()
        loss = loss_of(ours, 0)
        loss.backward()
        return loss

    loss = offloaded.step(closure)
    expected_loss = loss_of(plain, 0)
    expected_loss.backward()
    expected.step()
    assert loss.item() == expected_loss.item()
    assert_same(ours, plain)
    assert seen == [offloaded]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: torch.ones(3, device="meta"), TypeError, "on device 'meta'"),
        (lambda p: torch.ones(4, 4)[:, ::2], ValueError, "params[0][0]: its elements do not fill"),
        (lambda p: torch.ones(3, dtype=torch.int32), TypeError, "params[0][0]: int32"),
        (lambda p: torch.ones(3, dtype=torch.cfloat), TypeError, "params[0][0]: complex64"),
        (
            lambda p: torch.nested.nested_tensor(list(torch.eye(3)), layout=torch.jagged),
            TypeError,
            "params[0][0]: a nested tensor",
        ),
        (lambda p: torch.eye(3).to_sparse(), TypeError, "params[0][0]: a torch.sparse_coo tensor"),
        (
            lambda p: torch.ones(3).to(torch.float8_e5m2),
            TypeError,
            "params[0][0]: float8_e5m2; expected float32",
        ),
    ],
)
def test_parameters_that_cannot_be_stepped(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        OffloadedOptimizer(fs.GD, [make(None)])


def test_views_of_the_negative_are_read_as_what_they_are():
    view = (1j * torch.arange(4.0)).conj().imag
    assert view.is_neg()
    with pytest.raises(TypeError, match="memory holds the negative"):
        OffloadedOptimizer(fs.GD, [view])
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = view
    OffloadedOptimizer(fs.GD, [weight], lr=1.0).step()
    assert weight.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_sparse_gradients_are_refused_by_name():
    model = torch.nn.Embedding(5, 3, sparse=True)
    offloaded = OffloadedOptimizer(fs.GD, model.named_parameters())
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"grads\[0\]\['weight'\]: a torch.sparse_coo tensor"):
        offloaded.step()


def test_groups_are_given_once():
    offloaded = OffloadedOptimizer(
        fs.AdamW, [{"params": [torch.ones(2)], "lr": 0.1}, {"params": [torch.ones(3)]}], lr=0.2
    )
    assert [group["lr"] for group in offloaded.param_groups] == [0.1, 0.2]
    with pytest.raises(RuntimeError, match="is made with all its groups"):
        offloaded.add_param_group({"params": [torch.ones(2)]})


def test_state_dir(tmp_path):
    plain, ours = net(), net()
    expected = made(plain)
    offloaded = made(ours, state_dir=tmp_path)
    for t in range(4):
        if t == 2:
            offloaded.flush()
            ours = net()
            offloaded = made(ours, state_dir=tmp_path, resume=True)
        for model, optimizer in ((plain, expected), (ours, offloaded)):
            optimizer.zero_grad()
            with optimizer.overlap(clip_norm=1.0 if t == 1 else None):
                loss_of(model, t).backward()
            if optimizer is offloaded and t == 2:
                assert not (tmp_path / "index.json").exists()
            optimizer.step()
    assert_same(ours, plain)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_gradients_in_another_order_of_memory(clip_norm):
    last, first = torch.channels_last, torch.contiguous_format
    grads = [torch.randn(4, 3, 5, 6) for _ in range(2)]
    start = torch.randn(4, 3, 5, 6)
    plain = [start.clone(memory_format=f) for f in (last, first)]
    ours = [torch.nn.Parameter(p.clone()) for p in plain]
    for p, grad, memory_format in zip(ours, grads, (first, last), strict=True):
        p.grad = grad.clone(memory_format=memory_format)
    expected = fs.GD([p.numpy() for p in plain], lr=0.1)
    offloaded = OffloadedOptimizer(fs.GD, ours, lr=0.1)
    info = expected.step([g.numpy() for g in grads], clip_norm=clip_norm)
    assert offloaded.step(clip_norm=clip_norm) == info
    assert all(torch.equal(p, q) for p, q in zip(ours, plain, strict=True))


def test_tensors_may_be_given_without_an_optimizer_of_pytorch():
    param, other = torch.ones(3), torch.ones(3)
    optimizer = fusedstep.offload.OffloadedOptimizer(fs.Adam, [param], lr=0.1)
    info = optimizer.step([torch.arange(3.0)], clip_norm=1.0)
    ordinary = OffloadedOptimizer(fs.Adam, [other], lr=0.1)
    other.grad = torch.arange(3.0)
    assert ordinary.step(clip_norm=1.0) == info
    assert torch.equal(param, other)
