"""Hold the cost model of sharded steps against a job on this machine.

``mpirun -n 2 python -m fusedstep.bench.distributed`` prints what a rank has, sends and takes, as
`fusedstep.distributed.plan` has it and as measured. With the ranks made to talk through a network
interface (MPICH: MPIR_CVAR_NOLOCAL=1 UCX_TLS=tcp) and ``--interface lo``, the bytes sent are those
that the kernel counted there. The seconds of the model are those of its parts, measured alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fusedstep as fs
from fusedstep.distributed import MpiEngine, ShardedOptimizer
from fusedstep.distributed.plan import cost
from fusedstep.distributed.sharded import DEPTH


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fusedstep.bench.distributed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--params", type=float, default=8e6, help="(default: 8e6)")
    parser.add_argument("--steps", type=int, default=15, help="to take the median of (default: 15)")
    parser.add_argument("--bucket-bytes", type=int, default=4 << 20, help="(default: %(default)s)")
    parser.add_argument("--interface", help="network interface whose bytes are counted")
    args = parser.parse_args(argv)

    from mpi4py import MPI

    comm, engine = MPI.COMM_WORLD, MpiEngine()
    count, ranks = int(args.params), engine.size
    param, grad = np.full(count, 0.5, np.float32), np.full(count, 1e-3, np.float32)
    before = resident_bytes()
    optimizer = ShardedOptimizer(fs.Adam, param, engine, bucket_bytes=args.bucket_bytes)
    optimizer.step(grad)
    grown = resident_bytes() - before
    memory = optimizer.memory_bytes()

    sent, counted = None, args.interface and sent_bytes(args.interface)
    for _ in range(args.steps):
        comm.Barrier()
        optimizer.step(grad)
    comm.Barrier()
    if counted:
        sent = (sent_bytes(args.interface) - counted) / args.steps / ranks
    comm.Barrier()

    owned = np.zeros(-(-count // ranks), np.float32)
    whole, own_grad = param.copy(), np.ones_like(owned)
    alone = fs.Adam(owned)
    size = max(1, min(args.bucket_bytes // 4, count) // ranks)
    sent_buffers, gathered = (
        [np.zeros(size * ranks, np.float32) for _ in range(DEPTH)] for _ in range(2)
    )

    def communicate() -> None:
        for b, start in enumerate(range(0, len(owned), size) if ranks > 1 else ()):
            recv = own_grad[start : start + size]
            send = sent_buffers[b % DEPTH][: len(recv) * ranks]
            engine.reduce_scatter(send, recv).wait()
            engine.all_gather(gathered[b % DEPTH][: len(send)]).wait()

    def update() -> None:
        if ranks > 1:
            np.copyto(whole, grad)
            np.divide(own_grad, np.float32(1), out=own_grad)
            np.copyto(whole, param)
        alone.step(own_grad)

    seconds = [median_seconds(comm, f, args.steps) for f in (
        lambda: optimizer.step(grad), communicate, update,
    )]  # fmt: skip
    slowest = np.zeros(len(seconds))
    comm.Allreduce(np.array(seconds), slowest, op=MPI.MAX)
    predicted = cost(count, ranks, bucket_bytes=args.bucket_bytes)
    if engine.rank == 0:
        print(f"\n{count:,} float32 parameters, Adam, {ranks} ranks\n")
        print("| of rank 0 | model | measured |\n|---|--:|--:|")
        for key in ("state", "grad_slice", "buffers"):
            print(f"| {key}, MB | {getattr(predicted, key) / 1e6:.2f} | {memory[key] / 1e6:.2f} |")
        arrays = predicted.state + predicted.grad_slice + predicted.buffers
        print(f"| growth of the process, MB | {arrays / 1e6:.1f} | {grown / 1e6:.1f} |")
        if sent is not None:
            print(f"| sent per step, MB | {predicted.wire / 1e6:.2f} | {sent / 1e6:.2f} |")
        step, wire, update_alone = (1e3 * s for s in slowest)
        low, high = max(wire, update_alone), wire + update_alone
        print(f"| step, ms | {low:.1f} to {high:.1f} | {step:.1f} |")


def median_seconds(comm: object, function: Callable[[], object], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        comm.Barrier()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def sent_bytes(interface: str) -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == interface:
            return int(fields.split()[8])
    raise SystemExit(f"--interface: no network interface {interface!r}")


if __name__ == "__main__":
    main()
