"""The CUDA kernels as nvcc compiles them: wide accesses, only the operations of the rules."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Of the build itself: without -fmad=false the scalars of a step would have other bits.
CMAKE_FLAGS = re.search(
    r"target_compile_options\(_cuda PRIVATE\s+\$<\$<COMPILE_LANGUAGE:CUDA>:(.*?)>\)",
    (ROOT / "CMakeLists.txt").read_text(),
)
INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z][\w.]+)", re.M)
KERNEL = re.compile(
    r"\.entry \w*?step_kernelINS_\d+([A-Z]\w+?)E([fd])NS\d_\d(Dense|Strided)E(.*?)\n}\n", re.S
)
STREAMS = {"Gd": (2, 1), "GdMomentum": (3, 2), "Adam": (4, 3), "AmsGrad": (5, 4)}  # read, written


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the kernels as nvcc compiles them."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    ptx = tmp_path_factory.mktemp("cuda_ptx") / "launch.ptx"
    source = ROOT / "csrc" / "cuda" / "launch.cu"
    flags = ["-std=c++17", "-O3", *CMAKE_FLAGS[1].split()]
    subprocess.run(["nvcc", *flags, "-ptx", "-arch=compute_75", source, "-o", ptx], check=True)
    return ptx.read_text()


@pytest.fixture(scope="module")
def kernels(ptx: str) -> list[tuple[str, str, str, Counter[str]]]:
    """Return each kernel's rule, element type, placing, and how often it has which instruction."""
    return [
        (rule, element, placing, Counter(INSTRUCTION.findall(body)))
        for rule, element, placing, body in KERNEL.findall(ptx)
    ]


def test_every_kernel_is_there(kernels):
    variants = Counter((rule, element, placing) for rule, element, placing, _ in kernels)
    assert len(variants) == len(STREAMS) * 2 * 2
    assert set(variants.values()) == {2}  # a small and a large table


def test_dense_kernels_move_16_bytes_at_a_time(kernels):
    for rule, element, placing, count in kernels:
        if placing == "Strided":
            continue
        pack = "v4.f32" if element == "f" else "v2.f64"
        moved = count[f"ld.global.{pack}"], count[f"st.global.{pack}"]
        assert moved == STREAMS[rule], f"{rule} {element}"


def test_nothing_is_approximate_contracted_or_spilled(kernels):
    for rule, element, placing, count in kernels:
        where = f"{rule} {element} {placing}"
        allowed = r"(add|sub|mul|div|sqrt|fma)\.rn\.f|(ld|st|mov|selp|setp|neg|abs)\b"
        floating = [name for name in count if re.search(r"\.f(32|64)$", name)]
        assert [name for name in floating if not re.match(allowed, name)] == [], where
        assert not any(".ftz" in name or ".local" in name for name in count), where
        if rule in ("Adam", "AmsGrad"):
            width = "f32" if element == "f" else "f64"
            steps = count[f"div.rn.{width}"]
            assert steps > 0
            assert count[f"sqrt.rn.{width}"] == steps, where
            # The rule writes five; another would be a product and a sum that the compiler joined.
            assert count[f"fma.rn.{width}"] <= 5 * steps, where


def test_the_scalars_of_a_step_are_computed_as_written(ptx):
    bodies = re.findall(r"\.entry \w*begin_step_kernel\w*\((.*?)\n}\n", ptx, re.S)
    assert len(bodies) == 2  # of gradient descent and of Adam
    for body in bodies:
        count = Counter(INSTRUCTION.findall(body))
        assert not any(name.startswith("fma") or ".approx" in name for name in count)
        assert not any(".ftz" in name or ".local" in name for name in count)
    assert Counter(INSTRUCTION.findall(bodies[0] + bodies[1]))["sqrt.rn.f64"] > 0
