"""Sharded steps on an engine of threads: the same bits as one optimizer, or one error for all."""

import re
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from thread_engine import run_ranks

import fusedstep as fs
from fusedstep import distributed
from fusedstep.distributed import LocalEngine, ShardedOptimizer, layout
from fusedstep.distributed.engine import as_engine, gather_text

RANKS = (1, 2, 3, 4)
every_size = pytest.mark.parametrize("size", RANKS)

KINDS = {
    "gd": (fs.GD, {}),
    "nesterov": (fs.GD, {"momentum": 0.9, "nesterov": True}),
    "adam": (fs.Adam, {"lr": lambda t: 1e-2 / t, "weight_decay": 0.1}),
    "amsgrad": (fs.Adam, {"amsgrad": True, "maximize": True}),
    "adamw": (fs.AdamW, {"betas": (0.5, 0.9)}),
}

# Buckets of 2048 bytes: some of these span several, some share one, some ranks get nothing.
SHAPES = {
    "many": [(1000,), (3, 7), (), (0, 4), (513, 2), (5,)],
    "one": [(1,)],
    "empty": [(0,)],
    "uneven": [(257,), (255,), (1,)],
    "even": [(1024,), (1024,)],
}
DTYPES = [np.float32, np.float64, np.float32, np.float32, np.float32, np.float64]


def arrays(shapes, seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(d) for s, d in zip(shapes, DTYPES, strict=False)]


def share(gradient, rank, size):
    """Return one rank's part of a sum that is exact in any order: each element is of one rank."""
    mine = np.arange(gradient.size).reshape(gradient.shape) % size == rank
    return np.where(mine, gradient, np.zeros_like(gradient))


def sharded(engine, kind, params, **options):
    optimizer, hyper = KINDS[kind]
    options = {"reduction": "sum", "bucket_bytes": 2048, **options}
    return ShardedOptimizer(optimizer, params, engine, **options, **hyper)


def bits(params):
    return [param.tobytes() for param in params]


@every_size
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_ranks_gives_the_bits_of_the_ordinary_optimizer(size, shapes, kind):
    shapes = SHAPES[shapes]
    grads = [arrays(shapes, seed) for seed in range(1, 5)]
    grads[1][0] = None  # a parameter whose step count falls behind the others'
    expected = arrays(shapes, 0)
    optimizer, hyper = KINDS[kind]
    plain = optimizer(expected, **hyper)
    for grad in grads:
        plain.step(grad)

    def job(engine):
        params = arrays(shapes, 0)
        sharded_optimizer = sharded(engine, kind, params)
        for grad in grads:
            own = [None if g is None else share(g, engine.rank, size) for g in grad]
            info = sharded_optimizer.step(own)
            assert info == (None, False)
        return bits(params)

    assert run_ranks(size, job) == [bits(expected)] * size


@every_size
def test_structures_and_groups_as_in_the_ordinary_optimizer(size):
    def groups():
        w, b, c, d = arrays([(300, 2), (4,), (5, 5), (700,)], 0)
        b = b.astype(np.float32)
        return [
            {"params": {"w": w, "b": b}, "lr": 0.1},
            {"params": [c, d], "momentum": 0.9},
            {"params": np.ones(3)},
        ]

    def grads():
        w, b, c, d = arrays([(300, 2), (4,), (5, 5), (700,)], 1)
        return [{"b": b.astype(np.float32), "w": w}, (c, d), np.full(3, 0.5)]

    def flat(groups):
        return bits([*groups[0]["params"].values(), *groups[1]["params"], groups[2]["params"]])

    expected = groups()
    plain = fs.GD(expected)
    for _ in range(3):
        plain.step(grads())
    plain.param_groups[1]["lr"] = 0.5
    plain.step(grads())

    def job(engine):
        params = groups()
        optimizer = ShardedOptimizer(fs.GD, params, engine, reduction="sum", bucket_bytes=1024)

        def own():
            w_b, c_d, last = grads()
            return [
                {k: share(v, engine.rank, size) for k, v in w_b.items()},
                [share(v, engine.rank, size) for v in c_d],
                share(last, engine.rank, size),
            ]

        for _ in range(3):
            optimizer.step(own())
        optimizer.param_groups[1]["lr"] = 0.5
        optimizer.step(own())
        assert optimizer.param_groups[0]["params"][0] is params[0]["params"]["w"]
        return flat(params)

    assert run_ranks(size, job) == [flat(expected)] * size


