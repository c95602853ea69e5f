from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, final

import numpy as np
from numpy.typing import NDArray

__version__: str

# Arrays and numbers are checked by the module itself, with errors that name the argument.
def gd_step(
    params: object,
    grads: object,
    momentum_buffer: object,
    step: object,
    lr: object,
    momentum: object,
    dampening: object,
    nesterov: object,
    weight_decay: object,
    maximize: object,
    grad_scale: object,
    /,
) -> None: ...
def adam_step(
    params: object,
    grads: object,
    exp_avg: object,
    exp_avg_sq: object,
    max_exp_avg_sq: object,
    step: object,
    lr: object,
    betas: object,
    eps: object,
    weight_decay: object,
    bias_correction: object,
    maximize: object,
    grad_scale: object,
    decoupled: bool,
    /,
) -> None: ...

class _Optimizer:
    group_state_bytes: ClassVar[int]
    norm_workspace_bytes: int
    steps: list[int]
    def __init__(self, decoupled: bool = False, seed: int = 0) -> None: ...
    def add_group(
        self,
        structure: Literal["array", "list", "dict"] | str,
        params: list[NDArray[Any]],
        keys: list[str | None],
        state: list[list[NDArray[Any]]],
        suffixes: list[str],
        group_state: Any | None,
        extras: list[list[NDArray[Any] | None]],
        stochastic: bool,
        /,
    ) -> None: ...
    def check_group(
        self, group: Mapping[str, Any], number: int, state_arrays: int, capturable: bool, /
    ) -> None: ...
    def step(
        self, param_groups: object, grads: object, grad_scale: object, nested: bool, /
    ) -> None: ...
    def step_with_options(
        self,
        param_groups: object,
        grads: object,
        grad_scale: object,
        clip_norm: object,
        skip_nonfinite: object,
        zero_grad: object,
        nested: bool,
        gpu_norm: tuple[Any, Any] | None,
        /,
    ) -> tuple[float | None, bool] | None: ...
    def reads_tensor(self, tensor: object, /) -> bool: ...
    def watch_tensors(
        self,
        groups: list[tuple[int, list[tuple[Any, int]]]],
        state: list[tuple[Any, dict[str, Any]]],
        counts: list[NDArray[np.float32] | None],
        group_counts: list[Any | None],
        versioned: list[Any],
        raise_versions: Callable[[list[Any]], object] | None,
        as_array: Callable[[Any], Any],
        /,
    ) -> None: ...
    def step_tensors(
        self,
        param_groups: object,
        state: object,
        grad_scale: object,
        loss_scaling: tuple[Any | None, Any | None] | None,
        /,
    ) -> list[Any] | None: ...

@final
class GdOptimizer(_Optimizer): ...

@final
class AdamOptimizer(_Optimizer): ...

def check_parameter(param: object, suffix: str, /) -> None: ...
def config() -> dict[str, Any]: ...
def available_isas() -> tuple[str, ...]: ...
def get_isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def made_by_intel() -> bool: ...
def set_made_by_intel(intel: bool, /) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(count: object, /) -> None: ...
def cgroup_cpu_limit(membership: str, root: str, /) -> int: ...
def fill_zero(array: NDArray[Any], /) -> None: ...
def copy_bytes(source: NDArray[Any], target: NDArray[Any], past_caches: bool, /) -> None: ...
def sums_of_squares(
    gradients: list[NDArray[Any]], float64: bool, sums: NDArray[np.float64], /
) -> None: ...
def decode_8bit(
    codes: NDArray[Any], units: NDArray[np.float32], values: NDArray[np.float32], /
) -> None: ...
def encode_8bit(
    values: NDArray[np.float32], codes: NDArray[Any], units: NDArray[np.float32], /
) -> None: ...
