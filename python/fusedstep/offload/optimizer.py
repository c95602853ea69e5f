"""An optimizer whose state is in host memory, for parameters that live on a GPU."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import narrow
from ..distributed.boundary import address_of
from ..optimizer import Optimizer
from ..step_info import StepInfo
from .boundary import Gradient, Parameters
from .bucket_step import bucket_step
from .device import Device
from .layout import BLOCK, cut, places
from .norm import norm_of
from .overlap import Overlap
from .pipeline import Numbers, Pipeline
from .storage import PlacedStorage, StateDirectory, in_order_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..structure import Grads, Params

BUCKET_BYTES = 16 << 20


class OffloadedOptimizer:
    """An optimizer that keeps its state, and does its steps, in host memory.

    Parameters and gradients stay where they are, on a GPU. A step copies gradients to pinned host
    buffers, bucket by bucket; steps each bucket on the processor as soon as it has arrived, with an
    ordinary optimizer of this library; and copies the parameters back, all at the same time. The
    result has the bits of that optimizer on host arrays, for any size of bucket.

    Parameters
    ----------
    optimizer : type
        `fusedstep.GD`, `fusedstep.Adam` or `fusedstep.AdamW`.
    params : array, list, dict, or list of groups
        As for `optimizer`: CuPy arrays, or NumPy arrays (to try it without a GPU). For PyTorch
        there is `fusedstep.offload.torch.OffloadedOptimizer`. Their memory has no gaps.
    bucket_bytes : int
        Largest size of a bucket, in bytes of parameters. Three of them are allocated in each
        direction.
    pin_params : bool
        Pin the host's copy of the parameters, which are then copied to the device from where the
        step wrote them, without a buffer between. Faster; pinned memory cannot be swapped out.
    state_dir : path-like, optional
        A folder for state and the host's copy of the parameters, which are then a memory-mapped
        file. A new folder, unless `resume`.
    resume : bool
        Go on with what `flush` has left in `state_dir`: state, steps, hyper-parameters and
        parameters.
    device : Device, optional
        Where the parameters live, if not where their type says.
    **hyper
        Hyper-parameters, as for `optimizer`; `state_dtype`, `master_weights` and `seed` as well.

    Attributes
    ----------
    param_groups : list of dict
        The hyper-parameters of each group, to be read and changed between steps, with the device's
        arrays under ``"params"``.

    Raises
    ------
    TypeError, ValueError
        As `optimizer`; the parameters are not all on one device; `state_dir` does not fit.

    Notes
    -----
    Who else writes parameters between steps must call `refresh` (for PyTorch it is noticed).

    References
    ----------
    Ren, Rajbhandari, Aminabadi, Ruwase, Yang, Zhang, Li, He, "ZeRO-Offload: democratizing
    billion-scale model training", USENIX ATC 2021.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> from fusedstep.offload import OffloadedOptimizer
    >>> theta = np.array([1.0, -2.0], dtype=np.float32)  # or CuPy's
    >>> optimizer = OffloadedOptimizer(fs.GD, theta, lr=0.25)
    >>> optimizer.step(2 * theta)
    StepInfo(grad_norm=None, skipped=False)
    >>> theta
    array([ 0.5, -1. ], dtype=float32)
    """

    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        optimizer: type[Optimizer],
        params: Params,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        pin_params: bool = False,
        state_dir: str | PathLike[str] | None = None,
        resume: bool = False,
        device: Device | None = None,
        **hyper: Any,
    ) -> None:
        _check_options(optimizer, bucket_bytes, pin_params, state_dir, resume, hyper)
        self._params = Parameters(params, device)
        self._broken: str | None = None
        self._pending: tuple[Overlap, float | None, bool] | None = None
        # On nothing: checks all that can be checked before memory is taken, and, in each step, all
        # numbers before anything is written.
        by_group = self._params.by_group
        groups: Any = params if by_group else [{}]
        empty = [np.empty(0, dtype) for dtype in self._params.dtypes]
        checked = self._grouped(groups, empty)
        self._checker = optimizer(checked if by_group else checked[0]["params"], **hyper)
        no_grads = [group["params"] for group in self._grouped(groups, [a.copy() for a in empty])]
        self._no_grads = no_grads if by_group else no_grads[0]
        self._make_inner(optimizer, groups, bucket_bytes, pin_params, state_dir, resume)

    def _grouped(self, groups: Sequence[Mapping[str, Any]], arrays: Sequence[Any]) -> Any:
        """Return groups with other arrays in the place of the parameters."""
        grouped = []
        for group, structure, members in zip(
            groups, self._params.structures, self._params.members, strict=True
        ):
            given: Any = [arrays[i] for i in members]
            if structure == "dict":
                given = {self._params.names[i]: arrays[i] for i in members}
            elif structure == "array":
                given = given[0]
            grouped.append({**group, "params": given})
        return grouped

    def _make_inner(
        self,
        optimizer: type[Optimizer],
        groups: Sequence[Mapping[str, Any]],
        bucket_bytes: int,
        pin_params: bool,
        state_dir: str | PathLike[str] | None,
        resume: bool,
    ) -> None:
        """Make the ordinary optimizer, on host memory that it shares with the pipeline."""
        params, checker = self._params, self._checker
        itemsizes = [dtype.itemsize for dtype in params.dtypes]
        offsets, host_size = places(params.sizes, itemsizes)
        storage = PlacedStorage(checker._storage)
        keys = [checker._state_keys(group) for group in checker.param_groups]
        own_keys = [keys[g] for g in params.group_of]
        like = [
            np.broadcast_to(np.empty((), dtype), size)
            for dtype, size in zip(params.dtypes, params.sizes, strict=True)
        ]
        state_size = sum(map(storage.size_of_state, like, own_keys))
        # Random bits count a parameter's elements from its first.
        whole = list(map(storage.is_random, like, own_keys))
        buckets = cut(params.sizes, itemsizes, whole, bucket_bytes)

        self._directory: StateDirectory | None = None
        saved = None
        if state_dir is not None:
            self._directory = StateDirectory(state_dir)
            saved = self._directory.open(host_size + state_size, self._facts(optimizer), resume)
            self._host = self._directory.memory[:host_size]
            state_memory = self._directory.memory[host_size:]
        else:
            pinned = params.device.pinned
            self._host = pinned(host_size) if pin_params else _zeros(host_size)
            state_memory = _zeros(state_size)
        self._pipeline = Pipeline(params, self._host, pin_params, buckets)
        host = [
            in_order_of(array, self._host[begin : begin + n * dtype.itemsize].view(dtype))
            for array, begin, n, dtype in zip(
                params.arrays, offsets, params.sizes, params.dtypes, strict=True
            )
        ]
        if not resume:
            self._read_params(range(len(host)))
        storage.place_in(state_memory, resume)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has warned of rounding when it was checked
            # The optimizer on nothing, made again with this storage and on these parameters.
            inner = self._inner = copy.copy(checker)
            inner._storage = storage  # type: ignore[assignment]
            inner._start_empty()
            inner._grads_by_group = True
            for group in self._grouped(groups, host):
                inner._add_group(group)
        self._pipeline.steps = [
            bucket_step(inner, params, self._host, bucket.pieces) for bucket in buckets
        ]
        self.param_groups = []
        for group, structure, members in zip(
            inner.param_groups, params.structures, params.members, strict=True
        ):
            of_device = {**group, "params": [params.arrays[i] for i in members]}
            if structure == "dict":
                of_device["param_names"] = [params.names[i] for i in members]
            self.param_groups.append(of_device)
        if saved is not None:
            inner._set_steps(saved["steps"])
            self._take_hyper(saved["groups"])
            self._pipeline.write_params()
            self._stamps = self._stamped()

    def step(
        self,
        grads: Grads,
        *,
        grad_scale: float = 1.0,
        clip_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> StepInfo:
        """Update every parameter with its gradient; return when all are on the device.

        Parameters
        ----------
        grads : array, list or dict
            As for the ordinary optimizer, where the parameters are. They may be complete only in
            the order of the stream that computes (CuPy's current one).
        grad_scale : float
            Multiplies the gradients, > 0.
        clip_norm : float, optional
            > 0. As for the ordinary optimizer: the norm is that of all gradients. They come to the
            host once to be squared and once more to be used, so that none has to be kept there.
        skip_nonfinite : bool
            Leave the step out when the norm is not finite.

        Returns
        -------
        StepInfo
            As the ordinary optimizer's.

        Raises
        ------
        TypeError, ValueError
            As the ordinary optimizer; the gradients are to be clipped, but their norm is not
            finite. Nothing was changed.
        RuntimeError
            An earlier step was broken off in the middle, or is not finished.
        Exception
            A copy failed, or the program was interrupted. Where the error says (in a note) that
            some parameters are new and others old, the optimizer refuses to go on until state and
            parameters have been loaded.
        """
        return self._step(
            lambda: self._params.flat_grads(grads), grad_scale, clip_norm, skip_nonfinite
        )

    def _step(
        self,
        read: Callable[[], Sequence[Gradient | None]],
        grad_scale: float,
        clip_norm: float | None,
        skip_nonfinite: bool,
    ) -> StepInfo:
        self._refuse_broken()
        numbers = self._prepared(grad_scale, clip_norm, skip_nonfinite)
        grads = read()
        self._pipeline.reserve([grad and grad.dtype for grad in grads])
        sums = None
        if clip_norm is not None or skip_nonfinite:
            sums = self._new_sums()
            self._pipeline.add_sums(self._pipeline.all_work(grads), grads, sums)
        return self._decided(grads, numbers, sums, clip_norm, skip_nonfinite)

    def _decided(
        self,
        grads: Sequence[Gradient | None],
        numbers: Numbers,
        sums: Sequence[NDArray[Any]] | None,
        clip_norm: float | None,
        skip_nonfinite: bool,
    ) -> StepInfo:
        """Take the step whose gradients have been squared, where that was asked for."""
        norm = None
        if sums is not None:
            norm = numbers.grad_scale * norm_of(grads, sums)
            if skip_nonfinite and not math.isfinite(norm):
                return StepInfo(norm, True)
            numbers = self._clipped(numbers, norm, clip_norm)
        begun: set[int] = set()
        with self._whole_or_broken(begun, grads):
            self._begin_to_write()
            self._pipeline.update(self._pipeline.all_work(grads), grads, numbers, begun)
            self._count(grads, numbers)
        return StepInfo(norm, False)

    @contextmanager
    def _overlap(
        self, grad_scale: float, clip_norm: float | None, skip_nonfinite: bool
    ) -> Iterator[Overlap]:
        """Begin a step with the gradients that `Overlap.ready` is given; `_finish` ends it."""
        self._refuse_broken()
        numbers = self._prepared(grad_scale, clip_norm, skip_nonfinite)
        takes_norm = clip_norm is not None or skip_nonfinite
        self._pipeline.reserve(self._params.dtypes)
        if not takes_norm:
            self._begin_to_write()
        sums = self._new_sums() if takes_norm else None
        overlap = Overlap(self._params, self._pipeline, numbers, sums)
        self._pending = overlap, clip_norm, skip_nonfinite
        with self._whole_or_broken(overlap.begun, overlap.grads):
            try:
                yield overlap
            except BaseException:
                self._pending = None
                overlap.stop()
                raise

    def _finish(self, grads: Sequence[Any]) -> StepInfo:
        """End the step that is under way with the gradients as they are now."""
        assert self._pending is not None
        overlap, clip_norm, skip_nonfinite = self._pending
        self._pending = None
        with self._whole_or_broken(overlap.begun, overlap.grads):
            overlap.finish(grads)
            if overlap.sums is None:
                self._count(overlap.grads, overlap.numbers)
                return StepInfo(None, False)
        return self._decided(
            overlap.grads, overlap.numbers, overlap.sums, clip_norm, skip_nonfinite
        )

    def _begin_to_write(self) -> None:
        if self._directory is not None:
            self._directory.begin_to_write()

    def _new_sums(self) -> list[NDArray[Any]]:
        return [np.zeros(-(-size // BLOCK)) for size in self._params.sizes]

    def _prepared(
        self, grad_scale: float, clip_norm: float | None, skip_nonfinite: bool
    ) -> Numbers:
        """Check all numbers of a step, and where the parameters are."""
        self._check_groups()
        counts = self._inner._steps()
        groups = []
        for group, members in zip(self.param_groups, self._params.members, strict=True):
            number = max(counts[i] for i in members) + 1
            groups.append(
                {
                    key: group[key](number) if callable(group[key]) else group[key]
                    for key in self._checker.defaults
                }
            )
        for own, group in zip(self._checker.param_groups, groups, strict=True):
            own.update(group)
        self._checker._set_steps(counts)
        self._checker.step(
            self._no_grads,
            grad_scale=grad_scale,
            clip_norm=clip_norm,
            skip_nonfinite=skip_nonfinite,
        )
        self._params.read_memory()
        changed = [
            i
            for i, (old, new) in enumerate(zip(self._stamps, self._stamped(), strict=True))
            if old != new
        ]
        if changed:
            self._read_params(changed)
        return Numbers(groups, float(grad_scale), counts)

    def _check_groups(self) -> None:
        params = self._params
        same = len(self.param_groups) == len(params.members) and all(
            len(group["params"]) == len(members)
            and all(a is params.arrays[i] for a, i in zip(group["params"], members, strict=True))
            for group, members in zip(self.param_groups, params.members, strict=True)
        )
        if not same:
            raise ValueError(
                "param_groups: not the groups and arrays that the optimizer was made with; make a "
                "new optimizer and load this one's state_dict()"
            )
        for number, group in enumerate(self.param_groups):
            for key in self._checker.defaults:
                if key not in group:
                    raise ValueError(f"param_groups[{number}]: {key}: missing")

    def _clipped(self, numbers: Numbers, norm: float, clip_norm: float | None) -> Numbers:
        if clip_norm is None:
            return numbers
        if not math.isfinite(norm):
            raise ValueError(
                f"grads: their global norm is {norm}, which cannot be clipped; "
                f"skip_nonfinite=True skips such steps"
            )
        scale = numbers.grad_scale * min(1.0, clip_norm / (norm + 1e-6))
        return numbers._replace(grad_scale=scale)

    @contextmanager
    def _whole_or_broken(self, begun: set[int], grads: Sequence[Gradient | None]) -> Iterator[None]:
        """Remember a step that was broken off between its first byte and its last."""
        try:
            yield
        except BaseException as error:
            if begun:
                self._broken = self._what_was_begun(begun, grads)
                error.add_note(self._broken)
            raise

    def _what_was_begun(self, begun: set[int], grads: Sequence[Gradient | None]) -> str:
        buckets = self._pipeline.buckets
        written = {piece.param for b in begun for piece in buckets[b].pieces}
        written = {i for i in written if grads[i] is not None}
        names = [f"params{self._params.suffixes[i]}" for i in sorted(written)]
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        return (
            f"a step was broken off in the middle: {len(begun)} of {len(buckets)} buckets may be "
            f"new ({shown}), the others are old; load parameters and state from a checkpoint"
        )

    def _count(self, grads: Sequence[Gradient | None], numbers: Numbers) -> None:
        self._inner._set_steps(
            [n + (grad is not None) for n, grad in zip(numbers.counts, grads, strict=True)]
        )
        self._stamps = self._stamped()

    def _refuse_broken(self) -> None:
        if self._broken is not None:
            raise RuntimeError(self._broken)
        if self._pending is not None:
            raise RuntimeError(
                "a step that a backward pass has begun is not finished: call step() first"
            )

    def _stamped(self) -> list[tuple[int, int]]:
        """Return what tells whether a parameter was written or moved by somebody else."""
        return [
            (address_of(memory), getattr(array, "_version", 0))
            for memory, array in zip(self._params.memory, self._params.arrays, strict=True)
        ]

    def _read_params(self, indices: Iterable[int]) -> None:
        self._begin_to_write()
        self._pipeline.reserve(self._params.dtypes)
        self._pipeline.read_params(set(indices))
        self._stamps = self._stamped()

    def refresh(self) -> None:
        """Take over the parameters as they are on the device, after somebody else wrote them.

        As with the ordinary optimizer, a float32 copy (``master_weights="float32"``) stays.
        """
        self._refuse_broken()
        self._params.read_memory()
        self._read_params(range(len(self._params.arrays)))

    def memory_bytes(self) -> dict[str, int]:
        """Return what the host's arrays take, in bytes, by what they are for.

        Returns
        -------
        dict
            ``"params"``, the copy of the parameters; ``"state"``; ``"buffers"``, which are pinned.
        """
        state = [array for own in self._inner._arrays for array in own.values()]
        return {
            "params": self._host.nbytes,
            "state": sum(array.nbytes for array in state),
            "buffers": self._pipeline.pinned_bytes(),
        }

    @property
    def state(self) -> dict[int, dict[str, Any]]:
        """The state of each parameter by its index: its step count and its live state arrays."""
        return self._inner.state

    def state_dict(self) -> dict[str, Any]:
        """Return state and hyper-parameters, as the ordinary optimizer does.

        The arrays are the live state, in host memory. What an ordinary optimizer returns loads
        here, and the reverse.
        """
        self._refuse_broken()
        self._give_hyper()
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over state and hyper-parameters, and the parameters as they are on the device.

        Load a model's parameters first. This also ends the refusal after a step that was broken
        off.

        Raises
        ------
        TypeError, ValueError
            The state does not fit this optimizer. Nothing was changed.
        RuntimeError
            A step that a backward pass has begun is not finished.
        """
        if self._pending is not None:
            self._refuse_broken()
        self._check_groups()
        self._give_hyper()
        self._inner._checked_state(state_dict)
        self._params.read_memory()
        try:
            self._read_params(range(len(self._params.arrays)))
            self._inner.load_state_dict(state_dict)
        except BaseException:
            self._broken = "loading a state was broken off in the middle; load it again"
            raise
        self._take_hyper(self._inner.param_groups)
        self._broken = None

    def _give_hyper(self) -> None:
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update({key: group[key] for key in self._inner.defaults})

    def _take_hyper(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for group, saved in zip(self.param_groups, groups, strict=True):
            for key in self._inner.defaults:
                if saved[key] is not None:
                    value = saved[key]
                    group[key] = tuple(value) if isinstance(value, list) else value

    def save(self, path: str | PathLike[str]) -> None:
        """Write state and hyper-parameters to a safetensors file, as the ordinary optimizer does.

        The file loads into an ordinary optimizer, and the reverse.
        """
        from ..checkpoint import save_state

        save_state(type(self._inner).__name__, self.state_dict(), path)

    def load(self, path: str | PathLike[str]) -> None:
        """Take over what `save` wrote, here or in an ordinary optimizer, as `load_state_dict`."""
        from ..checkpoint import load_state

        self.load_state_dict(load_state(type(self._inner).__name__, path))

    def flush(self) -> None:
        """Return once state and parameters are on disk in `state_dir`, to be resumed from there.

        From the next step on, until it is flushed again, the folder cannot be resumed.

        Raises
        ------
        ValueError
            There is no `state_dir`.
        RuntimeError
            An earlier step was broken off in the middle, or is not finished.
        """
        self._refuse_broken()
        if self._directory is None:
            raise ValueError("flush: the optimizer was made without state_dir")
        hyper = [
            {key: None if callable(group[key]) else group[key] for key in self._inner.defaults}
            for group in self.param_groups
        ]
        self._directory.flush(
            {
                "facts": self._facts(type(self._inner)),
                "steps": self._inner._steps(),
                "groups": hyper,
            }
        )

    def _facts(self, optimizer: type[Optimizer]) -> list[str]:
        """Return what a folder of state must have been written for."""
        params, storage = self._params, self._checker._storage
        return [
            f"optimizer {optimizer.__name__}",
            f"state_dtype {storage.state_dtype!r}, master_weights {storage.master_weights!r}, "
            f"seed {storage.seed}",
            *(
                f"state {', '.join(self._checker._state_keys(group))} of param_groups[{number}]"
                for number, group in enumerate(self._checker.param_groups)
            ),
            *(
                f"params{suffix}: {dtype}, shape {shape}, order {narrow._memory_order(array)}"
                for suffix, dtype, shape, array in zip(
                    params.suffixes, params.dtypes, params.shapes, params.arrays, strict=True
                )
            ),
        ]

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__}: holds threads, streams and pinned memory, so it cannot be "
            "pickled or copied; save() and load() keep its state"
        )

    def __repr__(self) -> str:
        lines = [
            f"  group {number}: {len(group['params'])} arrays, "
            + ", ".join(f"{key}={group[key]!r}" for key in self._inner.defaults)
            for number, group in enumerate(self.param_groups)
        ]
        name = f"{type(self).__name__}({type(self._inner).__name__},"
        return "\n".join([name, *lines, ")"])


def _zeros(size: int) -> NDArray[np.uint8]:
    return narrow.new_array((size,), np.dtype(np.uint8))


def _check_options(
    optimizer: Any, bucket_bytes: Any, pin_params: bool, state_dir: Any, resume: bool, hyper: Any
) -> None:
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(f"optimizer: expected GD, Adam or AdamW of fusedstep, got {optimizer!r}")
    if not isinstance(bucket_bytes, int) or bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes: expected an integer > 0, got {bucket_bytes!r}")
    if state_dir is not None and pin_params:
        raise ValueError("pin_params: with state_dir the copy of the parameters is a file's memory")
    if state_dir is None and resume:
        raise ValueError("resume: needs the state_dir that is to be resumed")
    if hyper.get("capturable"):
        raise ValueError("capturable: a CUDA graph cannot hold a step on the processor")
