"""What every optimizer is: it owns state and step counts, and makes one native call for a step."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core, gpu, narrow
from .step_info import StepInfo
from .structure import are_groups, structure_of, suffixes_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .structure import Grads, Params

    Array = NDArray[Any]


_PLAIN = StepInfo(None, False)
# What PyTorch's groups have beside hyper-parameters: how to run steps, and what is its schedulers'.
_PYTORCHS_OWN = {"foreach", "capturable", "differentiable", "fused", "initial_lr"}
_PYTORCHS_OWN |= {"max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}


class Optimizer:
    """What every optimizer shares: parameter groups, state, steps and their saving.

    A subclass says which hyper-parameters it has (`defaults`), which state arrays a group with
    given hyper-parameters needs (`_state_keys`) and which native optimizer runs it
    (`_make_native`).

    Attributes
    ----------
    param_groups : list of dict
        The hyper-parameters of each group, to be read and changed between steps, with the arrays
        themselves under ``"params"``.
    capturable : bool
        Whether the steps are counted on the GPU.
    """

    __module__ = "fusedstep.optim"  # where it is public
    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        capturable: bool = False,
        storage: narrow.Storage | None = None,
    ) -> None:
        if not isinstance(capturable, bool):
            raise TypeError(f"capturable: expected True or False, got {type(capturable).__name__}")
        self.defaults = defaults
        self.capturable = capturable
        self._storage = storage or narrow.Storage()
        self._start_empty()
        if are_groups(params):
            self._grads_by_group = True
            for group in params:
                self._add_group(group)
        else:
            self._add_group({"params": params})

    def _start_empty(self) -> None:
        self.param_groups = []
        self._structures: list[str] = []
        self._arrays: list[dict[str, Array]] = []
        # Of each group, in its GPU's memory: the step count, then what the kernels keep there.
        self._counters: list[Any] = []
        # What computes the norm of gradients on a GPU; made when it is first needed.
        self._norm: gpu.Norm | None = None
        # Those before it that a graph may still use.
        self._norms_in_graphs: list[gpu.Norm] = []
        self._on_gpu = False
        self._native = self._make_native()
        self._grads_by_group = False

    @staticmethod
    def _state_keys(group: Mapping[str, Any]) -> tuple[str, ...]:
        raise TypeError("Optimizer is a base class; use GD, Adam or AdamW")

    def _make_native(self) -> Any:
        raise TypeError("Optimizer is a base class; use GD, Adam or AdamW")

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add a group of parameters; gradients then come as a list with one entry for each group.

        Parameters
        ----------
        group : dict
            ``{"params": array, list or dict of arrays, ...}`` and the hyper-parameters in which it
            differs from the optimizer's own.

        Raises
        ------
        TypeError, ValueError
            As for the constructor; nothing was added.
        """
        before = self._grads_by_group
        self._grads_by_group = True
        try:
            self._add_group(group)
        except Exception:
            self._grads_by_group = before
            raise

    def _add_group(self, group: Mapping[str, Any]) -> None:
        number = len(self.param_groups)
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f"param_groups[{number}]: expected a dict with 'params'")
        unknown = group.keys() - self.defaults.keys() - {"params", "param_names"}
        if unknown:
            raise TypeError(
                f"param_groups[{number}]: unknown hyper-parameter {min(unknown)!r}; "
                f"{type(self).__name__} has {', '.join(self.defaults)}"
            )
        structure, names, params = structure_of(group["params"])
        added = {**self.defaults, **group, "params": params}
        if structure == "dict":
            added["param_names"] = names
        elif "param_names" in group:
            raise TypeError(f"param_groups[{number}]: names are given by params as a dict")
        keys = self._state_keys(added)
        for name, value in added.items():
            if self.capturable and callable(value):
                raise TypeError(
                    f"param_groups[{number}]: {name}: a callable needs the number of the step, "
                    "which capturable=True keeps on the GPU; pass a number, or lr as a GPU array"
                )
        self._native.check_group(added, number, len(keys), self.capturable)
        suffixes = suffixes_of(structure, names, f"[{number}]" if self._grads_by_group else "")
        for param, suffix in zip(params, suffixes, strict=True):
            _core.check_parameter(param, suffix)
            if self.capturable and gpu.is_on_host(param):
                raise ValueError(
                    f"params{suffix}: in host memory, but capturable=True counts steps on a GPU"
                )
        self._storage.check(keys)
        _warn_of_rounding(params, suffixes, self._storage)
        made = [
            self._storage.new_state(param, keys, suffix)
            for param, suffix in zip(params, suffixes, strict=True)
        ]
        arrays = [own for own, _ in made]
        counter = self._new_counter(params[0]) if self.capturable else None
        state = [[own[key] for own in arrays] for key in keys]
        # Of each stream, or None where nothing lies beside any parameter's.
        extras = [list(of_stream) for of_stream in zip(*(e for _, e in made), strict=True)]
        self._native.add_group(
            structure,
            params,
            names,
            state,
            suffixes,
            counter,
            extras,
            self._storage.master_weights == "stochastic",
        )
        self.param_groups.append(added)
        self._structures.append(structure)
        self._arrays += arrays
        self._counters.append(counter)
        if self._norm is not None and self._norm.is_in_graph:
            self._norms_in_graphs.append(self._norm)
        self._norm = None
        self._on_gpu = not gpu.is_on_host(params[0])
        if self.capturable:  # a captured step is no time to allocate
            self._gpu_norm()

    def _new_counter(self, param: Any) -> Any:
        count = -(-self._native.group_state_bytes // 8)
        return gpu.zeros(count, np.dtype(np.int64), param)

    def _gpu_norm(self) -> gpu.Norm:
        """Return what computes the norm of the gradients on their GPU."""
        if self._norm is None:
            param = self.param_groups[0]["params"][0]
            self._norm = gpu.Norm(self._native.norm_workspace_bytes, param)
        return self._norm

    def step(
        self,
        grads: Grads,
        *,
        grad_scale: float = 1.0,
        clip_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grad: bool = False,
    ) -> StepInfo:
        """Update every parameter in place with its gradient.

        Parameters
        ----------
        grads : numpy.ndarray, list or dict
            Of the same structure as the parameters: an array, a list of arrays, a dict of arrays
            by name, or, where the parameters were given as groups, a list with one of these for
            each group. Shapes are those of the parameters; dtypes are float64 with float64
            parameters, else float32, bfloat16 or float16. A gradient of None leaves its parameter,
            and that parameter's step count, as they are.
        grad_scale : float
            Multiplies the gradients, > 0.
        clip_norm : float, optional
            The greatest norm that the gradients may have, > 0: they are multiplied by
            ``min(1, clip_norm / (norm + 1e-6))`` as well, where `norm` is the Euclidean norm of all
            scaled gradients of this call together. That of a NaN or an infinity is not finite, and
            without `skip_nonfinite` the step follows from it: a NaN makes every parameter NaN, an
            infinity only its own and the other gradients 0.
        skip_nonfinite : bool
            Leave the step out when the norm is not finite: no parameter, no state and no step count
            is changed. On a GPU, which alone knows that, the steps must be counted there as well:
            that needs an optimizer made with ``capturable=True``.
        zero_grad : bool
            Set the gradients to zero in the same pass over memory, also when the step is skipped.
            They must be writable and share no memory with each other.

        Returns
        -------
        StepInfo
            The norm, where `clip_norm` or `skip_nonfinite` asked for it, and whether the step was
            skipped. On a GPU the step returns without waiting; reading either waits for it.

        Raises
        ------
        TypeError
            A gradient is of the wrong kind or dtype.
        ValueError
            A gradient is missing, of another shape or overlaps with what the step writes; a
            hyper-parameter is out of range; `skip_nonfinite` was given for arrays on a GPU by an
            optimizer that was not made with ``capturable=True``. Whatever the error, nothing was
            changed.

        Notes
        -----
        The norm is computed in float64. The squares of float64 gradients overflow from about 1e154
        on, and the norm is then infinite.

        References
        ----------
        Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML
        2013, algorithm 1, as in ``torch.nn.utils.clip_grad_norm_``.
        """
        if clip_norm is None and skip_nonfinite is False and zero_grad is False:
            self._native.step(self.param_groups, grads, grad_scale, self._grads_by_group)
            return _PLAIN
        later, memory = None, None
        if self._on_gpu and (clip_norm is not None or skip_nonfinite is not False):
            later, memory = self._gpu_norm().prepare()
        info = self._native.step_with_options(
            self.param_groups,
            grads,
            grad_scale,
            clip_norm,
            skip_nonfinite,
            zero_grad,
            self._grads_by_group,
            memory,
        )
        return StepInfo(*info) if later is None or info is not None else later

    @property
    def state(self) -> dict[int, dict[str, Any]]:
        """The state of each parameter by its index: its step count and its live state arrays."""
        return {
            i: {"step": step, **arrays}
            for i, (step, arrays) in enumerate(zip(self._steps(), self._arrays, strict=True))
        }

    def _all_params(self) -> list[Array]:
        return [param for group in self.param_groups for param in group["params"]]

    def _steps(self) -> list[int]:
        """Return each parameter's step count, from the GPU where it is counted there."""
        if not self.capturable:
            return list(self._native.steps)
        steps = []
        for group, counter in zip(self.param_groups, self._counters, strict=True):
            steps += [int(gpu.to_host(counter[:1])[0])] * len(group["params"])
        return steps

    def _set_steps(self, steps: list[int]) -> None:
        """Set each parameter's step count; within a group that the GPU counts they are equal."""
        if not self.capturable:
            self._native.steps = steps
            return
        first = 0
        for group, counter in zip(self.param_groups, self._counters, strict=True):
            gpu.from_host(counter[:1], np.asarray(steps[first]))
            first += len(group["params"])

    def state_dict(self) -> dict[str, Any]:
        """Return state and hyper-parameters in PyTorch's layout.

        Returns
        -------
        dict
            ``{"state": {index: {"step": int, "exp_avg": array, ...}}, "param_groups": [...]}``.
            Groups hold the indices of their parameters, and ``"param_names"`` where they have
            names. The arrays are the live state, not copies (as in PyTorch): use `copy.deepcopy`
            to keep a moment in time. A hyper-parameter that is a callable is given as None.
            8-bit codes are in the order of their parameter's memory; where that is not C order,
            ``"memory_order"`` has its dimensions from the outermost, and ``~d`` for a reversed one.
        """
        groups = []
        first = 0
        for group in self.param_groups:
            count = len(group["params"])
            saved = {key: None if callable(value) else value for key, value in group.items()}
            saved["params"] = list(range(first, first + count))
            groups.append(saved)
            first += count
        state = {
            i: entry | narrow.memory_order(param, entry)
            for (i, entry), param in zip(self.state.items(), self._all_params(), strict=True)
        }
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over state and hyper-parameters from a `state_dict`.

        Parameters are matched by name where both sides have names, else by index. The values are
        copied into this optimizer's own arrays. Where the saved hyper-parameter was a callable,
        this optimizer's own value stays.

        Parameters
        ----------
        state_dict : dict
            As `state_dict` returns it, or `torch.optim.SGD`, `Adam` or `AdamW` (of the same decay).
            PyTorch's SGD counts no steps: where it has a momentum, one counts as taken.

        Raises
        ------
        TypeError, ValueError
            It does not fit this optimizer. Nothing was changed.
        """
        groups, arrays, steps = self._checked_state(state_dict)
        # A state_dict holds live arrays: this optimizer's own must be read before they are written.
        own_memory = {
            id(array.base)
            for own in self._arrays
            for array in own.values()
            if gpu.is_on_host(array)
        }
        arrays = [
            {key: a.copy() if id(a.base) in own_memory else a for key, a in saved.items()}
            for saved in arrays
        ]
        self._fill(arrays)
        for own_group, hyper in zip(self.param_groups, groups, strict=True):
            if "lr" in hyper and gpu.is_gpu_array(own_group["lr"]):  # a graph may hold it
                gpu.from_host(own_group["lr"], np.asarray(hyper.pop("lr")))
            own_group.update(hyper)
        self._set_steps(steps)

    def _fill(self, arrays: Sequence[Mapping[str, Any]]) -> None:
        """Copy host arrays into the state."""
        for own, values in zip(self._arrays, arrays, strict=True):
            for key, array in own.items():
                if gpu.is_on_host(array):
                    array[...] = values[key]
                else:
                    gpu.from_host(array, values[key])

    def _checked_state(
        self, state_dict: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]], list[int]]:
        """Return all that loading will write: hyper-parameters, arrays and step counts."""
        _check_kind(state_dict, Mapping, "state_dict")
        for part, kind in (("state", Mapping), ("param_groups", list | tuple)):
            if part not in state_dict:
                raise ValueError(f"state_dict: no {part!r}")
            _check_kind(state_dict[part], kind, f"state_dict: {part}")
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"state_dict: {len(saved_groups)} parameter groups, "
                f"but this optimizer has {len(self.param_groups)}"
            )
        groups: list[dict[str, Any]] = []
        arrays: list[Mapping[str, Any]] = []
        steps: list[int] = []
        for number, (own, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            where = f"state_dict: param_groups[{number}]"
            _check_kind(saved, Mapping, where)
            groups.append(self._checked_hyper(own, saved, number, where))
            indices = _matched_indices(own, saved, where)
            for param, index in zip(own["params"], indices, strict=True):
                entry = state_dict["state"].get(index, {"step": 0})
                entry_name = f"state_dict: state[{index}]"
                _check_kind(entry, Mapping, entry_name)
                if "foreach" in saved:
                    entry = self._entry_from_pytorch(entry)
                checked, step = self._checked_entry(
                    entry, param, self._arrays[len(arrays)], entry_name
                )
                arrays.append(checked)
                steps.append(step)
            own_steps = set(steps[len(steps) - len(indices) :])
            if self.capturable and len(own_steps) > 1:
                raise ValueError(
                    f"{where}: step counts from {min(own_steps)} to {max(own_steps)}, but "
                    "capturable=True has one count for all parameters of a group"
                )
        return groups, arrays, steps

    def _checked_hyper(
        self, own: Mapping[str, Any], saved: Mapping[str, Any], number: int, where: str
    ) -> dict[str, Any]:
        if "foreach" in saved:
            saved = self._from_pytorch(saved, where)
        unknown = saved.keys() - self.defaults.keys() - {"params", "param_names"}
        missing = self.defaults.keys() - saved.keys()
        if unknown or missing:
            raise ValueError(
                f"{where}: {f'unknown {min(unknown)!r}' if unknown else f'no {min(missing)!r}'}; "
                f"{type(self).__name__} has {', '.join(self.defaults)}"
            )
        hyper = {key: saved[key] for key in self.defaults if saved[key] is not None}
        if gpu.is_gpu_array(hyper.get("lr")):
            hyper["lr"] = gpu.to_number(hyper["lr"])
        merged = {**own, **hyper}
        keys, wanted = self._state_keys(own), self._state_keys(merged)
        if wanted != keys:
            raise ValueError(
                f"{where}: needs the state arrays ({', '.join(wanted)}), but this optimizer has "
                f"({', '.join(keys)}); make it with the same momentum or amsgrad"
            )
        self._native.check_group(merged, number, len(keys), self.capturable)
        return hyper

    def _from_pytorch(self, saved: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the hyper-parameters of a group that PyTorch saved."""
        return {key: value for key, value in saved.items() if key not in _PYTORCHS_OWN}

    def _entry_from_pytorch(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the state of a parameter that PyTorch saved, with its step count."""
        return entry

    def _checked_entry(
        self, entry: Mapping[str, Any], param: Array, own: Mapping[str, Any], where: str
    ) -> tuple[Mapping[str, Any], int]:
        """Return the values of a parameter's own state arrays, and its step count.

        A moment in another format than this optimizer's is converted.
        """
        step = _checked_step(entry.get("step"), where)
        moments = {key for key in own if not key.endswith(narrow.UNITS)}
        known = moments | {key + narrow.UNITS for key in moments} | {"step", narrow.ORDER}
        extra = entry.keys() - known
        if extra:
            raise ValueError(
                f"{where}: {min(extra)!r} is no state of this {type(self).__name__}"
                f"{_how_to_mend(extra)}"
            )
        if step == 0 and not entry.keys() & own.keys():
            return narrow.fresh(param, own), 0
        arrays: dict[str, Array] = {}
        for key in moments:
            if key not in entry:
                raise ValueError(f"{where}: no {key!r}{_how_to_mend({key})}")
            arrays |= narrow.converted(entry, key, own, param, where)
        return arrays, step

    def save(self, path: str | PathLike[str]) -> None:
        """Write state and hyper-parameters to a safetensors file, whole or not at all.

        Parameters
        ----------
        path : path-like
            Where to. A file that is there is replaced once the new one is complete.

        Raises
        ------
        ImportError
            safetensors is not installed (``pip install 'fusedstep[checkpoint]'``).
        """
        from .checkpoint import save_state

        save_state(type(self).__name__, self.state_dict(), path)

    def load(self, path: str | PathLike[str]) -> None:
        """Take over what `save` wrote. The file is data only: nothing in it is executed.

        Parameters
        ----------
        path : path-like
            A file that `save` wrote.

        Raises
        ------
        ValueError
            The file is truncated or altered, or is not a file of `save`, or is another
            optimizer's. Nothing was changed.
        TypeError, ValueError
            As `load_state_dict`.
        """
        from .checkpoint import load_state

        self.load_state_dict(load_state(type(self).__name__, path))

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "structures": self._structures,
            "grads_by_group": self._grads_by_group,
            "arrays": [
                {k: a if gpu.is_on_host(a) else gpu.to_host(a) for k, a in own.items()}
                | narrow.memory_order(param, own)
                for own, param in zip(self._arrays, self._all_params(), strict=True)
            ],
            "steps": self._steps(),
            "capturable": self.capturable,
            "storage": self._storage,
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.defaults = saved["defaults"]
        self.capturable = saved["capturable"]
        self._storage = saved["storage"]
        self._start_empty()
        self._grads_by_group = saved["grads_by_group"]
        for group, structure in zip(saved["param_groups"], saved["structures"], strict=True):
            params = group["params"]
            if structure == "array":
                params = params[0]
            elif structure == "dict":
                params = dict(zip(group["param_names"], params, strict=True))
            self._add_group({**group, "params": params})
        # Into arrays of our own: a copy made by pickle is not aligned as they are, and the
        # parameter's copy need not be in its memory order.
        self._fill(
            [
                {
                    key: array
                    for name in own
                    if not name.endswith(narrow.UNITS)
                    for key, array in narrow.converted(values, name, own, param, "state").items()
                }
                for values, own, param in zip(
                    saved["arrays"], self._arrays, self._all_params(), strict=True
                )
            ]
        )
        self._set_steps(saved["steps"])

    def __repr__(self) -> str:
        lines = [
            f"  group {number}: {len(group['params'])} arrays, "
            + ", ".join(f"{key}={group[key]!r}" for key in self.defaults)
            for number, group in enumerate(self.param_groups)
        ]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])


def _warn_of_rounding(
    params: Sequence[Any], suffixes: Sequence[str], storage: narrow.Storage
) -> None:
    for param, suffix in zip(params, suffixes, strict=True):
        if narrow.loses_small_steps(param, storage):
            warnings.warn(
                f"params{suffix}: {param.dtype}, so that a step smaller than the spacing of its "
                "elements is lost; master_weights='float32', 'correction16', 'correction8' or "
                "'stochastic' keeps it",
                stacklevel=5,
            )
            return


def _how_to_mend(keys: Collection[str]) -> str:
    if any(key in ("master", "correction") for key in keys):
        return "; make the optimizer with the master_weights that the saved one was made with"
    return ""


def _checked_step(step: Any, where: str) -> int:
    try:
        number = int(step)
        if number == step and 0 <= number < 2**62:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{where}: step: expected an integer from 0 to 2**62, got {step!r}")


def _check_kind(given: Any, kind: Any, where: str) -> None:
    if not isinstance(given, kind):
        expected = "dict" if kind is Mapping else "list"
        raise TypeError(f"{where}: expected a {expected}, got {type(given).__name__}")


def _matched_indices(own: Mapping[str, Any], saved: Mapping[str, Any], where: str) -> list[int]:
    """Return the saved index of each of a group's own parameters."""
    if "params" not in saved:
        raise ValueError(f"{where}: no 'params'")
    _check_kind(saved["params"], list | tuple, f"{where}: params")
    indices = list(saved["params"])
    if len(indices) != len(own["params"]):
        raise ValueError(
            f"{where}: {len(indices)} parameters, but this optimizer has {len(own['params'])}"
        )
    names, saved_names = own.get("param_names"), saved.get("param_names")
    if names is None or saved_names is None:
        return indices
    by_name = dict(zip(saved_names, indices, strict=True))
    for name in names:
        if name not in by_name:
            raise ValueError(f"{where}: no parameter named {name!r}")
    return [by_name[name] for name in names]
