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
STORED_KERNEL = re.compile(
    r"\.entry \w*?step_kernelINS_\d+([A-Z]\w+?)EfNS\d_\d(StoredAsI\w+?EEE|StoredE)\w+\((.*?)\n}\n",
    re.S,
)
# Of an element in each format that kernels are compiled for, and of what is beside it.
BYTES = {0: (4,), 1: (2,), 6: (2, 1), 7: (2,), 8: (1,), 9: (1,)}
SIGNED8 = 8
STREAMS = {"Gd": (2, 1), "GdMomentum": (3, 2), "Adam": (4, 3), "AmsGrad": (5, 4)}  # read, written


def compiled(folder: Path, name: str) -> str:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    ptx = folder / f"{name}.ptx"
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    flags = ["-std=c++17", "-O3", *CMAKE_FLAGS[1].split()]
    subprocess.run(["nvcc", *flags, "-ptx", "-arch=compute_75", source, "-o", ptx], check=True)
    return ptx.read_text()


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the kernels as nvcc compiles them."""
    return compiled(tmp_path_factory.mktemp("cuda_ptx"), "launch")


@pytest.fixture(scope="module")
def kernels(ptx: str) -> list[tuple[str, str, str, Counter[str]]]:
    """Return each kernel's rule, element type, placing, and how often it has which instruction."""
    return [
        (rule, element, placing, Counter(INSTRUCTION.findall(body)))
        for rule, element, placing, body in KERNEL.findall(ptx)
    ]


@pytest.fixture(scope="module")
def stored_kernels(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, str]]:
    """Return the rule, the formats and the instructions of each kernel of narrow arrays."""
    folder = tmp_path_factory.mktemp("cuda_ptx_stored")
    return STORED_KERNEL.findall(compiled(folder, "launch_stored"))


@pytest.fixture(scope="module")
def norm_ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiled(tmp_path_factory.mktemp("cuda_ptx_norm"), "launch_norm")


def test_every_kernel_is_there(kernels):
    variants = Counter((rule, element, placing) for rule, element, placing, _ in kernels)
    assert len(variants) == len(STREAMS) * 2 * 2
    assert set(variants.values()) == {2}  # a small and a large table


def wide(count, direction):
    """Return how many accesses move 16 bytes."""
    pattern = rf"{direction}\.global\.v(2\.\w64|4\.\w32)"
    return sum(n for name, n in count.items() if re.fullmatch(pattern, name))


def test_dense_kernels_move_16_bytes_at_a_time(kernels):
    for rule, element, placing, count in kernels:
        if placing == "Strided":
            continue
        read, written = STREAMS[rule]
        # Once where all streams lie alike, once where each is as wide as its address allows. A
        # gradient that is set to zero is written as well, and once more after a skipped step.
        assert wide(count, "ld") == 2 * read, f"{rule} {element}"
        assert wide(count, "st") == 2 * (written + 1) + 1, f"{rule} {element}"


def only_the_operations_of_the_rules(count, where, *, and_of_formats=False):
    allowed = r"(add|sub|mul|div|sqrt|fma)\.rn\.f|(ld|st|mov|selp|setp|neg|abs|copysign)\b"
    if and_of_formats:  # the reciprocal of a unit, that it is not too small for one, and not NaN
        allowed += r"|rcp\.rn\.f32|(min|max)\.f32"
    floating = [name for name in count if re.search(r"\.f(32|64)$", name)]
    assert [name for name in floating if not re.match(allowed, name)] == [], where
    assert not any(".ftz" in name or ".local" in name for name in count), where


def test_nothing_is_approximate_contracted_or_spilled(kernels):
    for rule, element, placing, count in kernels:
        where = f"{rule} {element} {placing}"
        converting = {name for name in count if name.startswith("cvt.rn.f32.f64")}
        for name in converting:  # the scale that the norm has led to, once
            assert count.pop(name) == 1, where
        only_the_operations_of_the_rules(count, where)
        if rule in ("Adam", "AmsGrad"):
            width = "f32" if element == "f" else "f64"
            steps = count[f"div.rn.{width}"]
            assert steps > 0
            assert count[f"sqrt.rn.{width}"] == steps, where
            # The rule writes five; another would be a product and a sum that the compiler joined.
            assert count[f"fma.rn.{width}"] <= 5 * steps, where


