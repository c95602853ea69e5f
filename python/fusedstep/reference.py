"""Slow, exact-as-possible optimizer steps to hold the fast ones against.

Plain NumPy, out of place, one textbook formula per line, in a wider type than the arrays given:
float64 for arrays of up to 32 bits, ``np.longdouble`` (where it is wider than double) for float64
arrays. The order of operations is the papers', not that of the fused kernels, so that an error in
one does not hide in the other.

- Adam: Kingma & Ba, *Adam: A Method for Stochastic Optimization*, ICLR 2015, Algorithm 1.
- AdamW: Loshchilov & Hutter, *Decoupled Weight Decay Regularization*, ICLR 2019, Algorithm 2,
  with the decay multiplied by the learning rate, as in PyTorch.
- AMSGrad: Reddi, Kale & Kumar, *On the Convergence of Adam and Beyond*, ICLR 2018, with the
  maximum taken before the bias correction, as in PyTorch.
- Momentum, dampening and Nesterov: as ``torch.optim.SGD`` documents them.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["adam", "gd", "ulp_error", "wide_dtype"]

Array = NDArray[Any]


def wide_dtype(dtype: np.typing.DTypeLike) -> np.dtype[Any]:
    """Return the type in which results for arrays of `dtype` are computed."""
    return np.dtype(np.float64 if np.dtype(dtype).itemsize < 8 else np.longdouble)


def gd(
    p: Array,
    g: Array,
    buf: Array | None = None,
    *,
    step: int = 1,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> tuple[Array, Array | None]:
    """One step of gradient descent.

    Parameters
    ----------
    p, g : array
        Parameters and gradient.
    buf : array, optional
        Momentum buffer after the step before; not read at step 1.
    step : int
        Number of this step, from 1.
    lr, momentum, dampening, nesterov, weight_decay, maximize, grad_scale
        As in `fusedstep.gd_step`.

    Returns
    -------
    p, buf : array
        Parameters and momentum buffer after the step, in the wide type; `buf` is None without
        momentum.
    """
    wide = wide_dtype(p.dtype).type
    lr, mu, tau, decay = wide(lr), wide(momentum), wide(dampening), wide(weight_decay)
    p = p.astype(wide)
    g = _gradient(p, g, grad_scale, maximize, decay)
    if momentum == 0:
        return p - lr * g, None
    if step == 1:
        buf = g.copy()
    else:
        assert buf is not None, "momentum needs its buffer after step 1"
        buf = mu * buf.astype(wide) + (1 - tau) * g
    direction = g + mu * buf if nesterov else buf
    return p - lr * direction, buf


def adam(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    vmax: Array | None = None,
    *,
    step: int = 1,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    bias_correction: bool = True,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> tuple[Array, Array, Array, Array | None]:
    """One step of Adam, AdamW (`decoupled`) or AMSGrad (`vmax` given).

    Parameters
    ----------
    p, g : array
        Parameters and gradient.
    m, v : array
        First and second moment after the step before (zeros before step 1).
    vmax : array, optional
        Largest `v` so far.
    step : int
        Number of this step, from 1.
    decoupled : bool
        Weight decay of AdamW instead of an L2 term in the gradient.
    lr, betas, eps, weight_decay, bias_correction, maximize, grad_scale
        As in `fusedstep.adam_step`.

    Returns
    -------
    p, m, v, vmax : array
        All four after the step, in the wide type; `vmax` is None where none was given.
    """
    wide = wide_dtype(p.dtype).type
    alpha, decay, epsilon = wide(lr), wide(weight_decay), wide(eps)
    beta1, beta2 = wide(betas[0]), wide(betas[1])
    p, m, v = p.astype(wide), m.astype(wide), v.astype(wide)
    g = _gradient(p, g, grad_scale, maximize, wide(0) if decoupled else decay)

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    second_moment = v
    if vmax is not None:
        vmax = second_moment = np.maximum(vmax.astype(wide), v)
    m_hat, v_hat = m, second_moment
    if bias_correction:
        m_hat = m / (1 - beta1**step)
        v_hat = second_moment / (1 - beta2**step)

    update = m_hat / (np.sqrt(v_hat) + epsilon)
    if decoupled:
        update = update + decay * p
    return p - alpha * update, m, v, vmax


def _gradient(p: Array, g: Array, grad_scale: float, maximize: bool, weight_decay: Any) -> Array:
    sign = -1 if maximize else 1
    gradient: Array = sign * p.dtype.type(grad_scale) * g.astype(p.dtype) + weight_decay * p
    return gradient


def ulp_error(result: Array, exact: Array, scale: Array | None = None) -> Array:
    """Error of `result` in units in the last place (ulp) of its own dtype.

    Parameters
    ----------
    result : array
        What was computed, in the precision under test.
    exact : array
        What it should be, in a wider type.
    scale : array, optional
        Magnitude at which the unit is taken, `exact` by default. A sum whose terms cancel can only
        be as accurate as its largest term; give that term's magnitude there.

    Returns
    -------
    array of float64
        Zero where both are the same infinity or both NaN, infinite where only one of them is.
    """
    dtype = result.dtype
    wide = wide_dtype(dtype)
    result, exact = result.astype(wide), exact.astype(wide)
    magnitude = np.abs(exact if scale is None else scale.astype(wide))
    # Written out, since np.spacing overflows at the largest finite number.
    limits = np.finfo(dtype)
    exponent = np.frexp(magnitude)[1] - 1
    exponent = np.where(magnitude == 0, limits.minexp, np.maximum(exponent, limits.minexp))
    unit = np.ldexp(wide.type(1), exponent - limits.nmant)
    with np.errstate(invalid="ignore"):
        error = np.abs(result - exact) / unit
    same = (result == exact) | (np.isnan(result) & np.isnan(exact))
    comparable = np.isfinite(result) & np.isfinite(exact)
    return np.where(same, 0.0, np.where(comparable, error, np.inf)).astype(np.float64)
