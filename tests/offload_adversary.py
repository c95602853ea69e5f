"""A device whose copies take their time, overtake each other, and fail when told to.

It stands in for a GPU: parameters are in host memory, but nothing may be read or written before the
copies that concern it have been waited for. Whoever does gets garbage, or is caught.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedstep.distributed.boundary import address_of
from fusedstep.offload import HostDevice

GARBAGE = 0xFF  # a NaN in every type


class CopyError(Exception):
    """A copy that was told to fail."""


class AdversaryDevice:
    """A stand-in for a GPU over another device of the host's.

    Attributes
    ----------
    pinned_bytes : int
        How much pinned memory has been asked for.
    started : int
        How many copies have been started.
    fail_at : int or None
        The number of the copy that fails, from 0, and how: "start" or "wait".
    """

    def __init__(self, seed: int = 0, inner: Any = None, most_seconds: float = 1e-3) -> None:
        self._inner = inner or HostDevice()
        self._random = random.Random(seed)
        self._most_seconds = most_seconds
        self._live: dict[Any, list[tuple[int, int]]] = {}
        self._marks = 0
        self._lock = threading.Lock()
        self.faults: list[str] = []
        self.pinned_bytes = 0
        self.started = 0
        self.fail_at: tuple[int, str] | None = None

    def memory(self, array: Any, like: Any) -> Any:
        return self._inner.memory(array, like)

    def pinned(self, size: int) -> Any:
        self.pinned_bytes += size
        return self._inner.pinned(size)

    def mark(self) -> int:
        self._marks += 1
        return self._marks

    def download(self, pairs: Sequence[tuple[Any, Any]], marks: Sequence[Any]) -> _Copy:
        assert pairs
        assert marks
        assert all(1 <= mark <= self._marks for mark in marks)
        return self._start(pairs, [target for _, target in pairs], self._inner.download)

    def upload(self, pairs: Sequence[tuple[Any, Any]], marks: Sequence[Any]) -> _Copy:
        assert pairs
        assert all(1 <= mark <= self._marks for mark in marks)
        return self._start(pairs, [source for source, _ in pairs], self._inner.upload)

    def _start(self, pairs: Any, buffers: Any, copy: Any) -> _Copy:
        with self._lock:
            number = self.started
            self.started += 1
            if self.fail_at == (number, "start"):
                raise CopyError(f"copy {number}")
            spans = [(address_of(b), address_of(b) + b.nbytes) for b in buffers]
            for begin, end in spans:
                for other in self._live.values():
                    if any(begin < e and b < end for b, e in other):
                        self.faults.append(f"copy {number} uses a buffer that another still uses")
            made = _Copy(self, number, pairs, copy, self._random.uniform(0, self._most_seconds))
            self._live[made] = spans
        return made

    def _waited(self, copy: _Copy) -> None:
        with self._lock:
            self._live.pop(copy, None)

    @property
    def under_way(self) -> int:
        return len(self._live)


class _Copy:
    def __init__(
        self, device: AdversaryDevice, number: int, pairs: Any, copy: Any, seconds: float
    ) -> None:
        self._device, self._number, self._pairs, self._copy = device, number, pairs, copy
        self._before = self._digest()
        for _, target in pairs:
            target[:] = GARBAGE
        self._done = threading.Event()
        self._timer = threading.Timer(seconds, self._run)
        self._timer.daemon = True
        self._timer.start()

    def _digest(self) -> bytes:
        digest = hashlib.blake2b()
        for source, _ in self._pairs:
            digest.update(np.asarray(source).tobytes())
        return digest.digest()

    def _run(self) -> None:
        try:
            if self._digest() != self._before:
                self._device.faults.append(f"the source of copy {self._number} was written early")
            if self._device.fail_at != (self._number, "wait"):
                self._copy(self._pairs, ())
        except Exception as error:
            self._device.faults.append(repr(error))
        finally:
            self._done.set()

    def wait(self) -> None:
        self._done.wait()
        self._device._waited(self)
        if self._device.fail_at == (self._number, "wait"):
            raise CopyError(f"copy {self._number}")
