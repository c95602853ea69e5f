"""The contenders. Each makes a step over its own parameters and state from a workload.

A peer is a class with a `name`, how to `install` it, the `rules` and `dtypes` it has, and
`make(params, grads, rule)`, which returns the step to be timed and a function that gives the
parameters as NumPy arrays. A peer that cannot be imported is reported with the reason; one that
does not do what the float64 reference does is reported as wrong and not timed.
"""

import importlib
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

import fusedstep as fs
from fusedstep import reference

from .workloads import BETAS, EPS, LR, MOMENTUM, Array

Step = Callable[[], object]
Made = tuple[Step, Callable[[], list[Array]]]

B1, B2 = BETAS


class Peer:
    """What a contender that says nothing else is like."""

    rules: tuple[str, ...] = ("adam",)
    dtypes: tuple[str, ...] = ("float32", "float64")


class FusedstepOptimizer(Peer):
    name = "fusedstep"
    install = "pip install fusedstep"
    rules = ("gd", "momentum", "adam")

    def make(self, params: list[Array], grads: list[Array], rule: str) -> Made:
        optimizer: fs.Optimizer
        if rule == "adam":
            optimizer = fs.Adam(params, lr=LR, betas=BETAS, eps=EPS)
        else:
            optimizer = fs.GD(params, lr=LR, momentum=MOMENTUM if rule == "momentum" else 0.0)
        step = optimizer.step
        return lambda: step(grads), lambda: params


class FusedstepFunction(Peer):
    name = "fusedstep function"
    install = "pip install fusedstep"
    rules = ("gd", "adam")

    def make(self, params: list[Array], grads: list[Array], rule: str) -> Made:
        t = 0
        if rule == "gd":
            return lambda: fs.gd_step(params, grads, lr=LR), lambda: params
        m, v = ([np.zeros_like(p) for p in params] for _ in range(2))
        one = len(params) == 1
        p, g, m, v = (arrays[0] if one else arrays for arrays in (params, grads, m, v))

        def step() -> None:
            nonlocal t
            t += 1
            fs.adam_step(p, g, m, v, step=t, lr=LR, betas=BETAS, eps=EPS)

        return step, lambda: params


def adam_by_hand(library: Any, params: list[Any], grads: list[Any]) -> Step:
    """Return Adam written with the arrays of a library, NumPy or CuPy."""
    m, v = ([library.zeros_like(p) for p in params] for _ in range(2))
    t = 0

    def adam() -> None:
        nonlocal t
        t += 1
        for p, g, mi, vi in zip(params, grads, m, v, strict=True):
            mi *= B1
            mi += (1 - B1) * g
            vi *= B2
            vi += (1 - B2) * g * g
            m_hat = mi / (1 - B1**t)
            v_hat = vi / (1 - B2**t)
            p -= LR * m_hat / (library.sqrt(v_hat) + EPS)

    return adam


class NumPy(Peer):
    """Written by hand, in place where a careful person would."""

    name = "NumPy"
    install = "pip install numpy"
    rules = ("gd", "momentum", "adam")

    def make(self, params: list[Array], grads: list[Array], rule: str) -> Made:
        if rule == "adam":
            return adam_by_hand(np, params, grads), lambda: params
        b = [np.zeros_like(p) for p in params]

        def gd() -> None:
            for p, g in zip(params, grads, strict=True):
                p -= LR * g

        def momentum() -> None:
            for p, g, bi in zip(params, grads, b, strict=True):
                bi *= MOMENTUM
                bi += g
                p -= LR * bi

        return {"gd": gd, "momentum": momentum}[rule], lambda: params


class NumExpr(Peer):
    name = "numexpr"
    install = "pip install numexpr"

    def __init__(self) -> None:
        import numexpr

        numexpr.set_num_threads(fs.get_num_threads())
        self.evaluate = numexpr.evaluate

    def make(self, params: list[Array], grads: list[Array], rule: str) -> Made:
        m, v = ([np.zeros_like(p) for p in params] for _ in range(2))
        t = 0

        def adam() -> None:
            nonlocal t
            t += 1
            for p, g, mi, vi in zip(params, grads, m, v, strict=True):
                f = p.dtype.type
                names = {
                    "p": p, "g": g, "m": mi, "v": vi,
                    "b1": f(B1), "a1": f(1 - B1), "b2": f(B2), "a2": f(1 - B2),
                    "s": f(LR / (1 - B1**t)), "c": f((1 - B2**t) ** -0.5), "e": f(EPS),
                }  # fmt: skip
                self.evaluate("b1 * m + a1 * g", local_dict=names, out=mi)
                self.evaluate("b2 * v + a2 * g * g", local_dict=names, out=vi)
                self.evaluate("p - s * m / (sqrt(v) * c + e)", local_dict=names, out=p)

        return adam, lambda: params