@every_size
def test_the_mean_is_the_sum_divided_once(size):
    grad = arrays([(3000,)], 1)[0]
    expected = arrays([(3000,)], 0)[0]
    total = (size * grad.astype(np.float64)).astype(np.float32) if size > 1 else grad
    fs.Adam(expected).step(total / np.float32(size))

    def job(engine):
        param = arrays([(3000,)], 0)[0]
        ShardedOptimizer(fs.Adam, param, engine, bucket_bytes=4096).step(grad)
        return param.tobytes()

    assert run_ranks(size, job) == [expected.tobytes()] * size


@pytest.mark.parametrize("clip_norm", [0.1, 30.0, 1e9])
def test_clipping_is_decided_once_and_does_not_depend_on_the_number_of_ranks(clip_norm):
    shapes, grads = SHAPES["many"], arrays(SHAPES["many"], 1)
    norm = 0.25 * np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads))

    def job(engine):
        params = arrays(shapes, 0)
        optimizer = sharded(engine, "adam", params)
        own = [share(g, engine.rank, engine.size) for g in grads]
        info = optimizer.step(own, grad_scale=0.25, clip_norm=clip_norm)
        return info, bits(params)

    by_size = [run_ranks(size, job) for size in RANKS]
    assert all(result == by_size[0][0] for results in by_size for result in results)
    info, result = by_size[0][0]
    assert info.grad_norm == pytest.approx(norm, rel=1e-12)

    expected = arrays(shapes, 0)
    fs.Adam(expected, **KINDS["adam"][1]).step(
        grads, grad_scale=0.25 * min(1.0, clip_norm / (info.grad_norm + 1e-6))
    )
    assert result == bits(expected)


@every_size
def test_parameters_without_gradients_do_not_count_in_the_norm(size):
    def job(engine):
        params = [np.ones(3000), np.ones(3000)]
        optimizer = ShardedOptimizer(fs.Adam, params, engine, bucket_bytes=4096)
        optimizer.step([np.full(3000, 2.0), np.full(3000, 2.0)], clip_norm=1.0)
        return optimizer.step([None, np.full(3000, 2.0)], clip_norm=1.0).grad_norm

    assert run_ranks(size, job) == pytest.approx([2 * np.sqrt(3000)] * size)


@every_size
def test_a_schedule_is_given_the_step_of_its_own_group(size):
    def job(engine):
        numbers = []

        def schedule(t):
            numbers.append(t)
            return 1e-3

        params = [{"params": np.ones(600)}, {"params": [np.ones(2000)], "lr": schedule}]
        optimizer = ShardedOptimizer(fs.Adam, params, engine, bucket_bytes=4096)
        for grad in (np.ones(2000), None, np.ones(2000)):
            optimizer.step([np.ones(600), [grad]])
        return numbers

    assert run_ranks(size, job) == [[1, 2, 2]] * size


@every_size
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_skipping_is_decided_once_and_changes_nothing(size, bad, dtype):
    def job(engine):
        param = np.ones(5000, dtype)
        optimizer = ShardedOptimizer(fs.Adam, param, engine, bucket_bytes=4096)
        grad = np.ones(5000, dtype)
        if engine.rank == size - 1:
            grad[4321] = bad
        info = optimizer.step(grad, skip_nonfinite=True)
        assert info.skipped
        assert not np.isfinite(info.grad_norm)
        assert (param == 1).all()
        with pytest.raises(ValueError, match="cannot be clipped"):
            optimizer.step(grad, clip_norm=1.0)
        assert (param == 1).all()
        # The skipped step does not count.
        info = optimizer.step(np.ones(5000, dtype), skip_nonfinite=True)
        assert info == (pytest.approx(np.sqrt(5000)), False)
        return param.tobytes()

    expected = np.ones(5000, dtype)
    fs.Adam(expected).step(np.ones(5000, dtype))
    assert run_ranks(size, job) == [expected.tobytes()] * size


