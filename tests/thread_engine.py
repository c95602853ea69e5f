"""An engine whose ranks are threads of this process, and which adds in float64, in rank order."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

TIMEOUT = 60


class Stopped(Exception):
    """Another rank has raised an error, or a rank has not taken part."""


class _Job:
    """The operations of all ranks, by their numbers."""

    def __init__(self, size):
        self.size = size
        self.condition = threading.Condition()
        self.sent = {}  # number of the operation: what each rank has sent so far, by rank
        self.stopped = False

    def send(self, number, rank, operation, data):
        with self.condition:
            self.sent.setdefault(number, {})[rank] = operation, data
            self.condition.notify_all()

    def receive(self, number):
        def all_there():
            return self.stopped or len(self.sent[number]) == self.size

        with self.condition:
            if not self.condition.wait_for(all_there, TIMEOUT) or self.stopped:
                raise Stopped
            by_rank = [self.sent[number][rank] for rank in range(self.size)]
        operations = {operation for operation, _ in by_rank}
        assert len(operations) == 1, f"the ranks are in different operations: {operations}"
        return [data for _, data in by_rank]

    def stop(self):
        with self.condition:
            self.stopped = True
            self.condition.notify_all()


class _Request:
    """Does its work where it is waited for, so that what is read before is not there."""

    def __init__(self, engine, number, buffer, work):
        self._engine = engine
        self._number = number
        self._buffer = buffer
        self._before = buffer.tobytes()
        self._work = work

    def wait(self):
        assert self._buffer.tobytes() == self._before, "a buffer was written while under way"
        self._work(self._engine._job.receive(self._number))


class ThreadEngine:
    """One rank; it keeps count of the bytes that it sends if each goes to a rank just once."""

    def __init__(self, job, rank):
        self._job = job
        self.rank = rank
        self.size = job.size
        self.sent_bytes = 0
        self._number = 0

    def reduce_scatter(self, send, recv):
        assert send.size == recv.size * self.size
        self.sent_bytes += recv.nbytes * (self.size - 1)
        part = slice(self.rank * recv.size, (self.rank + 1) * recv.size)

        def work(arrays):
            recv[...] = sum(array[part].astype(np.float64) for array in arrays)

        return self._started("reduce_scatter", send, send.copy(), work)

    def all_gather(self, buffer):
        assert buffer.size % self.size == 0
        size = buffer.size // self.size
        self.sent_bytes += size * buffer.itemsize * (self.size - 1)

        def work(arrays):
            buffer[...] = np.concatenate(arrays)

        own = buffer[self.rank * size : (self.rank + 1) * size]
        return self._started("all_gather", buffer, own.copy(), work)

    def all_reduce(self, buffer):
        def work(arrays):
            buffer[...] = sum(arrays[1:], arrays[0])

        return self._started("all_reduce", buffer, buffer.copy(), work)

    def _started(self, operation, buffer, data, work):
        number = self._number
        self._number += 1
        self._job.send(number, self.rank, operation, data)
        return _Request(self, number, buffer, work)


def run_ranks(size, function):
    """Return what ``function(engine)`` returns on each of `size` ranks; raise what one raises."""
    job = _Job(size)

    def guarded(rank):
        try:
            return function(ThreadEngine(job, rank))
        except BaseException:
            job.stop()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, Stopped)), errors[0])
    return [future.result() for future in futures]
