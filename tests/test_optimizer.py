"""The optimizers: structures of parameters, groups, schedules, state, loading and copying."""

import copy
import pickle

import numpy as np
import pytest
from helpers import assert_unchanged

import fusedstep as fs

KINDS = {
    "gd": (fs.GD, {}),
    "momentum": (fs.SGD, {"momentum": 0.9, "dampening": 0.1}),
    "adam": (fs.Adam, {"weight_decay": 0.1}),
    "amsgrad": (fs.Adam, {"amsgrad": True}),
    "adamw": (fs.AdamW, {}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def random(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def make(kind, params, **options):
    optimizer, own = KINDS[kind]
    return optimizer(params, **{**own, **options})


def named(seed=0):
    return {"w": random(3, 4, seed=seed), "b": random(5, seed=seed + 1)}


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def contents(optimizer):
    """Everything that a step or a load may change, as bytes."""
    state = {
        (i, key): np.asarray(value).tobytes()
        for i, entry in optimizer.state.items()
        for key, value in entry.items()
    }
    hyper = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [p.tobytes() for p in params_of(optimizer)], state, hyper


def steps_of(optimizer):
    return [entry["step"] for entry in optimizer.state.values()]


# Structures


@every_kind
def test_structures_give_the_same_bits(kind):
    p, g = named(), named(seed=2)
    alone = [make(kind, array) for array in named().values()]
    as_list, as_dict = make(kind, list(named().values())), make(kind, p)
    as_groups = make(kind, [{"params": named()["w"]}, {"params": {"b": named()["b"]}}])
    for _ in range(3):
        for optimizer, grad in zip(alone, g.values(), strict=True):
            optimizer.step(grad)
        as_list.step(tuple(g.values()))
        as_dict.step({"b": g["b"], "w": g["w"]})
        as_groups.step([g["w"], {"b": g["b"]}])
    expected = [optimizer.param_groups[0]["params"][0].tobytes() for optimizer in alone]
    for optimizer in (as_list, as_dict, as_groups):
        assert [q.tobytes() for q in params_of(optimizer)] == expected
        assert steps_of(optimizer) == [3, 3]
    assert p["w"].tobytes() == expected[0]


FUNCTIONS = {
    "gd": (fs.gd_step, []),
    "momentum": (fs.gd_step, ["momentum_buffer"]),
    "adam": (fs.adam_step, ["exp_avg", "exp_avg_sq"]),
    "amsgrad": (fs.adam_step, ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
    "adamw": (fs.adamw_step, ["exp_avg", "exp_avg_sq"]),
}


@every_kind
def test_optimizer_is_its_function(kind):
    function, roles = FUNCTIONS[kind]
    options = {k: v for k, v in KINDS[kind][1].items() if k != "amsgrad"}
    p, q = named(), list(named().values())
    state = {role: [np.full_like(a, 0.0) for a in q] for role in roles}
    optimizer = make(kind, p, lr=0.1)
    for t in range(1, 21):
        g = named(seed=10 * t)
        optimizer.step(g, grad_scale=0.5)
        function(q, list(g.values()), **state, step=t, lr=0.1, grad_scale=0.5, **options)
    assert [a.tobytes() for a in p.values()] == [a.tobytes() for a in q]
    for role, arrays in state.items():
        for i, array in enumerate(arrays):
            assert optimizer.state[i][role].tobytes() == array.tobytes()


def test_types_and_rules_mix_in_one_optimizer():
    def groups():
        return [
            {"params": [random(9), random(9, dtype=np.float64, seed=1)], "momentum": 0.9},
            {"params": random(2, 3, dtype=np.float64, seed=2), "lr": 0.5},
        ]

    grads = [[random(9, seed=3), random(9, dtype=np.float64, seed=4)], random(2, 3, seed=5)]
    grads[1] = grads[1].astype(np.float64)
    together, apart = fs.GD(groups()), [fs.GD([group]) for group in groups()]
    for _ in range(4):
        together.step(grads)
        for optimizer, grad in zip(apart, grads, strict=True):
            optimizer.step([grad])
    expected = [p.tobytes() for optimizer in apart for p in params_of(optimizer)]
    assert [p.tobytes() for p in params_of(together)] == expected
    assert [sorted(entry) for entry in together.state.values()] == [
        ["momentum_buffer", "step"],
        ["momentum_buffer", "step"],
        ["step"],
    ]


def test_groups_take_the_defaults_they_do_not_set():
    optimizer = fs.AdamW([{"params": random(3)}, {"params": random(3), "lr": 1.0}], lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01]


def test_sgd_is_gd():
    assert fs.SGD is fs.GD


@every_kind
def test_none_leaves_a_parameter_and_its_step_alone(kind):
    optimizer = make(kind, named())
    optimizer.step({"w": random(3, 4), "b": random(5)})
    _, *state = optimizer.state[1].values()
    with assert_unchanged(params_of(optimizer)[1], *state):
        optimizer.step({"w": random(3, 4), "b": None})
        optimizer.step({"w": None, "b": None})
    assert steps_of(optimizer) == [2, 1]
    # Its next step is its own second one.
    other = make(kind, named())
    for grads in ({"w": random(3, 4), "b": random(5)},) * 2:
        other.step(grads)
    optimizer.step({"w": None, "b": random(5)})
    assert contents(optimizer)[:2] == contents(other)[:2]


@every_kind
def test_memmap_parameters_are_updated_on_disk(kind, tmp_path):
    p = np.memmap(tmp_path / "p", np.float32, "w+", shape=(5, 7))
    p[...] = random(5, 7)
    expected = random(5, 7)
    for params in (p, expected):
        make(kind, params).step(random(5, 7, seed=1))
    p.flush()
    assert (tmp_path / "p").read_bytes() == expected.tobytes()


@every_kind
@pytest.mark.parametrize("order", ["C", "F", "permuted", "every other"])
def test_state_is_aligned_and_laid_out_as_its_parameter(kind, order):
    p = {
        "C": random(3, 5, 7),
        "F": np.asfortranarray(random(3, 5, 7)),
        "permuted": random(3, 5, 7).transpose(1, 0, 2),
        "every other": random(3, 10, 7)[:, ::2],
    }[order]
    state = make(kind, p).state[0]
    for key in set(state) - {"step"}:
        assert state[key].ctypes.data % 64 == 0
        assert state[key].strides == np.zeros_like(p).strides
        assert (state[key].dtype, state[key].shape) == (p.dtype, p.shape)
        assert not state[key].any()


def test_repr():
    optimizer = fs.GD([{"params": [random(1), random(1)]}, {"params": random(1), "lr": 0.5}])
    assert repr(optimizer).splitlines() == [
        "GD(",
        "  group 0: 2 arrays, lr=0.001, momentum=0.0, dampening=0.0, nesterov=False, "
        "weight_decay=0.0, maximize=False",
        "  group 1: 1 arrays, lr=0.5, momentum=0.0, dampening=0.0, nesterov=False, "
        "weight_decay=0.0, maximize=False",
        ")",
    ]


# Hyper-parameters


@every_kind
def test_a_schedule_gets_the_number_of_the_step(kind):
    seen = {"lr": [], "weight_decay": []}

    def schedule(name):
        return lambda t: seen[name].append(t) or 0.1 / t

    p, q = random(6), random(6)
    scheduled = make(kind, p, lr=schedule("lr"), weight_decay=schedule("weight_decay"))
    plain = make(kind, q)
    assert seen == {"lr": [], "weight_decay": []}
    for t in range(1, 6):
        scheduled.step(random(6, seed=t))
        plain.param_groups[0].update(lr=0.1 / t, weight_decay=0.1 / t)
        plain.step(random(6, seed=t))
    assert seen == {"lr": [1, 2, 3, 4, 5], "weight_decay": [1, 2, 3, 4, 5]}
    assert p.tobytes() == q.tobytes()


def test_a_schedule_is_called_once_for_each_group():
    seen = []
    scheduled = {"params": [random(2), random(3)], "lr": lambda t: seen.append(t) or 0.1}
    optimizer = fs.Adam([scheduled, {"params": random(4)}])
    optimizer.step([[random(2), None], random(4)])
    optimizer.step([[None, None], random(4)])
    optimizer.step([[random(2), random(3)], None])
    # The second step moved nothing in the group, so its next step is still the second.
    assert seen == [1, 2, 2]
    assert steps_of(optimizer) == [2, 1, 2]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1.0, ValueError),
        (np.nan, ValueError),
        ("0.1", TypeError),
        (None, TypeError),
        (lambda t: 0.1, TypeError),
        (1e39, ValueError),
    ],
)
@every_kind
def test_a_schedule_that_returns_nonsense_changes_nothing(kind, value, error):
    optimizer = make(kind, [{"params": random(3)}, {"params": random(4), "lr": lambda t: value}])
    before = contents(optimizer)
    with pytest.raises(error, match="lr: "):
        optimizer.step([random(3), random(4)])
    assert contents(optimizer) == before


@every_kind
def test_a_schedule_that_raises_changes_nothing(kind):
    def fail(t):
        raise RuntimeError(f"no rate for step {t}")

    optimizer = make(kind, [{"params": random(3)}, {"params": random(4), "lr": fail}])
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match="no rate for step 1"):
        optimizer.step([random(3), random(4)])
    assert contents(optimizer) == before
    optimizer.param_groups[1]["lr"] = 0.1
    optimizer.step([random(3), random(4)])
    assert steps_of(optimizer) == [1, 1]