def test_state_falls_as_one_over_the_number_of_ranks():
    count = 1 << 18

    def job(engine):
        optimizer = ShardedOptimizer(fs.Adam, np.zeros(count, np.float32), engine)
        return optimizer.memory_bytes()

    for size in RANKS:
        memory = run_ranks(size, job)
        assert sum(m["state"] for m in memory) == 8 * count
        slice_size = -(-count // (size * layout.CHUNK)) * layout.CHUNK
        assert max(m["state"] for m in memory) == 8 * slice_size
        assert {m["params"] for m in memory} == {4 * count}
        assert {m["grad_slice"] for m in memory} == ({4 * slice_size} if size > 1 else {0})


class Logged:
    """An engine that notes when operations on float32 begin and when they are waited for."""

    def __init__(self, engine):
        self._engine = engine
        self.rank, self.size = engine.rank, engine.size
        self.log = []

    def __getattr__(self, name):
        def started(*buffers):
            request = getattr(self._engine, name)(*buffers)
            if buffers[0].dtype != np.float32:
                return request
            self.log.append(f"{name} begins")
            return types.SimpleNamespace(
                wait=lambda: (request.wait(), self.log.append(f"{name} ends"))
            )

        return started


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}])
def test_communication_is_under_way_while_a_bucket_is_updated(options):
    def job(engine):
        logged = Logged(engine)
        param = np.ones(2048, np.float32)  # four buckets
        optimizer = ShardedOptimizer(fs.GD, param, logged, bucket_bytes=2048)
        step_parts = optimizer._step_parts

        def update(*arguments):
            logged.log.append("update")
            step_parts(*arguments)

        optimizer._step_parts = update
        optimizer.step(np.ones(2048, np.float32), **options)
        return logged.log

    for log in run_ranks(2, job):
        under_way = []
        for i, event in enumerate(log):
            if event == "update":
                began = [e.split()[0] for e in log[:i] if e.endswith("begins")]
                ended = [e.split()[0] for e in log[:i] if e.endswith("ends")]
                names = ("reduce_scatter", "all_gather")
                under_way.append(tuple(began.count(n) - ended.count(n) for n in names))
        reducing = (0, 0, 0, 0) if options else (1, 1, 1, 0)
        assert under_way == list(zip(reducing, (0, 1, 1, 1), strict=True))
        assert log.count("all_gather ends") == 4


def test_gradients_that_are_not_contiguous():
    grad = np.arange(600, dtype=np.float32).reshape(20, 30)
    expected = np.zeros((20, 30), np.float32)
    fs.Adam(expected).step(grad)

    def job(engine):
        param = np.zeros((20, 30), np.float32)
        ShardedOptimizer(fs.Adam, param, engine).step(np.asfortranarray(grad))
        return param.tobytes()

    assert run_ranks(2, job) == [expected.tobytes()] * 2


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@every_size
@pytest.mark.parametrize("subclass", [np.matrix, np.ma.MaskedArray])
def test_subclasses_of_arrays_are_taken_by_their_memory(size, subclass):
    expected = np.ones((20, 30))
    fs.Adam(expected).step(expected.copy())

    def job(engine):
        param = np.ones((20, 30))
        optimizer = ShardedOptimizer(fs.Adam, subclass(param, copy=False), engine, bucket_bytes=1)
        optimizer.step(subclass(np.ones((20, 30))), clip_norm=1e9)
        return param.tobytes()

    assert run_ranks(size, job) == [expected.tobytes()] * size


def test_torch_tensors_are_taken_by_their_memory():
    torch = pytest.importorskip("torch")
    weights = torch.nn.Parameter(torch.ones(5))
    weights.grad = torch.full((5,), 0.5)
    optimizer = ShardedOptimizer(fs.GD, [weights], lr=1.0)
    optimizer.step([weights.grad])
    assert weights.tolist() == [0.5] * 5


