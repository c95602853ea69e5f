"""The benchmark of `fusedstep.torch` writes what it measured, and times no peer that is idle."""

import json

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
bench = pytest.importorskip("fusedstep.bench.torch_optim")


class Idle:
    def __init__(self, params):
        pass

    def step(self):
        pass


def missing(params):
    raise ModuleNotFoundError("No module named 'deepspeed'")


@pytest.mark.parametrize(
    ("peer", "said"), [(missing, "missing (ModuleNotFoundError: "), (Idle, "not timed")]
)
@pytest.mark.parametrize(("required", "met"), [(1e-9, True), (1e9, False)])
def test_it_writes_a_record(peer, said, required, met, monkeypatch, tmp_path, capsys):
    options = {"state_dtype": "8bit", "master_weights": "stochastic"}
    wanted = {bench.FUSED: required, bench.DEEPSPEED: 1.0}
    case = bench.Case("small", ((64,), (3, 5)), wanted, torch.bfloat16, options)
    monkeypatch.setattr(bench, "CASES", (case,))
    monkeypatch.setitem(bench.PEERS, bench.DEEPSPEED, peer)
    code = bench.main(["--budget", "0.01", "--output", str(tmp_path / "records")])
    assert code == (0 if met else 1)
    assert f"{bench.DEEPSPEED}: " in (printed := capsys.readouterr().out)
    assert said in printed
    (path,) = (tmp_path / "records").glob("torch_optim-*.json")
    record = json.loads(path.read_text())
    (measured,) = record["cases"]
    assert measured["timings"].keys() == {bench.OURS, bench.FUSED}
    (row,) = record["requirements"]
    assert row["met"] is met
    medians = {name: timing["median"] for name, timing in measured["timings"].items()}
    assert row["measured"] == medians[bench.FUSED] / medians[bench.OURS]
