"""What the figures were measured on and with."""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fusedstep
from fusedstep import _core

PACKAGES = (
    "numpy", "numexpr", "numba", "torch", "jax", "jaxlib", "optax", "deepspeed", "matplotlib",
)  # fmt: skip


def require(parser: argparse.ArgumentParser, packages: Mapping[str, str]) -> None:
    """End the program where one of these modules is missing; each has what pip installs it by."""
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        parser.error(f"not installed: {', '.join(missing)} (pip install {' '.join(missing)})")


def caches() -> dict[str, int]:
    """Return the size in bytes of each data cache of the first processor, as in ``{"L1": ...}``."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "type").read_text().strip() == "Instruction":
            continue
        text = (index / "size").read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
        sizes["L" + (index / "level").read_text().strip()] = int(text.rstrip("KM")) * unit
    return sizes


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Others:
    """How many processors the rest of the machine keeps busy, on average since this was made."""

    def __init__(self) -> None:
        self.start = self._now()

    def processors(self) -> float | None:
        if self.start is None:
            return None
        wall, others = (b - a for a, b in zip(self.start, self._now() or self.start, strict=True))
        return max(0.0, others / wall) if wall else 0.0

    def _now(self) -> tuple[float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy - time.process_time()


def available_memory() -> int | None:
    """Return the bytes that can be taken without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def describe() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    config = _core.config()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "caches": caches(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "fusedstep": fusedstep.__version__,
        "compiler": config["compiler"],
        "isa": config["isa"],
        "supported_isas": list(config["supported_isas"]),
        "threads": config["num_threads"],
        "packages": versions,
    }


def write_record(folder: Path, kind: str, device: str, record: dict[str, Any]) -> Path:
    """Write what was measured on a device and a day, and return where."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
    path = folder / f"{kind}-{slug}-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
