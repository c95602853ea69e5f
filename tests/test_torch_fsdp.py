"""`fusedstep.torch` on DTensors: two processes with gloo, parameters sharded by FSDP2."""

import textwrap

import pytest

pytest.importorskip("torch.distributed.fsdp", reason="PyTorch is not installed")
from test_distributed_torch import run_ranks

PROLOGUE = """
import copy, warnings
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh,
)
import fusedstep.torch as fst

warnings.simplefilter("default")  # torch.distributed has warnings of its own

def network():
    torch.manual_seed(1)
    # Of the last layer, with one row, the second rank has nothing.
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4, bias=False), nn.Linear(4, 1))

def sharded(**options):
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)

def backward(model, seed, clip=None):
    torch.manual_seed(seed)
    model.zero_grad()
    (model(torch.randn(8, 5)) ** 2).mean().backward()  # the same batch on both ranks
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)

def full(model):
    whole = (getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters())
    return [p.detach().clone() for p in whole]

def raises(kind, message, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError("no error")
"""


# gloo's threads sometimes abort a process that ends as usual.
EPILOGUE = """
dist.barrier()
os._exit(0)
"""


def check_on_two_ranks(tmp_path, code):
    code = PROLOGUE + textwrap.dedent(code) + EPILOGUE
    errors, statuses = zip(*run_ranks(tmp_path, code), strict=True)
    assert statuses == (0, 0), "\n".join(errors)


def test_shards_have_the_bits_of_the_whole(tmp_path):
    check_on_two_ranks(
        tmp_path,
        """
        def compare(name, **options):
            model, whole, theirs = sharded(), network(), sharded()
            optimizer = getattr(fst, name)(model.parameters(), **options)
            one = getattr(fst, name)(whole.parameters(), **options)
            reference = getattr(torch.optim, name)(theirs.parameters(), **options)
            assert [p.to_local().numel() for p in model.parameters()][-1] == 1 - rank
            for step in range(6):
                clip = 0.1 if step % 2 else None
                backward(model, step, clip)
                backward(theirs, step, clip)
                for p, q in zip(model.parameters(), whole.parameters()):
                    q.grad = p.grad.full_tensor()
                optimizer.step()
                one.step()
                reference.step()
                for p, q, r in zip(full(model), full(whole), full(theirs)):
                    assert torch.equal(p, q)
                    torch.testing.assert_close(p, r, rtol=2e-6, atol=1e-7)
            mine, other, ones = (o.state_dict()["state"] for o in (optimizer, reference, one))
            assert mine.keys() == other.keys()
            for i, entry in other.items():
                assert list(entry) == list(mine[i])
                for key, value in entry.items():
                    own = mine[i][key]
                    assert type(own) is type(value)
                    if value is None:
                        continue
                    for attribute in ("dtype", "shape", "placements"):
                        assert getattr(own, attribute, 0) == getattr(value, attribute, 0)
                    assert own.stride() == value.stride()
                    if isinstance(value, DTensor):
                        assert torch.equal(own.full_tensor(), ones[i][key])

        compare("AdamW", lr=0.01)
        compare("Adam", lr=torch.tensor(0.01), weight_decay=0.1, amsgrad=True)
        compare("SGD", lr=0.1, momentum=0.9, nesterov=True)
        compare("SGD", lr=0.1)
        """,
    )


def test_grad_scaler_of_shards(tmp_path):
    check_on_two_ranks(
        tmp_path,
        """
        for fused in (None, True):
            model, theirs = sharded(), sharded()
            optimizer = fst.AdamW(model.parameters(), lr=0.01, fused=fused)
            reference = torch.optim.AdamW(theirs.parameters(), lr=0.01)
            for m, o in ((model, optimizer), (theirs, reference)):
                scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
                for step in range(4):
                    torch.manual_seed(step)
                    o.zero_grad()
                    scaler.scale((m(torch.randn(8, 5)) ** 2).mean()).backward()
                    if step == 2 and rank == 1:  # which is for both ranks to see
                        next(m.parameters()).grad.to_local()[0] = float("inf")
                    scaler.step(o)
                    scaler.update()
                assert scaler.get_scale() == 512
                assert next(iter(o.state.values()))["step"] == 3
            torch.testing.assert_close(full(model), full(theirs), rtol=2e-6, atol=1e-7)
        """,
    )


def test_state_dicts_of_distributed_checkpoints(tmp_path):
    check_on_two_ranks(
        tmp_path,
        """
        for whole in (False, True):
            model, theirs = sharded(), sharded()
            optimizer = fst.AdamW(model.parameters(), lr=0.01)
            reference = torch.optim.AdamW(theirs.parameters(), lr=0.01)
            for step in range(3):
                for m, o in ((model, optimizer), (theirs, reference)):
                    backward(m, step)
                    o.step()
            options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
            saved = get_optimizer_state_dict(model, optimizer, options=options)
            if rank == 0 or not whole:
                assert saved["state"].keys() == dict(model.named_parameters()).keys()
                held = saved["state"]["0.weight"]["exp_avg"]
                assert isinstance(held, DTensor) is not whole
                assert held.shape == (7, 5)
            # Into one that has not stepped, and into PyTorch's own.
            options = StateDictOptions(full_state_dict=whole, broadcast_from_rank0=whole)
            for kind in (fst.AdamW, torch.optim.AdamW):
                other = sharded()
                other.load_state_dict(copy.deepcopy(model.state_dict()))
                resumed = kind(other.parameters(), lr=0.5)
                set_optimizer_state_dict(other, resumed, copy.deepcopy(saved), options=options)
                assert resumed.param_groups[0]["lr"] == 0.01
                for step in range(3, 5):
                    backward(other, step)
                    resumed.step()
                if kind is fst.AdamW:
                    result = full(other)
                else:
                    torch.testing.assert_close(full(other), result, rtol=2e-6, atol=1e-7)
            for step in range(3, 5):
                backward(model, step)
                optimizer.step()
            assert all(map(torch.equal, full(model), result))
        """,
    )


