"""The optimizers for PyTorch: `torch.optim.SGD`, `Adam` and `AdamW` with fused steps.

Arguments, parameter groups, state and `state_dict` are those of `torch.optim`; the arithmetic is
that of `fusedstep.GD`, `fusedstep.Adam` and `fusedstep.AdamW`, whose bits the parameters have.
Nothing is copied: a step works in the tensors' own memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined,unused-ignore]

from . import _core, gpu, narrow
from .optimizer import _checked_step, _warn_of_rounding
from .step_count import StepCount

__all__ = ["GD", "SGD", "Adam", "AdamW"]

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
    raise ImportError(f"fusedstep.torch needs PyTorch 2.7 or newer, not {torch.__version__}")

# What PyTorch's groups have come to hold over time, for state from before.
_ADDED = {"amsgrad": False, "maximize": False, "nesterov": False}
# How PyTorch runs a step, which is no concern of a checkpoint's here.
_WAYS = ("foreach", "capturable", "differentiable", "fused")
# Where every empty array lies, which otherwise is somewhere else each time one is made.
_NO_MEMORY = np.empty(0)


@dataclass
class _Bound:
    """What the native optimizer is to know of a parameter."""

    param: torch.Tensor
    suffix: str
    array: Any
    count: StepCount | None  # what has counted its steps on a GPU so far
    entry: dict[str, Any]
    state: list[Any]
    extras: list[Any]
    step: int  # unless there is a count


class _Optimizer(torch.optim.Optimizer):
    """What the optimizers share: PyTorch holds all there is, and this binds it to the kernels.

    The native optimizer is made when a step finds none, or finds that it no longer fits: tensors
    were moved or exchanged, state was loaded, a parameter has its first gradient.
    """

    _storage: narrow.Storage
    _native: Any = None
    _loading: dict[str, Any] | None = None
    # Of what is bound: DTensors with their names, and whether one was made in inference mode.
    _distributed: list[tuple[torch.Tensor, str]]
    _inference = False
    _held: list[Any]  # capsules of what has the parameters' version counters
    # What counts a parameter's steps on a GPU; and all there ever were, which a graph may hold.
    _counts: dict[torch.Tensor, StepCount]
    _all_counts: list[StepCount]
    # Whether a graph would repeat a step with the number that it was captured with.
    _repeats_in_graphs = False

    def __init__(
        self, params: Any, defaults: dict[str, Any], storage: narrow.Storage, ways: dict[str, Any]
    ) -> None:
        for name, value in ways.items():
            _check_way(name, value)
        self._storage = storage
        self._all_counts = []
        self._unbind()
        super().__init__(params, {**defaults, **ways})

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves the scaling to the step, as with PyTorch's ``fused=True``."""
        return bool(self.defaults["fused"])

    def _state_keys(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _make_native(self) -> Any:
        raise NotImplementedError

    def _counts_steps(self) -> bool:
        raise NotImplementedError

    def _counts_on_gpu(self) -> bool:
        """Whether steps are counted in the GPU's memory; PyTorch does so in the same cases."""
        groups = self.param_groups
        return any(group.get("capturable") or group["fused"] for group in groups) and any(
            param.is_cuda for group in groups for param in group["params"]
        )

    def _unbind(self) -> None:
        self._forget_native()
        self._distributed = []
        self._counts = {}

    def _forget_native(self) -> None:
        """Let go of the native optimizer and of the memory that is held for it."""
        self._native = None
        self._held = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as `torch.optim.Optimizer.add_param_group`.

        Raises
        ------
        TypeError, ValueError
            A parameter or hyper-parameter cannot be used; nothing was added.
        """
        super().add_param_group(param_group)
        try:
            number = len(self.param_groups) - 1
            group = self.param_groups[number]
            for name in _WAYS:
                if name in group:
                    _check_way(name, group[name])
            keys = self._state_keys(group)
            self._make_native().check_group(group, number, len(keys), self._counts_on_gpu())
            self._storage.check(keys)
            suffixes, arrays = [], []
            for param, suffix in zip(group["params"], _suffixes(group, number), strict=True):
                if not torch.nn.parameter.is_lazy(param):
                    suffixes.append(suffix)
                    arrays.append(self._checked_parameter(param, keys, suffix))
            _warn_of_rounding(arrays, suffixes, self._storage)
        except Exception:
            self.param_groups.pop()
            raise
        self._forget_native()

    def _checked_parameter(self, param: torch.Tensor, keys: tuple[str, ...], suffix: str) -> Any:
        array = _checked_array(param, f"params{suffix}")
        _core.check_parameter(array, suffix)
        if _is_distributed(param):
            # What is rounded at random would depend on how many ranks there are.
            why = f"not for DTensors, and params{suffix} is one"
            dtypes = self._storage.state_dtypes(array, keys)
            if any(key.endswith(narrow.UNITS) for key in dtypes):
                raise ValueError(f"state_dtype: '8bit' is {why}")
            if self._storage.master_weights == "stochastic" and array.dtype.itemsize == 2:
                raise ValueError(f"master_weights: 'stochastic' is {why}")
        return array

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and the gradients anew, and returns the loss.

        Returns
        -------
        The loss that `closure` returned, or None.

        Raises
        ------
        TypeError, ValueError
            A gradient, a parameter, a hyper-parameter or the state cannot be used. No parameter and
            no state was changed.
        """
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        ):
            return self._observed_step(closure)
        return self._step(closure)

    # PyTorch would wrap it for hooks and profiles, which takes longer than a small step.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, scaling = 1.0, None
        # Both are set by a GradScaler for the time of a step.
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None or grad_scale is not None:
            if self._counts_on_gpu():
                scaling = self._on_gpu(grad_scale), self._on_gpu(found_inf)
            elif found_inf is not None and found_inf.item():
                return loss
            elif grad_scale is not None:
                scale = 1.0 / float(grad_scale)
        # Autograd must know: it refuses a backward pass through values that have changed since.
        stepped = self._step_native(scale, scaling)
        torch._C._increment_version(stepped)
        if self._distributed:
            torch._C._increment_version([_local(tensor) for tensor in stepped])
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(_step)

    def _on_gpu(self, number: Any) -> torch.Tensor | None:
        """Return a number of a GradScaler's on the parameters' GPU, without waiting for it."""
        if number is None:
            return None
        device = next(p.device for group in self.param_groups for p in group["params"])
        return torch.as_tensor(number, dtype=torch.float32).to(device, non_blocking=True)

    def _step_native(self, scale: float, scaling: Any) -> list[torch.Tensor]:
        """Return tensors whose version counters are to be raised, of those that were stepped."""
        for param, suffix in self._distributed:
            _place_gradient(param, suffix)
        if self._native is not None and not (
            self._inference and not torch.is_inference_mode_enabled()
        ):
            if self._repeats_in_graphs:
                self._check_graph()
            try:
                stepped = self._native.step_tensors(self.param_groups, self.state, scale, scaling)
                if stepped is not None:
                    return stepped  # type: ignore[no-any-return]
            except Exception:
                pass
        made = self._bind()
        try:
            if self._repeats_in_graphs:
                self._check_graph()
            stepped = self._native.step_tensors(self.param_groups, self.state, scale, scaling)
            if stepped is None:
                raise RuntimeError("parameters or state changed while a step was prepared")
            return stepped  # type: ignore[no-any-return]
        except Exception:
            self._forget_native()
            for param in made:
                del self.state[param]
            raise

    def _check_graph(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph would repeat this step with its number; make the optimizer with "
                "capturable=True"
            )

    def _bind(self) -> list[torch.Tensor]:
        """Make the native optimizer for the tensors as they are; return those given new state."""
        native = self._make_native()
        on_gpu = self._counts_on_gpu()
        bound: list[_Bound] = []
        counts: dict[torch.Tensor, StepCount] = {}
        groups, group_counts = [], []
        for number, group in enumerate(self.param_groups):
            keys = self._state_keys(group)
            native.check_group(group, number, len(keys), on_gpu)
            members = []
            for param, suffix in zip(group["params"], _suffixes(group, number), strict=True):
                if group.get("capturable") and not param.is_cuda:
                    raise ValueError(
                        f"params{suffix}: in host memory, but capturable=True counts steps on a GPU"
                    )
                before = {k: v for k, v in self.state.get(param, {}).items() if v is not None}
                if param.grad is not None or before or (not keys and param.requires_grad):
                    members.append(self._bound(param, suffix, before, keys, on_gpu))
            parts = _stepped_together(members) if on_gpu else [members] if members else []
            for part in parts:
                params = [member.param for member in part]
                count = None
                if on_gpu:
                    with torch.inference_mode(False):
                        count = self._count_for(part, native)
                    counts |= dict.fromkeys(params, count)
                native.add_group(
                    "list",
                    [member.array for member in part],
                    [None] * len(part),
                    [list(of_key) for of_key in zip(*(m.state for m in part), strict=True)],
                    [member.suffix for member in part],
                    None if count is None else count.group_state,
                    [list(of_stream) for of_stream in zip(*(m.extras for m in part), strict=True)],
                    self._storage.master_weights == "stochastic",
                )
                group_counts.append(count.vector if count and self._counts_steps() else None)
                bound += part
            groups.append(len(parts))
        native.steps = [member.step for member in bound]
        versioned = [_versioned(member, native) for member in bound]
        made = []
        for member in bound:
            if member.entry:
                own = self.state[member.param]
                if not own:
                    made.append(member.param)
                own.clear()
                own.update(member.entry)
        numbers = {id(member.param): i for i, member in enumerate(bound)}
        native.watch_tensors(
            [
                (parts, [(param, numbers.get(id(param), -1)) for param in group["params"]])
                for parts, group in zip(groups, self.param_groups, strict=True)
            ],
            list(self.state.items()),
            [
                _array(member.entry["step"]) if "step" in member.entry and not on_gpu else None
                for member in bound
            ],
            group_counts,
            [tensor for tensor, _ in versioned],
            None if any(_is_distributed(m.param) for m in bound) else torch._C._increment_version,
            _array,
        )
        self._native = native
        self._held = [capsule for _, capsule in versioned]
        self._counts = counts
        self._distributed = [(m.param, m.suffix) for m in bound if _is_distributed(m.param)]
        self._inference = any(member.param.is_inference() for member in bound)
        self._repeats_in_graphs = (
            self._counts_steps() and not on_gpu and any(member.param.is_cuda for member in bound)
        )
        return made

    def _bound(
        self,
        param: torch.Tensor,
        suffix: str,
        before: dict[str, Any],
        keys: tuple[str, ...],
        on_gpu: bool,
    ) -> _Bound:
        """Return what the native optimizer is to know of a parameter, checked."""
        array = self._checked_parameter(param, keys, suffix)
        if param.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"params{suffix}: made in inference mode, and only there can a step change it; "
                "step a clone of it"
            )
        if _is_distributed(param):
            _place_gradient(param, suffix)
        if param.grad is not None:
            _checked_array(param.grad, f"grads{suffix}", writes=False)
        count = self._count_of(param, before, keys) if on_gpu else None
        with torch.inference_mode(False):
            entry, state, extras, step = self._entry(
                before, param, array, keys, suffix, count is not None
            )
        return _Bound(param, suffix, array, count, entry, state, extras, step)

    def _count_of(
        self, param: torch.Tensor, before: Mapping[str, Any], keys: tuple[str, ...]
    ) -> StepCount | None:
        """Return what has counted a parameter's steps, if its state is still of that count."""
        count = self._counts.get(param)
        if count is None or before.get("step") is not count.step_of(param):
            return None
        return count if before or not keys else None

    def _count_for(self, part: list[_Bound], native: Any) -> StepCount:
        """Return what is to count the steps of parameters, in whose state its numbers are put."""
        params, count = [member.param for member in part], part[0].count
        if count is None or not count.is_of(params):
            words = -(-native.group_state_bytes // 8)
            start = part[0].step if count is None else count
            count = StepCount(params, words, start, self._counts_steps())
            self._all_counts.append(count)
        for member in part:
            if "step" in member.entry:
                member.entry["step"] = count.step_of(member.param)
        return count

    def _entry(
        self,
        before: dict[str, Any],
        param: torch.Tensor,
        array: Any,
        keys: tuple[str, ...],
        suffix: str,
        counted: bool,
    ) -> tuple[dict[str, Any], list[Any], list[Any], int]:
        """Return a parameter's entry in the state, its arrays, what lies beside each, its step.

        A step that a GPU counts is not asked for.
        """
        where = f"state{suffix}"
        step = 0
        if before:
            if not counted:
                step = _checked_step(before.get("step", min(1, len(keys))), where)
            for key in keys:
                if key not in before:
                    raise ValueError(f"{where}: no {key!r}")
        else:
            arrays, _ = self._storage.new_state(array, keys, suffix)
            before = {"step": torch.zeros((), device="cpu")} if self._counts_steps() else {}
            before |= {key: _tensor(own, param) for key, own in arrays.items()}
            before |= _order(array, arrays)
        wanted = self._storage.state_dtypes(array, keys)
        held = {}
        for key, value in before.items():
            if key == narrow.ORDER:
                held[key] = value.cpu().numpy()
            elif key != "step":
                _check_placements(value, param, f"{where}[{key!r}]")
                held[key] = _checked_array(value, f"{where}[{key!r}]")
        order = _order(array, wanted)
        kept = order.keys() == before.keys() & {narrow.ORDER} and all(
            before[key].tolist() == value.tolist() for key, value in order.items()
        )
        if not kept or any(
            k not in held or gpu.dtype_of(held[k]) != dtype for k, dtype in wanted.items()
        ):
            own, _ = self._storage.new_state(array, keys, suffix)
            values = narrow.fresh(array, own)
            for key in own:
                if key in held and not key.endswith(narrow.UNITS):
                    values |= narrow.converted(held, key, own, array, where)
            for key, value in values.items():
                if gpu.is_on_host(own[key]):
                    own[key][...] = value
                else:
                    gpu.from_host(own[key], value)
            tensors = {key: _tensor(value, param) for key, value in own.items()}
            held |= {key: _array(tensor) for key, tensor in tensors.items()}
            before |= tensors
            before.pop(narrow.ORDER, None)
            before |= order
        count = before.get("step")
        if count is not None and not _is_count(count):
            before["step"] = torch.tensor(float(step), device="cpu")
        beside = [held[name] for name in ("master", "correction") if name in wanted]
        extras = [
            beside[0] if beside else None,
            None,
            *(held.get(k + narrow.UNITS) if k + narrow.UNITS in wanted else None for k in keys),
        ]
        return before, [held[key] for key in keys], extras, step

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state and hyper-parameters, as `torch.optim.Optimizer.load_state_dict`.

        State keeps its dtypes, which PyTorch casts to the parameters'; the next step converts what
        was saved in another format.
        """

        def keep(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            self._loading = final

        handle = self.register_load_state_dict_pre_hook(keep)  # the last of them
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_storage": self._storage}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups", ())  # where state is being loaded
        super().__setstate__(state)
        self.__dict__.setdefault("_all_counts", [])
        self._unbind()
        if self._loading is not None:
            saved = chain.from_iterable(g["params"] for g in self._loading["param_groups"])
            params = chain.from_iterable(g["params"] for g in self.param_groups)
            for index, param in zip(saved, params, strict=True):
                for key, value in self._loading["state"].get(index, {}).items():
                    if isinstance(value, torch.Tensor) and key != "step":
                        self.state[param][key] = value.to(param.device)
        for group in self.param_groups:
            for key, value in {**self.defaults, **_ADDED}.items():
                if key in self.defaults:
                    group.setdefault(key, value)
        for group, own in zip(self.param_groups, before, strict=False):
            for name in _WAYS:
                group.pop(name, None)
                if name in own:
                    group[name] = own[name]


class SGD(_Optimizer):
    """Gradient descent as `torch.optim.SGD`, with momentum or without. `GD` is another name for it.

    Parameters
    ----------
    params : iterable
        As PyTorch's: parameters, pairs of a name and a parameter, or groups. float32, float64,
        bfloat16 or float16, dense, in host memory or on a CUDA GPU.
    lr, momentum, dampening, weight_decay, nesterov, maximize
        As PyTorch's. `lr` may be a tensor of one element.
    foreach, differentiable : bool, optional
        True is refused: there is one way to take a step.
    fused, capturable : bool, optional
        As those of `Adam`.
    state_dtype, master_weights, seed
        As those of `fusedstep.GD`.

    Raises
    ------
    TypeError, ValueError
        A parameter is sparse, complex or of another type that has no kernel; a number is out of
        range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        state_dtype: str | Mapping[str, str | None] | None = None,
        master_weights: str | None = None,
        seed: int = 0,
    ) -> None:
        # PyTorch's groups know nothing of it here.
        capturing = {} if capturable is False else {"capturable": capturable}
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
            },
            narrow.Storage(state_dtype, master_weights, seed),
            {"foreach": foreach, "differentiable": differentiable, "fused": fused, **capturing},
        )

    def _state_keys(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _make_native(self) -> Any:
        return _core.GdOptimizer(seed=self._storage.seed)

    def _counts_steps(self) -> bool:
        """Whether steps are part of the state: random rounding depends on their number."""
        return self._storage != narrow.Storage(seed=self._storage.seed)


GD = SGD


class Adam(_Optimizer):
    """Adam as `torch.optim.Adam`.

    Parameters
    ----------
    params : iterable
        As PyTorch's: parameters, pairs of a name and a parameter, or groups. float32, float64,
        bfloat16 or float16, dense, in host memory or on a CUDA GPU.
    lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
        As PyTorch's. `lr` and `betas` may be tensors of one element.
    foreach, differentiable : bool, optional
        True is refused: there is one way to take a step.
    fused : bool, optional
        Steps are fused in any case. True also leaves a `GradScaler`'s scaling to the step, as it
        does in PyTorch, and on a GPU counts steps as `capturable` does.
    capturable : bool
        On a GPU, count steps in its memory, so that a step which was captured in a CUDA graph is a
        new step each time the graph is replayed. `lr` may be a tensor of one float32 or float64
        there, which is read when a step runs and is not checked.
    state_dtype, master_weights, seed
        As those of `fusedstep.Adam`.

    Raises
    ------
    TypeError, ValueError
        A parameter is sparse, complex or of another type that has no kernel; a number is out of
        range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_dtype: str | Mapping[str, str | None] | None = None,
        master_weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
            narrow.Storage(state_dtype, master_weights, seed),
            {
                "foreach": foreach,
                "capturable": capturable,
                "differentiable": differentiable,
                "fused": fused,
            },
        )

    def _state_keys(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        keys = ("exp_avg", "exp_avg_sq")
        return (*keys, "max_exp_avg_sq") if group["amsgrad"] else keys

    def _make_native(self) -> Any:
        return _core.AdamOptimizer(seed=self._storage.seed)

    def _counts_steps(self) -> bool:
        return True


class AdamW(Adam):
    """Adam with decoupled weight decay, as `torch.optim.AdamW`.

    Parameters and errors are those of `Adam`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: str | Mapping[str, str | None] | None = None,
        master_weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            state_dtype=state_dtype,
            master_weights=master_weights,
            seed=seed,
        )


