"""What a sharded optimizer is given, taken apart and checked before anything is communicated."""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _core
from ..gpu import to_host
from ..structure import are_groups, structure_of, suffixes_of

if TYPE_CHECKING:
    from ..structure import Params


class Spans:
    """Where the memory of parameters lies, which must not overlap.

    Parameters
    ----------
    memories : sequence
        Each parameter's memory, in one piece: arrays of NumPy or CuPy, or tensors.
    suffixes : sequence of str
        What follows "params" in an error.

    Raises
    ------
    ValueError
        Two of them overlap.
    """

    def __init__(self, memories: Sequence[Any], suffixes: Sequence[str]) -> None:
        self._suffixes = suffixes
        self._spans = sorted(
            (address_of(memory), address_of(memory) + memory.nbytes, i)
            for i, memory in enumerate(memories)
            if memory.nbytes
        )
        for (_, end, i), (start, _, j) in zip(self._spans, self._spans[1:], strict=False):
            if start < end:
                raise ValueError(f"params{suffixes[i]}: overlaps params{suffixes[j]}")
        self._starts = [start for start, _, _ in self._spans]

    def check(self, memory: Any, name: str) -> None:
        """Raise ValueError if a gradient shares memory with a parameter."""
        if not memory.nbytes:
            return
        start = address_of(memory)
        # Parameters do not overlap: only the last that begins before the gradient's end can.
        last = bisect_left(self._starts, start + memory.nbytes) - 1
        if last >= 0 and self._spans[last][1] > start:
            suffix = self._suffixes[self._spans[last][2]]
            raise ValueError(f"{name}: overlaps params{suffix}, which the step writes")


