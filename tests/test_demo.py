"""The demo: its network, its hand-written optimizers, its checks, and the whole of it once."""

import numpy as np
import pytest

import fusedstep as fs
from fusedstep.__main__ import main
from fusedstep.commands import demo, digits


class Console:
    def print(self, *args):
        pass


def test_gradients_agree_with_finite_differences():
    rng = np.random.default_rng(0)
    params = {name: p.astype(np.float64) for name, p in digits.init_params(rng).items()}
    images, labels = rng.random((5, 64)), np.array([0, 3, 9, 1, 3])
    _, grads = digits.loss_and_grads(params, images, labels)
    assert grads.keys() == params.keys()
    for name, p in params.items():
        index = np.unravel_index(np.argmax(np.abs(grads[name])), p.shape)
        middle, h = p[index], 1e-6
        losses = []
        for p[index] in (middle + h, middle - h):
            losses.append(digits.loss_and_grads(params, images, labels)[0])
        p[index] = middle
        assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(grads[name][index], rel=1e-5)


@pytest.mark.parametrize("contest", demo.CONTESTS, ids=lambda contest: contest.name)
def test_both_sides_of_the_comparison_do_the_same(contest):
    rng = np.random.default_rng(0)
    start = {"w": rng.standard_normal((3, 4)), "b": rng.standard_normal(4)}
    sides = []
    for make_optimizer in (contest.fused, contest.plain):
        params = {name: p.copy() for name, p in start.items()}
        optimizer = make_optimizer(params, lambda t: contest.lr / t)
        for t in range(5):
            optimizer.step({name: np.cos(t + p) for name, p in start.items()})
        sides.append(params)
    for name in start:
        assert not np.array_equal(sides[0][name], start[name])
        np.testing.assert_allclose(sides[0][name], sides[1][name], rtol=1e-12)


def test_bowl_check_fails_on_a_slightly_wrong_step(monkeypatch):
    pytest.importorskip("rich")
    assert demo.check_bowl(0, Console())
    correct = fs.gd_step
    monkeypatch.setattr(fs, "gd_step", lambda p, g, *, lr: correct(p, g, lr=lr * 1.0001))
    assert not demo.check_bowl(0, Console())


@pytest.mark.parametrize(("accuracy", "ok"), [(0.975, True), (0.965, False)])
def test_digits_check_fails_below_the_required_accuracy(accuracy, ok):
    pytest.importorskip("rich")
    good = demo.History([0.1], [0.99], [1e-6], 1.0)
    weak = demo.History([0.1], [accuracy], [1e-6], 1.0)
    assert demo.check_digits({"GD": (good, good), "Adam": (weak, good)}, Console()) is ok


def test_demo(tmp_path, capsys):
    for module in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(module)
    assert main(["demo", "--quick", "--output", str(tmp_path / "new" / "folder")]) == 0
    assert "FAILED" not in capsys.readouterr().out
    picture = (tmp_path / "new" / "folder" / "loss_curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
