"""The examples: each runs as a user runs it, and what its docstring says of the outcome holds."""

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name, *arguments, warnings="error"):
    """Run an example to the end; return what it printed."""
    command = [sys.executable, "-W", warnings, EXAMPLES / name, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def results(name, tmp_path, *arguments):
    """Run an example that draws; return what it printed for machines."""
    for module in ("matplotlib", "rich", "sklearn", "threadpoolctl"):
        pytest.importorskip(module)
    path = tmp_path / "new" / "picture.png"
    printed = run(name, "--json", "--output", path, *arguments)
    picture = path.read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    return json.loads(printed)


def test_quickstart_finds_amplitude_damping_and_frequency():
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d*", run("quickstart.py"))]
    np.testing.assert_allclose(numbers, [2.0, 0.3, 1.7], rtol=0.05)


def test_a_student_learns_more_from_a_teacher_than_from_labels(tmp_path):
    found = results("distill.py", tmp_path, "--quick", "--seeds", "8")
    assert found["images"] == [135]
    students = {source: np.array(found["students"][source])[:, 0] for source in found["students"]}
    teachers = np.array(found["teachers"])
    assert len(teachers) == len(students["teacher"]) == 8
    assert teachers.min() > 96
    for source in ("labels", "smoothed labels"):
        gains = students["teacher"] - students[source]
        assert gains.mean() > 2
        assert gains.mean() > 3 * gains.std(ddof=1) / np.sqrt(len(gains))
        # A student that learned nothing would be easy to better.
        assert students[source].min() > 80


def test_a_warmup_and_a_decay_end_lower_than_the_best_constant_rate(tmp_path):
    found = results("schedules.py", tmp_path, "--quick", "--seeds", "5")
    assert found["peaks"] == [0.01, 0.1]
    small, large = {}, {}
    for name, losses in found["losses"].items():
        assert np.shape(losses) == (2, 5)
        small[name], large[name] = np.median(losses, axis=1)
    assert len(small) == 5
    assert min(small, key=small.get) == "constant"
    assert large["constant"] > 2 * small["constant"]
    for name in ("warm-up + cosine", "warm-up + inverse root"):
        assert large[name] < small["constant"] / 2
    assert large["warm-up + cosine"] < large["cosine"] / 2


def test_deblurring_gains_5_db(tmp_path):
    found = results("deblur.py", tmp_path)
    assert found["psnr_before"] == pytest.approx(20.2, abs=0.1)
    assert found["psnr_after"] > found["psnr_before"] + 5
    losses = found["losses"]
    assert losses[-1] < losses[0] / 4
    assert losses[-1] > 0.999 * losses[-20]  # converged


def test_the_gradient_of_deblurring_agrees_with_finite_differences():
    example = runpy.run_path(str(EXAMPLES / "deblur.py"))
    rng = np.random.default_rng(0)
    blur = example["Blur"](48, np)
    blur.transform = blur.transform.astype(np.float64)
    scene, direction = rng.random((2, 48, 48, 3))
    seen = rng.random((16, 16, 3))
    _, grad = example["loss_and_grad"](scene, seen, blur, np)
    h = 1e-6
    above, below = (
        example["loss_and_grad"](scene + s * direction, seen, blur, np)[0] for s in (h, -h)
    )
    assert (above - below) / (2 * h) == pytest.approx(float((grad * direction).sum()), rel=1e-6)


@pytest.mark.gpu
def test_deblurring_on_a_gpu_gains_the_same(tmp_path):
    pytest.importorskip("fusedstep._cuda", reason="this build has no CUDA backend")
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    on_cpu, on_gpu = (results("deblur.py", tmp_path, *arguments) for arguments in ((), ("--cupy",)))
    assert on_gpu["psnr_after"] == pytest.approx(on_cpu["psnr_after"], abs=0.05)


def test_a_transformer_learns_the_same_with_either_optimizer():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    found = json.loads(run("torch_transformer.py", "--quick", "--json"))
    theirs, ours, narrow = found.values()
    assert theirs["loss"] < 3.5  # 4.8 at the start
    assert abs(ours["loss"] - theirs["loss"]) < 0.01
    assert abs(narrow["loss"] - theirs["loss"]) < 0.1
    assert ours["state_bytes"] == theirs["state_bytes"]
    assert narrow["state_bytes"] < 0.3 * theirs["state_bytes"]


@pytest.mark.parametrize(
    ("name", "needed", "warnings"),
    [
        ("torch_trainer.py", ("transformers", "accelerate"), "error"),
        # Lightning itself uses what PyTorch warns of.
        ("torch_lightning.py", ("lightning",), "default"),
    ],
)
def test_trainers_learn_the_same_with_either_optimizer(name, needed, warnings):
    for package in needed:
        if importlib.util.find_spec(package) is None:  # they take seconds to import
            pytest.skip(f"{package} is not installed: pip install '.[torch-examples]'")
    theirs, ours = json.loads(run(name, "--quick", "--json", warnings=warnings)).values()
    assert theirs < 3.2  # 4.6 at the start
    assert abs(ours - theirs) < 0.001