class Parameters:
    """The parameters of an optimizer, whole and as flat views.

    Attributes
    ----------
    by_group : bool
        They were given as groups.
    structures : list of str
        How each group's were given: "array", "list" or "dict".
    members : list of list of int
        The indices of each group's.
    group_of : list of int
        The group of each.
    arrays, flat : list of array
        The parameters, and the same memory in one dimension.
    names : list of str or None
        Where they have names.
    suffixes : list of str
        What follows "params" or "grads" in an error.

    Raises
    ------
    TypeError, ValueError
        As the ordinary optimizer; a parameter is not C-contiguous.
    """

    structures: list[str]
    members: list[list[int]]
    arrays: list[Any]
    names: list[str | None]
    suffixes: list[str]

    def __init__(self, params: Params) -> None:
        self._read_groups(params)
        self.arrays = [as_array(array) for array in self.arrays]
        for array, suffix in zip(self.arrays, self.suffixes, strict=True):
            _core.check_parameter(array, suffix)
            if module_of(array) is None or module_of(array) is not module_of(self.arrays[0]):
                raise TypeError(
                    f"params{suffix}: {_kind(array)}; a sharded optimizer takes NumPy arrays or "
                    f"CuPy arrays, all of one kind"
                )
            if array.dtype not in (np.float32, np.float64):  # what the engines can add
                raise TypeError(
                    f"params{suffix}: {array.dtype}; a sharded optimizer takes float32 and float64"
                )
            if not array.flags.c_contiguous:
                raise ValueError(
                    f"params{suffix}: not C-contiguous, but a sharded optimizer cuts parameters "
                    f"between elements; pass np.ascontiguousarray(...)"
                )
        self.flat = [array.reshape(-1) for array in self.arrays]
        self._spans = Spans(self.flat, self.suffixes)

    def _read_groups(self, params: Params) -> None:
        """Set what does not depend on what the parameters are."""
        self.by_group = are_groups(params)
        groups: Any = params if self.by_group else [{"params": params}]
        self.structures, self.members, self.arrays, self.names, self.suffixes = [], [], [], [], []
        for number, group in enumerate(groups):
            if "params" not in group:
                raise TypeError(f"param_groups[{number}]: expected a dict with 'params'")
            structure, names, arrays = structure_of(group["params"])
            self.structures.append(structure)
            self.members.append(list(range(len(self.arrays), len(self.arrays) + len(arrays))))
            self.arrays += arrays
            self.names += names
            self.suffixes += suffixes_of(structure, names, f"[{number}]" if self.by_group else "")
        self.group_of = [number for number, own in enumerate(self.members) for _ in own]

    def flat_grads(self, grads: Any) -> list[Any]:
        """Return the gradient of each parameter as a flat array, or None.

        Raises
        ------
        TypeError, ValueError
            As a step of the ordinary optimizer.
        """
        if not self.by_group:
            return self._flat_group(grads, 0, "grads")
        if not (isinstance(grads, list | tuple) and len(grads) == len(self.members)):
            raise ValueError(
                f"grads: expected a list with an entry for each of the "
                f"{len(self.members)} parameter groups"
            )
        return [
            flat
            for number, given in enumerate(grads)
            for flat in self._flat_group(given, number, f"grads[{number}]")
        ]

    def _flat_group(self, given: Any, number: int, where: str) -> list[Any]:
        structure, members = self.structures[number], self.members[number]
        if structure == "array":
            given = [given]
        elif structure == "dict":
            if not isinstance(given, Mapping):
                raise TypeError(f"{where}: expected a dict, got {type(given).__name__}")
            names = [self.names[i] for i in members]
            if given.keys() != set(names):
                name = min(given.keys() ^ set(names), key=str)
                raise ValueError(f"{where}[{name!r}]: {'unknown' if name in given else 'missing'}")
            given = [given[name] for name in names]
        elif not isinstance(given, list | tuple):
            raise TypeError(f"{where}: expected a list, got {type(given).__name__}")
        if len(given) != len(members):
            raise ValueError(
                f"{where}: {len(given)} gradients, but there are {len(members)} parameters"
            )
        return [
            None if grad is None else self._flat_grad(i, grad)
            for i, grad in zip(members, given, strict=True)
        ]

    def _flat_grad(self, i: int, grad: Any) -> Any:
        grad = as_array(grad)
        param, name = self.arrays[i], f"grads{self.suffixes[i]}"
        if module_of(grad) is not module_of(param):
            raise TypeError(f"{name}: expected {_kind(param)}, as its parameter, got {_kind(grad)}")
        if grad.dtype != param.dtype:
            raise TypeError(f"{name}: {grad.dtype}, but its parameter is {param.dtype}")
        if grad.shape != param.shape:
            raise ValueError(f"{name}: shape {grad.shape}, but its parameter has {param.shape}")
        flat = grad.reshape(-1)
        self._spans.check(flat, name)
        return flat

    def facts(self, values: bool) -> list[str]:
        """Return a line for each parameter, with all that must be the same on every rank."""
        return [
            f"params{suffix}: {flat.dtype}, shape {array.shape}, group {self.group_of[i]}"
            + (f", values with CRC-32 {_checksum(flat):08x}" if values else "")
            for i, (array, flat, suffix) in enumerate(
                zip(self.arrays, self.flat, self.suffixes, strict=True)
            )
        ]


def pack(flat: Sequence[Any], parts: Any, buffer: Any) -> None:
    """Copy parts of flat arrays to their places in a buffer; zeros for padding and for None."""
    end = 0
    for part in parts:
        source = flat[part.param]
        buffer[part.place] = 0 if source is None else source[part.start : part.stop]
        end = part.place.stop
    buffer[end:] = 0


def as_array(value: Any) -> Any:
    """Return the memory of a PyTorch tensor of the host as an array, and anything else as it is.

    Subclasses of NumPy's array are taken as plain ones: a matrix cannot be made flat.
    """
    if hasattr(value, "detach") and value.device.type == "cpu":
        return value.detach().numpy()
    return np.asarray(value) if isinstance(value, np.ndarray) else value


def module_of(array: Any) -> Any:
    """Return the module that makes arrays like this one: NumPy, CuPy, or None."""
    if isinstance(array, np.ndarray):
        return np
    if type(array).__module__.partition(".")[0] == "cupy":
        import cupy

        return cupy
    return None


def address_of(memory: Any) -> int:
    """Return where an array, or a tensor of PyTorch, begins in memory."""
    if isinstance(memory, np.ndarray):
        return int(memory.__array_interface__["data"][0])
    return int(memory.data_ptr() if hasattr(memory, "data_ptr") else memory.data.ptr)


def _checksum(flat: Any) -> int:
    return zlib.crc32(to_host(flat).view(np.uint8).data)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"
