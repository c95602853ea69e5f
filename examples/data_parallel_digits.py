"""Learn handwritten digits on several processes; kill it at any time, and it goes on from there.

    pip install '.[demo,mpi]' mpich
    mpirun -n 2 python -m mpi4py examples/data_parallel_digits.py

Each process learns from its share of every batch and keeps its share of Adam's state. Started
again, also with another number of processes, it resumes from its newest complete checkpoint.
"""

import argparse
import zlib

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

import fusedstep as fs
from fusedstep.commands import digits
from fusedstep.distributed import ShardedOptimizer

BATCH_SIZE = 64


def train(epochs: int, folder: str) -> None:
    comm = MPI.COMM_WORLD
    data = digits.load_digits()
    params = digits.init_params(np.random.default_rng(0))
    batches = -(-len(data.train_labels) // BATCH_SIZE)
    # The gradients below are each process's share of the mean over a batch, so they are added up.
    optimizer = ShardedOptimizer(
        fs.Adam,
        params,
        comm,
        reduction="sum",
        lr=lambda t: 2e-3 * (1 - (t - 1) / (epochs * batches)),
    )
    loaded = optimizer.load(folder)
    first = loaded.extra["epoch"] + 1 if loaded else 1
    if loaded and comm.rank == 0:
        print(f"resumed from {loaded.path}", flush=True)

    for epoch in range(first, epochs + 1):
        # The order of an epoch depends on nothing but its number: a resumed run has the same.
        order = np.random.default_rng(epoch).permutation(len(data.train_labels))
        losses = []
        for batch in np.array_split(order, batches):
            share = np.array_split(batch, comm.size)[comm.rank]
            loss, grads = digits.loss_and_grads(
                params, data.train_images[share], data.train_labels[share]
            )
            weight = np.float32(len(share) / len(batch))
            optimizer.step({name: weight * grad for name, grad in grads.items()}, clip_norm=1.0)
            losses.append(weight * loss)
        optimizer.save(folder, extra={"epoch": epoch})
        loss = comm.allreduce(float(np.mean(losses)))
        if comm.rank == 0:
            accuracy = digits.accuracy(params, data.test_images, data.test_labels)
            print(f"epoch {epoch:2}  loss {loss:.4f}  test {accuracy:.1%}", flush=True)
    if comm.rank == 0:
        accuracy = digits.accuracy(params, data.test_images, data.test_labels)
        checksum = zlib.crc32(b"".join(param.tobytes() for param in params.values()))
        print(f"{accuracy:.1%} of the test digits read; checksum of the weights {checksum:08x}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--folder", default="digits-checkpoints", help="(default: %(default)s)")
    arguments = parser.parse_args()
    with threadpool_limits(1):  # the processes share the cores
        train(arguments.epochs, arguments.folder)
