"""State and parameters in fewer bytes: the arrays an optimizer keeps for them, and conversions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core, gpu
from .dtypes import bfloat16 as bfloat16

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

STATE_DTYPES = ("float32", "bfloat16", "8bit")
MASTER_WEIGHTS = ("float32", "correction16", "correction8", "stochastic")
# What lies beside a 16-bit parameter, under which name.
_BESIDE = {
    "float32": ("master", "float32"),
    "correction16": ("correction", "uint16"),
    "correction8": ("correction", "uint8"),
}
BLOCK = 64  # elements that share a unit
UNITS = "_units"
# Of saved 8-bit state: the order in which its parameter's elements lay, unless that is C order.
ORDER = "memory_order"


@dataclass(frozen=True)
class Storage:
    """How an optimizer stores its state, and what it keeps of 16-bit parameters.

    Attributes
    ----------
    state_dtype : str, dict or None
        As given to the optimizer.
    master_weights : str or None
        As given to the optimizer.
    seed : int
        Of what is rounded at random.
    """

    state_dtype: str | Mapping[str, str | None] | None = None
    master_weights: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.master_weights is not None and self.master_weights not in MASTER_WEIGHTS:
            raise ValueError(
                f"master_weights: expected one of {', '.join(MASTER_WEIGHTS)}, "
                f"got {self.master_weights!r}"
            )
        if not isinstance(self.seed, int | np.integer) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected an integer from 0 to 2**64 - 1, got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))

    def check(self, state_keys: tuple[str, ...]) -> None:
        """Raise for what no optimizer with these state arrays can do."""
        if isinstance(self.state_dtype, Mapping):
            for key in self.state_dtype:
                if key not in state_keys:
                    raise ValueError(
                        f"state_dtype: {key!r} is no state array; there are "
                        f"{', '.join(state_keys) or 'none'}"
                    )
        for key in state_keys:
            dtype = self._dtype(key)
            if dtype is not None and dtype not in STATE_DTYPES:
                raise ValueError(
                    f"state_dtype: expected one of {', '.join(STATE_DTYPES)}, got {dtype!r}"
                )

    def new_state(
        self, param: Any, state_keys: tuple[str, ...], suffix: str
    ) -> tuple[dict[str, Any], list[Any]]:
        """Return the state arrays of a parameter by name, and what lies beside each stream."""
        dtype = gpu.dtype_of(param)
        narrow = dtype.itemsize == 2
        beside = _BESIDE.get(self.master_weights or "") if narrow else None
        if dtype == np.float16 and self.master_weights not in (None, "float32"):
            raise ValueError(
                f"params{suffix}: float16, which only master_weights='float32' is there for"
            )
        # Blocks are counted from the first element, wherever that lies.
        in_blocks = any(self._dtype(key) == "8bit" for key in state_keys) or (
            narrow and self.master_weights == "stochastic"
        )
        # On the host only the loops of native arrays peel what comes before a boundary.
        unpeeled = gpu.is_on_host(param) and (
            narrow or any(self._dtype(key) not in (None, "float32") for key in state_keys)
        )
        lead = 0 if in_blocks or unpeeled else gpu.lead_of(param)
        arrays: dict[str, Any] = {}
        extras: list[Any] = [None, None]
        for key in state_keys:
            wanted = self._dtype(key)
            if wanted not in (None, "float32") and dtype == np.float64:
                raise TypeError(
                    f"state_dtype: {wanted!r} is for float32, bfloat16 and float16 parameters, "
                    f"but params{suffix} is float64"
                )
            if wanted == "8bit":
                size = math.prod(param.shape)
                arrays[key] = zeros(size, code_dtype(key), param)
                arrays[key + UNITS] = zeros(-(-size // BLOCK), np.dtype(np.float32), param)
                extras.append(arrays[key + UNITS])
                continue
            extras.append(None)
            compute = np.dtype(np.float32) if narrow else dtype
            arrays[key] = zeros_like(param, bfloat16() if wanted == "bfloat16" else compute, lead)
        if beside is not None:
            name, beside_dtype = beside
            arrays[name] = extras[0] = zeros_like(param, np.dtype(beside_dtype), lead)
            if name == "master" and gpu.is_on_host(param):
                arrays[name][...] = param
            elif name == "master":
                gpu.copy_as_float32(arrays[name], param)
        return arrays, extras

    def state_dtypes(self, param: Any, state_keys: tuple[str, ...]) -> dict[str, np.dtype[Any]]:
        """Return the dtype of each array that `new_state` makes, by name."""
        dtype = gpu.dtype_of(param)
        narrow = dtype.itemsize == 2
        float32 = np.dtype(np.float32)
        dtypes: dict[str, np.dtype[Any]] = {}
        for key in state_keys:
            wanted = self._dtype(key)
            if wanted == "8bit":
                dtypes |= {key: code_dtype(key), key + UNITS: float32}
            elif wanted == "bfloat16":
                dtypes[key] = bfloat16()
            else:
                dtypes[key] = float32 if narrow else dtype
        beside = _BESIDE.get(self.master_weights or "") if narrow else None
        if beside is not None:
            dtypes[beside[0]] = np.dtype(beside[1])
        return dtypes

    def _dtype(self, key: str) -> str | None:
        if not isinstance(self.state_dtype, Mapping):
            return self.state_dtype
        # The largest second moment is kept as the second moment is.
        return self.state_dtype.get(key, self.state_dtype.get(key.removeprefix("max_")))


def fresh(param: Any, own: Mapping[str, Any]) -> dict[str, Array]:
    """Return the values that state arrays have before the first step."""
    return {
        key: gpu.to_host(param).astype(np.float32)
        if key == "master"
        else np.zeros((), gpu.dtype_of(array))
        for key, array in own.items()
    }


def converted(
    entry: Mapping[str, Any], key: str, own: Mapping[str, Any], param: Any, where: str
) -> dict[str, Array]:
    """Return the values of one state array, and of its units, from a saved entry.

    What was saved may be in another format than the optimizer's own.
    """
    mine = own[key]
    dtype = gpu.dtype_of(mine)
    saved = gpu.to_host(entry[key])
    units = entry.get(key + UNITS)
    if units is not None:
        units = gpu.to_host(units)
        order = _saved_order(entry, param, where)
        size = math.prod(param.shape)
        _check(saved, (size,), code_dtype(key), f"{where}[{key!r}]")
        wanted = (-(-size // BLOCK),)
        _check(units, wanted, np.dtype(np.float32), f"{where}[{key + UNITS!r}]")
        if (units < 0).any():
            raise ValueError(f"{where}[{key + UNITS!r}]: negative, which a unit never is")
        if key + UNITS in own and order == _walk(param):
            return {key: saved, key + UNITS: units}
        saved = decode(saved, units, param.shape, order)
    if saved.shape != tuple(param.shape):
        raise ValueError(
            f"{where}[{key!r}]: shape {saved.shape}, but its parameter has shape "
            f"{tuple(param.shape)}"
        )
    moment = key not in ("master", "correction")
    if key + UNITS in own and moment and _is_moment_dtype(saved.dtype):
        if key.endswith("_sq"):
            if (saved < 0).any():
                raise ValueError(f"{where}[{key!r}]: negative, which a second moment never is")
            saved = abs(saved)  # -0.0 is not less than 0
        codes = np.empty(mine.shape, dtype)
        own_units = np.empty(own[key + UNITS].shape, np.float32)
        encode(saved, codes, own_units, _walk(param))
        return {key: codes, key + UNITS: own_units}
    if moment and _is_moment_dtype(saved.dtype) and _is_moment_dtype(dtype):
        return {key: saved.astype(dtype)}
    if saved.dtype != dtype:
        raise TypeError(f"{where}[{key!r}]: {saved.dtype}, but its parameter is {param.dtype}")
    return {key: saved}


def _is_moment_dtype(dtype: np.dtype[Any]) -> bool:
    return dtype.name in ("float32", "bfloat16")


def _check(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{where}: shape {array.shape}, but {shape} is expected")
    if array.dtype != dtype:
        raise TypeError(f"{where}: {array.dtype}, but {dtype} is expected")


def loses_small_steps(param: Any, storage: Storage) -> bool:
    return gpu.dtype_of(param).itemsize == 2 and storage.master_weights is None


def code_dtype(key: str) -> np.dtype[Any]:
    """Return the type of the codes of a moment: only a second one has no sign."""
    return np.dtype(np.uint8 if key.endswith("_sq") else np.int8)


def zeros_like(param: Any, dtype: np.dtype[Any], lead: int = 0) -> Any:
    """Return zeros in the parameter's layout, `lead` elements past a boundary of its memory's kind.

    On a GPU the parameter's own library allocates.
    """
    if not gpu.is_on_host(param):
        return gpu.zeros_like(param, dtype, lead)
    strides = np.empty_like(param, dtype, order="K", subok=False).strides
    return new_array(param.shape, dtype, strides, lead)


def zeros(count: int, dtype: np.dtype[Any], param: Any) -> Any:
    """Return a vector of zeros where the parameter is."""
    if gpu.is_on_host(param):
        return new_array((count,), dtype)
    return gpu.zeros(count, dtype, param)


def new_array(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    strides: tuple[int, ...] | None = None,
    lead: int = 0,
) -> Array:
    """Return zeros, the first of them `lead` elements past the beginning of a cache line.

    The pages are first touched by the threads that will update them.
    """
    cache_line = 64
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + cache_line, np.uint8)
    _core.fill_zero(memory)
    offset = (lead * dtype.itemsize - memory.__array_interface__["data"][0]) % cache_line
    return np.ndarray(shape, dtype, memory, offset, strides)


def decode(codes: Array, units: Array, shape: Sequence[int], order: Sequence[int]) -> Array:
    """Return what 8-bit codes stand for, as float32.

    Parameters
    ----------
    codes : numpy.ndarray
        int8 or uint8, a vector.
    units : numpy.ndarray
        float32, one for each 64 codes.
    shape : sequence of int
        Of the parameter.
    order : sequence of int
        The order of the codes, as `_walk` returns it.

    Returns
    -------
    numpy.ndarray
    """
    flat = np.empty(codes.size, np.float32)
    _core.decode_8bit(np.ascontiguousarray(codes), np.ascontiguousarray(units), flat)
    values = np.empty(shape, np.float32)
    walked = _walked(values, order)
    walked[...] = flat.reshape(walked.shape)
    return values


def encode(values: Array, codes: Array, units: Array, order: Sequence[int]) -> None:
    """Round float32 values in the shape of a parameter into 8-bit codes, in the order given."""
    _core.encode_8bit(_walked(np.array(values, np.float32), order).ravel(), codes, units)


def memory_order(param: Any, own: Mapping[str, Any]) -> dict[str, Array]:
    """Return what is saved beside a parameter's state so that the order of its codes is known."""
    order = _walk(param)
    if order == _c_order(param.shape) or not any(key.endswith(UNITS) for key in own):
        return {}
    return {ORDER: np.array(order)}