@every_kind
def test_a_schedule_may_use_its_optimizer(kind):
    seen = []

    def schedule(t):
        seen.append((optimizer.state[0]["step"], len(optimizer.state_dict()["param_groups"])))
        copy.deepcopy(optimizer.state)
        return 0.1

    optimizer = make(kind, random(3), lr=schedule)
    optimizer.step(random(3))
    optimizer.step(random(3))
    assert seen == [(0, 1), (1, 1)]


@every_kind
def test_a_schedule_that_removes_groups_is_too_late_for_its_step(kind):
    def schedule(t):
        optimizer.param_groups.clear()
        return 0.1

    first, last = random(3), random(4)
    optimizer = make(kind, [{"params": first, "lr": schedule}, {"params": last}])
    optimizer.step([random(3), random(4)])
    with assert_unchanged(first, last), pytest.raises(ValueError, match="param_groups"):
        optimizer.step([random(3), random(4)])


def test_nesterov_takes_a_schedule_for_dampening():
    optimizer = fs.GD(random(3), momentum=0.9, nesterov=True, dampening=lambda t: 0.0)
    optimizer.step(random(3))
    optimizer.param_groups[0]["dampening"] = lambda t: 0.1
    with pytest.raises(ValueError, match="nesterov"):
        optimizer.step(random(3))


