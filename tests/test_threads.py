"""The thread pool and its size: forks, threads of the program, the environment, the GIL."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import fusedstep as fs
from fusedstep import _core

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")

OURS = ("FUSEDSTEP_NUM_THREADS", "FUSEDSTEP_ISA", "OMP_NUM_THREADS")


def run_python(script, **environment):
    """Run a script in a fresh interpreter, with none of our variables but those given."""
    inherited = {key: value for key, value in os.environ.items() if key not in OURS}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, "OPENBLAS_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def output(script, **environment):
    done = run_python(script, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


# Forks.

FORK = """
import os, signal, sys
import numpy as np, fusedstep as fs

def steps(optimizer, count):
    for _ in range(count):
        optimizer.step(grads)

signal.alarm(30)
rng = np.random.default_rng(0)
start, grads = rng.standard_normal((2, 1_000_000))
expected = start.copy()
fs.set_num_threads(1)
steps(fs.Adam(expected), 6)

fs.set_num_threads(4)
params = start.copy()
optimizer = fs.Adam(params)
steps(optimizer, 3)
threads = len(os.listdir("/proc/self/task"))
child = os.fork()
if child == 0:
    signal.alarm(30)
    alone = len(os.listdir("/proc/self/task"))
    steps(optimizer, 3)
    again = len(os.listdir("/proc/self/task"))
    os._exit(0 if params.tobytes() == expected.tobytes() and (alone, again) == (1, 4) else 1)
steps(optimizer, 3)
_, status = os.waitpid(child, 0)
print(threads, params.tobytes() == expected.tobytes(), os.waitstatus_to_exitcode(status))
"""


@linux
def test_fork_after_a_parallel_step():
    assert output(FORK) == ["4 True 0"]


# Threads of the program.


def in_threads(functions):
    """Run the functions at once, and raise what one of them raises."""
    errors = []

    def run(function):
        try:
            start.wait(timeout=60)
            function()
        except BaseException as error:
            errors.append(error)

    start = threading.Barrier(len(functions))
    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def steps(optimizer, grads, count):
    for _ in range(count):
        optimizer.step(grads)


KINDS = (fs.GD, fs.Adam, fs.AdamW, fs.Adam)


@pytest.mark.parametrize("size", [1000, 200_000])
def test_several_optimizers_at_once(size):
    fs.set_num_threads(3)
    start, *grads = np.random.default_rng(0).standard_normal((1 + len(KINDS), size))
    expected, params = ([start.copy() for _ in KINDS] for _ in range(2))
    for kind, p, g in zip(KINDS, expected, grads, strict=True):
        steps(kind(p), g, 30)
    optimizers = [kind(p) for kind, p in zip(KINDS, params, strict=True)]
    in_threads([lambda o=o, g=g: steps(o, g, 30) for o, g in zip(optimizers, grads, strict=True)])
    assert [p.tobytes() for p in params] == [p.tobytes() for p in expected]


@pytest.mark.parametrize("size", [1000, 200_000])
def test_one_optimizer_in_several_threads(size):
    fs.set_num_threads(3)
    expected, grads = np.random.default_rng(0).standard_normal((2, size))
    params = expected.copy()
    steps(fs.Adam(expected), grads, 4 * 25)
    shared = fs.Adam(params)
    in_threads([lambda: steps(shared, grads, 25)] * 4)
    assert shared.state[0]["step"] == 4 * 25
    assert params.tobytes() == expected.tobytes()


@pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="this Python has no GIL"
)
def test_a_long_step_releases_the_gil():
    ticks = 0
    done = threading.Event()

    def count():
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(1e-4)

    params, grads = np.ones((2, 20_000_000), np.float32)
    interval = sys.getswitchinterval()
    counter = threading.Thread(target=count)
    # Nobody is asked to let go of the GIL: the counter gets it only where it is released.
    sys.setswitchinterval(1000)
    try:
        counter.start()
        while ticks == 0:
            time.sleep(1e-4)
        before = ticks
        for _ in range(50):  # on a busy machine the counter may not get a core during one step
            fs.gd_step(params, grads)
            if ticks != before:
                break
        during = ticks - before
    finally:
        sys.setswitchinterval(interval)
        done.set()
        counter.join()
    assert during > 0


# How many threads.

CONFIG = """
from fusedstep import _core
print(_core.config()["num_threads"], _core.config()["num_threads_reason"], sep=",")
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FUSEDSTEP_NUM_THREADS": "3"}, "3,FUSEDSTEP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "5"}, "5,OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "6,2"}, "6,OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "7", "FUSEDSTEP_NUM_THREADS": "3"}, "3,FUSEDSTEP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "7", "FUSEDSTEP_NUM_THREADS": ""}, "7,OMP_NUM_THREADS"),
    ],
)
def test_environment(environment, expected):
    assert output(CONFIG, **environment) == [expected]


@linux
@pytest.mark.parametrize("omp", ["", "0", "many"])
def test_affinity(omp):
    cpu = min(os.sched_getaffinity(0))
    script = f"import os; os.sched_setaffinity(0, {{{cpu}}})" + CONFIG
    assert output(script, OMP_NUM_THREADS=omp) == ["1,CPU affinity"]


def test_a_call_has_the_last_word():
    script = "import fusedstep; fusedstep.set_num_threads(9)" + CONFIG
    assert output(script, FUSEDSTEP_NUM_THREADS="3") == ["9,set_num_threads"]


