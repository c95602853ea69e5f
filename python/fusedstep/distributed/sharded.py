"""An optimizer whose state is spread over the ranks of a job."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..optimizer import Optimizer
from ..step_info import StepInfo
from .boundary import Parameters, module_of, pack
from .engine import agree, as_engine
from .layout import Part, cut
from .norm import global_norm

if TYPE_CHECKING:
    from ..structure import Grads, Params
    from .checkpoint import Loaded

BUCKET_BYTES = 16 << 20
# How many buckets are under way in each direction.
DEPTH = 2


class ShardedOptimizer:
    """An optimizer that keeps on each rank the state of one slice of the parameters (ZeRO-1).

    Every rank has all parameters and computes gradients of its own. A step reduces the gradients
    so that each rank gets its slice of their mean, steps that slice with an ordinary optimizer of
    this library, and gathers the parameters. It does so in buckets, with the communication of some
    under way while others are updated. With one rank it is that ordinary optimizer.

    Parameters
    ----------
    optimizer : type
        `fusedstep.GD`, `fusedstep.Adam` or `fusedstep.AdamW`.
    params : numpy.ndarray, list, dict, or list of groups
        As for `optimizer`, with the same values on all ranks; float32 or float64, C-contiguous.
        PyTorch tensors in host memory are taken by their memory.
    comm : mpi4py.MPI.Intracomm or Engine, optional
        The ranks. Without it there is one.
    reduction : {"mean", "sum"}
        What becomes of the gradients of the ranks.
    bucket_bytes : int
        Largest size of a bucket, in bytes. Four of them are allocated.
    **hyper
        Hyper-parameters, as for `optimizer`.

    Attributes
    ----------
    param_groups : list of dict
        The hyper-parameters of each group, to be read and changed (on every rank alike) between
        steps, with the whole arrays under ``"params"``.

    Raises
    ------
    TypeError, ValueError
        As `optimizer`; a parameter is not C-contiguous; the ranks differ in their parameters,
        hyper-parameters or versions of the library. The same error on every rank.

    References
    ----------
    Rajbhandari, Rasley, Ruwase, He, "ZeRO: memory optimizations toward training trillion parameter
    models", SC 2020, section 5.1 (stage 1).

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> from fusedstep.distributed import ShardedOptimizer
    >>> theta = np.array([1.0, -2.0], dtype=np.float32)
    >>> optimizer = ShardedOptimizer(fs.GD, theta, lr=0.25)  # comm=MPI.COMM_WORLD under mpirun
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
        comm: Any = None,
        *,
        reduction: str = "mean",
        bucket_bytes: int = BUCKET_BYTES,
        **hyper: Any,
    ) -> None:
        self._engine = as_engine(comm)
        facts, error = "", None
        try:
            if reduction not in ("mean", "sum"):
                raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
            if not (isinstance(bucket_bytes, int) and bucket_bytes > 0):
                raise ValueError(f"bucket_bytes: expected an integer > 0, got {bucket_bytes!r}")
            if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
                raise TypeError(f"optimizer: expected GD, Adam or AdamW, got {optimizer!r}")
            self._mean = reduction == "mean"
            self._deal_out(optimizer, params, hyper, bucket_bytes)
            facts = self._facts(f"reduction {reduction!r}, bucket_bytes {bucket_bytes}")
            self._allocate_buffers()
        except Exception as failure:
            error = failure
        agree(self._engine, error, facts, "how the optimizer is made")
        self._unfinished = False

    def _deal_out(
        self,
        optimizer: type[Optimizer],
        params: Params,
        hyper: dict[str, Any],
        bucket_bytes: int,
    ) -> None:
        """Make the ordinary optimizer, on the parts of the parameters that are this rank's."""
        all_params = self._params = Parameters(params)
        self._buckets, self._chunks = cut(
            [p.size for p in all_params.flat], [p.dtype for p in all_params.flat],
            self.size, bucket_bytes,
        )  # fmt: skip
        if self.size == 1:
            owned = [(0, Part(i, 0, p.size, 0)) for i, p in enumerate(all_params.flat)]
        else:
            owned = [(b, p) for b, bucket in enumerate(self._buckets)
                     for p in bucket.slice_parts(self.rank)]  # fmt: skip
        # This rank's parts by group, as the ordinary optimizer has them, and where those of a
        # bucket are there: group, index and part (whose offset counts from the bucket's slice).
        self._own: list[list[Part]] = [[] for _ in all_params.members]
        self._in_bucket: list[list[tuple[int, int, Part]]] = [[] for _ in self._buckets]
        for b, part in owned:
            number = all_params.group_of[part.param]
            if self.size > 1:
                self._in_bucket[b].append((number, len(self._own[number]), part))
            self._own[number].append(part)
        given: Any = params if all_params.by_group else [{}]
        groups = [dict(group) for group in given]
        if hyper.get("capturable"):
            raise ValueError(
                "capturable: not in a sharded optimizer; a CUDA graph cannot hold its communication"
            )
        if hyper.get("state_dtype") not in (None, "float32"):
            raise ValueError(
                f"state_dtype: {hyper['state_dtype']!r} is not in a sharded optimizer yet; its "
                "state has the type of the parameters"
            )
        # Behind the parts an empty parameter of each dtype. A step of these alone changes nothing
        # but checks all numbers; and a group may have nothing else on this rank.
        self._checks: list[list[Any]] = []
        self._no_checks: list[list[None]] = []
        for group, own, members in zip(groups, self._own, all_params.members, strict=True):
            by_dtype = {all_params.flat[i].dtype: all_params.flat[i] for i in members}
            empty = [flat[:0].copy() for flat in by_dtype.values()]
            views = [all_params.flat[p.param][p.start : p.stop] for p in own]
            group["params"] = views + empty
            self._checks.append([None] * len(views) + [array.copy() for array in empty])
            self._no_checks.append([None] * len(empty))
        self._inner = optimizer(groups, **hyper)
        self._steps = [0] * len(all_params.flat)
        self.param_groups = []
        for group, structure, members in zip(
            self._inner.param_groups, all_params.structures, all_params.members, strict=True
        ):
            whole = {**group, "params": [all_params.arrays[i] for i in members]}
            if structure == "dict":
                whole["param_names"] = [all_params.names[i] for i in members]
            self.param_groups.append(whole)

    def _facts(self, options: str) -> str:
        """Return all that must be the same on the ranks, a line for each fact."""
        lines = [
            f"fusedstep {__version__}",
            f"{self.name}, {options}",
            f"{len(self._steps)} parameters in {len(self.param_groups)} groups",
            *self._params.facts(values=self.size > 1),
            *_described(self._hyper(group) for group in self.param_groups),
        ]
        return "\n".join(lines)

    def _allocate_buffers(self) -> None:
        """Allocate the slices of the gradients and the buckets under way: nothing with one rank."""
        self._slices: list[Any] = []
        self._sent: list[dict[np.dtype[Any], Any]] = []
        self._gathered: list[dict[np.dtype[Any], Any]] = []
        if self.size == 1:
            return
        empty = module_of(self._params.arrays[0]).empty
        self._slices = [empty(bucket.slice_size, bucket.dtype) for bucket in self._buckets]
        largest: dict[np.dtype[Any], int] = {}
        for bucket in self._buckets:
            size = bucket.slice_size * self.size
            largest[bucket.dtype] = max(size, largest.get(bucket.dtype, 0))
        for buffers in (self._sent, self._gathered):
            buffers += [{d: empty(n, d) for d, n in largest.items()} for _ in range(DEPTH)]

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""
        return self._engine.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._engine.size

    def memory_bytes(self) -> dict[str, int]:
        """Return what this rank's arrays take, in bytes, by what they are for."""
        state = [v for entry in self._inner.state.values() for k, v in entry.items() if k != "step"]
        buffers = [a for buffer in self._sent + self._gathered for a in buffer.values()]
        arrays = {
            "params": self._params.arrays,
            "state": state,
            "grad_slice": self._slices,
            "buffers": buffers,
        }
        return {key: sum(array.nbytes for array in value) for key, value in arrays.items()}

    def step(
        self,
        grads: Grads,
        *,
        grad_scale: float = 1.0,
        clip_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> StepInfo:
        """Reduce the gradients of all ranks and update every parameter in place, on every rank.

        Parameters
        ----------
        grads : numpy.ndarray, list or dict
            This rank's gradients, as for the ordinary optimizer. Those of None must be the same on
            all ranks.
        grad_scale : float
            Multiplies the reduced gradients, > 0.
        clip_norm : float, optional
            > 0. Where the global norm of the scaled gradients exceeds it, they are scaled by
            ``clip_norm / (norm + 1e-6)``, as ``torch.nn.utils.clip_grad_norm_`` does.
        skip_nonfinite : bool
            Change nothing, on any rank, where the reduced gradients of all are not finite.

        Returns
        -------
        StepInfo
            The same on every rank.

        Raises
        ------
        TypeError, ValueError
            As the ordinary optimizer; the ranks disagree; the gradients are not finite and are to
            be clipped. The same error on every rank, and nothing was changed.
        RuntimeError
            An earlier step was broken off in the middle.
        """
        facts, error = "", None
        try:
            self._refuse_unfinished()
            flat = self._params.flat_grads(grads)
            self._set_hyper()
            self._inner.step(self._checks, grad_scale=grad_scale)
            _check_options(clip_norm, skip_nonfinite)
            if self.size > 1:
                facts = self._step_facts(flat, (grad_scale, clip_norm, skip_nonfinite))
        except Exception as failure:
            error = failure
        agree(self._engine, error, facts, "the step")

        norm = None
        ready: Iterable[int] = self._reduced(flat)
        if clip_norm is not None or skip_nonfinite:
            with self._unfinished_until_done(self.size > 1):
                slices = self._all_slices(flat, ready)
                norm = global_norm(self._engine, self._buckets, slices, self._chunks)
            ready = range(len(self._buckets))
            norm *= grad_scale
            if not np.isfinite(norm):
                if skip_nonfinite:
                    return StepInfo(norm, True)
                raise ValueError(
                    f"grads: their global norm is {norm}, which cannot be clipped; "
                    f"skip_nonfinite=True skips such steps"
                )
            if clip_norm is not None:
                grad_scale *= min(1.0, clip_norm / (norm + 1e-6))
                self._inner.step(self._checks, grad_scale=grad_scale)
        if self.size == 1:
            self._step_parts(
                [[flat[part.param] for part in group] for group in self._own], grad_scale
            )
        else:
            with self._unfinished_until_done():
                self._update(flat, ready, grad_scale)
        for i, grad in enumerate(flat):
            self._steps[i] += grad is not None
        return StepInfo(norm, False)

    def _refuse_unfinished(self) -> None:
        if self._unfinished:
            raise RuntimeError(
                "an earlier step or load was broken off in the middle, so the parameters are "
                "neither old nor new; start again from a checkpoint"
            )

    @contextmanager
    def _unfinished_until_done(self, while_under_way: bool = True) -> Iterator[None]:
        self._unfinished = while_under_way
        yield
        self._unfinished = False

    def _set_hyper(self) -> None:
        """Give the ordinary optimizer this step's numbers: it sees a step in several parts."""
        if len(self.param_groups) != len(self._inner.param_groups):
            raise ValueError(f"param_groups: expected {len(self._inner.param_groups)} groups")
        for group, inner, members in zip(
            self.param_groups, self._inner.param_groups, self._params.members, strict=True
        ):
            number = max(self._steps[i] for i in members) + 1
            for key, value in self._hyper(group).items():
                inner[key] = value(number) if callable(value) else value

    def _hyper(self, group: Mapping[str, Any]) -> dict[str, Any]:
        missing = self._inner.defaults.keys() - group.keys()
        if missing:
            raise ValueError(f"{min(missing)}: missing")
        return {key: group[key] for key in self._inner.defaults}

    def _step_facts(self, flat: Sequence[Any], options: tuple[Any, ...]) -> str:
        missing = [self._params.suffixes[i] for i, grad in enumerate(flat) if grad is None]
        lines = [
            f"step {max(self._steps) + 1}",
            f"no gradients for params{', params'.join(missing)}" if missing else "all gradients",
            "grad_scale {!r}, clip_norm {!r}, skip_nonfinite {!r}".format(*options),
            *_described(self._hyper(group) for group in self._inner.param_groups),
        ]
        return "\n".join(lines)

    def _reduced(self, flat: Sequence[Any]) -> Iterator[int]:
        """Reduce the gradients bucket by bucket; yield each bucket once its slice is there."""
        under_way: deque[tuple[int, Any]] = deque()
        for b, bucket in enumerate(self._buckets):
            if len(under_way) == DEPTH:
                yield self._finish_reduction(*under_way.popleft())
            buffer = self._sent[b % DEPTH][bucket.dtype][: bucket.slice_size * self.size]
            pack(flat, bucket.parts, buffer)
            under_way.append((b, self._engine.reduce_scatter(buffer, self._slices[b])))
        while under_way:
            yield self._finish_reduction(*under_way.popleft())

    def _finish_reduction(self, b: int, request: Any) -> int:
        request.wait()
        if self._mean:
            self._slices[b] /= self._slices[b].dtype.type(self.size)
        return b

    def _all_slices(self, flat: Sequence[Any], ready: Iterable[int]) -> Iterable[Any]:
        """Return this rank's slice of every bucket of gradients."""
        if self.size > 1:
            deque(ready, maxlen=0)
            return self._slices
        return self._packed(flat)

    def _packed(self, flat: Sequence[Any]) -> Iterator[Any]:
        """Yield the buckets of a single rank, each in the same buffer where it can be."""
        buffer = None
        for bucket in self._buckets:
            if buffer is None or buffer.dtype != bucket.dtype or len(buffer) < bucket.slice_size:
                buffer = module_of(self._params.arrays[0]).empty(bucket.slice_size, bucket.dtype)
            pack(flat, bucket.parts, buffer[: bucket.slice_size])
            yield buffer[: bucket.slice_size]

    def _update(self, flat: Sequence[Any], ready: Iterable[int], grad_scale: float) -> None:
        """Step the slice of each bucket that is ready, and gather its parameters."""
        under_way: deque[tuple[int, Any]] = deque()
        for b in ready:
            if len(under_way) == DEPTH:
                self._finish_gathering(*under_way.popleft())
            grads: list[list[Any]] = [[None] * len(group) for group in self._own]
            for group, index, part in self._in_bucket[b]:
                if flat[part.param] is not None:
                    grads[group][index] = self._slices[b][part.place]
            self._step_parts(grads, grad_scale)
            under_way.append((b, self._start_gathering(b)))
        while under_way:
            self._finish_gathering(*under_way.popleft())

    def _step_parts(self, grads: list[list[Any]], grad_scale: float) -> None:
        grads = [own + empty for own, empty in zip(grads, self._no_checks, strict=True)]
        self._inner.step(grads, grad_scale=grad_scale)

    def _start_gathering(self, b: int) -> Any:
        bucket = self._buckets[b]
        buffer = self._gather_buffer(b)
        begin = self.rank * bucket.slice_size
        pack(
            self._params.flat,
            list(bucket.slice_parts(self.rank)),
            buffer[begin : begin + bucket.slice_size],
        )
        return self._engine.all_gather(buffer)

    def _finish_gathering(self, b: int, request: Any) -> None:
        request.wait()
        buffer = self._gather_buffer(b)
        for part in self._buckets[b].parts:
            self._params.flat[part.param][part.start : part.stop] = buffer[part.place]

    def _gather_buffer(self, b: int) -> Any:
        bucket = self._buckets[b]
        return self._gathered[b % DEPTH][bucket.dtype][: bucket.slice_size * self.size]

    @property
    def name(self) -> str:
        """The name of the ordinary optimizer."""
        return type(self._inner).__name__

    def _state_keys(self, group: Mapping[str, Any]) -> list[str]:
        return list(self._inner._state_keys(group))

    def _shard(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield the parts that this rank owns: parameter, first element, and all arrays of it."""
        state = iter(self._inner.state.values())
        for group, own in zip(self._inner.param_groups, self._own, strict=True):
            entries = [next(state) for _ in group["params"]]
            for part, view, entry in zip(own, group["params"], entries, strict=False):
                arrays = {key: array for key, array in entry.items() if key != "step"}
                yield part.param, part.start, {"param": view, **arrays}

    def _load_state(
        self,
        steps: Sequence[int],
        groups: Sequence[dict[str, Any]],
        shard: Sequence[Mapping[str, Any]],
    ) -> None:
        """Take over step counts, hyper-parameters and the state of the parts in `_shard`."""
        entries = iter(shard)
        state_dict: dict[str, Any] = {"state": {}, "param_groups": []}
        index = 0
        for inner, own, hyper in zip(self._inner.param_groups, self._own, groups, strict=True):
            first = index
            for part in own:
                arrays = {k: v for k, v in next(entries).items() if k != "param"}
                state_dict["state"][index] = {"step": steps[part.param], **arrays}
                index += 1
            index = first + len(inner["params"])
            state_dict["param_groups"].append({"params": list(range(first, index)), **hyper})
        self._inner.load_state_dict(state_dict)
        for group, hyper in zip(self.param_groups, groups, strict=True):
            group.update({key: value for key, value in hyper.items() if value is not None})
        self._steps = list(steps)

    def _load_params(self, shard: Sequence[Any]) -> None:
        """Take over the parameters in `_shard`, and gather those of the other ranks."""
        with self._unfinished_until_done():
            for (param, start, _), values in zip(self._shard(), shard, strict=True):
                flat = self._params.flat[param]
                flat[start : start + values.size] = module_of(flat).asarray(values)
            if self.size > 1:
                for b in range(len(self._buckets)):
                    self._finish_gathering(b, self._start_gathering(b))

    def save(self, folder: str | PathLike[str], *, extra: Any = None, keep: int = 3) -> Path:
        """Write parameters, state and hyper-parameters as a new checkpoint, whole or not at all.

        Parameters
        ----------
        folder : path-like
            Where the checkpoints of this job are, seen by all ranks; made if it is not there.
        extra : object, optional
            Anything that JSON can hold, to be given back by `load`: epoch, state of a generator.
            What rank 0 gives is what is saved.
        keep : int
            How many complete checkpoints stay, >= 1; older ones are deleted once this is there.

        Returns
        -------
        pathlib.Path
            The folder of this checkpoint, on every rank.

        Raises
        ------
        OSError
            A rank could not write. The same error on every rank; older checkpoints are untouched.
        TypeError, ValueError
            `extra` or `keep` is of the wrong kind. The same error on every rank.
        RuntimeError
            An earlier step was broken off in the middle.
        """
        from .checkpoint import save

        return save(self, folder, extra, keep)

    def load(self, folder: str | PathLike[str]) -> Loaded | None:
        """Take over the newest complete checkpoint, saved by any number of ranks.

        Checkpoints that are damaged are named in a warning (on rank 0) and skipped.

        Parameters
        ----------
        folder : path-like
            Where the checkpoints are, or a single one of them.

        Returns
        -------
        Loaded or None
            Where from, and what was saved as `extra`; None where there is no checkpoint yet.

        Raises
        ------
        ValueError
            Every checkpoint is damaged, or the newest complete one does not fit: other parameters,
            another optimizer, a newer format. The same error on every rank; nothing was changed.
        OSError
            A file could not be read. The same error on every rank; nothing was changed.
        """
        from .checkpoint import load

        return load(self, folder)


def _check_options(clip_norm: Any, skip_nonfinite: Any) -> None:
    """Raise what the ordinary optimizer would: it gets neither, as the ranks decide together."""
    if not (clip_norm is None or isinstance(clip_norm, Real)):
        raise TypeError(f"clip_norm: expected a number, got {type(clip_norm).__name__}")
    if clip_norm is not None and not 0 < float(clip_norm) < float("inf"):
        raise ValueError(f"clip_norm: expected a finite number > 0, got {clip_norm!r}")
    if not isinstance(skip_nonfinite, bool):
        raise TypeError(
            f"skip_nonfinite: expected True or False, got {type(skip_nonfinite).__name__}"
        )


def _described(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    return [
        f"param_groups[{number}][{key!r}] = {'a callable' if callable(value) else repr(value)}"
        for number, group in enumerate(groups)
        for key, value in group.items()
    ]
