"""``python -m fusedstep``: what it prints, what it returns, and that the self-test can fail."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import fusedstep as fs
from fusedstep.__main__ import main


def run(*args, code=None, **env):
    command = ["-c", code] if code else ["-m", "fusedstep"]
    return subprocess.run(
        [sys.executable, *command, *args],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
        timeout=300,
    )


def test_version():
    assert run("--version").stdout.strip() == f"fusedstep {fs.__version__}"


def test_help_lists_the_commands():
    result = run("--help")
    assert result.returncode == 0
    for command in ("info", "selftest", "demo", "bench"):
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("args", [[], ["nonsense"], ["info", "--nonsense"]])
def test_wrong_arguments_are_refused(args):
    result = run(*args)
    assert result.returncode == 2
    assert "usage: python -m fusedstep" in result.stderr


def test_info_says_what_a_step_runs_on_and_why():
    result = run("info", FUSEDSTEP_ISA="scalar", FUSEDSTEP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    lines = {line[:19].strip(): line[20:] for line in result.stdout.splitlines()}
    assert lines["fusedstep"] == fs.__version__
    assert lines["cpu"]
    assert lines["cuda"]
    assert re.fullmatch(r"scalar \(.*FUSEDSTEP_ISA.*\)", lines["chosen"])
    assert re.fullmatch(r"1 \(.*FUSEDSTEP_NUM_THREADS.*\)", lines["threads"])
    assert lines["numpy"] == np.__version__


@pytest.mark.parametrize("variable", ["FUSEDSTEP_ISA", "FUSEDSTEP_NUM_THREADS"])
def test_a_bad_environment_variable_is_named(variable):
    result = run("info", **{variable: "nonsense"})
    assert result.returncode == 2
    assert re.search(rf"error: {variable}: .*'nonsense'", result.stderr)
    assert "Traceback" not in result.stderr


def test_info_as_json():
    config = json.loads(run("info", "--json").stdout)
    assert config["version"] == fs.__version__
    assert config["backends"]["cpu"] == "available"
    assert config["supported_isas"] == list(fs.available_isas())
    assert config["isa"] in config["supported_isas"]
    assert set(config["supported_isas"]) <= set(config["built_isas"])
    assert config["optional_packages"].keys() >= {"matplotlib", "rich", "scikit-learn"}


def test_show_config_prints_what_info_prints(capsys):
    fs.show_config()
    shown = capsys.readouterr().out
    main(["info"])
    assert shown == capsys.readouterr().out


def test_selftest_passes():
    result = run("selftest")
    assert result.returncode == 0, result.stdout + result.stderr
    checks = 2 * 6 * len(fs.available_isas()) + 6 * len(fs.available_isas())
    assert result.stdout.endswith(f"\n{checks} checks ok\n")


def spoil(monkeypatch, function, when=lambda: True, relative=0.0):
    """Make `function` return a wrong first parameter: off by `relative`, and at least one unit."""
    correct = getattr(fs, function)

    def wrong(params, *args, **kwargs):
        correct(params, *args, **kwargs)
        if when():
            first = params[0] if isinstance(params, list) else params
            first[:1] = np.nextafter(first[:1] * first.dtype.type(1 + relative), np.inf)

    monkeypatch.setattr(fs, function, wrong)


def failed_lines(capsys):
    return [line.split() for line in capsys.readouterr().out.splitlines() if "FAILED" in line][:-1]


def test_selftest_flags_a_wrong_value(monkeypatch, capsys):
    spoil(monkeypatch, "adamw_step", relative=1e-5)
    assert main(["selftest"]) == 1
    lines = failed_lines(capsys)
    assert {line[0] for line in lines} == {"adamw"}
    assert {line[1] for line in lines} == {"float32", "float64"}


def test_selftest_flags_one_unit_between_instruction_sets(monkeypatch, capsys):
    if len(fs.available_isas()) == 1:
        pytest.skip("one instruction set only")
    spoil(monkeypatch, "gd_step", when=lambda: fs.get_isa() == "scalar")
    assert main(["selftest"]) == 1
    lines = failed_lines(capsys)
    assert len(lines) == 3 * 2 * (len(fs.available_isas()) - 1)
    assert all("NOT" in line and line[2] != "scalar" for line in lines)


def test_selftest_flags_one_unit_between_numbers_of_threads(monkeypatch, capsys):
    spoil(monkeypatch, "adam_step", when=lambda: fs.get_num_threads() == 3)
    threads = fs.get_num_threads()
    with fs.num_threads(2):
        assert main(["selftest"]) == 1
    lines = failed_lines(capsys)
    assert [line[0] for line in lines] == [
        name for name in ("adam", "amsgrad") for _ in fs.available_isas()
    ]
    assert fs.get_num_threads() == threads


@pytest.mark.parametrize("module", ["rich", "matplotlib", "sklearn"])
def test_demo_without_its_extra_says_how_to_get_it(module):
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package, reason="the demo extra is not installed")
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from fusedstep.__main__ import main; sys.exit(main(['demo']))"
    )
    result = run(code=code)
    assert result.returncode == 2
    assert repr(module) in result.stderr
    assert "pip install 'fusedstep[demo]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_import_loads_numpy_and_nothing_optional():
    code = (
        "import sys, numpy; before = set(sys.modules); import fusedstep\n"
        "print(*(set(sys.modules) - before), sep='\\n')"
    )
    loaded = run(code=code).stdout.split()
    packages = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert packages == {"fusedstep"}
    assert not [name for name in loaded if name.startswith("fusedstep.commands")]
