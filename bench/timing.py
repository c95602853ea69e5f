"""Interleaved timing: every contender in turn, many times over, so that drift touches all alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over the rounds, and the quartiles."""

    median: float
    low: float
    high: float
    rounds: int
    calls: int  # in each round


# Threads of the contender before may go on spinning for some milliseconds in wait of more work.
# The rest is spent awake: after a sleep the scheduler may wake the threads of the next contender on
# this thread's own processor.
REST = 0.01


def interleaved(contenders: Mapping[str, Step], budget: float) -> dict[str, Timing]:
    """Time each contender for about `budget` seconds in all.

    A round calls each contender often enough to last a millisecond, in an order that rotates.
    """
    calls = {name: _calibrated(step) for name, step in contenders.items()}
    once = sum(_timed(step, calls[name]) * calls[name] for name, step in contenders.items())
    rounds = max(9, min(60, int(budget * len(contenders) / (once + REST * len(contenders)))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for j in range(len(names)):
                name = names[(i + j) % len(names)]
                _rest()
                # Off the clock: caches and threads as the contender's own last steps left them.
                _timed(contenders[name], calls[name])
                samples[name].append(_timed(contenders[name], calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(samples[name], calls[name]) for name in names}


def _rest() -> None:
    end = time.perf_counter() + REST
    while time.perf_counter() < end:
        pass


def _timed(step: Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def _calibrated(step: Step) -> int:
    for _ in range(3):
        step()
    calls = 1
    while _timed(step, calls) * calls < 1e-3:
        calls *= 2
    return calls


def _summary(samples: list[float], calls: int) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4)
    return Timing(median, low, high, len(samples), calls)
