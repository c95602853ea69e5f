"""The benchmark of offloaded steps runs to its end without a GPU, and says that there is none."""

import re

import pytest

offload = pytest.importorskip("fusedstep.bench.offload")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_runs_with_the_stand_in(dtype, capsys, monkeypatch):
    arguments = ["--stand-in", "--params", "3e5", "--steps", "2", "--bucket-bytes", "200000"]
    assert offload.main([*arguments, "--dtype", dtype, "--bandwidth", "1e9"]) in (0, 1)
    printed = capsys.readouterr().out
    assert "NO GPU" in printed
    itemsize = 4 if dtype == "float32" else 2
    (milliseconds,) = re.findall(r"copies alone, both ways \| ([\d.]+) ", printed)
    assert float(milliseconds) >= 3e5 * itemsize / 1e9 * 1e3
    assert re.search(r"step, clip_norm \| [\d.]+ \| [\d.]+ \|", printed)
    monkeypatch.setattr(offload, "WANTED", 100.0)
    assert offload.main([*arguments, "--dtype", dtype]) == 1
    assert "MISSED" in capsys.readouterr().out