def test_betas_change_between_steps():
    p, q, m, v = random(4), random(4), np.zeros(4, np.float32), np.zeros(4, np.float32)
    optimizer = fs.Adam(p)
    for t, beta in ((1, 0.5), (2, 0.75)):
        optimizer.param_groups[0]["betas"] = (beta, 0.9)
        optimizer.step(random(4, seed=t))
        fs.adam_step(q, random(4, seed=t), m, v, step=t, betas=(beta, 0.9))
    assert p.tobytes() == q.tobytes()


def test_a_name_whose_comparison_steps_the_optimizer_does_not_hang():
    optimizer = fs.GD({"w": random(3)})

    class Name:
        def __hash__(self):
            return hash("w")

        def __eq__(self, other):
            optimizer.step({"w": random(3)})
            return True

    optimizer.step({Name(): random(3)})
    assert optimizer.state[0]["step"] == 2


# Groups that come later


@every_kind
def test_a_group_can_be_added(kind):
    p, late = random(3), random(4, seed=1)
    optimizer = make(kind, p)
    optimizer.step(random(3, seed=2))
    optimizer.add_param_group({"params": {"late": late}, "lr": 0.5})
    with pytest.raises(TypeError, match="one entry for each parameter group"):
        optimizer.step(random(3, seed=2))
    optimizer.step([random(3, seed=3), {"late": random(4, seed=3)}])
    assert steps_of(optimizer) == [2, 1]
    alone = make(kind, random(4, seed=1), lr=0.5)
    alone.step(random(4, seed=3))
    assert late.tobytes() == params_of(alone)[0].tobytes()


@pytest.mark.parametrize(
    ("group", "error", "text"),
    [
        ({"params": [random(2), random(2).astype(int)]}, TypeError, r"params\[1\]\[1\]: int64"),
        ({"params": []}, ValueError, "no arrays"),
        ({"lr": 0.1}, TypeError, "param_groups.1.: expected a dict with 'params'"),
        ({"params": random(2), "rate": 0.1}, TypeError, "'rate'"),
        ({"params": random(2), "lr": -1}, ValueError, "param_groups.1.: lr"),
        (random(2), TypeError, "param_groups.1.: expected a dict"),
    ],
)
@every_kind
def test_a_refused_group_adds_nothing(kind, group, error, text):
    optimizer = make(kind, random(3))
    before = contents(optimizer)
    with pytest.raises(error, match=text):
        optimizer.add_param_group(group)
    assert contents(optimizer) == before
    assert len(optimizer.param_groups) == 1
    optimizer.step(random(3))
    optimizer.add_param_group({"params": random(2)})


# Loading


