"""What the ranks of the jobs in test_distributed_mpi.py do: ``mpi_job.py case arguments``."""

import os
import resource
import signal
import sys
import time

import numpy as np
from mpi4py import MPI
from mpi_data import arrays, assert_equal, unbroken

import fusedstep as fs
from fusedstep.distributed import MpiEngine, ShardedOptimizer

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()


def shares(seed):
    """Return gradients of which each element is of one rank, so that any sum of them is exact."""
    return {
        name: np.where(np.arange(a.size) % SIZE == RANK, a, np.zeros_like(a))
        for name, a in arrays(seed).items()
    }


def made(comm=COMM, seed=0, **options):
    params = arrays(seed)
    options = {"reduction": "sum", "bucket_bytes": 1 << 14, "lr": 0.01, **options}
    return params, ShardedOptimizer(fs.AdamW, params, comm, **options)


def bits():
    params, optimizer = made()
    for t in range(1, 6):
        optimizer.step(shares(t))
    assert_equal(params, unbroken(5))
    info = optimizer.step(shares(6), clip_norm=1.0)
    infos = COMM.allgather((info, [p.tobytes() for p in params.values()]))
    assert all(other == infos[0] for other in infos)
    report(repr(info.grad_norm))


def mean():
    param = np.ones(1000, np.float32)
    optimizer = ShardedOptimizer(fs.GD, param, COMM, lr=1.0)
    optimizer.step(np.full(1000, RANK, np.float32))
    assert (param == 1 - sum(range(SIZE)) / SIZE).all()
    report("ok")


def memory():
    count = 1 << 20
    optimizer = ShardedOptimizer(fs.Adam, np.zeros(count, np.float32), COMM)
    optimizer.step(np.ones(count, np.float32))
    report(max(COMM.allgather(optimizer.memory_bytes()["state"])))


def train(folder, until):
    """Train and save after every step, from where an earlier job came to."""
    params, optimizer = made()
    loaded = optimizer.load(folder)
    first = loaded.extra["step"] if loaded else 0
    report(f"loaded {first}")
    for t in range(first + 1, int(until) + 1):
        optimizer.step(shares(t))
        optimizer.save(folder, extra={"step": t})
        report(f"saved {t}")
    assert_equal(params, unbroken(int(until)))
    report("trained")


def full_disk(folder):
    params, optimizer = made()
    optimizer.step(shares(1))
    optimizer.save(folder, extra=1)
    optimizer.step(shares(2))
    if RANK == SIZE - 1:  # its "disk" is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        optimizer.save(folder, extra=2)
    except OSError as error:
        text = str(error)
    if RANK == SIZE - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    texts = COMM.allgather(text)
    assert texts == [texts[0]] * SIZE
    report(text)
    assert_equal(params, unbroken(2))
    assert optimizer.load(folder).extra == 1
    assert_equal(params, unbroken(1))


def different(what):
    """Make optimizers that differ on the last rank; all must raise the same error."""
    last = RANK == SIZE - 1
    if what == "params":
        arguments = {"params": {"w": np.ones(9 if last else 10)}}
    elif what == "version":
        arguments = {"params": np.ones(3)}
        fs.distributed.sharded.__version__ = "0.0.1" if last else "0.0.2"
    try:
        ShardedOptimizer(fs.Adam, comm=COMM, **arguments)
    except ValueError as error:
        text = str(error)
    texts = COMM.allgather(text)
    assert texts == [texts[0]] * SIZE
    report(text)


def missing_shard(folder):
    params, optimizer = made(seed=9)
    try:
        optimizer.load(folder)
    except ValueError as error:
        text = str(error)
    texts = COMM.allgather(text)
    assert texts == [texts[0]] * SIZE
    assert_equal(params, arrays(9))
    report(text)


def many():
    """Make more optimizers than MPI has communicators."""
    param = np.ones(3)
    for _ in range(2500):
        ShardedOptimizer(fs.GD, param, COMM)
    report("made")


def lose_a_rank(how):
    """Lose the last rank, by default in the middle of training; the others must not hang."""
    COMM.Barrier()  # MPI itself ends a job that loses a rank before all have started
    if how == "raised at the start" and RANK == SIZE - 1:
        report(time.time(), rank=RANK)
        raise ArithmeticError("a bug of the user")
    _, optimizer = made(MpiEngine(COMM, timeout=2.0))
    for t in range(1, 1_000_000):
        if t == 10 and RANK == SIZE - 1:
            report(time.time(), rank=RANK)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "raised":
                raise ArithmeticError("a bug of the user")
        optimizer.step(shares(1))


def report(text, rank=0):
    if rank == RANK:
        print(text, flush=True)


CASES = {
    f.__name__: f
    for f in (
        bits, mean, memory, train, full_disk, different, missing_shard, many, lose_a_rank,
    )
}  # fmt: skip

if __name__ == "__main__":
    CASES[sys.argv[1]](*sys.argv[2:])