# Bad input: one error, the same on every rank, and nothing is written.


def same_error(size, job):
    """Return the error that every rank raises, after checking that it is one and the same."""

    def guarded(engine):
        try:
            job(engine)
        except Exception as error:
            return type(error), str(error)
        return None

    errors = run_ranks(size, guarded)
    assert errors[0] is not None
    assert errors == [errors[0]] * size
    return errors[0]


def made_differently(**by_rank):
    """Return a job in which rank 1 makes its optimizer with something else."""

    def job(engine):
        options = {"optimizer": fs.Adam, "params": np.ones(10, np.float32)}
        if engine.rank == 1:
            options |= by_rank
        ShardedOptimizer(options.pop("optimizer"), options.pop("params"), engine, **options)

    return job


@pytest.mark.parametrize(
    ("different", "kind", "text"),
    [
        ({"params": np.ones(11, np.float32)}, ValueError, r"shape \(10,\).*rank 1.*shape \(11,\)"),
        ({"params": np.ones(10)}, ValueError, r"float32.*rank 1 has .*float64"),
        ({"params": [np.ones(10, np.float32)] * 2}, ValueError, r"rank 1: params\[0\]: overlaps"),
        ({"params": [np.ones(10, np.float32), np.ones(2)]}, ValueError, "1 parameters.*rank 1.*2"),
        ({"params": np.zeros(10, np.float32)}, ValueError, "CRC-32.*rank 1 has .*CRC-32"),
        ({"params": np.ones((10, 2))[:, 0]}, ValueError, "rank 1: params: not C-contiguous"),
        ({"params": np.ones(10, int)}, TypeError, "rank 1: params: int64"),
        ({"params": "weights"}, TypeError, "rank 1: params: "),
        ({"params": []}, ValueError, "rank 1: params: no arrays"),
        ({"optimizer": "Adam"}, TypeError, "rank 1: optimizer: expected GD, Adam or AdamW"),
        ({"optimizer": fs.AdamW}, ValueError, "Adam, .*rank 1 has AdamW"),
        ({"lr": 0.5}, ValueError, "'lr'.*0.001.*rank 1.*0.5"),
        ({"lr": -1}, ValueError, "rank 1: .*lr"),
        ({"momentum": 1}, TypeError, "rank 1: .*momentum"),
        ({"capturable": True}, ValueError, "rank 1: capturable: not in a sharded optimizer"),
        ({"params": np.ones(10, np.float16)}, TypeError, "rank 1: params: float16"),
        ({"reduction": "max"}, ValueError, "rank 1: reduction: expected 'mean' or 'sum'"),
        ({"bucket_bytes": 0}, ValueError, "rank 1: bucket_bytes"),
        ({"bucket_bytes": 99}, ValueError, "bucket_bytes 16777216, rank 1 has .*bucket_bytes 99"),
    ],
)
def test_ranks_that_make_their_optimizers_differently(different, kind, text):
    error, message = same_error(3, made_differently(**different))
    assert error is kind
    assert re.search(text, message), message


def test_ranks_with_different_versions_of_the_library(monkeypatch):
    local = threading.local()

    class Version:
        def __str__(self):
            return local.version

    monkeypatch.setattr("fusedstep.distributed.sharded.__version__", Version())

    def job(engine):
        local.version = "0.2.0" if engine.rank == 2 else "0.1.0"
        ShardedOptimizer(fs.Adam, np.ones(10), engine)

    error, message = same_error(3, job)
    assert error is ValueError
    assert message.endswith("rank 0 has fusedstep 0.1.0, rank 2 has fusedstep 0.2.0")


def steps_differently(size, change):
    """Run a job in which rank 1 steps differently; return the error, check that nothing changed."""

    def job(engine):
        params = {"b": np.ones(5), "w": np.ones((30, 20), np.float32)}
        optimizer = ShardedOptimizer(fs.Adam, params, engine, bucket_bytes=1024)
        grads = {"b": np.ones(5), "w": np.ones((30, 20), np.float32)}
        optimizer.step(grads)
        before, steps = bits(params.values()), optimizer._steps
        state = [a.tobytes() for _, _, entry in optimizer._shard() for a in entry.values()]
        options = {}
        if engine.rank == 1 or size == 1:
            grads = change(optimizer, params, grads, options)
        try:
            optimizer.step(grads, **options)
        finally:
            assert bits(params.values()) == before
            assert optimizer._steps == steps
            after = [a.tobytes() for _, _, entry in optimizer._shard() for a in entry.values()]
            assert after == state

    return same_error(size, job)


