"""Checkpoints of sharded optimizers: exact for any number of ranks, and never half a one."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from thread_engine import run_ranks

import fusedstep as fs
from fusedstep.distributed import ShardedOptimizer, checkpoint

pytest.importorskip("safetensors")

SHAPES = {"w": (500, 3), "b": (7,), "c": (1200,), "e": (0, 2)}


def params(seed=0):
    rng = np.random.default_rng(seed)
    made = {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
    return made | {"c": made["c"].astype(np.float64)}


def made(engine, seed=0, optimizer=fs.AdamW, bucket_bytes=2048, groups=False, **hyper):
    weights = params(seed)
    given = weights
    if groups:
        given = [{"params": [weights["w"], weights["b"]]}, {"params": [weights["c"]], "lr": 0.25}]
    return weights, ShardedOptimizer(
        optimizer, given, engine, reduction="sum", bucket_bytes=bucket_bytes, **hyper
    )


def train(optimizer, weights, steps):
    for t in steps:
        grads = params(100 + t)
        if optimizer.rank:
            grads = {k: np.zeros_like(g) for k, g in grads.items()}
        if t == 2:
            grads["b"] = None
        optimizer.step(grads)


def bits(weights):
    return [array.tobytes() for array in weights.values()]


def unbroken(steps, **options):
    weights, optimizer = made(None, **options)
    train(optimizer, weights, range(1, steps + 1))
    return bits(weights)


KINDS = {
    "adamw": {"lr": lambda t: 0.1 / t, "betas": (0.5, 0.75)},
    "amsgrad": {"optimizer": fs.Adam, "amsgrad": True, "weight_decay": 1 / 3},
    "momentum": {"optimizer": fs.GD, "momentum": 0.9, "nesterov": True},
    "gd": {"optimizer": fs.GD, "lr": np.float32(0.1)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(2, 3, 1), (1, 4, 2), (3, 1, 4)])
def test_resuming_on_another_number_of_ranks_equals_the_unbroken_run(tmp_path, kind, sizes):
    done = 0
    for size in sizes:

        def job(engine, first=done):
            # Other values and another cut than at the save: all must come from the file.
            weights, optimizer = made(
                engine, seed=first and 9, bucket_bytes=4096 if first else 2048, **KINDS[kind]
            )
            loaded = optimizer.load(tmp_path)
            if first:
                assert loaded.extra == {"done": first}
                assert loaded.path.parent == tmp_path
                assert loaded.skipped == ()
            else:
                assert loaded is None
            train(optimizer, weights, range(first + 1, first + 4))
            optimizer.save(tmp_path, extra={"done": first + 3})
            return bits(weights)

        results = run_ranks(size, job)
        done += 3
        assert results == [unbroken(done, **KINDS[kind])] * size


def test_hyper_parameters_and_steps_come_back(tmp_path):
    _, optimizer = made(None, lr=0.5, betas=(0.5, 0.75))
    train(optimizer, None, [1, 2, 3])
    optimizer.param_groups[0]["eps"] = 1 / 3
    optimizer.save(tmp_path)
    _, other = made(None)
    other.load(tmp_path)
    assert {k: v for k, v in other.param_groups[0].items() if k != "params"} == {
        k: v for k, v in optimizer.param_groups[0].items() if k != "params"
    }
    assert other._steps == [3, 2, 3, 3]


def test_extra_comes_back_as_it_was(tmp_path):
    state = np.random.default_rng(1).bit_generator.state
    extra = {"state": state, "epoch": np.int64(3), "losses": [0.5, np.float32(0.25)], "none": None}
    _, optimizer = made(None)
    optimizer.save(tmp_path, extra=extra)
    loaded = optimizer.load(tmp_path).extra
    assert loaded == extra
    assert type(loaded["epoch"]) is int


def test_only_the_newest_stay(tmp_path):
    def job(engine):
        _, optimizer = made(engine)
        return [optimizer.save(tmp_path, keep=2).name for _ in range(4)]

    names = [f"checkpoint-{n:06}" for n in (1, 2, 3, 4)]
    assert run_ranks(2, job) == [names] * 2
    assert sorted(os.listdir(tmp_path)) == names[2:]
    assert sorted(os.listdir(tmp_path / names[-1])) == [
        "index.json",
        "rank-00000-of-00002.safetensors",
        "rank-00001-of-00002.safetensors",
    ]


def three_checkpoints(folder):
    """Save after steps 1, 2 and 3 on two ranks."""

    def job(engine):
        weights, optimizer = made(engine)
        paths = []
        for t in (1, 2, 3):
            train(optimizer, weights, [t])
            paths.append(optimizer.save(folder, extra=t))
        return paths

    return run_ranks(2, job)[0]


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def nest_deeply(path):
    path.write_text("[" * 100_000)


def become_folder(path):
    path.unlink()
    path.mkdir()


def lose_folder(path):
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"")


SHARD = "rank-00001-of-00002.safetensors"
DAMAGES = [
    (SHARD, os.unlink, f"{SHARD} is missing"),
    (SHARD, truncate, rf"{SHARD} has \d+ bytes instead of \d+"),
    (SHARD, empty, rf"{SHARD} has 0 bytes instead of \d+"),
    (SHARD, flip, f"{SHARD} is altered: its checksum does not fit"),
    ("rank-00000-of-00002.safetensors", flip, "rank-00000-of-00002.safetensors is altered"),
    ("index.json", os.unlink, r"no index\.json"),
    ("index.json", truncate, r"index\.json is truncated or altered"),
    ("index.json", empty, r"index\.json is truncated or altered"),
    ("index.json", flip, r"index\.json is (truncated or )?altered"),
    ("index.json", nest_deeply, r"index\.json is truncated or altered"),
    ("index.json", become_folder, r"no index\.json"),
    ("index.json", lose_folder, r"no index\.json"),
]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("name", "damage", "text"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, size, name, damage, text):
    first, second, third = three_checkpoints(tmp_path)
    damage(third / name)

    def job(engine):
        weights, optimizer = made(engine, seed=9)
        loaded = optimizer.load(tmp_path)
        return bits(weights), loaded

    with pytest.warns(RuntimeWarning, match=rf"skipped {re.escape(str(third))}: .*{text}"):
        results = run_ranks(size, job)
    for weights, loaded in results:
        assert weights == unbroken(2)
        assert (loaded.path, loaded.extra) == (second, 2)
        assert len(loaded.skipped) == 1

    # When all are damaged that is an error, on every rank, and nothing is written.
    for path in (first, second):
        damage(path / name)

    def failing_job(engine):
        weights, optimizer = made(engine, seed=9)
        with pytest.raises(ValueError, match="no complete checkpoint") as caught:
            optimizer.load(tmp_path)
        assert bits(weights) == bits(params(9))
        return str(caught.value)

    (message,) = set(run_ranks(size, failing_job))
    assert all(str(path) in message for path in (first, second, third))


def test_a_damaged_checkpoint_does_not_count_among_those_to_keep(tmp_path):
    _, second, third = three_checkpoints(tmp_path)
    truncate(third / SHARD)
    _, optimizer = made(None)
    fourth = optimizer.save(tmp_path, keep=2)
    assert sorted(tmp_path.iterdir()) == [second, third, fourth]


def test_a_single_checkpoint_can_be_named(tmp_path):
    first, _, third = three_checkpoints(tmp_path)
    weights, optimizer = made(None, seed=9)
    assert optimizer.load(first).extra == 1
    assert bits(weights) == unbroken(1)
    os.unlink(third / SHARD)
    with pytest.raises(ValueError, match=f"{SHARD} is missing"):
        optimizer.load(third)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        optimizer.load(tmp_path / "checkpoint-000009")
    assert bits(weights) == unbroken(1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"optimizer": fs.Adam}, "of an optimizer AdamW, but this one is Adam"),
        ({"amsgrad": True}, r"param_groups\[0\] has state .* but this optimizer's has .*max_exp"),
        ({"groups": True}, "4 params, but this optimizer has 3"),
    ],
)
def test_what_does_not_fit_is_refused_on_all_ranks(tmp_path, options, text):
    three_checkpoints(tmp_path)

    def job(engine):
        weights, optimizer = made(engine, seed=9, **options)
        with pytest.raises(ValueError, match=text) as caught:
            optimizer.load(tmp_path)
        assert bits(weights) == bits(params(9))
        return str(caught.value)

    assert len(set(run_ranks(2, job))) == 1


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        ("w", np.zeros((3, 500), np.float32), r"params\['w'\] has shape \[500, 3\]"),
        ("w", np.zeros((500, 3)), r"params\['w'\] has dtype float32"),
        ("x", np.zeros((500, 3), np.float32), r"params\['x'\] has name w"),
    ],
)
def test_other_parameters_are_refused(tmp_path, name, array, text):
    three_checkpoints(tmp_path)
    others = {k: v for k, v in params().items() if k != "w"}
    optimizer = ShardedOptimizer(fs.AdamW, {name: array, **others})
    with pytest.raises(ValueError, match=text):
        optimizer.load(tmp_path)
    assert not array.any()


def test_a_newer_format_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    made(None)[1].save(tmp_path)
    monkeypatch.setattr(checkpoint, "VERSION", 1)
    with pytest.raises(ValueError, match=r"format fusedstep-sharded 2.*update fusedstep"):
        made(None)[1].load(tmp_path)


def test_elements_that_no_file_has_are_missed(tmp_path, monkeypatch):
    shard = ShardedOptimizer._shard
    monkeypatch.setattr(ShardedOptimizer, "_shard", lambda self: list(shard(self))[1:])
    made(None)[1].save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="1500 elements of param 0 are missing"):
        made(None)[1].load(tmp_path)


@pytest.mark.parametrize(
    ("part", "failing_rank"), [("_write_shard", 0), ("_write_shard", 1), ("_write_index", 0)]
)
def test_a_rank_that_cannot_write_stops_the_save_for_all(tmp_path, monkeypatch, failing_rank, part):
    newest = three_checkpoints(tmp_path)[-1]
    original = getattr(checkpoint, part)

    def failing(first, second):
        if getattr(first, "rank", 0) == failing_rank:
            original(first, second)
            raise OSError("No space left on device")
        return original(first, second)

    monkeypatch.setattr(checkpoint, part, failing)

    def job(engine):
        weights, optimizer = made(engine)
        train(optimizer, weights, [1, 2, 3, 4])
        with pytest.raises(OSError, match=f"rank {failing_rank}: No space left"):
            optimizer.save(tmp_path)
        # The job can go on.
        train(optimizer, weights, [5])
        return bits(weights)

    assert run_ranks(2, job) == [unbroken(5)] * 2
    assert max(tmp_path.iterdir()) == newest
    assert len(list(tmp_path.iterdir())) == 3


def test_what_a_killed_save_leaves_is_neither_loaded_nor_kept(tmp_path):
    newest = three_checkpoints(tmp_path)[-1]
    for name in (".checkpoint-000004.partial", ".checkpoint-000001.deleted"):
        os.mkdir(tmp_path / name)
        (tmp_path / name / SHARD).write_bytes(b"half")
    _, optimizer = made(None)
    assert optimizer.load(tmp_path).path == newest
    optimizer.save(tmp_path)
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


# What a save does to the disk; it may end before and after each.
DISK = [
    (checkpoint, "write_synced"),
    (checkpoint, "sync"),
    (checkpoint.shutil, "rmtree"),
    (Path, "mkdir"),
    (Path, "write_text"),
    (Path, "rename"),
]


def die_at(moment):
    """End this process, as a kill would, at the `moment`-th of those moments."""
    passed = itertools.count()

    def ended(original):
        def wrapper(*arguments, **options):
            if next(passed) == moment:
                os._exit(9)
            result = original(*arguments, **options)
            if next(passed) == moment:
                os._exit(9)
            return result

        return wrapper

    for owner, name in DISK:
        setattr(owner, name, ended(getattr(owner, name)))


def die_everywhere(folder):
    """Resume, step and save in a child that dies at one moment after the other."""
    step = 0
    for moment in itertools.count():
        child = os.fork()
        weights, optimizer = made(None, seed=9 if step else 0)
        loaded = optimizer.load(folder)
        assert (loaded.extra if loaded else 0) == step
        if child == 0:
            train(optimizer, weights, [step + 1])
            die_at(moment)
            optimizer.save(folder, extra=step + 1, keep=1)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert died in (0, 9)
        loaded = optimizer.load(folder)
        assert (loaded.extra if loaded else 0) in (step, step + 1)
        step = loaded.extra if loaded else 0
        assert not step or bits(weights) == unbroken(step)
        if died == 0:
            print("moments:", moment, "steps:", step)
            return


def test_a_save_may_end_at_every_moment(tmp_path):
    code = "import sys, test_distributed_checkpoint as t; t.die_everywhere(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    moments, steps = map(int, re.findall(r"\d+", result.stdout))
    assert moments >= 2 * len(DISK)
    assert 0 < steps < moments


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"keep": 0}, ValueError, "keep: expected an integer >= 1, got 0"),
        ({"keep": 1.5}, ValueError, r"keep: .* got 1\.5"),
        ({"extra": {1, 2}}, TypeError, "extra: expected what JSON can hold"),
    ],
)
def test_bad_options_write_nothing(tmp_path, options, kind, text):
    def job(engine):
        _, optimizer = made(engine)
        with pytest.raises(kind, match=text) as caught:
            optimizer.save(tmp_path / "new", **options)
        return str(caught.value)

    assert len(set(run_ranks(2, job))) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("calls", [*itertools.permutations(["step", "save", "load"], 2)])
def test_ranks_that_make_different_calls_all_say_so(tmp_path, calls):
    def job(engine):
        weights, optimizer = made(engine)
        call = calls[engine.rank == 1]
        with pytest.raises(ValueError, match="the ranks disagree on the step: ") as caught:
            getattr(optimizer, call)(params(1) if call == "step" else tmp_path)
        assert bits(weights) == bits(params())
        return str(caught.value)

    (message,) = set(run_ranks(3, job))
    for rank, call in enumerate(calls):
        assert f"rank {rank} has {'step 1' if call == 'step' else f'a {call}'}" in message
    assert made(None)[1].load(tmp_path) is None


def test_the_index_is_readable(tmp_path):
    path = three_checkpoints(tmp_path)[-1]
    content = json.loads((path / "index.json").read_text())
    assert content["version"] == 1
    assert content["library"] == fs.__version__
    assert content["params"][0] == {
        "name": "w", "shape": [500, 3], "dtype": "float32", "step": 3
    }  # fmt: skip
    assert [f["name"] for f in content["files"]] == sorted(
        name for name in os.listdir(path) if name.startswith("rank")
    )