def test_files_of_distributed_checkpoints(tmp_path):
    check_on_two_ranks(
        tmp_path,
        """
        import torch.distributed.checkpoint as dcp

        def states(model, optimizer):
            return {
                "model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)
            }

        folder = sys.argv[2] + "-checkpoint"
        model, other = sharded(), sharded()
        optimizer = fst.AdamW(model.parameters(), lr=0.01)
        for step in range(3):
            backward(model, step)
            optimizer.step()
        dcp.save(states(model, optimizer), checkpoint_id=folder)
        resumed = fst.AdamW(other.parameters(), lr=0.5)
        loaded = states(other, resumed)
        dcp.load(loaded, checkpoint_id=folder)
        other.load_state_dict(loaded["model"])
        set_optimizer_state_dict(other, resumed, loaded["optimizer"])
        for step in range(3, 6):
            for m, o in ((model, optimizer), (other, resumed)):
                backward(m, step)
                o.step()
        assert all(map(torch.equal, full(model), full(other)))
        """,
    )


def test_other_ways_to_distribute(tmp_path):
    check_on_two_ranks(
        tmp_path,
        """
        from torch.distributed.optim import ZeroRedundancyOptimizer
        from torch.distributed.tensor.parallel import (
            ColwiseParallel, RowwiseParallel, parallelize_module,
        )

        def parallel():
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
            return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)

        def compare(make, wrap=lambda params, kind: kind(params, lr=0.01)):
            torch.manual_seed(1)
            model = make()
            torch.manual_seed(1)
            theirs = make()
            optimizer = wrap(model.parameters(), fst.AdamW)
            reference = torch.optim.AdamW(theirs.parameters(), lr=0.01)
            before = full(model)
            for step in range(4):
                for m, o in ((model, optimizer), (theirs, reference)):
                    backward(m, step)
                    o.step()
            torch.testing.assert_close(full(model), full(theirs), rtol=2e-6, atol=1e-7)
            assert not any(map(torch.equal, full(model), before))

        replicated = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        compare(lambda: sharded(mesh=replicated))
        narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        compare(lambda: sharded(mp_policy=narrow))
        compare(parallel)
        compare(network, lambda params, kind: ZeroRedundancyOptimizer(params, kind, lr=0.01))
        """,
    )


def test_narrow_state_of_shards(tmp_path):
    check_on_two_ranks(
        tmp_path,
        """
        mesh = init_device_mesh("cpu", (2,))
        options = dict(lr=0.01, state_dtype="bfloat16", master_weights="correction16")
        torch.manual_seed(0)
        values = [torch.randn(s).bfloat16() for s in ((5, 3), (1, 4))]
        params = [nn.Parameter(distribute_tensor(v, mesh, [Shard(0)])) for v in values]
        whole = [nn.Parameter(v.clone()) for v in values]
        optimizer, one = fst.Adam(params, **options), fst.Adam(whole, **options)
        for step in range(4):
            if step == 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for p, q in zip(params, whole):
                q.grad = torch.randn_like(q)
                p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
            optimizer.step()
            one.step()
        for p, q in zip(params, whole):
            assert torch.equal(p.full_tensor(), q)
            for key, value in optimizer.state[p].items():
                if key != "step":
                    assert value.placements == p.placements
                    assert value.dtype == one.state[q][key].dtype
                    assert torch.equal(value.to_local(), distribute_tensor(
                        one.state[q][key].float(), mesh, [Shard(0)]).to_local())

        for options in ({"state_dtype": "8bit"}, {"master_weights": "stochastic"}):
            raises(ValueError, "params[0][0] is one", fst.Adam, params, **options)
        """,
    )


def test_other_placements(tmp_path):
    check_on_two_ranks(
        tmp_path,
        """
        mesh = init_device_mesh("cpu", (2,))
        for placement in (Replicate(), Shard(0), Shard(1)):
            p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [placement]))
            optimizer = fst.SGD([p], lr=1.0, momentum=0.5)
            for step in range(2):
                # As torch does, a gradient is distributed as its parameter is.
                p.grad = DTensor.from_local(torch.full((4, 3), 1.0 + rank), mesh, [Partial()])
                optimizer.step()
            assert torch.equal(p.full_tensor(), torch.full((4, 3), 1 - 3 - 4.5))

            before = p.full_tensor().detach().clone()
            local = p.to_local()
            loss = (local * local).sum()
            p.grad = None
            whole = copy.deepcopy(optimizer.state_dict())
            whole["state"][0]["momentum_buffer"] = torch.zeros(4, 3)
            other = fst.SGD([p], momentum=0.5)
            other.load_state_dict(whole)
            p.grad = distribute_tensor(torch.ones(4, 3), mesh, [placement])
            raises(ValueError, "state[0][0]['momentum_buffer']: placements None", other.step)
            assert torch.equal(p.full_tensor(), before)
            # Autograd knows of the step, through the shard as well.
            optimizer.step()
            raises(RuntimeError, "modified inplace", loss.backward)
        """,
    )