def hyper(key, value):
    def change(optimizer, params, grads, options):
        optimizer.param_groups[0][key] = value
        return grads

    return change


def without(key):
    def change(optimizer, params, grads, options):
        del optimizer.param_groups[0][key]
        return grads

    return change


def option(key, value):
    def change(optimizer, params, grads, options):
        options[key] = value
        return grads

    return change


def gradient(make):
    return lambda optimizer, params, grads, options: make(params, grads)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (gradient(lambda p, g: g | {"w": g["w"].T}), ValueError, r"grads\['w'\]: shape \(20, 30\)"),
        (gradient(lambda p, g: g | {"b": g["b"].astype("f")}), TypeError, r"grads\['b'\]: float32"),
        (gradient(lambda p, g: g | {"b": 1.0}), TypeError, r"grads\['b'\]: expected numpy.ndarray"),
        (gradient(lambda p, g: g | {"c": g["b"]}), ValueError, r"grads\['c'\]: unknown"),
        (gradient(lambda p, g: {"w": g["w"]}), ValueError, r"grads\['b'\]: missing"),
        (gradient(lambda p, g: list(g.values())), TypeError, "grads: expected a dict, got list"),
        (gradient(lambda p, g: g | {"b": p["w"].reshape(-1)[:10].view("d")[:5]}), ValueError,
         r"grads\['b'\]: overlaps params\['w'\]"),
        (gradient(lambda p, g: p), ValueError, r"grads\['b'\]: overlaps params\['b'\]"),
        (hyper("lr", float("nan")), ValueError, "lr"),
        (hyper("eps", "small"), TypeError, "eps"),
        (without("lr"), ValueError, "lr: missing"),
        (hyper("lr", lambda t: -t), ValueError, "lr"),
        (option("grad_scale", 0.0), ValueError, "grad_scale"),
        (option("clip_norm", -1.0), ValueError, "clip_norm: expected a finite number > 0"),
        (option("clip_norm", "1"), TypeError, "clip_norm: expected a number, got str"),
        (option("skip_nonfinite", "no"), TypeError, "skip_nonfinite: expected True or False"),
        (hyper("lr", 1e300), ValueError, "lr: 1e\\+300 is too large for float32"),
        (option("grad_scale", 1e300), ValueError, "grad_scale: 1e\\+300 is too large for float32"),
    ],
)  # fmt: skip
def test_a_bad_step_is_the_same_error_on_all_ranks_and_changes_nothing(size, change, kind, text):
    error, message = steps_differently(size, change)
    assert issubclass(error, kind)
    assert re.search(text, message), message
    assert size == 1 or "rank 1" in message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            gradient(lambda p, g: g | {"b": None}),
            r"all gradients, rank 1 has no gradients for .*'b'",
        ),
        (hyper("lr", 0.5), "'lr'.*= 0.001, rank 1 has .*= 0.5"),
        (hyper("lr", lambda t: t / 100), "'lr'.*= 0.001, rank 1 has .*= 0.02"),
        (option("grad_scale", 2.0), "grad_scale 1.0.*rank 1 has grad_scale 2.0"),
        (option("clip_norm", 2.0), "clip_norm None.*rank 1 has .*clip_norm 2.0"),
        (option("skip_nonfinite", True), "skip_nonfinite False, rank 1 has .*True"),
    ],
)
def test_ranks_that_disagree_on_a_step(change, text):
    error, message = steps_differently(3, change)
    assert error is ValueError
    assert message.startswith("the ranks disagree on the step: ")
    assert re.search(text, message), message


