"""examples/data_parallel_digits.py: it learns, and resumes after a kill as if nothing had been."""

import re
from pathlib import Path

import pytest

pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install mpi4py mpich")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install scikit-learn")
pytest.importorskip("safetensors")

import mpi_launcher

SCRIPT = str(Path(__file__).parents[1] / "examples" / "data_parallel_digits.py")


def arguments(folder, epochs=8):
    return "-m", "mpi4py", SCRIPT, "--epochs", epochs, "--folder", folder


def test_a_killed_training_resumes_as_if_unbroken(tmp_path):
    unbroken = mpi_launcher.run(2, *arguments(tmp_path / "unbroken")).splitlines()
    accuracy = float(re.match(r"([\d.]+)% of the test digits", unbroken[-1])[1])
    assert accuracy > 95

    folder = tmp_path / "killed"
    with mpi_launcher.Job(2, *arguments(folder)) as job:
        for _ in range(3):
            assert job.process.stdout.readline().startswith("epoch ")
        job.kill(job.pids(SCRIPT))
        assert job.finish()[0] != 0
    resumed = mpi_launcher.run(2, *arguments(folder)).splitlines()
    assert resumed[0].startswith(f"resumed from {folder}/checkpoint-00000")
    assert 1 <= len(resumed) - 2 <= 5
    assert resumed[-1] == unbroken[-1]
    # With what is there already, another number of processes has nothing left to do.
    assert mpi_launcher.run(3, *arguments(folder)).splitlines()[1:] == [unbroken[-1]]
