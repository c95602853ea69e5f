"""The calling thread's floating-point settings neither change a step nor are changed by it."""

import ctypes
import platform
import shutil
import subprocess
from typing import NamedTuple

import numpy as np
import pytest

import fusedstep as fs

# The register that says how to compute: the MXCSR of x86-64, whose low six bits say what happened,
# and the FPCR of aarch64. fesetround sets the x87 unit of x86-64, too.
SOURCE = """
#include <fenv.h>
#ifdef __x86_64__
#include <xmmintrin.h>
unsigned get_control(void) { return _mm_getcsr() & ~0x3Fu; }
void set_control(unsigned value) { _mm_setcsr(value); }
#else
unsigned get_control(void) {
    unsigned long value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
}
void set_control(unsigned value) { __asm__ volatile("msr fpcr, %0" : : "r"((unsigned long)value)); }
#endif
int set_rounding(int mode) { return fesetround(mode); }
"""


class Machine(NamedTuple):
    """Bits of the register, the modes of <fenv.h>, and how far they are shifted in the register."""

    default: int
    flush: dict[str, int]
    down: int
    up: int
    toward_zero: int
    shift: int


MACHINES = {
    "x86_64": Machine(
        0x1F80, {"flush to zero": 0x8000, "denormals are zero": 0x0040}, 0x400, 0x800, 0xC00, 3
    ),
    "aarch64": Machine(0, {"flush to zero": 1 << 24}, 2 << 22, 1 << 22, 3 << 22, 0),
}
MACHINE = MACHINES.get(platform.machine(), MACHINES["x86_64"])
BOTH = sum(MACHINE.flush.values())
SETTINGS = {
    **{name: (bits, 0) for name, bits in MACHINE.flush.items()},
    "both": (BOTH, 0),
    "down": (0, MACHINE.down),
    "up": (0, MACHINE.up),
    "toward zero": (0, MACHINE.toward_zero),
    "all at once": (BOTH, MACHINE.up),
}


@pytest.fixture(scope="module")
def fenv(tmp_path_factory):
    compiler = shutil.which("cc")
    if platform.machine() not in MACHINES:
        pytest.skip(f"how {platform.machine()} is told to flush denormals is not known here")
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
    wanted = MACHINE.default | bits | rounding << MACHINE.shift
    fs.set_num_threads(threads)
    for dtype in (np.float32, np.float64):
        expected, results = draw(size, dtype), draw(size, dtype)
        step(expected)
        fenv.set_rounding(rounding)
        fenv.set_control(wanted)
        try:
            step(results)
            after = fenv.get_control()
        finally:
            fenv.set_rounding(0)
            fenv.set_control(MACHINE.default)
        assert after == wanted
        assert [a.tobytes() for a in results] == [a.tobytes() for a in expected]


def test_the_settings_do_change_arithmetic(fenv):
    """What the test above relies on."""
    tiny = np.full(64, np.finfo(np.float32).tiny, np.float32)
    three = np.full(64, 3, np.float32)
    fenv.set_control(MACHINE.default | BOTH | MACHINE.down << MACHINE.shift)
    try:
        half, down = tiny * np.float32(0.5), 1 / three
    finally:
        fenv.set_control(MACHINE.default)
    assert (half == 0).all()
    assert (down < 1 / three).all()