def _check_way(name: str, value: Any) -> None:
    if value is None or value is False or (name in ("fused", "capturable") and value is True):
        return
    if value is True:
        raise ValueError(f"{name}=True: not supported; leave it out, a step is one fused pass")
    raise TypeError(f"{name}: expected True, False or None, got {value!r}")


def _stepped_together(members: Iterable[_Bound]) -> list[list[_Bound]]:
    """Return a group in parts of equal step counts, in each of which all or none take this step."""
    parts: dict[tuple[Any, bool], list[_Bound]] = {}
    for member in members:
        key = (member.step if member.count is None else member.count, member.param.grad is None)
        parts.setdefault(key, []).append(member)
    return list(parts.values())


def _versioned(member: _Bound, native: Any) -> tuple[torch.Tensor, Any]:
    """Return a tensor that has a parameter's version counter, and a capsule that holds it.

    Raising the version of a tensor that C++ refers to as well takes half the time, since PyTorch
    need not hold its Python object meanwhile. The parameter itself cannot be held like that:
    `torch.utils.swap_tensors` refuses such tensors.
    """
    param, array = member.param, member.array
    if (
        param.is_inference()
        # A step would not notice that these were swapped for an alias with a counter of its own.
        or not native.reads_tensor(param)
        or isinstance(array, torch.Tensor)
        or not array.flags.c_contiguous
    ):
        return param, None
    with torch.inference_mode(False):
        alias = param.detach()
    return alias, to_dlpack(alias)


