"""Where an optimizer's state lies: in memory of one piece, which may be a file's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import checkpoint, narrow
from .layout import aligned

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "fusedstep-offload-1"


class PlacedStorage:
    """`narrow.Storage` whose arrays lie one after the other in memory that is given to it.

    Parameters
    ----------
    storage : narrow.Storage
        What the arrays are.
    """

    def __init__(self, storage: narrow.Storage) -> None:
        self._storage = storage
        self.master_weights = storage.master_weights
        self.seed = storage.seed
        self.check = storage.check

    def place_in(self, memory: NDArray[np.uint8], keep: bool) -> None:
        """Take this memory for all arrays to come; `keep` what is in it, else it holds zeros."""
        self._memory, self._keep, self._used = memory, keep, 0

    def size_of_state(self, param: Any, state_keys: tuple[str, ...]) -> int:
        """Return the bytes that the arrays of a parameter take."""
        layout = self._layout(param, state_keys).values()
        return sum(aligned(count * dtype.itemsize) for dtype, count in layout)

    def is_random(self, param: Any, state_keys: tuple[str, ...]) -> bool:
        """Whether a step rounds at random, with bits that count a parameter's elements."""
        return any(key.endswith(narrow.UNITS) for key in self._layout(param, state_keys)) or (
            param.dtype.itemsize == 2 and self.master_weights == "stochastic"
        )

    def new_state(
        self, param: Any, state_keys: tuple[str, ...], suffix: str
    ) -> tuple[dict[str, Any], list[Any]]:
        arrays: dict[str, Any] = {}
        layout = self._layout(param, state_keys)
        for key, (dtype, count) in layout.items():
            flat = self._memory[self._used : self._used + count * dtype.itemsize].view(dtype)
            self._used += aligned(flat.nbytes)
            blockwise = key.endswith(narrow.UNITS) or key + narrow.UNITS in layout
            arrays[key] = flat if blockwise else in_order_of(param, flat)
        if "master" in arrays and not self._keep:
            arrays["master"][...] = param
        beside = arrays.get("master", arrays.get("correction"))
        return arrays, [beside, None, *(arrays.get(key + narrow.UNITS) for key in state_keys)]

    def _layout(
        self, param: Any, state_keys: tuple[str, ...]
    ) -> dict[str, tuple[np.dtype[Any], int]]:
        """Return the dtype and the number of elements of each array of a parameter, by name."""
        blocks = -(-param.size // narrow.BLOCK)
        return {
            key: (dtype, blocks if key.endswith(narrow.UNITS) else param.size)
            for key, dtype in self._storage.state_dtypes(param, state_keys).items()
        }


def in_order_of(param: Any, flat: NDArray[Any]) -> NDArray[Any]:
    """Return a vector in the shape of a parameter, its elements in the order of that's memory."""
    order = narrow._memory_order(param)
    shape = [param.shape[d] for d in order]
    view: NDArray[Any] = flat.reshape(shape).transpose(np.argsort(order))
    return view


def in_memory_order(param: Any, array: NDArray[Any]) -> NDArray[Any]:
    """Return the vector that `in_order_of` made an array of."""
    if array.ndim != param.ndim:
        return array
    flat: NDArray[Any] = array.transpose(narrow._memory_order(param)).reshape(-1)
    return flat


class StateDirectory:
    """A folder with a file of all memory, and an index that says whether the file is complete.

    The index is there while the file is, byte for byte, what the optimizer had when it was last
    flushed. It is taken away before the next step writes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index = self.path / "index.json"
        self.file = self.path / "state.bin"

    def open(self, size: int, facts: Sequence[str], resume: bool) -> dict[str, Any] | None:
        """Map the file into `memory`; return what its index holds where it is to be resumed.

        Raises
        ------
        ValueError
            The folder holds state, but is not to be resumed; or the reverse; or what it holds is
            of another optimizer or was not flushed.
        OSError
            The folder or the file cannot be made, or the disk has no room for it.
        """
        if not resume and (self.file.exists() or self.index.exists()):
            raise ValueError(
                f"state_dir: {self.path} holds the state of an optimizer already; resume=True goes "
                "on with it; delete the folder to begin anew"
            )
        saved = self._saved(facts) if resume else None
        if resume and self.file.stat().st_size != max(size, 1):
            raise ValueError(
                f"state_dir: {self.file} has {self.file.stat().st_size} bytes, expected "
                f"{max(size, 1)}"
            )
        if not resume:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                with open(self.file, "xb") as file:
                    # Room is taken now: a full disk would end the program in the middle of a step.
                    os.posix_fallocate(file.fileno(), 0, max(size, 1))
            except OSError:
                self.file.unlink(missing_ok=True)
                raise
        self._map = np.memmap(self.file, np.uint8, "r+")
        self.memory = np.asarray(self._map)[:size]
        return saved

    def _saved(self, facts: Sequence[str]) -> dict[str, Any]:
        if not self.file.exists():
            raise ValueError(f"state_dir: {self.path} holds no state to resume")
        if not self.index.exists():
            raise ValueError(
                f"state_dir: {self.path} was written to after its last flush() and is neither old "
                "nor new; start again from a checkpoint"
            )
        try:
            saved: dict[str, Any] = json.loads(self.index.read_text())
        except ValueError as error:
            raise ValueError(f"state_dir: {self.index} is damaged ({error})") from error
        if not isinstance(saved, Mapping) or saved.get("format") != FORMAT:
            raise ValueError(f"state_dir: {self.index} is not an index of this format")
        if saved["facts"] != facts:
            pairs = zip_longest(saved["facts"], facts, fillvalue="nothing more")
            theirs, own = next((a, b) for a, b in pairs if a != b)
            raise ValueError(
                f"state_dir: {self.path} holds the state of another optimizer: it has {theirs}, "
                f"this one has {own}"
            )
        return saved

    def flush(self, contents: Mapping[str, Any]) -> None:
        """Return once all is on disk, with an index that says so."""
        self._map.flush()
        temporary = self.index.with_suffix(".new")
        temporary.write_text(json.dumps({"format": FORMAT, **contents}, default=_number))
        checkpoint.sync(temporary)
        os.replace(temporary, self.index)
        checkpoint.sync(self.path)

    def begin_to_write(self) -> None:
        """Say on disk that the file is no longer complete."""
        if self.index.exists():
            self.index.unlink()
            checkpoint.sync(self.path)


def _number(value: Any) -> bool | float:
    return checkpoint._plain_number(value)
