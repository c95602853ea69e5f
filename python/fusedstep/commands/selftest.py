"""Check every kernel on this machine.

Results are held against a reference in wider arithmetic, and must be the same, bit for bit, on all
instruction sets and with any number of threads.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedstep as fs
from fusedstep import reference

Array = NDArray[Any]

# Largest accepted error of one step, in units in the last place of the largest term of each sum:
# no result is more than eight roundings, each of at most one unit, away from the arguments.
TOLERANCE = 8.0
# One list of arrays per call. The odd lengths end in a partial vector and start off alignment.
LENGTHS = (1, 3, 7, 31, 64, 1001, 0, 2989)
STEPS = (1, 2, 1000)
THREADS = (1, 2, 3, 4)
MANY = 1_000_003  # elements, enough for several threads

COMMON: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"grad_scale": 0.3},
)
SGD_OPTIONS = (*COMMON, {"dampening": 0.2, "weight_decay": 0.1})
ADAM_OPTIONS = (*COMMON, {"bias_correction": False}, {"betas": (0.5, 0.95), "eps": 1e-3})


@dataclass(frozen=True)
class Rule:
    """One update rule: the function that runs it and the options it is run with."""

    name: str
    function: str
    state: tuple[str, ...]
    options: tuple[dict[str, Any], ...]
    fixed: dict[str, Any] = field(default_factory=dict)

    def step(self, arrays: dict[str, Any], step: int, options: dict[str, Any]) -> None:
        """Run fusedstep, in place."""
        if self.state:
            options = {**options, "step": step}
        getattr(fs, self.function)(**arrays, **self.fixed, **options)

    def exact(self, arrays: dict[str, Array], step: int, options: dict[str, Any]) -> list[Array]:
        """Run the reference; return the parameters and the state after the step."""
        options = {"lr": 1e-3, **self.fixed, **options, "step": step}
        results: tuple[Array | None, ...]
        if self.function == "gd_step":
            results = reference.gd(*arrays.values(), **options)
        else:
            if self.function == "adamw_step":
                options = {"weight_decay": 1e-2, **options, "decoupled": True}
            results = reference.adam(*arrays.values(), **options)
        return [result for result in results if result is not None]

    def scale(self, arrays: dict[str, Array], step: int, options: dict[str, Any]) -> list[Array]:
        """Return the magnitude of the largest terms: the reference with nothing that cancels."""
        options = {**options, "maximize": False, "lr": -1e-3}
        return self.exact({name: np.abs(a) for name, a in arrays.items()}, step, options)


ADAM_STATE = ("exp_avg", "exp_avg_sq")
RULES = (
    Rule("gd", "gd_step", (), COMMON),
    Rule("momentum", "gd_step", ("momentum_buffer",), SGD_OPTIONS, {"momentum": 0.9}),
    Rule("nesterov", "gd_step", ("momentum_buffer",), COMMON, {"momentum": 0.9, "nesterov": True}),
    Rule("adam", "adam_step", ADAM_STATE, ADAM_OPTIONS),
    Rule("adamw", "adamw_step", ADAM_STATE, ADAM_OPTIONS),
    Rule("amsgrad", "adam_step", (*ADAM_STATE, "max_exp_avg_sq"), ADAM_OPTIONS),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the random data (default: 0)")


def main(args: argparse.Namespace) -> int:
    isa_before, threads_before = fs.get_isa(), fs.get_num_threads()
    try:
        passed = [*check_accuracy(args.seed), *check_threads(args.seed)]
    finally:
        fs.set_isa(isa_before)
        fs.set_num_threads(threads_before)
    failures = passed.count(False)
    print()
    print(f"{failures} of {len(passed)} checks FAILED" if failures else f"{len(passed)} checks ok")
    return 1 if failures else 0


def check_accuracy(seed: int) -> Iterator[bool]:
    """Hold every rule on every instruction set against the reference and the scalar kernels."""
    print("Error of one step in units in the last place, against a reference in wider arithmetic,")
    print(f"largest over {sum(LENGTHS)} elements, steps {STEPS} and all options; limit {TOLERANCE}")
    print()
    print(f"{'rule':<10}{'dtype':<9}{'isa':<8}{'parameters':>11}{'state':>8}  {'bits':<16}result")
    for rule in RULES:
        for dtype in (np.float32, np.float64):
            baseline: list[Array] | None = None
            for isa in fs.available_isas():
                fs.set_isa(isa)
                results, errors = run_all_options(rule, dtype, seed)
                same = baseline is None or identical(results, baseline)
                bits = "" if baseline is None else f"{'=' if same else 'NOT'} {'scalar'}"
                baseline = results if baseline is None else baseline
                passed = same and max(errors) <= tolerance(dtype)
                state = f"{max(errors[1:]):8.2f}" if rule.state else " " * 8
                print(
                    f"{rule.name:<10}{np.dtype(dtype).name:<9}{isa:<8}{errors[0]:>11.2f}{state}"
                    f"  {bits:<16}{'ok' if passed else 'FAILED'}"
                )
                yield passed


def check_threads(seed: int) -> Iterator[bool]:
    """Compare the bits of one large step between numbers of threads."""
    print()
    print(f"One step of {MANY} float32 elements with {THREADS} threads")
    print()
    print(f"{'rule':<10}{'isa':<8}{'bits':<16}result")
    for rule in RULES:
        start = random_arrays(rule, np.float32, MANY, step=2, seed=seed)
        for isa in fs.available_isas():
            fs.set_isa(isa)
            results = []
            for threads in THREADS:
                fs.set_num_threads(threads)
                arrays = {name: a.copy() for name, a in start.items()}
                rule.step(arrays, 2, {})
                results.append(list(arrays.values()))
            passed = all(identical(result, results[0]) for result in results)
            bits = "same" if passed else "NOT the same"
            print(f"{rule.name:<10}{isa:<8}{bits:<16}{'ok' if passed else 'FAILED'}")
            yield passed


def run_all_options(rule: Rule, dtype: Any, seed: int) -> tuple[list[Array], list[float]]:
    """Return all results of `rule` and the largest error of the parameters and of each state."""
    all_results: list[Array] = []
    errors = [0.0] * (1 + len(rule.state))
    for options in rule.options:
        for step in STEPS:
            start = random_arrays(rule, dtype, sum(LENGTHS), step, seed)
            after = {name: a.copy() for name, a in start.items()}
            rule.step({name: cut(a) for name, a in after.items()}, step, options)
            results = [after[name] for name in after if name != "grads"]
            exact = rule.exact(start, step, options)
            scale = rule.scale(start, step, options)
            for i, (result, *wide) in enumerate(zip(results, exact, scale, strict=True)):
                errors[i] = max(errors[i], float(np.max(reference.ulp_error(result, *wide))))
            all_results += results
    return all_results, errors


def random_arrays(rule: Rule, dtype: Any, size: int, step: int, seed: int) -> dict[str, Array]:
    """Return parameters, gradients of many magnitudes, and the state before `step`."""
    rng = np.random.default_rng(seed)
    arrays = {"params": rng.standard_normal(size)}
    # With the sign of the parameters, so that weight decay cancels nothing: where it did, the root
    # of the second moment would carry an error for which `Rule.scale` does not allow.
    magnitudes = np.abs(rng.standard_normal(size)) * 10.0 ** rng.uniform(-4, 2, size)
    arrays["grads"] = np.copysign(magnitudes, arrays["params"])
    for name in rule.state:
        state = rng.standard_normal(size) * 10.0 ** rng.uniform(-4, 2, size)
        if step == 1:
            # Adam starts from zeros; GD must not read its buffer at the first step.
            state[:] = np.nan if name == "momentum_buffer" else 0
        arrays[name] = state**2 if name.endswith("_sq") else state
    return {name: a.astype(dtype) for name, a in arrays.items()}


def cut(array: Array) -> list[Array]:
    """Return views of `array` of the lengths under test."""
    return np.split(array, np.cumsum(LENGTHS)[:-1])


def identical(results: list[Array], others: list[Array]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(results, others, strict=True))


def tolerance(dtype: Any) -> float:
    # Where no type is wider than float64 the reference is no more exact than the kernels.
    wider = np.finfo(reference.wide_dtype(dtype)).eps < np.finfo(dtype).eps
    return TOLERANCE if wider else 4 * TOLERANCE
