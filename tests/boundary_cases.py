"""Good and bad arrays for every rule, and what it is to refuse one."""

from contextlib import contextmanager

import numpy as np
import pytest
from helpers import assert_unchanged
from numpy.lib.stride_tricks import as_strided

import fusedstep as fs

SHAPE = (2, 3)
GD_ROLES = ["params", "grads", "momentum_buffer"]
ADAM_ROLES = ["params", "grads", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
# function, its arrays, what else it needs
RULES = {
    "gd": (fs.gd_step, GD_ROLES[:2], {}),
    "momentum": (fs.gd_step, GD_ROLES, {"momentum": 0.9, "step": 2}),
    "adam": (fs.adam_step, ADAM_ROLES[:4], {"step": 2}),
    "amsgrad": (fs.adam_step, ADAM_ROLES, {"step": 2}),
    "adamw": (fs.adamw_step, ADAM_ROLES[:4], {"step": 2}),
}
OPTIMIZERS = {
    "gd": (fs.GD, {}),
    "momentum": (fs.GD, {"momentum": 0.9}),
    "adam": (fs.Adam, {}),
    "amsgrad": (fs.Adam, {"amsgrad": True}),
    "adamw": (fs.AdamW, {}),
}
every_rule = pytest.mark.parametrize("rule", RULES)
both_forms = pytest.mark.parametrize("form", ["single", "list"])


class OnGpu:
    """What a GPU array looks like from here."""

    __cuda_array_interface__ = {"shape": SHAPE, "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012


def random(shape=SHAPE, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).random(shape).astype(dtype)


def arrays_of(rule, **options):
    roles = RULES[rule][1]
    return {role: random(seed=i, **options) for i, role in enumerate(roles)}


def misaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    memory[:] = np.frombuffer(array.tobytes(), np.uint8)
    return memory.view(array.dtype).reshape(array.shape)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def jax_array(array):
    return pytest.importorskip("jax").numpy.asarray(array)


def torch_tensor(array):
    return pytest.importorskip("torch").from_numpy(array)


# what is made of a good array, the error, what the message says
BAD_TYPES = {
    "int32": (lambda a: a.astype(np.int32), TypeError, "int32"),
    "complex": (lambda a: a.astype(np.complex64), TypeError, "complex64"),
    "object": (lambda a: a.astype(object), TypeError, "object"),
    "swapped": (lambda a: a.astype(a.dtype.newbyteorder()), TypeError, "byte-swapped float32"),
    "misaligned": (misaligned, ValueError, "not aligned"),
    "python float": (lambda a: 1.5, TypeError, "got float"),
    "numpy scalar": (lambda a: np.float32(1), TypeError, "a scalar; pass numpy.asarray("),
    "string": (lambda a: "abc", TypeError, "got str"),
    "dict": (lambda a: {"w": a}, TypeError, "pass the dict's values as a list"),
    "generator": (lambda a: (x for x in [a]), TypeError, "got generator"),
    "masked": (lambda a: np.ma.masked_array(a, mask=a > 0.5), TypeError, "masked"),
    "gpu": (lambda a: OnGpu(), TypeError, "no CUDA backend"),
    "jax": (jax_array, TypeError, "jax.Array is immutable"),
    "torch": (torch_tensor, TypeError, "tensor.detach().numpy()"),
}
# Beside its parameter, that is not for the parameter itself.
UNLIKE = {
    "float64": (lambda a: a.astype(np.float64), TypeError, "float64, but its parameter is float32"),
    "transposed": (lambda a: a.T, ValueError, "shape (3, 2), but its parameter has shape (2, 3)"),
    "flat": (lambda a: a.ravel(), ValueError, "shape (6,)"),
    "longer": (lambda a: np.resize(a, (3, 3)), ValueError, "shape (3, 3)"),
    "0-d": (lambda a: np.array(0.0, a.dtype), ValueError, "shape ()"),
    "empty": (lambda a: a[:0], ValueError, "shape (0, 3)"),
}
UNWRITABLE = {
    "read-only": (read_only, ValueError, "read-only"),
    "stride 0": (lambda a: as_strided(a.copy(), a.shape, (0, 4)), ValueError, "overlap in memory"),
    "self-overlapping": (
        lambda a: as_strided(a.copy(), a.shape, (8, 4)),
        ValueError,
        "overlap in memory",
    ),
}
MADE = {**BAD_TYPES, **UNLIKE, **UNWRITABLE}
NONE = {"none": (lambda a: None, TypeError, "got NoneType")}


def bad_arrays(rule):
    """Yield (role, case) for everything that is wrong with one array of a call."""
    for role in RULES[rule][1]:
        cases = list(BAD_TYPES)
        cases += [] if role == "params" else UNLIKE
        cases += [] if role == "grads" else UNWRITABLE
        yield from ((role, case) for case in cases)


def listed(arrays):
    """Return the list form, where the arrays given are the last of three."""
    others = {role: [array.copy(), array.copy()] for role, array in arrays.items()}
    return {role: [*others[role], array] for role, array in arrays.items()}


NOT_NUMBERS = [(value, TypeError) for value in ("1", None, [1.0], 1j, lambda t: 0.1)]
NOT_FINITE = [(value, ValueError) for value in (np.nan, np.inf, -np.inf)]
NEGATIVE = [(-1e-9, ValueError)]
NOT_BETA = [*NEGATIVE, (1.0, ValueError), (2.0, ValueError)]
NOT_FLAGS = [(value, TypeError) for value in (1, 0.0, None, "yes")]
BAD_COMMON = {
    "lr": NEGATIVE + NOT_FINITE + NOT_NUMBERS,
    "weight_decay": NEGATIVE + NOT_FINITE + NOT_NUMBERS,
    "grad_scale": [(0.0, ValueError), *NEGATIVE, *NOT_FINITE, *NOT_NUMBERS],
    "maximize": NOT_FLAGS,
}
BAD_GD = {
    **BAD_COMMON,
    "momentum": NEGATIVE + NOT_FINITE + NOT_NUMBERS,
    "dampening": NOT_FINITE + NOT_NUMBERS,
    "nesterov": NOT_FLAGS,
}
BAD_ADAM = {
    **BAD_COMMON,
    "eps": NEGATIVE + NOT_FINITE + NOT_NUMBERS,
    "bias_correction": NOT_FLAGS,
    "betas": [
        *(((beta, 0.9), error) for beta, error in NOT_BETA + NOT_FINITE + NOT_NUMBERS[:-1]),
        *(((0.9, beta), error) for beta, error in NOT_BETA + NOT_FINITE + NOT_NUMBERS[:-1]),
        *((value, TypeError) for value in (0.9, "ab", (0.9,), (0.9, 0.9, 0.9), None, {0.9, 0.8})),
    ],
}


def bad_hypers(rule):
    return BAD_GD if "adam" not in rule and rule != "amsgrad" else BAD_ADAM


@contextmanager
def refused(error, *texts, unchanged=()):
    """Fail unless the block raises this very error with these texts and writes nothing."""
    arrays = [a for a in unchanged if isinstance(a, np.ndarray) and a.dtype != object]
    with assert_unchanged(*arrays), pytest.raises(error) as caught:
        yield
    assert caught.type is error
    for text in texts:
        assert text in str(caught.value)


def refuse_call(rule, arrays, error, *texts, **options):
    function, _, needed = RULES[rule]
    flat = [a for v in arrays.values() for a in (v if isinstance(v, list) else [v])]
    with refused(error, *texts, unchanged=flat):
        function(**{**arrays, **needed, **options})


def take(rule, arrays, **options):
    function, _, needed = RULES[rule]
    function(**{**arrays, **needed, **options})


def copies(arrays):
    return {role: np.array(a, copy=True, order="C", subok=False) for role, a in arrays.items()}


def interleaved(rule, **_):
    matrix = random((6, len(RULES[rule][1])))
    return {role: matrix[:, i] for i, role in enumerate(RULES[rule][1])}


def one_buffer(rule, **_):
    roles = RULES[rule][1]
    flat = random(6 * len(roles))
    return {role: flat[6 * i : 6 * i + 6].reshape(SHAPE) for i, role in enumerate(roles)}


def memmap(rule, path):
    arrays = {}
    for role, array in arrays_of(rule).items():
        arrays[role] = np.memmap(path / role, np.float32, "w+", shape=SHAPE)
        arrays[role][...] = array
    return arrays


def only_grads(change):
    return lambda rule, **_: {
        role: change(a) if role == "grads" else a for role, a in arrays_of(rule).items()
    }


def every_array(change):
    return lambda rule, **_: {role: change(a) for role, a in arrays_of(rule).items()}


ACCEPTED = {
    "interleaved columns": interleaved,
    "one buffer": one_buffer,
    "memmap": memmap,
    "matrix": every_array(lambda a: a.view(np.matrix)),
    "empty": every_array(lambda a: a[:0].copy()),
    "0-d": every_array(lambda a: np.array(a[0, 0])),
    "10-d": every_array(lambda a: a.reshape(1, 2, 1, 1, 3, 1, 1, 1, 1, 1)),
    "reversed": every_array(lambda a: a[::-1, ::-1]),
    "every other": every_array(lambda a: np.repeat(a, 2, axis=1)[:, ::2]),
    "read-only gradient": only_grads(read_only),
    "broadcast gradient": only_grads(lambda a: np.broadcast_to(a[:1], SHAPE)),
    "self-overlapping gradient": only_grads(lambda a: as_strided(a, SHAPE, (4, 4))),
    "fortran gradient": only_grads(np.asfortranarray),
}


def grouped(rule, **options):
    """Return an optimizer of three groups after one step, and good gradients for the next."""
    make, own = OPTIMIZERS[rule]
    groups = [
        {"params": random(7)},
        {"params": {"w": random(seed=1), "b": random(3, np.float64, 2)}, "lr": 0.5},
        {"params": [random(4, seed=3), random(seed=4)]},
    ]
    optimizer = make(groups, **own, **options)
    grads = [
        random(7, seed=5),
        {"w": random(seed=6), "b": random(3, np.float64, 7)},
        [random(4, seed=8), random(seed=9)],
    ]
    optimizer.step(grads)
    return optimizer, grads


@contextmanager
def refused_by(optimizer, error, *texts):
    arrays = [p for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state
    arrays += [a for entry in state.values() for key, a in entry.items() if key != "step"]
    steps = [entry["step"] for entry in state.values()]
    with refused(error, *texts, unchanged=arrays):
        yield
    assert [entry["step"] for entry in optimizer.state.values()] == steps