def _suffixes(group: Mapping[str, Any], number: int) -> list[str]:
    names = group.get("param_names", range(len(group["params"])))
    return [f"[{number}][{name!r}]" for name in names]


def _is_count(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dtype == torch.float32
        and value.device.type == "cpu"
        and value.dim() == 0
    )


def _checked_array(tensor: torch.Tensor, name: str, writes: bool = True) -> Any:
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: a {kind} tensor; only dense (strided) tensors can be stepped")
    if tensor.is_complex():
        raise TypeError(
            f"{name}: {tensor.dtype}; step torch.view_as_real(x), which shares its memory"
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(
            f"{name}: on device {tensor.device.type!r}; only tensors in host memory and on CUDA "
            "GPUs can be stepped"
        )
    if tensor.is_neg() and writes:
        raise TypeError(
            f"{name}: a view whose memory holds the negative of its values, as (x.conj()).imag is; "
            "give its resolve_neg()"
        )
    try:
        return _array(tensor)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name}: {tensor.dtype} {type(tensor).__qualname__}: {error}") from error


def _array(tensor: torch.Tensor) -> Any:
    """Return an array of a tensor's memory; on a GPU the tensor itself."""
    tensor = _local(tensor).detach().resolve_neg()
    if tensor.device.type != "cpu":
        return tensor
    if tensor.dtype == torch.bfloat16:
        array = tensor.view(torch.int16).numpy().view(narrow.bfloat16())
    else:
        array = tensor.numpy()
    return array if array.size else np.ndarray(array.shape, array.dtype, _NO_MEMORY)


