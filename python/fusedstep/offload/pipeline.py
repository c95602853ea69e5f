"""Buckets on their way: gradients come down, a step is taken, parameters go up."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _core
from .boundary import Gradient
from .layout import BLOCK, Bucket, aligned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .boundary import Parameters
    from .bucket_step import BucketStep
    from .device import Bytes, Copy

# How many buckets have a buffer in each direction.
DEPTH = 3


class Work(NamedTuple):
    """A bucket whose gradients are complete behind some marks of the device's."""

    bucket: int
    marks: Sequence[Any]


class Feed:
    """The buckets to be worked on, in order, put in by one thread and taken out by another."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._ended = False

    def put(self, work: Work) -> None:
        self._queue.put(work)

    def end(self) -> None:
        self._queue.put(None)

    def take(self, wait: bool) -> Work | None:
        """Return the next; None where there is none yet, or, having waited, none will come."""
        if self._ended or (not wait and self._queue.empty()):
            return None
        work = self._queue.get()
        self._ended = work is None
        return work


class Numbers(NamedTuple):
    """What a step does with the gradients.

    Attributes
    ----------
    groups : list of dict
        The hyper-parameters of each group, as numbers.
    grad_scale : float
        Multiplies the gradients.
    counts : list of int
        How many steps each parameter has taken.
    """

    groups: Sequence[Mapping[str, Any]]
    grad_scale: float
    counts: Sequence[int]


class Pipeline:
    """The buckets of an optimizer and the buffers that they pass through.

    Parameters
    ----------
    params : Parameters
        Where gradients come from, and parameters go.
    host : numpy.ndarray
        The parameters' bytes in host memory.
    host_is_pinned : bool
        Whether parameters may be copied from there without a buffer between.
    buckets : list of Bucket
        All of them.

    Attributes
    ----------
    steps : list of BucketStep
        How each bucket is updated.
    """

    def __init__(
        self,
        params: Parameters,
        host: Bytes,
        host_is_pinned: bool,
        buckets: Sequence[Bucket],
    ) -> None:
        self._params = params
        self._host = host
        self._host_is_pinned = host_is_pinned
        self.buckets = buckets
        self.steps: list[BucketStep] = []
        self._down: list[Bytes] = []
        self._up: list[Bytes] = []
        self.reserve(params.dtypes)

    def reserve(self, grad_dtypes: Sequence[np.dtype[Any] | None]) -> None:
        """Make sure that the buffers hold gradients of these dtypes."""
        sizes = [self._room(bucket, grad_dtypes) for bucket in self.buckets]
        size, count = max(sizes, default=0), min(DEPTH, len(self.buckets))
        if count and (not self._down or len(self._down[0]) < size):
            self._down = []  # first, so that old and new buffers are not there together
            self._down = [self._params.device.pinned(size) for _ in range(count)]
        if count and not self._up and not self._host_is_pinned:
            largest = max(bucket.end - bucket.begin for bucket in self.buckets)
            self._up = [self._params.device.pinned(largest) for _ in range(count)]

    def _room(self, bucket: Bucket, dtypes: Sequence[np.dtype[Any] | None]) -> int:
        used = 0
        for piece in bucket.pieces:
            dtype = dtypes[piece.param]
            if dtype is not None:
                used += aligned((piece.stop - piece.start) * dtype.itemsize)
        return used

    def pinned_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._down + self._up)

    def all_work(self, grads: Sequence[Gradient | None]) -> Feed:
        """Return every bucket for which there is a gradient, as complete by now."""
        feed = Feed()
        marks = [self._params.device.mark()]
        for b in range(len(self.buckets)):
            if self.has_gradient(b, grads):
                feed.put(Work(b, marks))
        feed.end()
        return feed

    def has_gradient(self, b: int, grads: Sequence[Gradient | None]) -> bool:
        return any(grads[piece.param] is not None for piece in self.buckets[b].pieces)

    def arrivals(
        self, feed: Feed, grads: Sequence[Gradient | None]
    ) -> Generator[tuple[int, list[NDArray[Any] | None]], None, None]:
        """Copy gradients to the host; yield each bucket with those of its pieces once there.

        They may be read until the next is asked for.
        """
        under_way: deque[tuple[int, Copy, list[NDArray[Any] | None]]] = deque()
        number = 0
        try:
            while True:
                while len(under_way) < len(self._down):
                    work = feed.take(wait=not under_way)
                    if work is None:
                        break
                    buffer = self._down[number % len(self._down)]
                    under_way.append((work.bucket, *self._start_download(work, grads, buffer)))
                    number += 1
                if not under_way:
                    return
                b, copy, views = under_way[0]
                copy.wait()
                under_way.popleft()  # not before: the wait may be interrupted
                yield b, views
        finally:
            _wait_for_all(copy for _, copy, _ in under_way)

    def _start_download(
        self, work: Work, grads: Sequence[Gradient | None], buffer: Bytes
    ) -> tuple[Copy, list[NDArray[Any] | None]]:
        views: list[NDArray[Any] | None] = []
        pairs = []
        used = 0
        for piece in self.buckets[work.bucket].pieces:
            grad = grads[piece.param]
            if grad is None:
                views.append(None)
                continue
            size = grad.dtype.itemsize
            target = buffer[used : used + (piece.stop - piece.start) * size]
            pairs.append((grad.memory[piece.start * size : piece.stop * size], target))
            views.append(target.view(grad.dtype))
            used += aligned(target.nbytes)
        return self._params.device.download(pairs, work.marks), views

    def read_params(self, wanted: set[int]) -> None:
        """Copy parameters from the device to host memory."""
        sources: list[Gradient | None] = [
            Gradient(memory, dtype) if i in wanted else None
            for i, (memory, dtype) in enumerate(
                zip(self._params.memory, self._params.dtypes, strict=True)
            )
        ]
        with contextlib.closing(self.arrivals(self.all_work(sources), sources)) as arrivals:
            for b, views in arrivals:
                for piece, view in zip(self.buckets[b].pieces, views, strict=True):
                    if view is not None:
                        place = self._host[piece.offset : piece.offset + view.nbytes]
                        _core.copy_bytes(view, place, False)

    def write_params(self) -> None:
        """Copy all parameters from host memory to the device."""
        marks = [self._params.device.mark()]
        with self._uploads() as upload:
            for b, bucket in enumerate(self.buckets):
                upload(b, [True] * len(bucket.pieces), marks)

    @contextlib.contextmanager
    def _uploads(self) -> Iterator[Callable[[int, Sequence[bool], Sequence[Any]], None]]:
        """Give a function that starts to copy some pieces of a bucket; in the end all are there."""
        under_way: deque[Copy] = deque()
        number = 0

        def upload(b: int, which: Sequence[bool], marks: Sequence[Any]) -> None:
            nonlocal number
            bucket = self.buckets[b]
            source = self._host[bucket.begin : bucket.end]
            if len(under_way) == DEPTH:
                under_way[0].wait()
                under_way.popleft()
            if not self._host_is_pinned:
                buffer = self._up[number % len(self._up)][: source.nbytes]
                _core.copy_bytes(source, buffer, True)
                source = buffer
            number += 1
            pairs = []
            for piece, wanted in zip(bucket.pieces, which, strict=True):
                if wanted:
                    size = self._params.dtypes[piece.param].itemsize
                    begin = piece.offset - bucket.begin
                    place = slice(piece.start * size, piece.stop * size)
                    pairs.append(
                        (
                            source[begin : begin + place.stop - place.start],
                            self._params.memory[piece.param][place],
                        )
                    )
            under_way.append(self._params.device.upload(pairs, marks))

        try:
            yield upload
            while under_way:
                under_way[0].wait()
                under_way.popleft()
        finally:
            _wait_for_all(under_way)

    def update(
        self, feed: Feed, grads: Sequence[Gradient | None], numbers: Numbers, begun: set[int]
    ) -> None:
        """Step each bucket whose gradients have arrived, and copy it to the device.

        A bucket is in `begun` from before its first byte is written.
        """
        with (
            self._uploads() as upload,
            contextlib.closing(self.arrivals(feed, grads)) as arrivals,
        ):
            for b, views in arrivals:
                step = self.steps[b]
                pieces = self.buckets[b].pieces
                groups = [
                    {**numbers.groups[g], "params": params}
                    for g, params in zip(step.groups, step.params, strict=True)
                ]
                step.native.steps = [
                    numbers.counts[pieces[i].param] for order in step.order for i in order
                ]
                given = [[views[i] for i in order] for order in step.order]
                begun.add(b)
                try:
                    step.native.step(groups, given, numbers.grad_scale, True)
                except Exception:
                    begun.discard(b)  # it changes nothing when it raises
                    raise
                # The gradients were behind all that reads these parameters.
                upload(b, [view is not None for view in views], ())

    def add_sums(
        self, feed: Feed, grads: Sequence[Gradient | None], sums: Sequence[NDArray[Any]]
    ) -> None:
        """Put the sums of the squares of each gradient's blocks into its place in `sums`."""
        with contextlib.closing(self.arrivals(feed, grads)) as arrivals:
            for b, views in arrivals:
                for float64 in (False, True):
                    found = [
                        (piece, view)
                        for piece, view in zip(self.buckets[b].pieces, views, strict=True)
                        if view is not None
                        and (self._params.dtypes[piece.param] == np.float64) == float64
                    ]
                    if not found:
                        continue
                    counts = [-(-view.size // BLOCK) for _, view in found]
                    own = np.empty(sum(counts))
                    _core.sums_of_squares([view for _, view in found], float64, own)
                    end = 0
                    for (piece, _), count in zip(found, counts, strict=True):
                        first = piece.start // BLOCK
                        sums[piece.param][first : first + count] = own[end : end + count]
                        end += count


def _wait_for_all(copies: Iterable[Copy]) -> None:
    """Wait until no copy uses a buffer any more, when an error is under way already."""
    for copy in copies:
        with contextlib.suppress(Exception):
            copy.wait()
