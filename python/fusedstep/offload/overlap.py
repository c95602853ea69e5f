"""A step that begins while the backward pass is still under way."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .pipeline import Feed, Numbers, Work

if TYPE_CHECKING:
    from .boundary import Gradient, Parameters
    from .pipeline import Pipeline


class Overlap:
    """Buckets that go on their way, on a thread, as soon as all their gradients are complete.

    Without a norm to be taken first they are stepped, and their parameters are copied back.
    With it, they are squared; the steps follow when all have been.

    Parameters
    ----------
    params, pipeline
        The optimizer's.
    numbers : Numbers
        What the step does.
    sums : list of numpy.ndarray, optional
        Where the sums of squares go, if the norm is to be taken.

    Attributes
    ----------
    grads : list of Gradient or None
        Those that have been used so far.
    begun : set of int
        The buckets whose parameters may be new.
    """

    def __init__(
        self,
        params: Parameters,
        pipeline: Pipeline,
        numbers: Numbers,
        sums: Sequence[Any] | None,
    ) -> None:
        self._params = params
        self._pipeline = pipeline
        self._steps_at_once = sums is None
        self.numbers = numbers
        self.sums = sums
        self.grads: list[Gradient | None] = [None] * len(params.arrays)
        self.begun: set[int] = set()
        # What has been used: the gradient itself, held so that no other is taken for it, and its
        # version.
        self._used: list[tuple[Any, int] | None] = [None] * len(params.arrays)
        self._marks: list[list[Any]] = [[] for _ in pipeline.buckets]
        self._waits_for: list[set[int]] = [
            {
                piece.param
                for piece in bucket.pieces
                if getattr(params.arrays[piece.param], "requires_grad", True)
            }
            for bucket in pipeline.buckets
        ]
        self._buckets_of: list[list[int]] = [[] for _ in params.arrays]
        for b, bucket in enumerate(pipeline.buckets):
            for piece in bucket.pieces:
                self._buckets_of[piece.param].append(b)
        self._sent: set[int] = set()
        self._feed = Feed()
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="fusedstep-offload", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self.sums is None:
                self._pipeline.update(self._feed, self.grads, self.numbers, self.begun)
            else:
                self._pipeline.add_sums(self._feed, self.grads, self.sums)
        except BaseException as error:
            self._error = error

    def ready(self, i: int, grad: Any) -> None:
        """Take a gradient that is complete in the order of the stream that computes.

        Raises
        ------
        TypeError, ValueError
            It cannot be used.
        RuntimeError
            It was complete before, and the step may have used it already; or the step is over.
        """
        if self._stopped:
            raise RuntimeError("a backward pass in overlap() went on after the step was finished")
        if self._used[i] is not None:
            if self._steps_at_once:
                raise RuntimeError(
                    f"grads{self._params.suffixes[i]}: accumulated a second time while the "
                    "step was under way; of several backward passes, only the last one may run in "
                    "overlap()"
                )
            return  # squared again in the end, when it is found to have changed
        self._take(i, grad)
        mark = self._params.device.mark()
        for b in self._buckets_of[i]:
            self._marks[b].append(mark)
            self._waits_for[b].discard(i)
            if not self._waits_for[b]:
                self._sent.add(b)
                self._feed.put(Work(b, self._marks[b]))

    def _take(self, i: int, grad: Any) -> None:
        flat = self._params._flat_grad(i, grad)
        if flat.dtype != self._params.dtypes[i]:
            raise TypeError(
                f"grads{self._params.suffixes[i]}: {flat.dtype}, but in overlap() it is to be "
                f"{self._params.dtypes[i]}, as its parameter"
            )
        self.grads[i] = flat
        self._used[i] = grad, _version(grad)

    def _is_as_used(self, i: int, grad: Any) -> bool:
        used = self._used[i]
        if used is None:
            return grad is None
        return grad is used[0] and _version(grad) == used[1]

    def finish(self, grads: Sequence[Any]) -> None:
        """Send the buckets that are left, and return when all have come to their end.

        Parameters
        ----------
        grads : sequence of array or None
            The gradients of all parameters as they are now.

        Raises
        ------
        RuntimeError
            A gradient was changed after the step had used it.
        Exception
            What went wrong on the thread.
        """
        again: set[int] = set()
        try:
            for i, grad in enumerate(grads):
                if self._is_as_used(i, grad):
                    continue
                if self._used[i] is None and self._sent.isdisjoint(self._buckets_of[i]):
                    self._take(i, grad)
                elif self._steps_at_once:
                    raise RuntimeError(
                        f"grads{self._params.suffixes[i]}: changed after the step had used it; "
                        "give grad_scale and clip_norm to overlap()"
                    )
                else:
                    again.update(self._buckets_of[i])
            for i, grad in enumerate(grads):
                if again.intersection(self._buckets_of[i]):
                    self.grads[i] = None if grad is None else self._params._flat_grad(i, grad)
            mark = self._params.device.mark()
            for b in range(len(self._pipeline.buckets)):
                if (b not in self._sent or b in again) and self._pipeline.has_gradient(
                    b, self.grads
                ):
                    self._feed.put(Work(b, [*self._marks[b], mark]))
        finally:
            self.stop()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Return when what was sent has come to its end."""
        self._stopped = True
        self._feed.end()
        interrupt = None
        while self._thread.is_alive():
            try:
                self._thread.join()
            except KeyboardInterrupt as error:  # who asks what was begun must not ask too early
                interrupt = error
        if interrupt is not None:
            raise interrupt


def _version(grad: Any) -> int:
    """Return what is another number when a tensor of PyTorch has been written."""
    return getattr(grad, "_version", 0)