class Numba(Peer):
    name = "numba"
    install = "pip install numba"

    def __init__(self) -> None:
        import numba

        numba.set_num_threads(min(fs.get_num_threads(), numba.config.NUMBA_NUM_THREADS))

        @numba.njit(parallel=True)  # type: ignore[untyped-decorator]
        def kernel(p, g, m, v, b1, a1, b2, a2, s, c, e):  # type: ignore[no-untyped-def]
            for i in numba.prange(p.size):
                m[i] = b1 * m[i] + a1 * g[i]
                v[i] = b2 * v[i] + a2 * g[i] * g[i]
                p[i] -= s * m[i] / (np.sqrt(v[i]) * c + e)

        self.kernel = kernel

    def make(self, params: list[Array], grads: list[Array], rule: str) -> Made:
        m, v = ([np.zeros_like(p) for p in params] for _ in range(2))
        flat = [[a.reshape(-1) for a in arrays] for arrays in (params, grads, m, v)]
        t = 0

        def adam() -> None:
            nonlocal t
            t += 1
            for p, g, mi, vi in zip(*flat, strict=True):
                f = p.dtype.type
                scalars = (B1, 1 - B1, B2, 1 - B2, LR / (1 - B1**t), (1 - B2**t) ** -0.5, EPS)
                self.kernel(p, g, mi, vi, *map(f, scalars))

        return adam, lambda: params


class Torch(Peer):
    """`torch.optim`, with its fused implementation or the one over lists."""

    install = "pip install torch"
    rules = ("gd", "momentum", "adam")
    implementation = "fused"
    name = "torch fused"

    def __init__(self) -> None:
        import torch

        self.torch = torch
        torch.set_num_threads(fs.get_num_threads())

    def tensors(self, arrays: Iterable[Array]) -> list[Any]:
        return [self.torch.from_numpy(array) for array in arrays]

    def make(self, params: list[Array], grads: list[Array], rule: str) -> Made:
        tensors = self.tensors(params)
        for tensor, grad in zip(tensors, self.tensors(grads), strict=True):
            tensor.grad = grad
        options: dict[str, Any] = {"lr": LR, self.implementation: True}
        if rule == "adam":
            optimizer = self.torch.optim.Adam(tensors, betas=BETAS, eps=EPS, **options)
        else:
            momentum = MOMENTUM if rule == "momentum" else 0.0
            optimizer = self.torch.optim.SGD(tensors, momentum=momentum, **options)
        return optimizer.step, lambda: params


class TorchForeach(Torch):
    name = "torch foreach"
    implementation = "foreach"
    rules = ("adam",)


class TorchRaw(Torch):
    """The operator that torch's fused Adam calls, without the optimizer around it."""

    name = "torch raw op"
    rules = ("adam",)

    def make(self, params: list[Array], grads: list[Array], rule: str) -> Made:
        torch = self.torch
        p, g = self.tensors(params), self.tensors(grads)
        m, v = ([torch.zeros_like(x) for x in p] for _ in range(2))
        # One counter for all, set through NumPy: torch's own addition takes longer than the step.
        counter = np.zeros((), np.float32)
        steps = [torch.from_numpy(counter)] * len(p)
        options = {
            "lr": LR, "beta1": B1, "beta2": B2, "weight_decay": 0.0, "eps": EPS, "amsgrad": False,
            "maximize": False, "grad_scale": None, "found_inf": None,
        }  # fmt: skip
        op = torch._fused_adam_
        t = 0

        def adam() -> None:
            nonlocal t
            t += 1
            counter[()] = t
            op(p, g, m, v, [], steps, **options)

        return adam, lambda: params


