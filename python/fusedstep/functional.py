"""The steps as stateless functions, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import _core

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = NDArray[Any] | Sequence[NDArray[Any]]


def gd_step(
    params: Arrays,
    grads: Arrays,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    momentum_buffer: Arrays | None = None,
    step: int | Sequence[int] | None = None,
    grad_scale: float = 1.0,
) -> None:
    """Take one step of gradient descent, with momentum or without, in place.

    With the scaled gradient ``g = grad_scale * grads + weight_decay * params``::

        buffer = momentum * buffer + (1 - dampening) * g      (the first step: buffer = g)
        update = g + momentum * buffer if nesterov else buffer
        params = params - lr * update

    Parameters
    ----------
    params : numpy.ndarray or list of numpy.ndarray
        float32, float64, bfloat16 or float16, any shape, written. A list is one call of the
        kernels. Of a 16-bit parameter, steps smaller than the spacing of its elements are lost, of
        which a program is warned once; `fusedstep.Adam` and `GD` can keep them.
    grads : numpy.ndarray or list of numpy.ndarray
        The gradients, of the shapes of `params`; float64 with float64 parameters, else float32,
        bfloat16 or float16.
    lr : float
        Learning rate, >= 0.
    momentum : float
        >= 0. Needs `momentum_buffer` and `step` unless 0.
    dampening : float
        Weakens what a gradient adds to the momentum.
    nesterov : bool
        Look ahead along the momentum (needs ``momentum > 0`` and ``dampening == 0``).
    weight_decay : float
        L2 penalty, >= 0.
    maximize : bool
        Climb instead of descend.
    momentum_buffer : numpy.ndarray or list of numpy.ndarray, optional
        Like `params`, written; with 16-bit parameters float32, or bfloat16. Its content does not
        matter at step 1.
    step : int or list of int, optional
        The number of this step, from 1; a list has one for each array.
    grad_scale : float
        Multiplies the gradients, > 0.

    Raises
    ------
    TypeError
        An argument is of the wrong kind or dtype.
    ValueError
        Shapes or lengths differ, arrays overlap, an output is read-only, a number is out of range.
        Whatever the error, no array was changed.

    References
    ----------
    Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep
    learning", ICML 2013, as in ``torch.optim.SGD``.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> theta = np.array([1.0, -2.0], dtype=np.float32)
    >>> fs.gd_step(theta, 2 * theta, lr=0.25)
    >>> theta
    array([ 0.5, -1. ], dtype=float32)
    """
    _core.gd_step(
        params,
        grads,
        momentum_buffer,
        step,
        lr,
        momentum,
        dampening,
        nesterov,
        weight_decay,
        maximize,
        grad_scale,
    )


def adam_step(
    params: Arrays,
    grads: Arrays,
    exp_avg: Arrays,
    exp_avg_sq: Arrays,
    *,
    step: int | Sequence[int],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    maximize: bool = False,
    max_exp_avg_sq: Arrays | None = None,
    grad_scale: float = 1.0,
) -> None:
    """Take one step of Adam, in place.

    With the scaled gradient ``g = grad_scale * grads + weight_decay * params``::

        exp_avg    = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        m_hat      = exp_avg / (1 - beta1**step)
        v_hat      = exp_avg_sq / (1 - beta2**step)
        params     = params - lr * m_hat / (sqrt(v_hat) + eps)

    Parameters
    ----------
    params : numpy.ndarray or list of numpy.ndarray
        float32, float64, bfloat16 or float16, any shape, written. A list is one call of the
        kernels. Of a 16-bit parameter, steps smaller than the spacing of its elements are lost, of
        which a program is warned once; `fusedstep.Adam` and `GD` can keep them.
    grads : numpy.ndarray or list of numpy.ndarray
        The gradients, of the shapes of `params`; float64 with float64 parameters, else float32,
        bfloat16 or float16.
    exp_avg, exp_avg_sq : numpy.ndarray or list of numpy.ndarray
        First and second moment, like `params`, written; with 16-bit parameters float32, or
        bfloat16. Zeros before step 1.
    step : int or list of int
        The number of this step, from 1; a list has one for each array.
    lr : float
        Learning rate, >= 0.
    betas : tuple of float
        Decay rates of the moments, each in [0, 1).
    eps : float
        Added to the root of the second moment, >= 0.
    weight_decay : float
        L2 penalty, >= 0 (`adamw_step` has decoupled decay).
    bias_correction : bool
        False leaves ``m_hat = exp_avg`` and ``v_hat = exp_avg_sq``.
    maximize : bool
        Climb instead of descend.
    max_exp_avg_sq : numpy.ndarray or list of numpy.ndarray, optional
        Running maximum of `exp_avg_sq`, like `params`, written, zeros before step 1. Giving it
        turns AMSGrad on: it takes the place of `exp_avg_sq` in the update.
    grad_scale : float
        Multiplies the gradients, > 0.

    Raises
    ------
    TypeError
        An argument is of the wrong kind or dtype.
    ValueError
        Shapes or lengths differ, arrays overlap, an output is read-only, a number is out of range.
        Whatever the error, no array was changed.

    References
    ----------
    Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1. Reddi, Kale,
    Kumar, "On the convergence of Adam and beyond", ICLR 2018, algorithm 2.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> theta = np.ones(3)
    >>> m, v = np.zeros_like(theta), np.zeros_like(theta)
    >>> for t in range(1, 2001):
    ...     fs.adam_step(theta, 2 * theta, m, v, step=t, lr=0.01)
    >>> bool(np.abs(theta).max() < 1e-6)
    True
    """
    _core.adam_step(
        params,
        grads,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
        step,
        lr,
        betas,
        eps,
        weight_decay,
        bias_correction,
        maximize,
        grad_scale,
        False,
    )


def adamw_step(
    params: Arrays,
    grads: Arrays,
    exp_avg: Arrays,
    exp_avg_sq: Arrays,
    *,
    step: int | Sequence[int],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    bias_correction: bool = True,
    maximize: bool = False,
    max_exp_avg_sq: Arrays | None = None,
    grad_scale: float = 1.0,
) -> None:
    """Take one step of AdamW, in place: `adam_step` with decoupled weight decay.

    The decay leaves the gradient alone; the parameters shrink by themselves first::

        params = params * (1 - lr * weight_decay)

    Parameters, errors and the rest are those of `adam_step`.

    References
    ----------
    Loshchilov, Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2.
    """
    _core.adam_step(
        params,
        grads,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
        step,
        lr,
        betas,
        eps,
        weight_decay,
        bias_correction,
        maximize,
        grad_scale,
        True,
    )
