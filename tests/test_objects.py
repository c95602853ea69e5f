"""The per-ISA objects of the build: no code for one instruction set is linked in for another."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = os.environ.get("FUSEDSTEP_BUILD_DIR")


def objects() -> dict[str, Path]:
    if BUILD is None:
        pytest.skip("FUSEDSTEP_BUILD_DIR is not set (dev.py test sets it): no objects to look at")
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    found = {
        path.parents[2].name.removesuffix(".dir").removeprefix("kernels_"): path
        for path in Path(BUILD).rglob("kernels_*.dir/**/kernels.cpp.o")
    }
    assert "scalar" in found, f"no kernel objects under {BUILD}"
    return found


def symbols(path: Path) -> dict[str, str]:
    """Return the symbols that an object defines, by name, with nm's letter for their kind."""
    listing = subprocess.run(
        ["nm", "--defined-only", path], check=True, capture_output=True, text=True
    )
    return {
        fields[-1]: fields[-2] for fields in map(str.split, listing.stdout.splitlines()) if fields
    }


def disassembly(path: Path) -> str:
    return subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", path], check=True, capture_output=True, text=True
    ).stdout


def baseline_objects() -> list[Path]:
    return list(Path(BUILD).rglob("_core.dir/**/*.o"))


def test_all_instruction_sets_are_built():
    expected = {"scalar"}
    if platform.machine() == "x86_64":
        expected |= {"avx2", "avx512"}
    assert set(objects()) == expected


def test_isa_objects_share_no_symbol():
    seen: dict[str, str] = {}
    for isa, path in objects().items():
        for name, kind in symbols(path).items():
            if kind in "rtdb":  # local to its object
                continue
            assert name not in seen, f"{name} is in the {seen[name]} and the {isa} object"
            seen[name] = isa
    assert len(seen) > 3


def test_isa_objects_and_baseline_share_no_symbol():
    found = objects()
    baseline = baseline_objects()
    assert baseline
    common = set().union(*(symbols(path) for path in baseline))
    for isa, path in found.items():
        exported = {name for name, kind in symbols(path).items() if kind not in "rtdb"}
        assert not exported & common, isa


def test_every_symbol_of_an_isa_object_names_its_isa():
    for isa, path in objects().items():
        for name, kind in symbols(path).items():
            if kind in "rtdb":
                continue
            assert isa in name, f"{name} in the {isa} object could be shared"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="about x86-64 registers")
def test_baseline_objects_use_no_wide_registers():
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    found = objects()
    for path in [*baseline_objects(), found["scalar"]]:
        listing = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", path],
            check=True,
            capture_output=True,
            text=True,
        )
        assert "%ymm" not in listing.stdout, path
        assert "%zmm" not in listing.stdout, path
    avx512 = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", found["avx512"]],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "%zmm" in avx512.stdout