class Optax(Peer):
    """A jitted step with its buffers donated, waited for."""

    name = "optax"
    install = "pip install jax optax"

    def __init__(self) -> None:
        import jax
        import optax

        jax.config.update("jax_enable_x64", True)
        self.jax, self.optax = jax, optax

    def make(self, params: list[Array], grads: list[Array], rule: str) -> Made:
        jax = self.jax
        optimizer = self.optax.adam(LR, b1=B1, b2=B2, eps=EPS)
        held = [jax.numpy.array(p) for p in params]
        fixed = [jax.numpy.array(g) for g in grads]
        state = optimizer.init(held)

        def update(held: Any, state: Any, fixed: Any) -> Any:
            updates, state = optimizer.update(fixed, state, held)
            return self.optax.apply_updates(held, updates), state

        compiled = jax.jit(update, donate_argnums=(0, 1))

        def adam() -> None:
            nonlocal held, state
            held, state = compiled(held, state, fixed)
            jax.block_until_ready(held)

        return adam, lambda: [np.asarray(p) for p in held]


class DeepSpeed(Torch):
    """CPUAdam, which compiles itself at first use."""

    name = "DeepSpeed"
    install = "pip install deepspeed (with a C++ compiler and ninja on the PATH)"
    rules = ("adam",)
    dtypes = ("float32",)

    def __init__(self) -> None:
        super().__init__()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self.adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        self.adam([self.torch.zeros(8)], lr=LR)  # compiles

    def optimizer(
        self, tensors: list[Any], weight_decay: float = 0.0, adamw_mode: bool = False
    ) -> Any:
        return self.adam(
            tensors,
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=weight_decay,
            adamw_mode=adamw_mode,
        )

    def make(self, params: list[Array], grads: list[Array], rule: str) -> Made:
        tensors = self.tensors(params)
        for tensor, grad in zip(tensors, self.tensors(grads), strict=True):
            tensor.grad = grad
        return self.optimizer(tensors).step, lambda: params


PEERS: tuple[Any, ...] = (
    FusedstepOptimizer,
    FusedstepFunction,
    NumPy,
    NumExpr,
    Numba,
    Torch,
    TorchRaw,
    TorchForeach,
    Optax,
    DeepSpeed,
)


def available_peers(report: Callable[[str, str], None]) -> list[Any]:
    """Return the peers that are installed and right; report the others with the reason."""
    peers = []
    for peer_class in PEERS:
        try:
            peer = peer_class()
        except Exception as error:  # whatever keeps a peer from loading is its reason
            lines = str(error).strip().splitlines() or ["no message"]
            reason = f"{type(error).__name__}: {lines[-1]}"
            report(peer_class.name, f"missing ({reason}); {peer_class.install}")
            continue
        try:
            for rule in peer.rules:
                check(peer, rule)
        except Exception as error:
            report(peer_class.name, f"WRONG, not timed ({error})")
            continue
        report(peer_class.name, "ok")
        peers.append(peer)
    return peers


def step_of(
    name: str, make: Callable[[], tuple[Step, list[Array]]], say: Callable[[str], None]
) -> Step | None:
    """Return the step of a peer that runs and updates its parameters; say why of another."""
    try:
        step, params = make()
    except Exception as error:  # whatever keeps a peer from running is its reason
        say(f"{name}: missing ({type(error).__name__}: {str(error).splitlines()[:1]})")
        return None
    before = [param.copy() for param in params]
    for _ in range(3):
        step()
    # bfloat16 loses some changes, not most.
    if any((p != b).mean() < 0.5 for p, b in zip(params, before, strict=True)):
        say(f"{name}: does not update its parameters, not timed")
        return None
    return step


def check(peer: Any, rule: str) -> None:
    """Hold three steps of a peer against the reference."""
    rng = np.random.default_rng(2)
    shapes = ((1003,), (7, 9))
    start, grads = ([rng.standard_normal(s, dtype=np.float32) for s in shapes] for _ in range(2))
    step, result = peer.make([p.copy() for p in start], grads, rule)
    for _ in range(3):
        step()
    for p, g, got in zip(start, grads, result(), strict=True):
        p = p.astype(np.float64)
        m, v, buffer = np.zeros_like(p), np.zeros_like(p), None
        for t in range(1, 4):
            if rule == "adam":
                p, m, v, _ = reference.adam(p, g, m, v, step=t, lr=LR, betas=BETAS, eps=EPS)
            else:
                momentum = MOMENTUM if rule == "momentum" else 0.0
                p, buffer = reference.gd(p, g, buffer, step=t, lr=LR, momentum=momentum)
        worst = float(np.max(np.abs(got - p)))
        if not worst < 1e-6:
            raise ValueError(f"{rule}: off by {worst:.1e} after 3 steps of {LR}")
