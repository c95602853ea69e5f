"""Objects of the user's at the boundary: what their code may do, and how long they live."""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
from boundary_cases import RULES, arrays_of, every_rule, grouped, listed, random

# Code of the user's that runs while a call is being checked, in a process of its own: it may crash
# or hang.
HOSTILE = {
    "a key's comparison shortens the list of groups": """
class Key(str):
    def __hash__(self):
        return hash("w")

    def __eq__(self, other):
        del grads[1:]
        return str.__eq__(self, other)

optimizer = fs.GD([{"params": {"w": ones(4)}}, *({"params": ones(4)} for _ in range(50))])
grads = [{Key("w"): ones(4)}, *(ones(4) for _ in range(50))]
with pytest.raises((IndexError, ValueError)):
    optimizer.step(grads)
assert {entry["step"] for entry in optimizer.state.values()} == {0}
""",
    "a key's comparison empties the dict": """
class Key:
    def __hash__(self):
        return 12345

    def __eq__(self, other):
        grads.clear()
        return False

optimizer = fs.GD({"w": ones(4)})
grads = {"w": ones(4)}
grads[Key()] = ones(4)
with pytest.raises(ValueError, match="is not a parameter"):
    optimizer.step(grads)
""",
    "a gradient's attribute steps its optimizer": """
class Gradient:
    @property
    def __cuda_array_interface__(self):
        optimizer.step(ones(4))

optimizer = fs.GD(ones(4))
with pytest.raises((TypeError, RuntimeError)):
    optimizer.step(Gradient())
optimizer.step(ones(4))
""",
    "a gradient's attribute loads into its optimizer": """
class Gradient:
    @property
    def __cuda_array_interface__(self):
        optimizer.load_state_dict(optimizer.state_dict())

optimizer = fs.GD(ones(4))
with pytest.raises((TypeError, RuntimeError)):
    optimizer.step(Gradient())
optimizer.step(ones(4))
""",
    "a step's __index__ frees an array": """
class Step:
    def __index__(self):
        params[0].resize(0, refcheck=False)
        return 1

params = [ones(4096), ones(4)]
with pytest.raises(ValueError, match="shape"):
    fs.gd_step(params, [ones(4096), ones(4)], step=[1, Step()])
""",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_code_neither_crashes_nor_hangs(case):
    setting = "import numpy as np, pytest, fusedstep as fs\n"
    setting += "ones = lambda n: np.ones(n, np.float32)\n"
    done = subprocess.run(
        [sys.executable, "-c", setting + HOSTILE[case]],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env={**os.environ, "PYTHONMALLOC": "debug"},  # the use of freed memory shows
    )
    assert done.returncode == 0, done.stderr


# Lifetimes


@every_rule
def test_calls_leak_no_references(rule):
    function, _, needed = RULES[rule]
    good = listed(arrays_of(rule))
    bad = {**good, "grads": [*good["grads"][:2], good["grads"][2].astype(np.float64)]}
    lr = float("1e-3")
    watched = [a for arrays in (*good.values(), *bad.values()) for a in (arrays, *arrays)] + [lr]

    def call():
        function(**good, **needed, lr=lr)
        with pytest.raises(TypeError, match=r"grads\[2\]"):
            function(**bad, **needed, lr=lr)

    assert_no_growth(call, watched, 5000)


@every_rule
def test_optimizers_leak_no_references(rule):
    optimizer, grads = grouped(rule)
    bad = [*grads[:2], [grads[2][0], grads[2][1].astype(np.float64)]]
    watched = [*grads, *grads[1].values(), *grads[2], bad, bad[2], bad[2][1]]
    watched += [p for group in optimizer.param_groups for p in group["params"]]

    def call():
        with pytest.raises(TypeError, match=r"grads\[2\]"):
            optimizer.step(bad)
        optimizer.step(grads)

    assert_no_growth(call, watched, 5000)


@every_rule
def test_a_refused_step_keeps_no_gradient(rule):
    optimizer, grads = grouped(rule)
    good = random(7)
    before = sys.getrefcount(good)
    with pytest.raises(ValueError, match=r"grads\[2\]"):
        optimizer.step([good, grads[1], grads[2][:1]])
    assert sys.getrefcount(good) == before


def assert_no_growth(call, watched, times):
    call()
    gc.collect()
    before = [sys.getrefcount(x) for x in watched]
    blocks = sys.getallocatedblocks()
    for _ in range(times):
        call()
    gc.collect()
    assert [sys.getrefcount(x) for x in watched] == before
    assert sys.getallocatedblocks() - blocks < times / 10
