"""What PyTorch does for an optimizer of its tensors, which needs no GPU to be seen."""

import numpy as np
import pytest

from fusedstep import gpu

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")

every_dtype = pytest.mark.parametrize(
    "dtype",
    [*map(np.dtype, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, "u2", "u1", "i1"))],
    ids=str,
)


@every_dtype
def test_state_is_allocated_and_copied(dtype):
    param = torch.randn(4, 3).t().to(torch.bfloat16)
    state = gpu.zeros_like(param, dtype)
    assert state.stride() == param.stride()
    assert gpu.dtype_of(state) == dtype
    values = np.arange(12).reshape(3, 4).astype(dtype)
    gpu.from_host(state, values)
    copy = gpu.to_host(state)
    assert copy.dtype == dtype
    assert copy.tobytes() == values.tobytes()
    gpu.from_host(state, np.zeros((), dtype))
    assert not any(gpu.to_host(state).tobytes())


@every_dtype
def test_vectors_are_allocated(dtype):
    vector = gpu.zeros(5, dtype, torch.ones(2, requires_grad=True))
    assert (gpu.dtype_of(vector), vector.shape, vector.requires_grad) == (dtype, (5,), False)
    assert not any(gpu.to_host(vector).tobytes())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_copied_as_float32(dtype):
    param = torch.randn(4, 3).t().to(dtype).requires_grad_()
    target = gpu.zeros_like(param, np.dtype(np.float32))
    gpu.copy_as_float32(target, param)
    assert torch.equal(target, param.float())


def test_the_outcome_of_a_step_is_read_when_it_is_needed():
    norm = gpu.Norm(64, torch.ones(2))
    info, (workspace, outcome) = norm.prepare()
    assert workspace.nbytes >= 64
    outcome.view(torch.float64)[0] = 2.5
    outcome.view(torch.uint8)[16] = 1
    assert not info.is_known
    assert info == (2.5, True)
    assert info.is_known