def _saved_order(entry: Mapping[str, Any], param: Any, where: str) -> list[int]:
    """Return the order in which saved codes are."""
    c_order = _c_order(param.shape)
    if ORDER not in entry:
        return c_order
    order: list[int] = gpu.to_host(entry[ORDER]).tolist()
    if sorted(d if d >= 0 else ~d for d in order) != c_order:
        raise ValueError(
            f"{where}[{ORDER!r}]: {order}, but its parameter has shape {tuple(param.shape)}"
        )
    return order


def _c_order(shape: Sequence[int]) -> list[int]:
    return [d for d, length in enumerate(shape) if length > 1]


def _walk(array: Any) -> list[int]:
    """Return the dimensions as a step walks an array, those of length 1 left out.

    A dimension d that the step walks from its end (its stride is negative) is ~d.
    """
    strides = gpu.strides_of(array)
    return [~d if strides[d] < 0 else d for d in _memory_order(array) if array.shape[d] > 1]


def _walked(array: Array, order: Sequence[int]) -> Array:
    """Return a view whose elements, in C order, are in the order that `_walk` returned."""
    turns: list[Any] = [slice(None, None, -1 if ~d in order else 1) for d in range(array.ndim)]
    turned = array[(*turns, ...)]
    axes = [d if d >= 0 else ~d for d in order]
    return turned.transpose([d for d in range(array.ndim) if d not in axes] + axes)


def _memory_order(array: Array) -> list[int]:
    """Return the dimensions in the order in which a step walks an array."""
    strides = gpu.strides_of(array)
    return sorted(range(array.ndim), key=lambda d: -abs(strides[d]))
