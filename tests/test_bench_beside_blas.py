"""The benchmark of steps between matrix products."""

import json

from fusedstep.bench import beside_blas


def test_every_setting_is_timed_in_processes_of_its_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(beside_blas, "PRODUCTS", (8,))
    monkeypatch.setattr(beside_blas, "ELEMENTS", (100,))
    beside_blas.main(["--rounds", "20", "--output", str(tmp_path)])
    (record,) = tmp_path.glob("beside_blas-*.json")
    cases = json.loads(record.read_text())["cases"]
    assert [case["setting"] for case in cases] == list(beside_blas.SETTINGS)
    assert all(case["product"] > 0 and case["step"] > 0 for case in cases)
    assert f"wrote {record}" in capsys.readouterr().out


def test_the_setting_reaches_the_process(monkeypatch):
    monkeypatch.setenv(beside_blas.VARIABLE, "9")
    seen = []

    class Answer:
        stdout = "{}"

    def run(command, env, **_):
        seen.append(env.get(beside_blas.VARIABLE))
        return Answer

    monkeypatch.setattr(beside_blas.subprocess, "run", run)
    for setting in (None, "4"):
        beside_blas.in_own_process(setting, 1, 2, 3)
    assert seen == [None, "4"]
