"""A step allocates nothing, and state arrays lie in memory as they should."""

import ctypes
import gc
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import fusedstep as fs

NAMES = """
    arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost
"""


class Mallinfo(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES.split())


@pytest.fixture
def mallinfo():
    """Return a function that gives the bytes that malloc has handed out."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is None:
        pytest.skip("no mallinfo2 here: it is glibc's, from 2.33 on")
    function.restype = Mallinfo

    # Small blocks, and large ones, which are mapped.
    def allocated():
        info = function()
        return info.uordblks + info.hblkhd

    return allocated


@pytest.fixture(autouse=True)
def _no_collection():
    """Keep garbage of other tests out of the measurements."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def arrays(size=1000):
    return {name: np.ones(size, dtype) for name, dtype in (("w", "f4"), ("b", "f8"), ("c", "f4"))}


def optimizer_of_one():
    optimizer, grads = fs.Adam(np.ones(1000)), np.ones(1000)
    return lambda: optimizer.step(grads)


def optimizer_of_list():
    optimizer, grads = fs.Adam(list(arrays().values())), list(arrays().values())
    return lambda: optimizer.step(grads)


def optimizer_of_dict():
    optimizer, grads = fs.Adam(arrays(), amsgrad=True), arrays()
    return lambda: optimizer.step(grads)


def optimizer_of_groups():
    groups = [{"params": arrays()}, {"params": list(arrays().values()), "lr": 0.1}]
    optimizer, grads = fs.AdamW(groups), [arrays(), list(arrays().values())]
    return lambda: optimizer.step(grads)


def optimizer_of_views():
    optimizer, grads = fs.GD(np.ones((50, 40))[:, ::2], momentum=0.9), np.ones((50, 20))
    return lambda: optimizer.step(grads)


def parallel_optimizer():
    fs.set_num_threads(3)
    optimizer, grads = fs.Adam(np.ones(200_000)), np.ones(200_000)
    return lambda: optimizer.step(grads)


def clipping_optimizer():
    fs.set_num_threads(3)
    params = [np.ones(200_000), np.ones((50, 40))[:, ::2], np.ones(5, np.float32)]
    optimizer, grads = fs.Adam(params), [np.ones_like(p) for p in params]
    return lambda: optimizer.step(grads, clip_norm=1.0, skip_nonfinite=True, zero_grad=True)


def skipping_optimizer():
    optimizer, grads = fs.Adam(np.ones(1000)), np.full(1000, np.nan)
    return lambda: optimizer.step(grads, skip_nonfinite=True)


def function_of_one():
    p, g, m, v = np.ones((4, 1000))
    return lambda: fs.adam_step(p, g, m, v, step=5)


def function_of_list():
    p, g, m, v = (list(arrays().values()) for _ in range(4))
    return lambda: fs.adam_step(p, g, m, v, step=[5, 6, 7])


def refused():
    optimizer = fs.Adam([np.ones(1000)])
    wrong = [np.ones(999)]

    def attempt():
        try:
            optimizer.step(wrong)
        except ValueError:
            return
        pytest.fail("not refused")

    return attempt


CASES = [
    optimizer_of_one,
    optimizer_of_list,
    optimizer_of_dict,
    optimizer_of_groups,
    optimizer_of_views,
    parallel_optimizer,
    clipping_optimizer,
    skipping_optimizer,
    function_of_one,
    function_of_list,
    refused,
]


def repeat(step, times):
    for _ in range(times):
        step()


@pytest.mark.parametrize("case", CASES)
def test_steps_leave_the_heap_as_it_was(mallinfo, case):
    step = case()
    repeat(step, 20)
    growth = []
    for _ in range(5):  # anything else in the process may use the heap too, but not every time
        gc.collect()
        before = mallinfo()
        repeat(step, 1000)
        growth.append(mallinfo() - before)
    assert 0 in growth, growth


@pytest.mark.parametrize("case", CASES)
def test_steps_keep_no_python_memory(case):
    step = case()
    repeat(step, 20)
    tracemalloc.start()
    try:
        repeat(step, 20)
        before, _ = tracemalloc.get_traced_memory()
        repeat(step, 1000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1000


def test_a_heap_that_grows_is_seen(mallinfo):
    """What the test above relies on."""
    kept = []
    before = mallinfo()
    repeat(lambda: kept.append(np.ones(1000)), 10)
    assert mallinfo() - before >= 10 * 8000


PEAK = """
import numpy as np, fusedstep as fs

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

fs.set_num_threads(2)
size = {size}
params, grads = (np.full({shape}, 1, np.float32) for _ in range(2))
optimizer = fs.Adam(params{view})
for array in list(optimizer.state[0].values())[1:]:
    array[...] = 1
small = np.full(200_000, 1, np.float32)
fs.gd_step(small, grads.reshape(-1)[:200_000])
before = status("VmHWM")
below_peak = before - status("VmRSS")
optimizer.step(grads{view})
print(below_peak, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("shape", "view"), [("size", ""), ("(4, size // 4)", "[:, ::-2]")], ids=["dense", "view"]
)
def test_a_step_takes_no_memory(shape, view):
    script = PEAK.format(size=20_000_000, shape=shape, view=view)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    # In KiB; one array is 80 MB. Below an earlier peak nothing would be seen.
    below_peak, growth = map(int, done.stdout.split())
    assert below_peak < 1000
    assert growth < 1000


LAYOUTS = {
    "C": lambda a: a,
    "Fortran": lambda a: a.T,
    "permuted": lambda a: a.transpose(1, 0, 2),
    "slices": lambda a: a[::2, 1:, ::3],
    "empty": lambda a: a[:0],
    "0-d": lambda a: a[1, 1, 1, ...],
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("past_a_line", [0, 1, 5])
def test_large_state_lies_as_its_parameter_does(dtype, past_a_line):
    memory = np.zeros(4096, dtype)
    first = -memory.ctypes.data % 64 // memory.itemsize + past_a_line
    param = memory[first : first + 2000]
    own = fs.Adam(param).state[0]
    for key in ("exp_avg", "exp_avg_sq"):
        assert own[key].ctypes.data % 64 == past_a_line * memory.itemsize


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_state_is_aligned_and_ordered_as_its_parameter(layout, dtype):
    param = layout(np.ones((5, 6, 7), dtype))
    own = fs.Adam(param, amsgrad=True).state[0]
    assert own.pop("step") == 0
    assert list(own) == ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    for array in own.values():
        assert array.ctypes.data % 64 == 0
        assert (array.shape, array.dtype) == (param.shape, param.dtype)
        assert array.strides == np.empty_like(param).strides
        assert array.flags.writeable
        assert not array.any()
