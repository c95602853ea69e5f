"""The GPU benchmark, with NumPy in CuPy's place: it runs to its end and judges what it measured."""

import itertools
import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib")
cuda = pytest.importorskip("fusedstep.bench.cuda")


class Event:
    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass


class Device:
    id = 0
    compute_capability = "90"

    def synchronize(self):
        pass


@pytest.fixture
def cupy(monkeypatch):
    counts = itertools.count()
    backend = SimpleNamespace(
        info=lambda: {"driver": "13.0", "toolkit": "13.0"}, launch_count=lambda: next(counts)
    )
    monkeypatch.setitem(sys.modules, "fusedstep._cuda", backend)
    monkeypatch.setattr(cuda, "COPY_BYTES", 1 << 16)
    pool = SimpleNamespace(free_bytes=lambda: 0, free_all_blocks=lambda: None)
    properties = {"name": b"No GPU", "totalGlobalMem": 1 << 30, "l2CacheSize": 1 << 20}
    runtime = SimpleNamespace(
        memGetInfo=lambda: (1 << 30, 1 << 30), getDeviceProperties=lambda device: properties
    )
    return SimpleNamespace(
        **{name: getattr(np, name) for name in ("asarray", "zeros", "ones", "sqrt", "copyto")},
        zeros_like=np.zeros_like,
        asnumpy=np.array,
        float32=np.float32,
        random=np.random,
        __version__="0",
        get_default_memory_pool=lambda: pool,
        cuda=SimpleNamespace(
            Event=Event,
            Device=Device,
            runtime=runtime,
            get_elapsed_time=lambda begin, end: (end.time - begin.time) * 1e3,
        ),
    )


def test_a_quick_run(cupy, monkeypatch, tmp_path):
    from fusedstep.bench.run import write

    small = cuda.Workload(cuda.GPT2_SMALL.name, ((3, 4),) * 148)
    monkeypatch.setattr(
        cuda,
        "CASES",
        tuple(
            (small if workload is cuda.GPT2_SMALL else workload, wanted)
            for workload, wanted in cuda.CASES
        ),
    )
    monkeypatch.setattr(cuda, "GPT2_SMALL", small)
    record = cuda.run(cupy, cuda.Clock(cupy), True, ["CuPy"], lambda *_, **__: None)
    assert record["peers"]["fusedstep"] == record["peers"]["CuPy"] == "ok"
    assert record["gpu"] == "No GPU"
    for case in record["cases"] + record["sweep"]:
        for timings in ("timings", "gpu_timings", "python_timings"):
            assert set(case[timings]) == {"fusedstep", "CuPy"}
            assert all(t["median"] > 0 for t in case[timings].values())
    (case,) = record["narrow"]
    assert case["elements"] == 1_000_000
    narrow = cuda.cuda_narrow
    assert set(case["timings"]) == {*narrow.narrow.OURS, narrow.CLIPPED, narrow.OFFSET}
    rows = {(row["case"], row["claim"]): row for row in record["requirements"]}
    cost = rows[small.name, "fusedstep, microseconds until the call returns"]
    assert cost["met"] == (cost["measured"] <= 25)
    assert rows[small.name, "fusedstep, launches of a step"]["measured"] == 1
    large = rows["adam float32 1,000,000,000", "fusedstep, times as fast as device copy (gpu)"]
    assert large["measured"] is None
    write(record, tmp_path, "gpu")
    assert len(list(tmp_path.glob("gpu-no-gpu-*.png"))) == 3
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["requirements"]


def test_requirements_are_ratios_of_medians():
    def case(name, **medians):
        timings = {contender: {"median": t} for contender, t in medians.items()}
        return {"name": name, "timings": timings, "gpu_timings": timings, "python_timings": timings}

    record = {
        "cases": [
            case(
                "adam float32 1,000,000,000",
                **{"fusedstep": 1.0, "torch fused": 1.06, "CuPy": 0.9, "roofline": 0.93},
            )
        ]
    }
    rows = {row["claim"]: row for row in cuda.requirements_of(record) if row["measured"]}
    assert rows["fusedstep, times as fast as torch fused (gpu)"]["met"]
    assert rows["fusedstep, times as fast as device copy (gpu)"]["met"]
    best = rows["fusedstep, times as fast as best peer (gpu)"]
    assert best["measured"] == pytest.approx(0.9)
    assert not best["met"]


def test_the_requirements_of_steps_in_fewer_bytes():
    medians = {"float32": 2.8, "float32, 8-bit moments": 1.6, "float32, clip_norm": 3.5}
    timings = {name: {"median": median} for name, median in medians.items()}
    cases = [{"elements": size, "timings": timings} for size in (1_000_000, 1_000_000_000)]
    rows = {row["claim"]: row for row in cuda.cuda_narrow.requirements_of(cases)}
    assert rows["float32, 8-bit moments, times as fast as float32 (gpu)"]["met"]
    assert rows["float32, clip_norm, times as fast as float32 (gpu)"]["met"] is False
    assert rows["float32, 8-bit moments, times as fast as torchao AdamW8bit (gpu)"]["met"] is None
    assert len(rows) == len(cuda.cuda_narrow.REQUIRED)


@pytest.mark.parametrize(("offset", "met"), [(0.9, True), (1.02, True), (1.04, False)])
def test_the_odd_tensor_may_take_3_percent_longer(offset, met):
    medians = {"fusedstep": 1.0, cuda.OFFSET: offset, cuda.OWN_STATE: 1.0}
    timings = {name: {"median": median} for name, median in medians.items()}
    case = {"name": "adam float32 100,000,000", "gpu_timings": timings, "timings": timings}
    rows = [row for row in cuda.requirements_of({"cases": [case]}) if row["measured"]]
    assert [(row["claim"], row["met"]) for row in rows] == [
        ("fusedstep, odd offset, times as fast as fusedstep (gpu)", met),
        ("fusedstep, odd offset, own state, times as fast as fusedstep (gpu)", True),
    ]


def test_a_case_for_which_the_gpu_is_too_small_is_skipped(cupy):
    said = []
    workload = cuda.one_array(1_000_000_000)
    assert cuda.run_case(cupy, cuda.Clock(cupy), workload, [], said.append) is None
    assert "skipped" in said[0]


def test_the_odd_tensor_is_odd_and_off_the_boundary(cupy, monkeypatch):
    seen = []
    monkeypatch.setattr(cuda.fs, "adam_step", lambda *arrays, **options: seen.append(arrays))
    steps = cuda.odd_offsets(cupy, 1000)
    for name in (cuda.OFFSET, cuda.PARAMETER_ALONE):
        steps[name]()
    assert all(array.size == 1001 for arrays in seen for array in arrays)
    assert [[array.base is not None for array in arrays] for arrays in seen] == [
        [True] * 4, [True, False, False, False],
    ]  # fmt: skip
    assert {array.base.size for array in seen[0]} == {1002}
    steps[cuda.OWN_STATE]()


def test_the_odd_narrow_tensor_is_odd_and_off_the_boundary(cupy, monkeypatch):
    seen = []

    class Adam:
        def __init__(self, param, **options):
            seen.append(param)

        def step(self, grad):
            seen.append(grad)

    monkeypatch.setattr(cuda.cuda_narrow.fs, "Adam", Adam)
    cuda.cuda_narrow.odd_offset(cupy, 1000)()
    assert [(a.size, a.base.size, a.dtype.name) for a in seen] == [(1001, 1002, "bfloat16")] * 2
