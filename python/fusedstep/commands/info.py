"""Print what is installed, what this machine offers, and what a step would run on."""

import argparse
import importlib
import json
import platform
import sys
from importlib import metadata
from typing import Any

import numpy as np

from fusedstep import _core

# Optional distribution: what it serves.
OPTIONAL_PACKAGES = {
    "safetensors": "save and load optimizer state: pip install 'fusedstep[checkpoint]'",
    "matplotlib": "demo and bench: pip install 'fusedstep[demo]'",
    "rich": "demo and bench: pip install 'fusedstep[demo]'",
    "scikit-learn": "demo: pip install 'fusedstep[demo]'",
    "threadpoolctl": "can limit fusedstep's threads along with those of other libraries",
    "torch": "a peer in bench",
    "cupy": "arrays on the GPU",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def main(args: argparse.Namespace) -> int:
    if args.json:
        print(json.dumps(collect(), indent=2))
    else:
        show_config()
    return 0


def show_config() -> None:
    """Print versions, backends, instruction sets and threads, for a look or a bug report."""
    print(format_config(collect()))


def collect() -> dict[str, Any]:
    """Return all that `info` prints, ready for JSON."""
    return {
        **_core.config(),
        "backends": {"cpu": "available", "cuda": _cuda_state()},
        "optional_packages": {name: _version(name) for name in OPTIONAL_PACKAGES},
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "executable": sys.executable,
    }


def format_config(config: dict[str, Any]) -> str:
    rows = [
        ("fusedstep", config["version"]),
        ("backends", ""),
        *((f"  {name}", state) for name, state in config["backends"].items()),
        ("instruction sets", ""),
        ("  in this build", " ".join(config["built_isas"])),
        ("  on this CPU", " ".join(config["supported_isas"])),
        ("  chosen", f"{config['isa']} ({config['isa_reason']})"),
        ("threads", f"{config['num_threads']} ({config['num_threads_reason']})"),
        ("optional packages", ""),
    ]
    for name, version in config["optional_packages"].items():
        rows.append((f"  {name}", version or f"missing ({OPTIONAL_PACKAGES[name]})"))
    rows += [
        ("python", f"{config['python']} {config['executable']}"),
        ("numpy", config["numpy"]),
        ("compiler", config["compiler"]),
        ("platform", config["platform"]),
        ("cpu", config["cpu"]),
    ]
    return "\n".join(f"{label:<19} {value}".rstrip() for label, value in rows)


def _cuda_state() -> str:
    """Return what the CUDA backend was built for and runs on, or why it does not run."""
    try:
        cuda = importlib.import_module("fusedstep._cuda")
    except ModuleNotFoundError:
        return "not built: this build has CPU kernels only"
    except ImportError as error:
        return f"does not load: {error}"
    return describe_cuda(cuda.info())


def describe_cuda(info: dict[str, Any]) -> str:
    """Return one line about the backend: toolkit, code, driver, and what each GPU runs."""
    architectures = info["architectures"].split()
    built = f"built with CUDA {info['toolkit']} for {', '.join(architectures)}"
    driver = f"driver for CUDA {info['driver']}"
    if info["error"] is not None:
        return f"unavailable; {built}; {driver}; {info['error']}"
    devices = "; ".join(
        f"{d['name']}, compute capability {d['compute_capability']}, "
        f"runs {code_for(d['compute_capability'], architectures)}"
        for d in info["devices"]
    )
    return f"available; {built}; {driver}; {devices}"


def code_for(capability: str, architectures: list[str]) -> str:
    """Return which of a build's code a GPU runs.

    Machine code ("90-real") runs on GPUs of its generation that are no older; PTX ("90-virtual") is
    compiled by the driver for any that is no older; "90" is both. "90a" and "90f" have code that
    is taken for that GPU alone here; "native" and "all" do not say what they stand for.
    """
    major, minor = map(int, capability.split("."))
    fitting = []
    for architecture in architectures:
        name, _, kind = architecture.partition("-")
        number = name.rstrip("af")
        if not number.isdigit():
            fitting.append((-1, (0, 0), f"what {architecture!r} stood for when it was built"))
            continue
        own = divmod(int(number), 10)
        if number != name and own != (major, minor):
            continue
        if kind != "virtual" and own[0] == major and own[1] <= minor:
            fitting.append((1, own, f"machine code for {number}"))
        if kind != "real" and own <= (major, minor):
            fitting.append((0, own, f"PTX for {number}, compiled at first use"))
    return max(fitting)[2] if fitting else "nothing: this build has no code for it"


def _version(distribution: str) -> str | None:
    # CuPy's wheels are named after the CUDA release they are built for.
    names = ["cupy", "cupy-cuda12x", "cupy-cuda13x"] if distribution == "cupy" else [distribution]
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
