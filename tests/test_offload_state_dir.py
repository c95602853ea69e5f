"""State of offloaded optimizers in a memory-mapped file."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_unchanged
from offload_adversary import AdversaryDevice, CopyError

import fusedstep as fs
from fusedstep.offload import OffloadedOptimizer

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = ((300, 1000), (5,), (0, 2), (50_000,))
STORAGE = [
    (np.float32, {}),
    (np.float32, {"state_dtype": "8bit", "seed": 9}),
    (BFLOAT16, {"master_weights": "float32"}),
    (BFLOAT16, {"master_weights": "correction8", "state_dtype": "bfloat16"}),
]


def arrays(dtype: Any, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {f"w{i}": rng.standard_normal(s).astype(dtype) for i, s in enumerate(SHAPES)}


def bits(params: dict[str, Any]) -> list[bytes]:
    return [p.tobytes() for p in params.values()]


def state_bits(optimizer: Any) -> list[Any]:
    return [
        {k: v if k == "step" else v.tobytes() for k, v in entry.items()}
        for entry in optimizer.state.values()
    ]


@pytest.mark.parametrize(("dtype", "storage"), STORAGE, ids=str)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(dtype, storage, tmp_path):
    unbroken, ours = arrays(dtype), arrays(dtype)
    expected = fs.AdamW(unbroken, lr=0.02, **storage)
    optimizer = OffloadedOptimizer(
        fs.AdamW, ours, lr=0.02, state_dir=tmp_path / "state", bucket_bytes=100_000, **storage
    )
    memory = optimizer.memory_bytes()
    if dtype == np.float32 and not storage:
        assert memory["state"] + memory["params"] > 5 * memory["buffers"]
    assert (tmp_path / "state" / "state.bin").stat().st_size >= memory["state"] + memory["params"]
    for t in range(6):
        if t in (2, 4):
            optimizer.param_groups[0]["betas"] = (0.5, 0.9)
            expected.param_groups[0]["betas"] = (0.5, 0.9)
            optimizer.flush()
            del optimizer
            ours = arrays(dtype, seed=99)  # what a new process has
            optimizer = OffloadedOptimizer(
                fs.AdamW, ours, state_dir=tmp_path / "state", resume=True,
                bucket_bytes=70_000, device=AdversaryDevice(t), **storage,
            )  # fmt: skip
            assert bits(ours) == bits(unbroken)
            assert optimizer.param_groups[0]["lr"] == 0.02
            assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)
        grads: Any = arrays(dtype, seed=t + 1)
        if t == 3:
            grads["w3"] = None
        options = {"clip_norm": 1.0} if t % 2 else {}
        assert optimizer.step(grads, **options) == expected.step(grads, **options)
    assert bits(ours) == bits(unbroken)
    assert state_bits(optimizer) == state_bits(expected)


def test_state_is_the_file(tmp_path):
    optimizer = OffloadedOptimizer(fs.Adam, arrays(np.float32), state_dir=tmp_path)
    optimizer.step(arrays(np.float32, 1))
    optimizer.flush()
    on_disk = np.fromfile(tmp_path / "state.bin", np.uint8)
    assert on_disk.tobytes() == optimizer._directory.memory.tobytes()
    moment = optimizer.state[0]["exp_avg"]
    assert moment.any()
    assert moment.tobytes() in on_disk.tobytes()


def test_a_flush_that_fails_leaves_no_index(tmp_path, monkeypatch):
    optimizer = made(tmp_path)

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(optimizer._directory._map, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        optimizer.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["state.bin"]


def test_a_checkpoint_is_made_and_loaded_as_ever(tmp_path):
    plain, ours = arrays(np.float32), arrays(np.float32)
    expected = fs.Adam(plain)
    expected.step(arrays(np.float32, 1))
    expected.save(tmp_path / "checkpoint")
    for target, source in zip(ours.values(), plain.values(), strict=True):
        target[...] = source
    optimizer = OffloadedOptimizer(fs.Adam, ours, state_dir=tmp_path / "state")
    optimizer.load(tmp_path / "checkpoint")
    expected.step(arrays(np.float32, 2))
    optimizer.step(arrays(np.float32, 2))
    assert bits(ours) == bits(plain)


def made(path: Path, **changes: Any) -> OffloadedOptimizer:
    options = {"params": arrays(np.float32), "optimizer": fs.Adam, **changes}
    return OffloadedOptimizer(
        options.pop("optimizer"), options.pop("params"), state_dir=path, **options
    )


def test_a_folder_with_state_is_not_begun_anew(tmp_path):
    made(tmp_path / "a").flush()
    with pytest.raises(ValueError, match="resume=True goes on with it"):
        made(tmp_path / "a")


def test_a_folder_without_state_is_not_resumed(tmp_path):
    with pytest.raises(ValueError, match="holds no state to resume"):
        made(tmp_path / "a", resume=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "write",
    [
        lambda o: o.step(arrays(np.float32, 1)),
        lambda o: o.refresh(),
        lambda o: o.load_state_dict(fs.Adam(arrays(np.float32)).state_dict()),
    ],
)
def test_what_was_written_after_a_flush_is_not_resumed(write, tmp_path):
    optimizer = made(tmp_path)
    optimizer.flush()
    write(optimizer)
    with pytest.raises(ValueError, match=r"written to after its last flush\(\)"):
        made(tmp_path, resume=True)
    optimizer.flush()
    made(tmp_path, resume=True)


def test_a_skipped_step_does_not_touch_the_file(tmp_path):
    optimizer = made(tmp_path)
    optimizer.flush()
    grads = arrays(np.float32, 1)
    grads["w1"][2] = np.nan
    assert optimizer.step(grads, skip_nonfinite=True).skipped
    assert made(tmp_path, resume=True).state[0]["step"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": fs.AdamW}, "it has optimizer Adam, this one has optimizer AdamW"),
        ({"amsgrad": True}, "this one has state exp_avg, exp_avg_sq, max_exp_avg_sq of"),
        ({"state_dtype": "bfloat16"}, "it has state_dtype None, master_weights None, seed 0"),
        ({"seed": 1}, "seed 1"),
        ({"params": {"w0": np.ones((300, 1000), np.float32)}}, "this one has nothing more"),
        ({"params": list(arrays(np.float32).values())}, "params['w0']: float32, shape (300, 1000)"),
    ],
    ids=str,
)
def test_state_of_another_optimizer_is_refused(changes, message, tmp_path):
    made(tmp_path).flush()
    before = (tmp_path / "state.bin").read_bytes()
    params = changes.get("params", arrays(np.float32))
    values = list(params.values() if isinstance(params, dict) else params)
    with assert_unchanged(*values), pytest.raises(ValueError, match=re.escape(message)):
        made(tmp_path, **{**changes, "params": params}, resume=True)
    assert (tmp_path / "state.bin").read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "index.json").write_text("{"), "index.json is damaged"),
        (lambda p: (p / "index.json").write_text("[]"), "not an index of this format"),
        (lambda p: (p / "index.json").write_text('{"format": "other"}'), "not an index"),
        (lambda p: (p / "state.bin").write_bytes(b"abc"), "has 3 bytes, expected"),
    ],
)
def test_a_damaged_folder_is_refused(damage, message, tmp_path):
    made(tmp_path).flush()
    damage(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        made(tmp_path, resume=True)


def test_a_step_that_failed_is_not_flushed(tmp_path):
    device = AdversaryDevice()
    optimizer = made(tmp_path, device=device, bucket_bytes=100_000)
    optimizer.flush()
    device.fail_at = device.started + 9, "wait"
    with pytest.raises(CopyError):
        optimizer.step(arrays(np.float32, 1))
    with pytest.raises(RuntimeError, match="broken off in the middle"):
        optimizer.flush()
    with pytest.raises(ValueError, match="written to after its last flush"):
        made(tmp_path, resume=True)


def test_pinned_parameters_are_not_in_a_file(tmp_path):
    with pytest.raises(ValueError, match="pin_params: with state_dir"):
        made(tmp_path, pin_params=True)
    with pytest.raises(ValueError, match="flush: the optimizer was made without state_dir"):
        OffloadedOptimizer(fs.Adam, arrays(np.float32)).flush()


def test_bad_arguments_leave_no_folder(tmp_path):
    with pytest.raises(ValueError, match="lr"):
        made(tmp_path / "a", lr=-1.0)
    assert not (tmp_path / "a").exists()


KILLED = """
import os, signal, sys
import numpy as np
import fusedstep as fs
from fusedstep.offload import HostDevice, OffloadedOptimizer

class Killing(HostDevice):
    left = 3
    def upload(self, pairs, marks):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().upload(pairs, marks)

theta = np.ones(200_000, np.float32)
optimizer = OffloadedOptimizer(
    fs.Adam, theta, state_dir=sys.argv[1], bucket_bytes=100_000, device=Killing()
)
optimizer.flush()
optimizer.step(theta.copy())
"""


def test_a_program_killed_in_a_step_is_noticed(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "state"], check=False)
    assert done.returncode == -signal.SIGKILL
    theta = np.zeros(200_000, np.float32)
    with pytest.raises(ValueError, match="neither old nor new"):
        OffloadedOptimizer(fs.Adam, theta, state_dir=tmp_path / "state", resume=True)
    assert not theta.any()


def test_the_index_can_be_read(tmp_path):
    optimizer = made(tmp_path, lr=lambda t: 0.1)
    optimizer.step(arrays(np.float32, 1))
    optimizer.flush()
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["steps"] == [1, 1, 1, 1]
    assert index["groups"][0]["lr"] is None
    resumed = made(tmp_path, resume=True, lr=0.5)
    assert resumed.param_groups[0]["lr"] == 0.5
