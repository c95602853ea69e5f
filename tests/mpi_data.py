"""What the jobs under mpirun train, and what an unbroken run on one rank makes of it."""

import numpy as np

import fusedstep as fs

SIZES = {"w": 40_000, "b": 3, "c": 9_999}


def arrays(seed):
    rng = np.random.default_rng(seed)
    made = {name: rng.standard_normal(size) for name, size in SIZES.items()}
    return {name: a if name == "c" else a.astype(np.float32) for name, a in made.items()}


def unbroken(steps, **options):
    """Return the parameters after so many steps of the ordinary optimizer."""
    params = arrays(0)
    optimizer = fs.AdamW(params, lr=0.01)
    for t in range(1, steps + 1):
        optimizer.step(arrays(t), **options)
    return params


def assert_equal(params, expected):
    for name, param in params.items():
        assert param.tobytes() == expected[name].tobytes(), name
