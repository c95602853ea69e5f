"""The calling thread's floating-point settings neither change a step nor are changed by it."""

import ctypes
import platform
import shutil
import subprocess

import numpy as np
import pytest

import fusedstep as fs

SOURCE = """
#include <fenv.h>
#include <xmmintrin.h>
unsigned get_mxcsr(void) { return _mm_getcsr(); }
void set_mxcsr(unsigned value) { _mm_setcsr(value); }
int set_rounding(int mode) { return fesetround(mode); }
"""
DEFAULT = 0x1F80
FLAGS = 0x3F  # what happened, not how to compute
FLUSH_TO_ZERO, DENORMALS_ARE_ZERO = 0x8000, 0x0040
# The modes of <fenv.h> on x86; in the MXCSR they are three bits higher.
DOWN, UP, TOWARD_ZERO = 0x400, 0x800, 0xC00

SETTINGS = {
    "flush to zero": (FLUSH_TO_ZERO, 0),
    "denormals are zero": (DENORMALS_ARE_ZERO, 0),
    "both": (FLUSH_TO_ZERO | DENORMALS_ARE_ZERO, 0),
    "down": (0, DOWN),
    "up": (0, UP),
    "toward zero": (0, TOWARD_ZERO),
    "all at once": (FLUSH_TO_ZERO | DENORMALS_ARE_ZERO, UP),
}


@pytest.fixture(scope="module")
def fenv(tmp_path_factory):
    compiler = shutil.which("cc")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the MXCSR is a register of x86-64")
    if compiler is None:
        pytest.skip("no C compiler to reach the floating-point settings with")
    folder = tmp_path_factory.mktemp("fenv")
    (folder / "fenv.c").write_text(SOURCE)
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "fenv.c", "-o", "fenv.so", "-lm"],
        cwd=folder,
        check=True,
    )
    return ctypes.CDLL(str(folder / "fenv.so"))


def gd(arrays):
    fs.gd_step(*arrays[:2], momentum_buffer=arrays[2], step=7, lr=0.1, momentum=0.9)


def adam(arrays):
    fs.adam_step(*arrays[:4], step=7, lr=0.1, weight_decay=0.3)


def amsgrad(arrays):
    fs.adamw_step(*arrays[:4], max_exp_avg_sq=arrays[4], step=7, lr=0.1, weight_decay=0.3)


def optimizer(arrays):
    optimizer = fs.Adam([arrays[0]], lr=0.1)
    for _ in range(3):
        optimizer.step([arrays[1]])
    for array, state in zip(arrays[2:], list(optimizer.state[0].values())[1:], strict=False):
        array[...] = state


def clipping(arrays):
    info = fs.GD(arrays[0], lr=0.1).step(arrays[1], clip_norm=1.0)
    arrays.append(np.array(info.grad_norm))


def draw(size, dtype):
    """Return arrays of which a half is denormal, or becomes so in a step."""
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((5, size))
    arrays[:, ::2] *= np.finfo(dtype).tiny
    arrays[3:] = abs(arrays[3:])
    return list(arrays.astype(dtype))


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("step", [gd, adam, amsgrad, optimizer, clipping])
@pytest.mark.parametrize(("size", "threads"), [(1003, 1), (400_003, 3)])
def test_settings_of_the_caller(fenv, isa, setting, step, size, threads):
    bits, rounding = setting
    fs.set_num_threads(threads)
    for dtype in (np.float32, np.float64):
        expected, results = draw(size, dtype), draw(size, dtype)
        step(expected)
        fenv.set_rounding(rounding)
        fenv.set_mxcsr(DEFAULT | bits | rounding << 3)
        try:
            step(results)
            after = fenv.get_mxcsr()
        finally:
            fenv.set_rounding(0)
            fenv.set_mxcsr(DEFAULT)
        assert after & ~FLAGS == DEFAULT | bits | rounding << 3
        assert [a.tobytes() for a in results] == [a.tobytes() for a in expected]


def test_the_settings_do_change_arithmetic(fenv):
    """What the test above relies on."""
    tiny = np.full(64, np.finfo(np.float32).tiny, np.float32)
    three = np.full(64, 3, np.float32)
    fenv.set_mxcsr(DEFAULT | FLUSH_TO_ZERO | DOWN << 3)
    try:
        half, down = tiny * np.float32(0.5), 1 / three
    finally:
        fenv.set_mxcsr(DEFAULT)
    assert (half == 0).all()
    assert (down < 1 / three).all()
