"""The optimizers: gradient descent, Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core, narrow
from .optimizer import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from .structure import Params

    Schedule = float | Callable[[int], float]

__all__ = ["GD", "SGD", "Adam", "AdamW", "Optimizer"]


class GD(Optimizer):
    """Gradient descent, with momentum or without. `SGD` is another name for it.

    The equations are those of `fusedstep.gd_step`.

    Parameters
    ----------
    params : numpy.ndarray, list, dict, or list of groups
        float32, float64, bfloat16 or float16 arrays to be updated in place: one array, a list, a
        dict of arrays by name, or a list of groups ``{"params": ..., "lr": ..., ...}``.
    lr : float or callable
        Learning rate, >= 0. Any hyper-parameter that is a float may be a callable instead, which
        is given the number of the step about to be taken (from 1; in a group whose parameters
        have taken unequal numbers of steps, of the one that has taken most) and returns the value.
    momentum : float or callable
        >= 0. Unless it is 0 each parameter gets a state array ``momentum_buffer``.
    dampening : float or callable
        Weakens what a gradient adds to the momentum.
    nesterov : bool
        Look ahead along the momentum (needs ``momentum > 0`` and ``dampening == 0``).
    weight_decay : float or callable
        L2 penalty, >= 0.
    maximize : bool
        Climb instead of descend.
    capturable : bool
        For GPU arrays: count the steps in the GPU's memory, one count for each group, so that a
        step which was captured in a CUDA graph is a new step each time the graph is replayed.
        `lr` may then be a GPU array of one float32 or float64, which is read when a step runs and
        is not checked; float64 gives the bits of a number. Callables are refused, and so is a
        gradient of None. Reading `state`, saving and pickling wait for the GPU.
    state_dtype : str or dict, optional
        How state is stored beside float32, bfloat16 and float16 parameters: ``"float32"`` (the
        default), ``"bfloat16"``, or ``"8bit"`` (a byte for each element and a float32 for each 64,
        under the array's name and ``"_units"``; rounded at random). A dict has one for each state
        array. Steps are computed in float32 whatever it is.
    master_weights : str, optional
        What is kept of a bfloat16 or float16 parameter beyond its own bits, so that small steps
        are not lost: ``"float32"`` (a float32 copy), ``"correction16"`` (the 16 bits that bfloat16
        lacks of it), ``"correction8"`` (the next 8), or ``"stochastic"`` (nothing: bfloat16 is
        rounded at random, right on average). float16 has ``"float32"`` only.
    seed : int
        Of what is rounded at random. The same seed gives the same bits, also after a resume.

    Raises
    ------
    TypeError
        An argument is of the wrong kind or dtype.
    ValueError
        Arrays overlap or are read-only, a number is out of range.

    References
    ----------
    Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep
    learning", ICML 2013, as in ``torch.optim.SGD``.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> theta = np.array([1.0, -2.0], dtype=np.float32)
    >>> optimizer = fs.GD(theta, lr=0.25)
    >>> optimizer.step(2 * theta)
    StepInfo(grad_norm=None, skipped=False)
    >>> theta
    array([ 0.5, -1. ], dtype=float32)
    """

    def __init__(
        self,
        params: Params,
        lr: Schedule = 1e-3,
        *,
        momentum: Schedule = 0.0,
        dampening: Schedule = 0.0,
        nesterov: bool = False,
        weight_decay: Schedule = 0.0,
        maximize: bool = False,
        capturable: bool = False,
        state_dtype: str | Mapping[str, str | None] | None = None,
        master_weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
            capturable=capturable,
            storage=narrow.Storage(state_dtype, master_weights, seed),
        )

    @staticmethod
    def _state_keys(group: Mapping[str, Any]) -> tuple[str, ...]:
        momentum = group["momentum"]
        never = isinstance(momentum, int | float | np.number) and momentum == 0
        return () if never else ("momentum_buffer",)

    def _make_native(self) -> Any:
        return _core.GdOptimizer(seed=self._storage.seed)

    def _entry_from_pytorch(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        there = {key: value for key, value in entry.items() if value is not None}
        # PyTorch keeps no count here. One step says that the momentum goes on.
        return {"step": int("momentum_buffer" in there), **there}


SGD = GD


class Adam(Optimizer):
    """Adam, with the weight decay (if any) added to the gradient as an L2 penalty.

    The equations are those of `fusedstep.adam_step`. `AdamW` has decoupled decay.

    Parameters
    ----------
    params : numpy.ndarray, list, dict, or list of groups
        float32, float64, bfloat16 or float16 arrays to be updated in place: one array, a list, a
        dict of arrays by name, or a list of groups ``{"params": ..., "lr": ..., ...}``. Each array
        gets the state arrays ``exp_avg`` and ``exp_avg_sq``.
    lr : float or callable
        Learning rate, >= 0. Any hyper-parameter that is a float may be a callable instead, which
        is given the number of the step about to be taken (from 1; in a group whose parameters
        have taken unequal numbers of steps, of the one that has taken most) and returns the value.
    betas : tuple of float
        Decay rates of the moments, each in [0, 1).
    eps : float or callable
        Added to the root of the second moment, >= 0.
    weight_decay : float or callable
        L2 penalty, >= 0.
    amsgrad : bool
        Divide by the running maximum of the second moment (a third state array,
        ``max_exp_avg_sq``).
    maximize : bool
        Climb instead of descend.
    bias_correction : bool
        False uses the moments as they are, without the division by ``1 - beta**t``.
    capturable : bool
        For GPU arrays: count the steps in the GPU's memory, one count for each group, so that a
        step which was captured in a CUDA graph is a new step each time the graph is replayed.
        `lr` may then be a GPU array of one float32 or float64, which is read when a step runs and
        is not checked; float64 gives the bits of a number. Callables are refused, and so is a
        gradient of None. Reading `state`, saving and pickling wait for the GPU.
    state_dtype : str or dict, optional
        How state is stored beside float32, bfloat16 and float16 parameters: ``"float32"`` (the
        default), ``"bfloat16"``, or ``"8bit"`` (a byte for each element and a float32 for each 64,
        under the array's name and ``"_units"``; rounded at random). A dict has one for each state
        array. Steps are computed in float32 whatever it is.
    master_weights : str, optional
        What is kept of a bfloat16 or float16 parameter beyond its own bits, so that small steps
        are not lost: ``"float32"`` (a float32 copy), ``"correction16"`` (the 16 bits that bfloat16
        lacks of it), ``"correction8"`` (the next 8), or ``"stochastic"`` (nothing: bfloat16 is
        rounded at random, right on average). float16 has ``"float32"`` only.
    seed : int
        Of what is rounded at random. The same seed gives the same bits, also after a resume.

    Raises
    ------
    TypeError
        An argument is of the wrong kind or dtype.
    ValueError
        Arrays overlap or are read-only, a number is out of range.

    References
    ----------
    Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1. Reddi, Kale,
    Kumar, "On the convergence of Adam and beyond", ICLR 2018, algorithm 2.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> weights = {"w": np.ones((3, 2)), "b": np.zeros(2)}
    >>> optimizer = fs.Adam(weights, lr=lambda t: 1e-3 * min(1, t / 100))
    >>> optimizer.step({"w": np.full((3, 2), 0.5), "b": None}, clip_norm=1.0)
    StepInfo(grad_norm=1.224744871391589, skipped=False)
    """

    _decoupled = False

    def __init__(
        self,
        params: Params,
        lr: Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: Schedule = 1e-8,
        weight_decay: Schedule = 0.0,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        bias_correction: bool = True,
        capturable: bool = False,
        state_dtype: str | Mapping[str, str | None] | None = None,
        master_weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
                "bias_correction": bias_correction,
            },
            capturable=capturable,
            storage=narrow.Storage(state_dtype, master_weights, seed),
        )

    @staticmethod
    def _state_keys(group: Mapping[str, Any]) -> tuple[str, ...]:
        keys = ("exp_avg", "exp_avg_sq")
        return (*keys, "max_exp_avg_sq") if group["amsgrad"] else keys

    def _make_native(self) -> Any:
        return _core.AdamOptimizer(decoupled=self._decoupled, seed=self._storage.seed)

    def _from_pytorch(self, saved: Mapping[str, Any], where: str) -> dict[str, Any]:
        group = {"bias_correction": True, **super()._from_pytorch(saved, where)}
        # Not in what was saved before PyTorch 2.7.
        decoupled = group.pop("decoupled_weight_decay", self._decoupled)
        if decoupled != self._decoupled:
            raise ValueError(
                f"{where}: decoupled_weight_decay: {decoupled}, which "
                f"{'AdamW' if decoupled else 'Adam'} has and {type(self).__name__} has not"
            )
        return group


class AdamW(Adam):
    """Adam with decoupled weight decay.

    Parameters, errors and state are those of `Adam`; the equations are those of
    `fusedstep.adamw_step`.

    References
    ----------
    Loshchilov, Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2.
    """

    _decoupled = True

    def __init__(
        self,
        params: Params,
        lr: Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: Schedule = 1e-8,
        weight_decay: Schedule = 1e-2,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        bias_correction: bool = True,
        capturable: bool = False,
        state_dtype: str | Mapping[str, str | None] | None = None,
        master_weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            bias_correction=bias_correction,
            capturable=capturable,
            state_dtype=state_dtype,
            master_weights=master_weights,
            seed=seed,
        )
