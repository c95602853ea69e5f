"""The engine on torch.distributed: two processes with gloo."""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")

PROLOGUE = """
import datetime, os, signal, sys
import numpy as np, torch, torch.distributed as dist
import fusedstep as fs
from fusedstep.distributed import ShardedOptimizer, TorchEngine

rank = int(sys.argv[1])
dist.init_process_group(
    "gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2,
    timeout=datetime.timedelta(seconds=20),
)
"""


def run_ranks(tmp_path, code):
    """Run `code` on both ranks; return exit status and stderr of each."""
    script = tmp_path / "job.py"
    script.write_text(PROLOGUE + textwrap.dedent(code))
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", script, str(rank), str(tmp_path / "rendezvous")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return [(p.communicate(timeout=100)[1], p.returncode) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_two_processes_give_the_bits_of_the_ordinary_optimizer(tmp_path):
    results = run_ranks(
        tmp_path,
        """
        def weights(seed):
            rng = np.random.default_rng(seed)
            return [rng.standard_normal((300, 7), dtype=np.float32), rng.standard_normal(999)]

        expected = weights(0)
        plain = fs.AdamW(expected)
        params = [torch.nn.Parameter(torch.from_numpy(w)) for w in weights(0)]
        optimizer = ShardedOptimizer(
            fs.AdamW, params, TorchEngine(), reduction="sum", bucket_bytes=2048
        )
        for t in range(1, 6):
            grads = weights(t)
            plain.step(grads)
            for param, grad in zip(params, grads):
                mine = np.arange(grad.size).reshape(grad.shape) % 2 == rank
                param.grad = torch.from_numpy(np.where(mine, grad, np.zeros_like(grad)))
            optimizer.step([param.grad for param in params])
        for param, other in zip(params, expected):
            assert param.detach().numpy().tobytes() == other.tobytes()

        mean = ShardedOptimizer(fs.GD, one := np.ones(300), TorchEngine(), lr=1.0)
        mean.step(np.full(300, float(rank)), skip_nonfinite=True)
        assert (one == 0.5).all()

        # Bad input on one rank is an error on both.
        try:
            optimizer.step([param.grad for param in params][: 2 - rank])
        except ValueError as error:
            assert str(error) == "rank 1: grads: 1 gradients, but there are 2 parameters"
        else:
            raise AssertionError("no error")
        dist.destroy_process_group()
        """,
    )
    assert results == [("", 0)] * 2


def test_a_rank_that_dies_is_an_error_in_the_other(tmp_path):
    (error, status), (_, other) = run_ranks(
        tmp_path,
        """
        param = np.ones(100_000, np.float32)
        optimizer = ShardedOptimizer(fs.GD, param, TorchEngine())
        for t in range(1_000_000):
            if t == 5 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step(np.ones_like(param))
        """,
    )
    assert other == -9
    assert status != 0  # gloo's threads sometimes abort the process that ends with the exception
    assert "RuntimeError" in error or "DistBackendError" in error


def test_without_a_process_group():
    from fusedstep.distributed import TorchEngine

    with pytest.raises(RuntimeError, match="init_process_group first"):
        TorchEngine()
