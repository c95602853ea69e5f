"""The optimizers as one writes them by hand in NumPy, for comparison with the fused ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Params = dict[str, NDArray[Any]]


class GD:
    """Gradient descent, with momentum where it is not 0."""

    def __init__(self, params: Params, lr: Callable[[int], float], *, momentum: float = 0.0):
        self.params, self.lr, self.momentum = params, lr, momentum
        self.steps = 0
        self.buffers = {name: np.zeros_like(p) for name, p in params.items()}

    def step(self, grads: Params) -> None:
        self.steps += 1
        lr = self.lr(self.steps)
        for name, p in self.params.items():
            update = grads[name]
            if self.momentum:
                buffer = self.buffers[name]
                buffer *= self.momentum
                buffer += update
                update = buffer
            p -= lr * update


class Adam:
    """Adam with bias correction (Kingma & Ba 2015)."""

    def __init__(
        self,
        params: Params,
        lr: Callable[[int], float],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        self.params, self.lr, self.betas, self.eps = params, lr, betas, eps
        self.steps = 0
        self.exp_avg = {name: np.zeros_like(p) for name, p in params.items()}
        self.exp_avg_sq = {name: np.zeros_like(p) for name, p in params.items()}

    def step(self, grads: Params) -> None:
        self.steps += 1
        lr = self.lr(self.steps)
        beta1, beta2 = self.betas
        for name, p in self.params.items():
            g, m, v = grads[name], self.exp_avg[name], self.exp_avg_sq[name]
            m *= beta1
            m += (1 - beta1) * g
            v *= beta2
            v += (1 - beta2) * g**2
            m_hat = m / (1 - beta1**self.steps)
            v_hat = v / (1 - beta2**self.steps)
            p -= lr * m_hat / (np.sqrt(v_hat) + self.eps)