@pytest.mark.parametrize("wrong", [0, -1, 10**9, 10**30])
def test_set_num_threads_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"num_threads: .* from 1 to 1024, got {wrong}"):
        fs.set_num_threads(wrong)


@pytest.mark.parametrize("wrong", [1.5, "2", None])
def test_set_num_threads_of_another_type(wrong):
    with pytest.raises(TypeError, match=f"num_threads: .* integer, got {type(wrong).__name__}"):
        fs.set_num_threads(wrong)


def test_num_threads_is_a_context():
    fs.set_num_threads(3)
    with fs.num_threads(2):
        assert fs.get_num_threads() == 2
    assert fs.get_num_threads() == 3


INVALID = """
import numpy as np, fusedstep as fs

small, large = np.ones(3, np.float32), np.ones(1_000_000)
arrays = [small, large]
pair = [np.ones(3, np.float32), np.ones(3)]
optimizer = fs.Adam(pair)
for attempt in (
    lambda: fs.gd_step(small, small.copy()),
    lambda: fs.gd_step(large, large.copy()),
    lambda: fs.gd_step(arrays, [small.copy(), large.copy()]),
    lambda: optimizer.step([array.copy() for array in pair]),
):
    try:
        attempt()
    except ValueError as error:
        print(error)
assert all((array == 1).all() for array in arrays + pair)
assert not any(np.any(value) for own in optimizer.state.values() for value in own.values())
"""


@pytest.mark.parametrize("value", ["0", "-2", "2.5", "many", "1025", "9" * 30])
def test_invalid_number_in_the_environment(value):
    message = f"FUSEDSTEP_NUM_THREADS: expected an integer from 1 to 1024, got '{value}'"
    assert output(INVALID, FUSEDSTEP_NUM_THREADS=value) == [message] * 4


@pytest.mark.parametrize("value", ["sse9", "AVX2 "])
def test_invalid_instruction_set_in_the_environment(value):
    lines = output(INVALID, FUSEDSTEP_ISA=value)
    assert len(lines) == 4
    for line in lines:
        assert line.startswith(f"FUSEDSTEP_ISA: '{value}' is not an instruction set of this build")
        assert "scalar" in line


TASKS = """
import os
tasks = lambda: len(os.listdir("/proc/self/task"))
import numpy as np
before = tasks()
import fusedstep as fs
imported = tasks()
p = np.ones(1000)
fs.Adam(p).step(p.copy())
small = tasks()
p = np.ones(1_000_000)
fs.gd_step(p, p.copy())
print(imported - before, small - before, tasks() - before)
"""


@linux
def test_no_thread_starts_before_it_is_needed():
    assert output(TASKS, FUSEDSTEP_NUM_THREADS="4") == ["0 0 3"]


# Control groups.


@pytest.fixture
def limit(tmp_path):
    """Return the limit that a fake /proc/self/cgroup and /sys/fs/cgroup give."""

    def limit(membership, files):
        for name, content in files.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        (tmp_path / "membership").write_text(membership)
        return _core.cgroup_cpu_limit(str(tmp_path / "membership"), str(tmp_path / "root"))

    return limit


V2 = "0::/user.slice/job\n"
V1 = "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n"
QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (V2, {"user.slice/job/cpu.max": "400000 100000\n"}, 4),
        (V2, {"user.slice/job/cpu.max": "150000 100000\n"}, 2),
        (V2, {"user.slice/job/cpu.max": "1000 100000\n"}, 1),
        (V2, {"user.slice/job/cpu.max": "max 100000\n"}, 0),
        (V2, {"user.slice/job/cpu.max": "800000 100000\n", "user.slice/cpu.max": "3 1\n"}, 3),
        (V2, {"user.slice/job/cpu.max": "2 1\n", "user.slice/cpu.max": "3 1\n"}, 2),
        (V2, {"user.slice/job/cpu.max": "max 1\n", "user.slice/cpu.max": "max 1\n"}, 0),
        # In a container the path is the host's, and the root is the container's own group.
        ("0::/system.slice/docker-1.scope\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        (V1, {f"cpu,cpuacct/docker/1/{QUOTA}": "8\n", f"cpu,cpuacct/docker/1/{PERIOD}": "4\n"}, 2),
        (V1, {f"cpu/docker/1/{QUOTA}": "500000\n", f"cpu/docker/1/{PERIOD}": "100000\n"}, 5),
        (V1, {f"cpu/docker/1/{QUOTA}": "-1\n", f"cpu/docker/1/{PERIOD}": "100000\n"}, 0),
        (V1, {f"cpu/{QUOTA}": "300000\n", f"cpu/{PERIOD}": "100000\n"}, 3),
        (V1, {f"memory/docker/1/{QUOTA}": "1\n", f"memory/docker/1/{PERIOD}": "1\n"}, 0),
        # The job of another: neither ours nor above us.
        (V2, {"user.slice/other/cpu.max": "1 1\n"}, 0),
        ("garbage\n", {"cpu.max": "1 1\n"}, 0),
        ("", {"cpu.max": "1 1\n"}, 0),
        (V2, {"user.slice/job/cpu.max": "garbage\n"}, 0),
    ],
)
def test_cgroup_limit(limit, membership, files, expected):
    assert limit(membership, files) == expected


def test_no_cgroups(tmp_path):
    assert _core.cgroup_cpu_limit(str(tmp_path / "none"), str(tmp_path)) == 0
