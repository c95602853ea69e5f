"""The cost model: what it foretells is what a sharded optimizer has and sends."""

import re
from pathlib import Path

import numpy as np
import pytest
from thread_engine import run_ranks

import fusedstep as fs
from fusedstep.distributed import ShardedOptimizer, plan
from fusedstep.distributed.layout import CHUNK

OPTIMIZERS = {
    "gd": (fs.GD, {}),
    "momentum": (fs.GD, {"momentum": 0.9}),
    "adam": (fs.Adam, {}),
    "adamw": (fs.AdamW, {}),
    "amsgrad": (fs.Adam, {"amsgrad": True}),
}


def test_every_optimizer_is_in_the_model():
    assert OPTIMIZERS.keys() == plan.STATE_ARRAYS.keys()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    ("count", "dtype", "bucket_bytes"),
    [(100_000, np.float32, 1 << 14), (100_000, np.float64, 1 << 24), (7, np.float32, 1 << 10)],
)
def test_memory_and_bytes_sent_are_as_foretold(ranks, kind, count, dtype, bucket_bytes):
    optimizer, hyper = OPTIMIZERS[kind]

    def job(engine):
        param = np.ones(count, dtype)
        made = ShardedOptimizer(optimizer, param, engine, bucket_bytes=bucket_bytes, **hyper)
        before = engine.sent_bytes
        made.step(np.ones(count, dtype))
        return made.memory_bytes(), engine.sent_bytes - before

    foretold = plan.cost(
        count, ranks, optimizer=kind, itemsize=np.dtype(dtype).itemsize, bucket_bytes=bucket_bytes
    )
    results = run_ranks(ranks, job)
    for key in ("params", "grad_slice", "buffers"):
        assert {memory[key] for memory, _ in results} == {getattr(foretold, key)}
    state = [memory["state"] for memory, _ in results]
    assert sum(state) == plan.STATE_ARRAYS[kind] * foretold.params
    # The model has state for the padding as well: less than a chunk for each rank.
    padding = plan.STATE_ARRAYS[kind] * ranks * CHUNK * np.dtype(dtype).itemsize
    assert max(state) <= foretold.state <= max(state) + padding
    agreement = 2 * 8 * (ranks - 1)  # two integers to each other rank
    assert {sent - agreement for _, sent in results} == {foretold.wire}


def test_time_is_of_bytes_and_bandwidth():
    cost = plan.cost(1024 * 4, 4, bandwidth=1e6, memory_bandwidth=1e9, bucket_bytes=1 << 20)
    size = 4 * 4096
    assert cost.wire == 2 * size * 3 // 4
    assert cost.wire_seconds == pytest.approx(cost.wire / 1e6)
    assert cost.traffic == 4 * size + (7 + 2 * 2) * size // 4
    assert cost.memory_seconds == pytest.approx(cost.traffic / 1e9)
    assert cost.memory == 2 * size + (2 + 1) * size // 4 + 4 * size


def test_the_table_in_the_documentation_is_what_the_command_prints(capsys):
    plan.main([])
    page = Path(__file__).parents[1] / "docs" / "sharding.md"
    assert capsys.readouterr().out in page.read_text()


def test_options_of_the_command(capsys):
    plan.main(["--params", "1e6", "--ranks", "2", "--optimizer", "momentum", "--dtype", "float64"])
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| 2 | 8 MB | 8 MB | 4 MB | 4 MB | 32 MB | 56 MB | 8 MB |")
    for option in (["--params", "0"], ["--ranks", "1.5"], ["--bandwidth", "-1"]):
        with pytest.raises(SystemExit):
            plan.main(option)
        assert re.search(r"expected a (whole )?number", capsys.readouterr().err)