def _order(array: Any, own: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return what the state says of the memory order of a parameter with 8-bit state."""
    order = narrow.memory_order(array, own)
    return {key: torch.from_numpy(value) for key, value in order.items()}


def _tensor(array: Any, param: torch.Tensor) -> torch.Tensor:
    """Return a tensor of an array's memory; of its values where the parameter is a DTensor."""
    if isinstance(array, torch.Tensor):
        tensor = array
    elif array.dtype.name == "bfloat16":
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    if not _is_distributed(param):
        return tensor
    distributed = torch.empty_like(param, dtype=tensor.dtype, requires_grad=False)
    _local(distributed).copy_(tensor)
    return distributed


def _is_distributed(tensor: torch.Tensor) -> bool:
    """Say whether it is a DTensor, of which a rank holds its own part."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return module is not None and isinstance(tensor, module.DTensor)


def _local(tensor: Any) -> torch.Tensor:
    """Return what this rank holds of a tensor."""
    local: torch.Tensor = tensor
    if _is_distributed(tensor):
        with torch.no_grad():
            local = tensor.to_local()
        if hasattr(local, "wait"):
            local = local.wait()
    return local


def _place_gradient(param: Any, suffix: str) -> None:
    """Distribute a gradient as its parameter is, which the operations of a DTensor do too."""
    grad = param.grad
    if grad is None or getattr(grad, "placements", None) == param.placements:
        return
    if not _is_distributed(grad):
        raise TypeError(
            f"grads{suffix}: {type(grad).__qualname__}, but its parameter is a DTensor with "
            f"placements {param.placements}"
        )
    with torch.no_grad():
        param.grad = grad.redistribute(placements=param.placements)


def _check_placements(value: Any, param: Any, where: str) -> None:
    """Raise where state is not distributed as its parameter is."""
    held, wanted = (t.placements if _is_distributed(t) else None for t in (value, param))
    if held != wanted:
        raise ValueError(
            f"{where}: placements {held}, but its parameter has {wanted}; "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict loads it as needed"
        )
