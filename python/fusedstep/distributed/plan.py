"""What a sharded step costs each rank, before it is run: memory, bytes on the wire, time.

``python -m fusedstep.distributed.plan`` prints the table; docs/sharding.md derives it.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from .layout import CHUNK
from .sharded import BUCKET_BYTES, DEPTH

# State arrays of each optimizer, each as large as the parameters.
STATE_ARRAYS = {"gd": 0, "momentum": 1, "adam": 2, "adamw": 2, "amsgrad": 3}


class Cost(NamedTuple):
    """What one rank has and does; bytes, and seconds for each step.

    Attributes
    ----------
    params, grads : int
        The whole parameters, and this rank's gradients of all of them.
    state, grad_slice : int
        The state of this rank's slice, and its reduced gradients (largest rank).
    buffers : int
        Buckets under way.
    wire : int
        Sent by a rank in each step (and received).
    traffic : int
        Read from and written to memory in each step.
    wire_seconds, memory_seconds : float
        What these two take by themselves.
    """

    params: int
    grads: int
    state: int
    grad_slice: int
    buffers: int
    wire: int
    traffic: int
    wire_seconds: float
    memory_seconds: float

    @property
    def memory(self) -> int:
        return self.params + self.grads + self.state + self.grad_slice + self.buffers


def cost(
    params: int,
    ranks: int,
    *,
    optimizer: str = "adam",
    itemsize: int = 4,
    bucket_bytes: int = BUCKET_BYTES,
    bandwidth: float = 25e9,
    memory_bandwidth: float = 200e9,
) -> Cost:
    """Return what a step costs a rank.

    Parameters
    ----------
    params : int
        Number of parameters.
    ranks : int
        Number of ranks.
    optimizer : str
        A key of `STATE_ARRAYS`.
    itemsize : int
        Bytes of a parameter: 4 or 8.
    bucket_bytes : int
        As in `ShardedOptimizer`.
    bandwidth, memory_bandwidth : float
        Of a rank's link in each direction, and of its memory; bytes per second.
    """
    arrays = STATE_ARRAYS[optimizer]
    size = params * itemsize
    if ranks == 1:
        return Cost(
            size, size, arrays * size, 0, 0, 0, _update(arrays) * size, 0.0,
            _update(arrays) * size / memory_bandwidth,
        )  # fmt: skip
    grain = ranks * CHUNK * itemsize
    bucket = max(1, bucket_bytes // grain) * grain
    padded = -(-size // grain) * grain
    owned = padded // ranks
    # Each rank sends all slices but its own, twice: to be reduced, and once they are updated.
    wire = 2 * (padded - owned)
    # Gradients are copied into buckets and parameters out of them; the slice is divided for the
    # mean, stepped, and copied into its bucket.
    traffic = 4 * size + (2 + _update(arrays) + 2) * owned
    return Cost(
        size, size, arrays * owned, owned, 2 * DEPTH * min(bucket, padded), wire, traffic,
        wire / bandwidth, traffic / memory_bandwidth,
    )  # fmt: skip


def _update(arrays: int) -> int:
    """How many times a step of the ordinary optimizer reads or writes an array."""
    return 3 + 2 * arrays


def table(costs: dict[int, Cost]) -> str:
    """Return the costs by number of ranks, as the rows of a Markdown table."""
    lines = [
        "| ranks | parameters | gradients | state | slice of gradients | buffers | all memory "
        "| sent per step | network | memory | step |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for ranks, c in costs.items():
        memory = (c.params, c.grads, c.state, c.grad_slice, c.buffers, c.memory, c.wire)
        low, high = max(c.wire_seconds, c.memory_seconds), c.wire_seconds + c.memory_seconds
        step = _seconds(low) if low == high else f"{_seconds(low)} to {_seconds(high)}"
        cells = [*map(_bytes, memory), _seconds(c.wire_seconds), _seconds(c.memory_seconds), step]
        lines.append(f"| {ranks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 999.5 * size
                else f"{count / size:.0f} {unit}"
            )
    return f"{count:.0f} B"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _number(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return number


def _count(text: str) -> int:
    number = _number(text)
    if number != int(number):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text}")
    return int(number)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fusedstep.distributed.plan", description=__doc__
    )
    add = parser.add_argument
    add("--params", type=_count, default=10**9, help="number of parameters (default: 1e9)")
    add("--ranks", type=_count, nargs="+", default=[1, 2, 4, 8, 16, 64], help="(default: 1 to 64)")
    add("--optimizer", choices=STATE_ARRAYS, default="adam", help="(default: adam)")
    add("--dtype", choices=["float32", "float64"], default="float32", help="(default: float32)")
    add("--bucket-bytes", type=_count, default=BUCKET_BYTES, help="(default: %(default)s)")
    add("--bandwidth", type=_number, default=25e9,
        help="of a rank's link in each direction, bytes/s (default: 25e9)")  # fmt: skip
    add("--memory-bandwidth", type=_number, default=200e9,
        help="of a rank's memory, bytes/s (default: 200e9)")  # fmt: skip
    args = parser.parse_args(argv)
    costs = {
        ranks: cost(
            args.params,
            ranks,
            optimizer=args.optimizer,
            itemsize=4 if args.dtype == "float32" else 8,
            bucket_bytes=args.bucket_bytes,
            bandwidth=args.bandwidth,
            memory_bandwidth=args.memory_bandwidth,
        )
        for ranks in args.ranks
    }
    print(table(costs))


if __name__ == "__main__":
    main()
