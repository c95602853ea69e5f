"""How much memory a step takes beyond its arrays."""

import ctypes
import tracemalloc
from collections.abc import Callable
from pathlib import Path

Step = Callable[[], object]


class _MallInfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


def heap_in_use() -> int | None:
    """Return the bytes that malloc has given out, where the C library can say (glibc >= 2.33)."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    mallinfo2.restype = _MallInfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def heap_growth(step: Step, steps: int) -> int | None:
    """Return by how many bytes the heap in use grew over some steps."""
    step()
    before = heap_in_use()
    for _ in range(steps):
        step()
    after = heap_in_use()
    return None if before is None or after is None else after - before


def peak_growth(step: Step) -> int | None:
    """Return by how many bytes a step lifts the peak of the process's resident memory."""
    try:
        step()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _status("VmRSS")
        step()
        return _status("VmHWM") - before
    except OSError:
        return None


def python_peak(step: Step) -> int:
    """Return the most bytes a step holds at one time through Python's and NumPy's allocators."""
    step()
    tracemalloc.start()
    try:
        step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
