"""The CUDA kernels' source, compiled for the host, against the CPU backend: the same bits."""

from typing import Any

import numpy as np
import pytest
from fake_gpu import CupyArray

import fusedstep as fs

pytest_plugins = ["cuda_on_host"]

ADAM = ("exp_avg", "exp_avg_sq")
RULES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "gd": ("gd_step", (), {"weight_decay": 0.01}),
    "momentum": ("gd_step", ("momentum_buffer",), {"momentum": 0.9, "dampening": 0.1}),
    "nesterov": ("gd_step", ("momentum_buffer",), {"momentum": 0.9, "nesterov": True}),
    "adam": ("adam_step", ADAM, {"weight_decay": 0.01, "grad_scale": 0.3}),
    "adamw": ("adamw_step", ADAM, {"maximize": True}),
    "amsgrad": ("adam_step", (*ADAM, "max_exp_avg_sq"), {"bias_correction": False}),
}


def both(rule: str, arrays: dict[str, list[np.ndarray]], views: Any, **options: Any) -> None:
    """Step copies of `arrays` on both backends, through `views` of them; compare all memory."""
    function, _, fixed = RULES[rule]
    results = []
    for wrap in (lambda array: array, CupyArray):
        memory = {name: [a.copy() for a in owned] for name, owned in arrays.items()}
        arguments = {
            name: [wrap(view(a)) for a, view in zip(owned, views[name], strict=True)]
            for name, owned in memory.items()
        }
        getattr(fs, function)(**arguments, **fixed, **options)
        results.append(memory)
    for name, owned in results[0].items():
        for i, (cpu, cuda) in enumerate(zip(owned, results[1][name], strict=True)):
            assert cpu.tobytes() == cuda.tobytes(), f"{rule}: {name}[{i}]"


def aligned(rng: np.random.Generator, size: int, dtype: Any) -> np.ndarray:
    """Return random numbers of many magnitudes, specials among them, on a 64-byte boundary."""
    memory = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    array = memory[offset : offset + size * np.dtype(dtype).itemsize].view(dtype)
    array[:] = rng.standard_normal(size) * 10.0 ** rng.uniform(-44, 10, size)
    array[rng.random(size) < 0.01] = rng.choice([0.0, -0.0, np.inf])
    return array


def random_job(rng: np.random.Generator, rule: str, dtype: Any, count: int, longest: int) -> Any:
    _, state, _ = RULES[rule]
    names = ("params", "grads", *state)
    sizes = rng.integers(0, longest + 1, count)
    margin = 8  # elements around each view that nothing may write
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in names}
    views: dict[str, list[Any]] = {name: [] for name in names}
    for size in sizes:
        kind = rng.choice(["same", "different", "strided"], p=[0.6, 0.2, 0.2])
        common = int(rng.integers(0, margin))
        for name in names:
            offset = int(rng.integers(0, margin)) if kind == "different" else common
            step = int(rng.choice([-2, -1, 1, 2, 3])) if kind == "strided" else 1
            rows = 3 if kind == "strided" and size % 3 == 0 else 1
            span = int(size) * abs(step) + 2 * margin
            array = aligned(rng, span, dtype)
            if name.endswith("_sq"):
                np.abs(array, out=array)
            arrays[name].append(array)

            def view(a, offset=offset, size=int(size), step=step, rows=rows):
                return a[offset : offset + size * abs(step)][::step].reshape(rows, -1)

            views[name].append(view)
    return arrays, views


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", RULES)
def test_random_jobs_have_the_bits_of_the_cpu(rule, dtype, gpu):
    rng = np.random.default_rng(7)
    with np.errstate(all="ignore"):
        for _ in range(150):
            gpu.set_most_blocks(int(rng.integers(1, 6)))
            count = int(rng.integers(1, 12))
            longest = int(rng.choice([3, 70, 700]))
            arrays, views = random_job(rng, rule, dtype, count, longest)
            steps = [int(step) for step in rng.choice([1, 2, 1000], count)]
            step = steps if rng.random() < 0.5 else steps[0]
            both(rule, arrays, views, **({"step": step} if RULES[rule][1] else {}))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("blocks", [1, 2, 100])
def test_long_tensors_cross_chunks(blocks, offset, dtype, gpu):
    rng = np.random.default_rng(offset)
    gpu.set_most_blocks(blocks)
    chunk = 16384 // np.dtype(dtype).itemsize
    sizes = [
        n for k in (1, 2, 3) for n in (k * chunk - offset - 1, k * chunk - offset, k * chunk + 1)
    ]
    arrays = {
        name: [np.abs(aligned(rng, size + offset, dtype)) for size in sizes]
        for name in ("params", "grads", *ADAM)
    }
    views = {name: [lambda a: a[offset:]] * len(sizes) for name in arrays}
    both("adam", arrays, views, step=3)


def test_strided_tensors_of_several_dimensions(gpu):
    rng = np.random.default_rng(0)
    arrays = {name: [aligned(rng, 9 * 10 * 11 * 12, np.float32)] for name in ("params", "grads")}
    ways = [
        lambda a: a.reshape(9, 10, 11, 12)[::2, 1:, ::-1, ::3],
        lambda a: a[: 5 * 9 * 11 * 4].reshape(4, 11, 9, 5).T,
    ]
    both("gd", arrays, dict(zip(arrays, [[way] for way in ways], strict=True)))
    both("gd", arrays, dict(zip(arrays, [[way] for way in reversed(ways)], strict=True)))


@pytest.mark.parametrize(
    ("count", "own_steps", "launches", "small"),
    [
        (1, False, 1, 1),
        (148, False, 1, 1),
        (166, False, 1, 1),
        (167, False, 1, 0),
        (1000, False, 1, 0),
        (1361, False, 1, 0),
        (1362, False, 2, 1),
        (5000, False, 4, 0),
        (1000, True, 4, 0),
    ],
)
def test_a_list_is_split_into_few_launches(count, own_steps, launches, small, gpu):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 70, count)
    arrays = {
        name: [np.abs(aligned(rng, size, np.float32)) for size in sizes]
        for name in ("params", "grads", *ADAM)
    }
    views = {name: [lambda a: a] * count for name in arrays}
    before = gpu.launch_count(), gpu.small_launch_count()
    both("adam", arrays, views, step=list(range(1, count + 1)) if own_steps else 5)
    assert gpu.launch_count() - before[0] == launches
    assert gpu.small_launch_count() - before[1] == small


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", RULES)
def test_a_thousand_tensors_are_one_launch_of_every_rule(rule, dtype, gpu):
    rng = np.random.default_rng(0)
    names = ("params", "grads", *RULES[rule][1])
    arrays = {name: [np.abs(aligned(rng, 5, dtype)) for _ in range(1000)] for name in names}
    views = {name: [lambda a: a] * 1000 for name in names}
    before = gpu.launch_count()
    both(rule, arrays, views, **({"step": 5} if RULES[rule][1] else {}))
    assert gpu.launch_count() - before == 1


def test_empty_tensors_launch_nothing(gpu):
    before = gpu.launch_count()
    fs.gd_step([CupyArray(np.empty(0))], [CupyArray(np.empty(0))])
    assert gpu.launch_count() == before
