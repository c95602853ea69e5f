"""What a sharded optimizer asks of an engine, and what is built on that alone."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

# The status with which a job ends that has waited in vain.
GAVE_UP = 74
# A rank that waits yields the processor for this long, in seconds, then sleeps between its looks.
_YIELD = 0.2
_SLEEP = 1e-3


class Request(Protocol):
    """A collective operation under way."""

    def wait(self) -> None:
        """Return once the result may be read and the buffers may be used again."""


class Engine(Protocol):
    """Collective operations between the ranks of a job, none of which blocks.

    Every rank starts the same operations in the same order. Buffers are one-dimensional and
    contiguous, of one dtype and size on all ranks: NumPy arrays of float32, float64, int64 or
    uint8, and whatever else the engine knows (CuPy arrays). A rank that does not take part ends
    the job with an error; no operation waits for ever.

    Attributes
    ----------
    rank : int
        Of this process, from 0.
    size : int
        Number of ranks.
    """

    rank: int
    size: int

    def reduce_scatter(self, send: Any, recv: Any) -> Request:
        """Put into `recv` this rank's part (one of `size` equal ones) of the sum of all `send`."""

    def all_gather(self, buffer: Any) -> Request:
        """Fill `buffer` with every rank's part of it; this rank's own part is in place already."""

    def all_reduce(self, buffer: Any) -> Request:
        """Replace `buffer` by its sum over the ranks, in place."""


class Done:
    """The request of an operation that was complete at once."""

    def wait(self) -> None:
        pass


class LocalEngine:
    """The engine of a single rank."""

    rank = 0
    size = 1

    def reduce_scatter(self, send: Any, recv: Any) -> Request:
        recv[...] = send
        return Done()

    def all_gather(self, buffer: Any) -> Request:
        return Done()

    def all_reduce(self, buffer: Any) -> Request:
        return Done()


def as_engine(comm: Any) -> Engine:
    """Return the engine meant by `comm`: None, an mpi4py communicator or an engine itself."""
    if comm is None:
        return LocalEngine()
    if type(comm).__module__.partition(".")[0] == "mpi4py":
        from .mpi import MpiEngine

        return MpiEngine(comm)
    missing = [name for name in ("rank", "size", *_OPERATIONS) if not hasattr(comm, name)]
    if missing:
        raise TypeError(
            f"comm: expected an mpi4py communicator, an engine of fusedstep.distributed or None, "
            f"got {type(comm).__name__}, which has no {missing[0]!r}"
        )
    engine: Engine = comm
    return engine


_OPERATIONS = ("reduce_scatter", "all_gather", "all_reduce")


def check_timeout(timeout: float) -> None:
    if not timeout > 0:
        raise ValueError(f"timeout: expected a number of seconds > 0, got {timeout!r}")


def wait_until(done: Callable[[], bool], engine: Any, operation: str) -> bool:
    """Return True once `done()`; or, after the engine's time limit, say so and return False."""
    start = time.monotonic()
    while not done():
        waited = time.monotonic() - start
        if waited > engine.timeout:
            print(
                f"fusedstep: rank {engine.rank} of {engine.size} has waited {engine.timeout:g} s "
                f"for the others in {operation}; one of them has stopped. Ending the job: resume "
                f"it from its newest checkpoint ({type(engine).__name__}(timeout=...) sets the "
                f"time).",
                file=sys.stderr,
                flush=True,
            )
            return False
        if waited < _YIELD:
            os.sched_yield()
        else:
            time.sleep(_SLEEP)
    return True


def gather_text(engine: Engine, text: str) -> list[str]:
    """Return the `text` of every rank, on every rank."""
    data = text.encode()
    lengths = np.zeros(engine.size, np.int64)
    lengths[engine.rank] = len(data)
    engine.all_gather(lengths).wait()
    longest = int(lengths.max())
    if longest == 0:
        return [""] * engine.size
    buffer = np.zeros((engine.size, longest), np.uint8)
    buffer[engine.rank, : len(data)] = np.frombuffer(data, np.uint8)
    engine.all_gather(buffer.reshape(-1)).wait()
    return [row[:n].tobytes().decode() for row, n in zip(buffer, lengths.tolist(), strict=True)]


def agree(engine: Engine, error: Exception | None, fact: str = "", what: str = "") -> None:
    """Go on where all ranks can; where one cannot, raise the same error on all of them.

    One small all-gather when all is well.

    Parameters
    ----------
    engine : Engine
        Between the ranks.
    error : Exception or None
        Why this rank cannot go on.
    fact : str
        What must be the same on every rank (its hash travels).
    what : str
        Names that in an error.

    Raises
    ------
    Exception
        The error of the first rank that has one.
    ValueError
        The facts differ.
    """
    if engine.size == 1:
        if error is not None:
            raise error
        return
    states = np.zeros((engine.size, 2), np.int64)
    states[engine.rank] = error is not None, _hash(fact)
    engine.all_gather(states.reshape(-1)).wait()
    failed, hashes = states[:, 0], states[:, 1]
    if failed.any():
        texts = gather_text(engine, f"{_kind(error)} {error}" if error else "")
        first = int(failed.argmax())
        kind, _, text = texts[first].partition(" ")
        raise _KINDS[kind](f"rank {first}: {text}") from error
    if (hashes != hashes[0]).any():
        facts = gather_text(engine, fact)
        other = int((hashes != hashes[0]).argmax())
        raise ValueError(
            f"the ranks disagree on {what}: rank 0 has {_difference(facts[0], facts[other])}, "
            f"rank {other} has {_difference(facts[other], facts[0])}"
        )


_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (FileNotFoundError, ImportError, OSError, RuntimeError, TypeError, ValueError)
}


def _kind(error: Exception) -> str:
    """Return the name of the nearest type that the other ranks know."""
    names = (kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS)
    return next(names, RuntimeError.__name__)


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _difference(text: str, other: str) -> str:
    """Return the first line in which `text` differs from `other`."""
    lines, other_lines = text.split("\n"), other.split("\n")
    for i, line in enumerate(lines):
        if i >= len(other_lines) or line != other_lines[i]:
            return line if len(line) <= 200 else line[:200] + "..."
    return "nothing more"
