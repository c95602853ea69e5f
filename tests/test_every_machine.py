"""The same bits on every machine: digests that GCC and Clang on x86-64 and aarch64 have given.

What the results have to be, other tests say; this one, that they do not depend on where it runs.
Who changes arithmetic or a format on purpose writes the digests anew with
``python tests/test_every_machine.py``, and says in the changelog what becomes of saved state.
"""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

import fusedstep as fs
from fusedstep.dtypes import bfloat16

SIZE, STEPS = 20_011, 3  # several blocks of the norm, and a part of one
ADAM = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99)}
RULES = {
    "gd": ("GD", {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": ("GD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}),
    "nesterov": ("GD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": ("Adam", ADAM),
    "adam, small beta1": ("Adam", {**ADAM, "betas": (0.2, 0.9)}),
    "adamw": ("AdamW", ADAM),
    "amsgrad": ("AdamW", {**ADAM, "amsgrad": True}),
}
MASTERS = {
    "float32": (None,),
    "float16": (None, "float32"),
    "bfloat16": (None, "float32", "correction16", "correction8", "stochastic"),
}
CASES = {
    f"{rule}, {dtype}": (optimizer, dtype, options)
    for rule, (optimizer, options) in RULES.items()
    for dtype in ("float32", "float64")
} | {
    f"adamw, {dtype}, {master}, {state}": (
        "AdamW",
        dtype,
        {**ADAM, "state_dtype": state, "master_weights": master},
    )
    for dtype, masters in MASTERS.items()
    for master in masters
    for state in ("float32", "bfloat16", "8bit")
    if (dtype, state) != ("float32", "float32")
}
RECORD = Path(__file__).with_name("every_machine.json")


def draw(number, dtype):
    """Return numbers of many magnitudes, from integer arithmetic alone."""
    z = np.arange(SIZE, dtype=np.uint64) + np.uint64(number * SIZE)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    whole = (z >> np.uint64(40)).astype(np.float64) - 2.0**23
    values = np.ldexp(whole, -(20 + (z % np.uint64(30)).astype(np.int32)))
    return values.astype(bfloat16() if dtype == "bfloat16" else dtype)


def arrays_of(state):
    """Yield all arrays in a state dict, in the order of their keys."""
    if isinstance(state, np.ndarray):
        yield state
    elif isinstance(state, dict):
        for key in sorted(state, key=str):
            yield from arrays_of(state[key])


def digest(optimizer_class, dtype, options):
    param = draw(0, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a narrow parameter with nothing beside it
        optimizer = getattr(fs, optimizer_class)(param, **options)
    norms = []
    for step in range(1, STEPS + 1):
        norms.append(optimizer.step(draw(step, dtype), clip_norm=1.0, grad_scale=0.5).grad_norm)
    total = hashlib.sha256(param.tobytes())
    total.update(np.array(norms).tobytes())
    for array in arrays_of(optimizer.state_dict()["state"]):
        total.update(array.tobytes())
    return total.hexdigest()[:16]


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_every_machine(isa, maker, case):
    if "bfloat16" in case:
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    assert digest(*CASES[case]) == json.loads(RECORD.read_text())[case]


if __name__ == "__main__":
    digests = {case: digest(*arguments) for case, arguments in CASES.items()}
    RECORD.write_text(json.dumps(digests, indent=1) + "\n")
