"""Jobs under mpirun: the same bits, checkpoints that survive kills, and no rank left waiting."""

import os
import random
import time
from pathlib import Path

import pytest

pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install mpi4py mpich")
pytest.importorskip("safetensors")

import mpi_launcher
from mpi_data import arrays, assert_equal, unbroken

import fusedstep as fs
from fusedstep.distributed import ShardedOptimizer

SCRIPT = str(Path(__file__).with_name("mpi_job.py"))


def run(ranks, *arguments, **environment):
    return mpi_launcher.run(ranks, SCRIPT, *arguments, **environment).strip()


def test_any_number_of_ranks_gives_the_bits_of_the_ordinary_optimizer():
    assert len({run(ranks, "bits") for ranks in (1, 2, 3, 4)}) == 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_mean_over_the_ranks(ranks):
    assert run(ranks, "mean") == "ok"


def test_state_per_rank_falls_as_one_over_the_number_of_ranks():
    assert [int(run(ranks, "memory")) for ranks in (1, 2, 4)] == [8 << 20, 4 << 20, 2 << 20]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("params", r"rank 0 has params['w']: float64, shape (10,)"),
        ("version", "rank 0 has fusedstep 0.0.2, rank 2 has fusedstep 0.0.1"),
    ],
)
def test_ranks_that_differ_all_say_so(what, text):
    assert text in run(3, "different", what)


def test_more_optimizers_than_there_are_communicators():
    assert run(2, "many") == "made"


def test_resuming_on_two_then_three_ranks_then_one(tmp_path):
    for ranks, until in ((2, 2), (3, 4), (1, 6)):
        assert f"loaded {until - 2}\n" in run(ranks, "train", tmp_path, until) + "\n"


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_spares_the_last_checkpoint(tmp_path):
    assert "File too large" in run(2, "full_disk", tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-000001"]


def test_a_missing_shard_is_an_error_on_all_ranks(tmp_path):
    run(2, "train", tmp_path, 1)
    os.unlink(tmp_path / "checkpoint-000001" / "rank-00001-of-00002.safetensors")
    assert "rank-00001-of-00002.safetensors is missing" in run(3, "missing_shard", tmp_path)


def loaded_here(folder):
    """Load in this process; return the step and check its parameters against the unbroken run."""
    params = arrays(9)
    loaded = ShardedOptimizer(fs.AdamW, params).load(folder)
    step = loaded.extra["step"] if loaded else 0
    if step:
        assert_equal(params, unbroken(step))
    return step


@pytest.mark.parametrize("victims", ["all", "one rank"])
def test_a_kill_at_any_moment_leaves_the_newest_complete_checkpoint(tmp_path, victims):
    seed = random.randrange(1 << 32)
    print("seed of the moments:", seed)
    rng = random.Random(seed)
    total, step = 100_000, 0
    for ranks in (2, 3, 1, 2):
        with mpi_launcher.Job(ranks, SCRIPT, "train", tmp_path, total) as job:
            assert job.process.stdout.readline() == f"loaded {step}\n"
            assert job.process.stdout.readline() == f"saved {step + 1}\n"
            time.sleep(rng.uniform(0, 0.3))
            pids = job.pids(SCRIPT)
            assert len(pids) == ranks
            job.kill(pids if victims == "all" else [rng.choice(pids)])
            status, out, _ = job.finish(timeout=30)
            assert status != 0
        announced = [
            step + 1,
            *(int(line.split()[1]) for line in out.splitlines() if "saved" in line),
        ]
        step = loaded_here(tmp_path)
        # The save that was under way may have been complete but for its message.
        assert step in (announced[-1], announced[-1] + 1)
    assert "trained" in run(2, "train", tmp_path, step + 2)


@pytest.mark.parametrize(
    ("how", "started", "limit"),
    [
        ("killed", (), 10),
        ("stopped", (), 2 + 10),
        ("raised", (), 2 + 10),
        ("raised at the start", (), 2 + 10),
        ("raised", ("-m", "mpi4py"), 10),
    ],
)
def test_a_lost_rank_ends_the_job(how, started, limit):
    with mpi_launcher.Job(3, *started, SCRIPT, "lose_a_rank", how) as job:
        lost = float(job.process.stdout.readline())
        status, _, err = job.finish(timeout=60)
        assert status != 0
        assert time.time() - lost < limit
    if how == "stopped" or (how.startswith("raised") and not started):
        assert "has waited 2 s for the others in" in err
        assert "resume it from its newest checkpoint" in err


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_that_is_none(timeout):
    code = (
        "import numpy as np\nfrom fusedstep.distributed import MpiEngine\n"
        f"MpiEngine(timeout=float('{timeout}'))"
    )
    with mpi_launcher.Job(1, "-c", code) as job:
        status, _, err = job.finish()
    assert status != 0
    assert "timeout: expected a number of seconds > 0" in err
