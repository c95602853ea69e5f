"""A loss scale that adapts itself, for training in float16."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .optimizer import Optimizer
    from .step_info import StepInfo

# The scale and its reciprocal are numbers of float32, neither 0 nor denormal.
SMALLEST, LARGEST = 2.0**-126, 2.0**126


class LossScaler:
    """Scales a loss up, so that small gradients do not vanish in float16, and gradients back down.

    Multiply the loss by `scale` before it is differentiated, and let `step` undo that. When a
    gradient has overflowed, the step is skipped and the scale backs off; after `growth_interval`
    steps in a row that were not skipped it grows. It stays between 2**-126 and 2**126.

    Parameters
    ----------
    init_scale : float
        The scale at first.
    growth_factor : float
        Multiplies the scale when it grows, > 1.
    backoff_factor : float
        Multiplies the scale after a skipped step, in (0, 1).
    growth_interval : int
        How many steps in a row must not have been skipped for the scale to grow, >= 1.

    Raises
    ------
    TypeError
        An argument is not a number.
    ValueError
        A number is out of range.

    References
    ----------
    Micikevicius et al., "Mixed precision training", ICLR 2018, section 3.2, with the schedule of
    ``torch.amp.GradScaler``.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> theta = np.ones(3, dtype=np.float32)
    >>> optimizer, scaler = fs.GD(theta, lr=0.5), fs.LossScaler()
    >>> scaler.step(optimizer, scaler.scale * theta)
    StepInfo(grad_norm=1.7320508075688772, skipped=False)
    >>> scaler.step(optimizer, np.full(3, np.inf, dtype=np.float32))
    StepInfo(grad_norm=inf, skipped=True)
    >>> theta, scaler.scale
    (array([0.5, 0.5, 0.5], dtype=float32), 32768.0)
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self._set(
            {
                "init_scale": init_scale,
                "growth_factor": growth_factor,
                "backoff_factor": backoff_factor,
                "growth_interval": growth_interval,
                "_growth_tracker": 0,
            }
        )

    def _set(self, values: Mapping[str, Any], where: str = "") -> None:
        scale, growth_factor, backoff_factor, growth_interval, tracker = (
            _number(value, where + name) for name, value in values.items()
        )
        scale_name = where + next(iter(values))
        _check(SMALLEST <= scale <= LARGEST, scale_name, "between 2**-126 and 2**126", scale)
        _check(1 < growth_factor <= LARGEST, where + "growth_factor", "> 1, finite", growth_factor)
        _check(0 < backoff_factor < 1, where + "backoff_factor", "in (0, 1)", backoff_factor)
        for name, value, least in (
            ("growth_interval", growth_interval, 1),
            ("_growth_tracker", tracker, 0),
        ):
            _check(value >= least and value % 1 == 0, where + name, f"whole, >= {least}", value)
        self._scale = float(scale)
        self._growth_factor = float(growth_factor)
        self._backoff_factor = float(backoff_factor)
        self._growth_interval = int(growth_interval)
        self._growth_tracker = int(tracker)

    @property
    def scale(self) -> float:
        """What to multiply the loss by."""
        return self._scale

    def step(self, optimizer: Optimizer, grads: Any, **options: Any) -> StepInfo:
        """Take a step with the gradients of the scaled loss, or skip it, and update the scale.

        On a GPU the optimizer must have been made with ``capturable=True``, and the scale waits for
        the step.

        Parameters
        ----------
        optimizer : Optimizer
            Its `step` is called with the reciprocal of `scale` as `grad_scale`, and with
            ``skip_nonfinite=True``.
        grads : numpy.ndarray, list or dict
            As for the optimizer's `step`.
        **options
            The optimizer's other options, `clip_norm` and `zero_grad`.

        Returns
        -------
        StepInfo
            Of the optimizer's step; the norm is that of the gradients without the scale.

        Raises
        ------
        TypeError, ValueError
            As the optimizer's step. Nothing was changed, nor was the scale.
        """
        info = optimizer.step(grads, grad_scale=1 / self._scale, skip_nonfinite=True, **options)
        self.update(info.skipped)
        return info

    def update(self, skipped: bool) -> None:
        """Adapt the scale to a step that was taken without `step`, or to several of them.

        Parameters
        ----------
        skipped : bool
            Whether the step (or any of them) was skipped.

        Raises
        ------
        TypeError
            It is neither True nor False.
        """
        if not isinstance(skipped, bool | np.bool_):
            raise TypeError(
                f"skipped: expected True or False, got {type(skipped).__name__}; "
                "of a StepInfo pass its attribute skipped"
            )
        if skipped:
            self._growth_tracker = 0
            self._multiply(self._backoff_factor)
            return
        self._growth_tracker += 1
        if self._growth_tracker >= self._growth_interval:
            self._growth_tracker = 0
            self._multiply(self._growth_factor)

    def _multiply(self, factor: float) -> None:
        self._scale = min(max(self._scale * factor, SMALLEST), LARGEST)

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and all that its course depends on, by the names of PyTorch.

        Returns
        -------
        dict
            ``scale``, ``growth_factor``, ``backoff_factor``, ``growth_interval`` and
            ``_growth_tracker``, the number of steps since the scale last changed or one was
            skipped.
        """
        return {
            "scale": self._scale,
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._growth_tracker,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a `state_dict`, also one of ``torch.amp.GradScaler``.

        Parameters
        ----------
        state_dict : dict
            As `state_dict` returns it.

        Raises
        ------
        TypeError, ValueError
            A key is missing or unknown, a value out of range. Nothing was changed.
        """
        own = self.state_dict()
        for wrong, what in (
            (own.keys() - state_dict.keys(), "no"),
            (state_dict.keys() - own.keys(), "unknown"),
        ):
            if wrong:
                raise ValueError(f"state_dict: {what} {min(wrong)!r}")
        self._set({name: state_dict[name] for name in own}, "state_dict: ")

    def __repr__(self) -> str:
        return (
            f"LossScaler(scale={self._scale}, growth_factor={self._growth_factor}, "
            f"backoff_factor={self._backoff_factor}, growth_interval={self._growth_interval})"
        )


def _number(value: Any, name: str) -> Any:
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return value


def _check(in_range: bool, name: str, wanted: str, value: float) -> None:
    if not in_range:
        raise ValueError(f"{name}: expected a number {wanted}, got {value}")