@pytest.mark.parametrize("kind", ["momentum", "adam", "amsgrad", "adamw"])
def test_state_dict_has_the_keys_of_pytorch(kind):
    torch = pytest.importorskip("torch")
    mine, options = make(kind, random(3)), KINDS[kind][1]
    mine.step(random(3))
    parameter = torch.nn.Parameter(torch.zeros(3))
    other = {"momentum": "SGD", "amsgrad": "Adam"}.get(kind) or type(mine).__name__
    theirs = getattr(torch.optim, other)([parameter], **options)
    parameter.grad = torch.ones(3)
    theirs.step()
    saved, expected = mine.state_dict(), theirs.state_dict()
    assert saved.keys() == expected.keys()
    assert saved["state"][0].keys() - {"step"} == expected["state"][0].keys() - {"step"}
    group, expected_group = saved["param_groups"][0], expected["param_groups"][0]
    assert group.keys() - {"bias_correction"} <= expected_group.keys()
    assert group["params"] == expected_group["params"] == [0]
    if kind == "momentum":
        return  # PyTorch's SGD keeps no step count
    # Its state loads into this one; of its group, what this one knows.
    expected["param_groups"] = [{**group, "lr": expected_group["lr"]}]
    mine.load_state_dict(expected)
    for key, value in expected["state"][0].items():
        assert np.array_equal(mine.state[0][key], value)


def trained(kind, params=None, **options):
    optimizer = make(kind, named() if params is None else params, **options)
    for t in range(3):
        optimizer.step({"w": random(3, 4, seed=t), "b": random(5, seed=t) if t else None})
    return optimizer


@every_kind
def test_a_loaded_optimizer_goes_on_bit_for_bit(kind):
    optimizer = trained(kind, lr=0.25)
    other = make(kind, {name: p.copy() for name, p in zip("wb", params_of(optimizer), strict=True)})
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert contents(other) == contents(optimizer)
    for each in (optimizer, other):
        each.step(named(seed=7))
    assert contents(other) == contents(optimizer)


@every_kind
def test_loading_matches_names_in_any_order(kind):
    optimizer = trained(kind)
    w, b = params_of(optimizer)
    other = make(kind, {"b": b.copy(), "w": w.copy()})
    other.load_state_dict(optimizer.state_dict())
    assert steps_of(other) == [2, 3]
    for key in set(optimizer.state[0]) - {"step"}:
        assert other.state[1][key].tobytes() == optimizer.state[0][key].tobytes()
    nameless = make(kind, [w.copy(), b.copy()])
    nameless.load_state_dict(optimizer.state_dict())
    assert steps_of(nameless) == [3, 2]


def test_loading_copies():
    optimizer, other = trained("adam"), make("adam", named())
    own = other.state[0]["exp_avg"]
    other.load_state_dict(optimizer.state_dict())
    assert other.state[0]["exp_avg"] is own
    assert not np.shares_memory(own, optimizer.state[0]["exp_avg"])


def test_an_optimizer_may_load_its_own_state_with_names_exchanged():
    optimizer = make("adam", {"x": random(4), "y": random(4, seed=1)})
    optimizer.step({"x": random(4, seed=2), "y": random(4, seed=3)})
    expected = [optimizer.state[i]["exp_avg"].tobytes() for i in (1, 0)]
    exchanged = optimizer.state_dict()
    exchanged["param_groups"][0]["param_names"] = ["y", "x"]
    optimizer.load_state_dict(exchanged)
    assert [optimizer.state[i]["exp_avg"].tobytes() for i in (0, 1)] == expected


def test_a_schedule_is_none_and_stays_with_its_optimizer():
    def rate(t):
        return 0.1

    optimizer = trained("adam", lr=lambda t: 0.5)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["lr"] is None
    other = make("adam", named(), lr=rate)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] is rate


def changed(path, value):
    """Set (or with ... delete) what lies at a path in a state_dict."""

    def change(saved):
        *parents, last = path
        for key in parents:
            saved = saved[key]
        if value is ...:
            del saved[last]
        else:
            saved[last] = value

    return change