def test_a_step_that_breaks_off_in_the_middle_is_remembered(tmp_path):
    class Breaking(LocalEngine):
        """Two ranks in name; the second bucket is never gathered."""

        size = 2
        gathers = 0

        def reduce_scatter(self, send, recv):
            return super().reduce_scatter(send[: recv.size], recv)

        def all_gather(self, buffer):
            if buffer.dtype == np.float32:
                self.gathers += 1
                if self.gathers == 2:
                    raise RuntimeError("the network is gone")
            return super().all_gather(buffer)

    class Agreeing(Breaking):
        def all_gather(self, buffer):
            if buffer.dtype != np.float32:  # the other rank says what this one says
                half = buffer.size // 2
                buffer[half:] = buffer[:half]
            return super().all_gather(buffer)

    param = np.ones(2048, np.float32)
    optimizer = ShardedOptimizer(fs.Adam, param, Agreeing(), bucket_bytes=2048)
    with pytest.raises(RuntimeError, match="the network is gone"):
        optimizer.step(param.copy())
    for again in (lambda: optimizer.step(param.copy()), lambda: optimizer.save(tmp_path)):
        with pytest.raises(RuntimeError, match=r"broken off in the middle.*from a checkpoint"):
            again()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("comm", [3, "world", object()])
def test_what_is_no_engine(comm):
    with pytest.raises(TypeError, match="comm: expected an mpi4py communicator, an engine"):
        ShardedOptimizer(fs.Adam, np.ones(3), comm)


def test_engine_of_one_rank():
    engine = as_engine(None)
    assert (engine.rank, engine.size) == (0, 1)
    assert as_engine(engine) is engine
    assert gather_text(engine, "text") == ["text"]


def test_text_of_any_length_travels():
    texts = ["", "ünï", "x" * 1000]
    assert run_ranks(3, lambda engine: gather_text(engine, texts[engine.rank])) == [texts] * 3


def test_importing_needs_no_engine():
    code = "import sys, fusedstep.distributed as d; print(d.__all__, *sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert str(distributed.__all__) in result.stdout
    assert not {"mpi4py", "torch", "cupy", "safetensors"} & set(result.stdout.split())


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=6),
    doubles=st.lists(st.booleans(), min_size=6, max_size=6),
    ranks=st.integers(1, 5),
    bucket_bytes=st.integers(1, 20000),
)
def test_every_element_is_dealt_out_once(sizes, doubles, ranks, bucket_bytes):
    dtypes = [np.dtype(np.float64 if d else np.float32) for d in doubles[: len(sizes)]]
    buckets, chunks = layout.cut(sizes, dtypes, ranks, bucket_bytes)
    owner = [np.full(size, -1) for size in sizes]
    chunk = [np.full(size, -1) for size in sizes]
    for bucket in buckets:
        assert bucket.slice_size % layout.CHUNK == 0
        most = max(bucket_bytes, ranks * layout.CHUNK * bucket.dtype.itemsize)
        assert bucket.slice_size * ranks * bucket.dtype.itemsize <= most
        for rank in range(ranks):
            numbers = bucket.chunks(rank)
            assert numbers.stop - numbers.start == bucket.slice_size // layout.CHUNK
            for part in bucket.slice_parts(rank):
                assert dtypes[part.param] == bucket.dtype
                assert 0 <= part.place.start < part.place.stop <= bucket.slice_size
                elements = np.arange(part.place.start, part.place.stop)
                assert (owner[part.param][part.start : part.stop] == -1).all()
                owner[part.param][part.start : part.stop] = rank
                own = numbers.start + elements // layout.CHUNK
                chunk[part.param][part.start : part.stop] = own
    assert all((array >= 0).all() for array in owner)
    assert all((array < chunks).all() for array in chunk)
    # Which elements share a chunk does not depend on ranks or buckets.
    alone, _ = layout.cut(sizes, dtypes, 1, 1 << 30)
    for bucket in alone:
        for part in bucket.parts:
            elements = np.arange(part.place.start, part.place.stop)
            expected = bucket.first_chunk + elements // layout.CHUNK
            assert (chunk[part.param][part.start : part.stop] == expected).all()
