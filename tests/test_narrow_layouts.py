"""8-bit state is in the order of its parameter's memory, which another parameter need not have."""

import copy
import pickle

import numpy as np
import pytest

import fusedstep as fs

SHAPE = (8, 40)
SCALES = np.logspace(-1, 1, 320).reshape(SHAPE)

LAYOUTS = {
    "C": lambda: np.zeros(SHAPE, np.float32),
    "F": lambda: np.zeros(SHAPE[::-1], np.float32).T,
    "F with gaps": lambda: np.zeros((40, 16), np.float32)[:, ::2].T,
    "reversed": lambda: np.zeros(SHAPE, np.float32)[::-1, ::-1],
    "F, a dimension reversed": lambda: np.zeros(SHAPE[::-1], np.float32)[::-1].T,
}


def trained(param, **options):
    rng = np.random.default_rng(0)
    optimizer = fs.Adam(param, lr=0.01, **options)
    for _ in range(10):
        optimizer.step((rng.standard_normal(SHAPE) * SCALES).astype(np.float32))
    return optimizer


def update(optimizer):
    """Return by how much a step without a gradient moves the parameter: moments alone decide."""
    param = optimizer.param_groups[0]["params"][0]
    before = param.copy()
    optimizer.step(np.zeros(SHAPE, np.float32))
    return param - before


def assert_close(moved, expected):
    """Fail unless moments were rounded at most; at other elements' places they are unrelated."""
    assert np.linalg.norm(moved - expected) < 0.1 * np.linalg.norm(expected)


def by_state_dict(optimizer, param, options, tmp_path):
    resumed = fs.Adam(param, lr=0.01, **options)
    resumed.load_state_dict(optimizer.state_dict())
    return resumed


def by_file(optimizer, param, options, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    optimizer.save(tmp_path / "state")
    resumed = fs.Adam(param, lr=0.01, **options)
    resumed.load(tmp_path / "state")
    return resumed


@pytest.mark.parametrize("way", [by_state_dict, by_file])
@pytest.mark.parametrize("own_dtype", ["8bit", None])
@pytest.mark.parametrize("saved_dtype", ["8bit", None])
@pytest.mark.parametrize("own", LAYOUTS)
@pytest.mark.parametrize("saved", LAYOUTS)
def test_moments_stay_with_their_elements(saved, own, saved_dtype, own_dtype, way, tmp_path):
    optimizer = trained(LAYOUTS[saved](), state_dtype=saved_dtype)
    param = LAYOUTS[own]()
    param[...] = optimizer.param_groups[0]["params"][0]
    resumed = way(optimizer, param, {"state_dtype": own_dtype}, tmp_path)
    moved, expected = update(resumed), update(optimizer)
    if saved_dtype == own_dtype and (saved == own or own_dtype is None):
        assert np.array_equal(moved, expected)
    else:  # rounded once more, in other blocks
        assert_close(moved, expected)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_of_an_optimizer_keeps_them_too(layout, way):
    optimizer = trained(LAYOUTS[layout](), state_dtype="8bit")
    moved, expected = update(way(optimizer)), update(optimizer)
    assert_close(moved, expected)


def test_c_order_needs_no_word():
    assert (
        "memory_order" not in trained(LAYOUTS["C"](), state_dtype="8bit").state_dict()["state"][0]
    )
    assert "memory_order" not in trained(LAYOUTS["F"]()).state_dict()["state"][0]
    saved = trained(LAYOUTS["F, a dimension reversed"](), state_dtype="8bit").state_dict()
    assert saved["state"][0]["memory_order"].tolist() == [~1, 0]


def test_an_order_of_another_shape_is_refused():
    optimizer = trained(LAYOUTS["F"](), state_dtype="8bit")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["memory_order"] = np.array([2, 0])
    with pytest.raises(ValueError, match=r"\['memory_order'\]: \[2, 0\], but its parameter has"):
        optimizer.load_state_dict(saved)


def test_memory_formats_of_pytorch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import fusedstep.torch

    def make(values):
        param = torch.nn.Parameter(values)
        return param, fusedstep.torch.Adam([param], lr=0.01, state_dtype="8bit")

    def step(param, optimizer, grad):
        before = param.detach().clone()
        param.grad = grad
        optimizer.step()
        return param.detach() - before

    shape = (4, 6, 3, 3)
    scales = torch.logspace(-1, 1, 216).reshape(shape)
    generator = torch.Generator().manual_seed(0)
    param, optimizer = make(torch.zeros(shape).to(memory_format=torch.channels_last))
    for _ in range(10):
        step(param, optimizer, torch.randn(shape, generator=generator) * scales)
    other, resumed = make(param.detach().clone(memory_format=torch.contiguous_format))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = step(param, optimizer, torch.zeros(shape))
    moved = step(other, resumed, torch.zeros(shape))
    assert_close(moved.flatten().numpy(), expected.flatten().numpy())
    assert "memory_order" not in resumed.state[other]
    other.data = other.data.to(memory_format=torch.channels_last)
    expected = step(param, optimizer, torch.zeros(shape))
    moved = step(other, resumed, torch.zeros(shape))
    assert_close(moved.flatten().numpy(), expected.flatten().numpy())
    assert resumed.state[other]["memory_order"].tolist() == [0, 2, 3, 1]


def test_memory_formats_of_offloaded_tensors():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import fusedstep.torch
    from fusedstep.offload.torch import OffloadedOptimizer

    shape = (4, 6, 3, 3)
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(3)]
    for param in params[:2]:
        param.data = param.data.to(memory_format=torch.channels_last)
    options = {"lr": 0.01, "state_dtype": "8bit"}
    offloaded = OffloadedOptimizer(fs.Adam, params[:1], **options)
    for _ in range(3):
        params[0].grad = torch.randn(shape, generator=generator)
        offloaded.step()
    others = [fusedstep.torch.Adam([param], **options) for param in params[1:]]
    others.append(OffloadedOptimizer(fs.Adam, [params[2].detach().clone()], **options))
    params.append(others[-1].param_groups[0]["params"][0])
    updates = []
    for param, optimizer in zip(params, [offloaded, *others], strict=True):
        param.data.copy_(params[0].detach())
        optimizer.load_state_dict(copy.deepcopy(offloaded.state_dict()))
    for param, optimizer in zip(params, [offloaded, *others], strict=True):
        before = param.detach().clone()
        param.grad = torch.zeros(shape)
        optimizer.step()
        updates.append((param.detach() - before).flatten().numpy())
    assert np.array_equal(updates[1], updates[0])
    assert_close(updates[2], updates[0])
    assert_close(updates[3], updates[0])
