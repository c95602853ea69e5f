"""Checkpoints: exact, atomic, and refused when anything in the file is not as it was saved."""

import os
import stat
import sys
from fractions import Fraction

import numpy as np
import pytest

import fusedstep as fs

safetensors_numpy = pytest.importorskip("safetensors.numpy")

KINDS = {
    "gd": (fs.GD, {}),
    "momentum": (fs.GD, {"momentum": 0.9}),
    "nesterov": (fs.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (fs.Adam, {"eps": 1 / 3, "betas": (0.1, 0.7)}),
    "amsgrad": (fs.Adam, {"amsgrad": True}),
    "adamw": (fs.AdamW, {"lr": np.float32(0.1)}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def random(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def arrays(seed):
    return [
        {"wéights": np.asfortranarray(random(3, 4, seed=seed)), "a.b": random(5, seed=seed + 1)},
        [random(2, 2, dtype=np.float64, seed=seed + 2), np.array(seed, np.float32)],
        [random(0, 3), random(4, 6, seed=seed + 3)[:, ::2]],
        random(4, 3, 2, seed=seed + 4).transpose(1, 2, 0),
    ]


def made(kind, seed=0, **options):
    optimizer, own = KINDS[kind]
    groups = [{"params": params} for params in arrays(seed)]
    groups[1]["lr"] = 1 / 7
    groups[2]["weight_decay"] = decay
    return optimizer(groups, **{**own, **options})


def decay(t):
    return 0.5 / t


def trained(kind, **options):
    optimizer = made(kind, **options)
    optimizer.step(arrays(7))
    grads = arrays(8)
    grads[0]["a.b"] = None
    optimizer.step(grads)
    return optimizer


def contents(optimizer):
    return (
        [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        {
            (i, key): (np.shape(value), np.asarray(value).tobytes())
            for i, entry in optimizer.state.items()
            for key, value in entry.items()
        },
    )


@every_kind
def test_round_trip_is_exact(kind, tmp_path):
    optimizer = trained(kind)
    optimizer.save(tmp_path / "state")
    other = made(kind, lr=0.9)
    other.load(str(tmp_path / "state"))
    assert contents(other) == contents(optimizer)
    assert [entry["step"] for entry in other.state.values()] == [2, 1, 2, 2, 2, 2, 2]
    # From the same parameters both go on to the same bits.
    for mine, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            q[...] = p
    for each in (optimizer, other):
        each.step(arrays(9))
    assert contents(other) == contents(optimizer)
    for mine, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            assert p.tobytes() == q.tobytes()


@every_kind
def test_a_fresh_optimizer_can_be_saved(kind, tmp_path):
    optimizer, other = made(kind), trained(kind)
    optimizer.save(tmp_path / "state")
    other.load(tmp_path / "state")
    assert contents(other) == contents(optimizer)


def test_special_values_survive(tmp_path):
    optimizer = fs.Adam(random(6))
    values = np.array([np.nan, -np.inf, -0.0, 1e-45, 3.4e38, -np.nan], np.float32)
    optimizer.state[0]["exp_avg"][...] = values
    optimizer.save(tmp_path / "state")
    other = fs.Adam(random(6))
    other.load(tmp_path / "state")
    assert other.state[0]["exp_avg"].tobytes() == values.tobytes()


def test_a_relative_path_is_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optimizer = fs.Adam(random(3))
    optimizer.save("state")
    optimizer.load("state")
    assert os.listdir(tmp_path) == ["state"]


def refuse(optimizer, path, text="", error=ValueError):
    before = contents(optimizer)
    with pytest.raises(error) as caught:
        optimizer.load(path)
    assert str(path) in str(caught.value)
    assert text in str(caught.value)
    assert contents(optimizer) == before


@pytest.fixture
def saved(tmp_path):
    """Save a small state and return its bytes, and where in them the arrays begin."""
    optimizer = fs.Adam({"w": random(3), "b": random(2)})
    optimizer.step({"w": random(3), "b": random(2)})
    optimizer.save(tmp_path / "state")
    data = (tmp_path / "state").read_bytes()
    return data, 8 + int.from_bytes(data[:8], "little")


@pytest.fixture
def optimizer():
    optimizer = fs.Adam({"w": random(3, seed=1), "b": random(2, seed=1)})
    optimizer.step({"w": random(3, seed=2), "b": random(2, seed=2)})
    return optimizer


def test_a_truncated_file_is_refused(saved, optimizer, tmp_path):
    data, data_start = saved
    path = tmp_path / "truncated"
    for length in {*range(0, len(data), 7), *range(9), *range(data_start - 3, len(data))}:
        path.write_bytes(data[:length])
        refuse(optimizer, path)
    path.write_bytes(data + b"\0")
    refuse(optimizer, path)
    path.write_bytes(data)
    optimizer.load(path)


@pytest.mark.parametrize("part", ["header", "arrays"])
def test_a_changed_byte_is_refused(saved, optimizer, tmp_path, part):
    data, data_start = saved
    path = tmp_path / "changed"
    for position in range(data_start) if part == "header" else range(data_start, len(data)):
        flip = (0x01, 0x20, 0x80, 0xFF)[position % 4]
        path.write_bytes(data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :])
        refuse(optimizer, path)


def test_a_foreign_file_is_refused(optimizer, tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors_numpy.save_file({"w": random(3)}, path)
    refuse(optimizer, path, "not a file that an optimizer of fusedstep saved")
    safetensors_numpy.save_file({"w": random(3)}, path, {"format": "pt"})
    refuse(optimizer, path, "not a file that an optimizer of fusedstep saved")
    path.write_bytes(b"\x80\x04K\x01.")
    refuse(optimizer, path)


@pytest.mark.parametrize("other", [fs.GD, fs.AdamW])
def test_the_file_of_another_optimizer_is_refused(optimizer, tmp_path, other):
    other({"w": random(3), "b": random(2)}).save(tmp_path / "state")
    refuse(optimizer, tmp_path / "state", f"{other.__name__}, but this one is Adam")


def test_a_file_that_does_not_fit_is_refused(saved, tmp_path):
    path = tmp_path / "state"
    for sizes in ({"w": 4, "b": 2}, {"w": 3}, {"w": 3, "c": 2}):
        params = {name: random(size) for name, size in sizes.items()}
        optimizer = fs.Adam(params)
        before = contents(optimizer)
        with pytest.raises(ValueError, match="state_dict: "):
            optimizer.load(path)
        assert contents(optimizer) == before


def test_a_missing_file_is_not_found(optimizer, tmp_path):
    refuse(optimizer, tmp_path / "nothing", error=FileNotFoundError)


def test_without_safetensors_the_error_names_the_extra(optimizer, tmp_path, monkeypatch):
    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    for call in (optimizer.save, optimizer.load):
        with pytest.raises(ImportError, match=r"fusedstep\[checkpoint\]"):
            call(tmp_path / "state")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["replace", "fsync", "chmod"])
def test_a_failing_save_leaves_the_old_file(saved, optimizer, tmp_path, monkeypatch, name):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="disk full"):
        optimizer.save(tmp_path / "state")
    assert os.listdir(tmp_path) == ["state"]
    assert (tmp_path / "state").read_bytes() == saved[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only directory")
def test_a_read_only_directory_is_refused(saved, optimizer, tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError):
        optimizer.save(tmp_path / "state")
    tmp_path.chmod(0o755)
    assert os.listdir(tmp_path) == ["state"]


def test_a_missing_directory_is_not_made(optimizer, tmp_path):
    with pytest.raises(FileNotFoundError):
        optimizer.save(tmp_path / "missing" / "state")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_is_respected(optimizer, tmp_path, umask):
    before = os.umask(umask)
    try:
        optimizer.save(tmp_path / "state")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    "hyper",
    [
        {"betas": [0.5, 0.25]},
        {"lr": np.float32(0.25)},
        {"lr": Fraction(1, 4)},
        {"amsgrad": np.True_},
    ],
)
def test_every_accepted_kind_of_number_can_be_saved(hyper, tmp_path):
    optimizer = fs.Adam(random(3), **hyper)
    optimizer.step(random(3))
    optimizer.save(tmp_path / "state")
    other = fs.Adam(random(3), **hyper)
    other.load(tmp_path / "state")
    ((name, value),) = hyper.items()
    restored = other.param_groups[0][name]
    assert restored == (tuple(value) if name == "betas" else value)


def test_a_link_stays_a_link(optimizer, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "state")
    optimizer.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    optimizer.load(tmp_path / "state")


def test_a_directory_is_no_file(optimizer, tmp_path):
    with pytest.raises(IsADirectoryError):
        optimizer.load(tmp_path)
