"""What a step reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class StepInfo:
    """What a step reports. It compares and unpacks as the tuple ``(grad_norm, skipped)``.

    On a GPU both are computed there; they are copied to the host, which waits for the step, when
    one of them is first read. As with an array, that is to be done on the stream of the step. What
    a step reports that was captured in a CUDA graph is copied at each reading: it is that of the
    latest replay, and ``(0.0, False)`` before the first.

    Attributes
    ----------
    grad_norm : float or None
        Euclidean norm of the scaled gradients, all of them together, before clipping; None unless
        `clip_norm` or `skip_nonfinite` asked for it.
    skipped : bool
        Whether the step was left out because the norm was not finite.
    """

    __slots__ = ("__weakref__", "_changes", "_read", "_values")

    def __init__(self, grad_norm: float | None, skipped: bool) -> None:
        self._values: tuple[float | None, bool] = (grad_norm, skipped)
        self._read: Callable[[], tuple[float, bool]] | None = None
        self._changes = False

    @classmethod
    def later(cls, read: Callable[[], tuple[float, bool]], *, changes: bool = False) -> StepInfo:
        """Return what `read` returns, which is called when that is needed, or each time."""
        info = cls(None, False)
        info._read = read
        info._changes = changes
        return info

    @property
    def is_known(self) -> bool:
        """Whether reading it waits for nothing."""
        return self._read is None

    @property
    def grad_norm(self) -> float | None:
        return self._known()[0]

    @property
    def skipped(self) -> bool:
        return self._known()[1]

    def _known(self) -> tuple[float | None, bool]:
        if self._read is not None:
            self._values = self._read()
            if not self._changes:
                self._read = None
        return self._values

    def __iter__(self) -> Iterator[Any]:
        return iter(self._known())

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        return self._known()[index]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StepInfo):
            other = other._known()
        return self._known() == other

    def __hash__(self) -> int:
        return hash(self._known())

    def __reduce__(self) -> tuple[Any, ...]:
        return StepInfo, self._known()

    def __repr__(self) -> str:
        grad_norm, skipped = self._known()
        return f"StepInfo(grad_norm={grad_norm!r}, skipped={skipped!r})"