def test_the_kernels_of_narrow_arrays_are_there(stored_kernels):
    variants = Counter((rule, formats) for rule, formats, _ in stored_kernels)
    assert set(variants.values()) == {2}  # a small and a large table
    assert {rule for rule, formats in variants if formats == "StoredE"} == STREAMS.keys()
    assert len(variants) == len(STREAMS) + 5  # those of Adam that are compiled for their formats


def test_the_kernels_of_narrow_arrays_are_exact_and_keep_to_registers(stored_kernels):
    for rule, formats, body in stored_kernels:
        count = Counter(INSTRUCTION.findall(body))
        for name in [name for name in count if name.startswith("cvt.rn.f32.f64")]:
            assert count.pop(name) == 1
        only_the_operations_of_the_rules(count, f"{rule} {formats}", and_of_formats=True)
        if formats != "StoredE":
            parameter, *others = [int(n) for n in re.findall(r"(?:FormatE|S4_)(\d)", formats)]
            lanes = 16 if SIGNED8 in others else 8
            packs = lanes * sum([*BYTES[parameter], *(b for f in others for b in BYTES[f])]) // 16
            # The gradient is read, and written where it is set to zero; after a skipped step, 16
            # bytes at a time.
            assert (wide(count, "ld"), wide(count, "st")) == (packs, packs + 1), formats
        else:  # sixteen elements of any size: of 4 bytes, four accesses, of 2, two, of 1, one
            read, written = STREAMS[rule]
            expected = 7 * (read + 1), 7 * (written + 2) + 1  # and of what is beside the parameter
            assert (wide(count, "ld"), wide(count, "st")) == expected, rule
        # All lanes of a warp exchange values, and none of them has left before.
        for mask in re.findall(r"shfl\.sync\.bfly\.b32\s+.*, (\S+);", body):
            assert re.search(rf"mov\.[bu]32\s+{mask}, -1;", body)


def test_the_norm_is_added_in_float64_as_written(norm_ptx):
    bodies = re.findall(r"\.entry \w*?((?:sum|end)_\w+_kernel)\w*\((.*?)\n}\n", norm_ptx, re.S)
    assert Counter(re.sub(r"I.*", "", name) for name, _ in bodies) == {
        "sum_blocks_kernel": 2, "sum_gradients_kernel": 2, "end_norm_kernel": 1,
    }  # fmt: skip
    for name, body in bodies:
        count = Counter(INSTRUCTION.findall(body))
        assert not any(".ftz" in n or ".local" in n or ".approx" in n for n in count), name
        assert (count["fma.rn.f64"] > 0) == name.startswith("sum_blocks"), name
        assert not any(n.startswith("fma.rn.f32") for n in count), name
        # Sixteen rows of a gradient on their way, for each type that one may have.
        assert wide(count, "ld") == (4 * 16 if name.startswith("sum_blocks") else 0), name
    end = Counter(INSTRUCTION.findall(dict(bodies)["end_norm_kernel"]))
    assert end["sqrt.rn.f64"] == end["div.rn.f64"] == 1


def test_the_scalars_of_a_step_are_computed_as_written(ptx):
    bodies = re.findall(r"\.entry \w*begin_step_kernel\w*\((.*?)\n}\n", ptx, re.S)
    assert len(bodies) == 2  # of gradient descent and of Adam
    for body in bodies:
        count = Counter(INSTRUCTION.findall(body))
        assert not any(name.startswith("fma") or ".approx" in name for name in count)
        assert not any(".ftz" in name or ".local" in name for name in count)
    assert Counter(INSTRUCTION.findall(bodies[0] + bodies[1]))["sqrt.rn.f64"] > 0