BAD_STATES = {
    "no state": (changed(["state"], ...), ValueError, "no 'state'"),
    "no groups": (changed(["param_groups"], ...), ValueError, "no 'param_groups'"),
    "state is a list": (changed(["state"], []), TypeError, "state: expected a dict, got list"),
    "groups are a dict": (changed(["param_groups"], {}), TypeError, "groups: expected a list"),
    "group is a list": (changed(["param_groups", 0], []), TypeError, "[0]: expected a dict"),
    "entry is a list": (changed(["state", 1], []), TypeError, "state[1]: expected a dict"),
    "no params": (changed(["param_groups", 0, "params"], ...), ValueError, "no 'params'"),
    "params is a number": (changed(["param_groups", 0, "params"], 2), TypeError, "params: exp"),
    "too few groups": (changed(["param_groups"], []), ValueError, "0 parameter groups"),
    "unknown key": (changed(["param_groups", 0, "rate"], 1), ValueError, "unknown 'rate'"),
    "missing key": (changed(["param_groups", 0, "eps"], ...), ValueError, "no 'eps'"),
    "bad lr": (changed(["param_groups", 0, "lr"], -1), ValueError, "lr: "),
    "bad betas": (changed(["param_groups", 0, "betas"], (2, 0)), ValueError, "betas"),
    "amsgrad": (changed(["param_groups", 0, "amsgrad"], True), ValueError, "max_exp_avg_sq"),
    "too few": (changed(["param_groups", 0, "params"], [0]), ValueError, "1 parameters, but"),
    "other names": (changed(["param_groups", 0, "param_names"], ["w", "c"]), ValueError, "'b'"),
    "no array": (changed(["state", 1, "exp_avg_sq"], ...), ValueError, "no 'exp_avg_sq'"),
    "extra array": (changed(["state", 1, "sum"], random(5)), ValueError, "'sum' is no state"),
    "shape": (changed(["state", 1, "exp_avg"], random(6)), ValueError, "shape"),
    "dtype": (changed(["state", 1, "exp_avg"], random(5, dtype=float)), TypeError, "float64"),
    "no step": (changed(["state", 1, "step"], ...), ValueError, "step: "),
    "negative step": (changed(["state", 1, "step"], -1), ValueError, "step: "),
    "fractional step": (changed(["state", 1, "step"], 1.5), ValueError, "step: "),
    "huge step": (changed(["state", 1, "step"], 2**64), ValueError, "step: "),
    "last step of all": (changed(["state", 1, "step"], 2**63 - 1), ValueError, "step: "),
    "nan step": (changed(["state", 1, "step"], np.nan), ValueError, "step: "),
    "step text": (changed(["state", 1, "step"], "three"), ValueError, "step: "),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_refused_state_changes_nothing(case):
    change, error, text = BAD_STATES[case]
    saved = trained("adam").state_dict()
    change(saved)
    optimizer = make("adam", named(seed=5), lr=0.5)
    optimizer.step(named(seed=6))
    before = contents(optimizer)
    with pytest.raises((TypeError, ValueError, OverflowError)) as caught:
        optimizer.load_state_dict(saved)
    assert contents(optimizer) == before
    assert caught.type is error
    assert text in str(caught.value)


def test_momentum_state_needs_an_optimizer_with_momentum():
    optimizer = make("gd", named())
    before = contents(optimizer)
    with pytest.raises(ValueError, match="momentum_buffer"):
        optimizer.load_state_dict(trained("momentum").state_dict())
    assert contents(optimizer) == before


# Copies


def copies(optimizer):
    yield copy.deepcopy(optimizer)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(optimizer, protocol))


@every_kind
def test_copies_are_independent_and_go_on_bit_for_bit(kind):
    optimizer = trained(kind)
    before = contents(optimizer)
    for other in copies(optimizer):
        assert type(other) is type(optimizer)
        assert repr(other) == repr(optimizer)
        assert contents(other) == before
        for entry in other.state.values():
            for key in set(entry) - {"step"}:
                assert entry[key].ctypes.data % 64 == 0
        other.step(named(seed=9))
        assert contents(optimizer) == before
        after = contents(other)
    optimizer.step(named(seed=9))
    assert contents(optimizer) == after


@every_kind
def test_copies_keep_groups_names_and_structure(kind):
    optimizer = make(kind, random(3))
    optimizer.add_param_group({"params": {"w": random(2), "b": random(4)}, "lr": 0.5})
    optimizer.add_param_group({"params": (random(2), random(4))})
    grads = [random(3), {"w": random(2), "b": None}, [None, random(4)]]
    optimizer.step(grads)
    for other in copies(optimizer):
        assert contents(other) == contents(optimizer)
        other.step(grads)
        with pytest.raises(TypeError, match=r"grads\[1\]: expected a dict"):
            other.step([random(3), [random(2), random(4)], [None, None]])
    optimizer.step(grads)
    assert contents(other) == contents(optimizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@every_kind
def test_a_copy_of_params_and_optimizer_keeps_them_together(kind, copied):
    params = named()
    params, optimizer = copied((params, make(kind, params)))
    assert params_of(optimizer)[0] is params["w"]
    before = params["w"].copy()
    optimizer.step(named(seed=3))
    assert not np.array_equal(params["w"], before)


@every_kind
def test_a_copied_schedule_works(kind):
    optimizer = make(kind, random(3), lr=halved)
    for other in copies(optimizer):
        other.step(random(3))
        assert other.param_groups[0]["lr"] is halved


def halved(t):
    return 0.5**t
