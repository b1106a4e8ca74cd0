"""Least squares after a cut, against numpy, by hand, and on networks of every kind."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import networks
from dyncompress import DynCompress, DynCompressError, make_plan
from dyncompress.compensation import WarmStart, compensate
from dyncompress.conversion import convert, narrowed, plan_of, resolve, settle_norms
from dyncompress.layers import DynamicConv
from dyncompress.ridge import Problem
from dyncompress.samples import Sample, collect, patches_of
from tests.classifiers import classifier, equal, fit, loader, weights


def outputs(net: nn.Module, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([net.eval()(x) for x in batches])


# ---- one layer ---------------------------------------------------------------------------------------------------


def test_a_small_problem_equals_numpys_least_squares() -> None:
    """A ridge is least squares with sqrt(lam) I below the inputs, and sqrt(lam) W0 below the outputs."""
    rng = np.random.default_rng(0)
    h, y, w0 = rng.normal(size=(50, 6)), rng.normal(size=(50, 3)), rng.normal(size=(3, 6))
    for strength in (0.0, 0.3):
        lam = strength * np.diag(h.T @ h).mean()
        stacked = np.vstack([h, np.sqrt(lam) * np.eye(6)]), np.vstack([y, np.sqrt(lam) * w0.T])
        expected = np.linalg.lstsq(*stacked, rcond=None)[0].T
        problem = Problem(torch.tensor(w0), None, 1, centred=False)
        for part in (slice(0, 20), slice(20, 50)):  # streamed
            problem.add(torch.tensor(h[part])[None], torch.tensor(y[part]))
        solution = problem.solve(strength)
        assert np.abs(solution.weight.numpy() - expected).max() < 1e-10
        wanted = ((y - h @ expected.T) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert abs(solution.after - wanted) < 1e-10


def test_a_free_constant_equals_a_column_of_ones() -> None:
    rng = np.random.default_rng(1)
    h, y = rng.normal(size=(40, 4)) + 2, rng.normal(size=(40, 2)) - 3
    expected = np.linalg.lstsq(np.hstack([h, np.ones((40, 1))]), y, rcond=None)[0].T
    problem = Problem(torch.zeros(2, 4, dtype=torch.float64), torch.tensor([1.0, 2.0]), 1, centred=True)
    problem.add(torch.tensor(h)[None], torch.tensor(y))
    solution = problem.solve(0.0)
    assert np.abs(solution.weight.numpy() - expected[:, :4]).max() < 1e-10
    assert np.abs((solution.shift + torch.tensor([1.0, 2.0])).numpy() - expected[:, 4]).max() < 1e-10


def test_inputs_that_say_the_same_share_the_change() -> None:
    """Two equal inputs and y = 4 h: of all solutions the nearest to (1, 1) is (2, 2)."""
    h = torch.tensor([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]], dtype=torch.float64)
    problem = Problem(torch.ones(1, 2, dtype=torch.float64), None, 1, centred=False)
    problem.add(h[None], 4 * h[:, :1])
    assert torch.allclose(problem.solve(0.0).weight, torch.tensor([[2.0, 2.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.Conv2d(4, 8, (3, 2), (1, 2), (0, 3), (2, 1), groups=2),
        nn.Conv2d(4, 4, 3, padding="same", groups=4, padding_mode="reflect"),
        nn.Conv1d(4, 6, 4, 3, 1, padding_mode="circular"),
        nn.Conv3d(4, 2, 2, padding=1),
        nn.Linear(4, 5),
    ],
    ids=str,
)
def test_patches_times_the_weight_are_the_layers_output(layer: Any) -> None:
    size = (7, 6, 5)[: getattr(layer.weight, "ndim", 2) - 2]
    x = torch.randn(2, 4, *size) if size else torch.randn(2, 3, 4)
    out = layer(x)
    out = out.flatten(2).transpose(1, 2) if size else out
    places = torch.randint(out.shape[1], (2, 5))
    groups = getattr(layer, "groups", 1)
    kernel = layer.weight.reshape(groups, -1, layer.weight[0].numel())
    found = (patches_of(layer, x, places) @ kernel.mT).transpose(0, 1).flatten(1) + layer.bias
    assert torch.allclose(found.unflatten(0, (2, 5)), out.take_along_dim(places.unsqueeze(2), 1), atol=1e-5)


# ---- networks ----------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Linear up to a constant, and every channel is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            for layer in (self.one, self.two):
                layer.weight[8:], layer.bias[8:] = layer.weight[:8], layer.bias[:8]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("layer", "image", "out"),
    [(nn.Conv2d(3, 4, 3), (3, 5, 5), (9, 4)), (nn.Linear(6, 4), (6,), (1, 4))],
    ids=["conv", "linear"],
)
def test_an_image_without_a_batch_is_a_batch_of_one(layer: nn.Module, image: Any, out: tuple[int, int]) -> None:
    places, values, read = torch.arange(out[0])[None], torch.zeros(1, *out), list[Tensor]()
    calls = [[Sample(places, values, torch.tensor([False]))]]
    assert collect(nn.Sequential(layer), layer, [torch.ones(image)], calls, lambda x, _: read.append(x)) == ""
    assert [x.shape for x in read] == [(1, *image)]


def test_what_was_there_twice_is_recovered_when_one_of_each_is_cut() -> None:
    """Without the cut channels the next layer's weights on their twins are the sums of both."""
    torch.manual_seed(0)
    net = Chain().double()
    plan = make_plan(net, torch.zeros(1, 3, 8, 8).double(), "40%", "static")
    kept = tuple(range(8))
    plan = resolve(net, plan.__class__(**{**vars(plan), "keep": tuple(kept for _ in plan.keep)}))
    batches = [torch.randn(16, 3, 8, 8).double() for _ in range(2)]
    plain = narrowed(net, plan)
    assert (outputs(plain, batches) - outputs(net, batches)).abs().max() > 0.01
    compensate(plain, net, plan, batches, strength=0.0)
    assert (outputs(plain, batches) - outputs(net, batches)).abs().max() < 1e-8
    expected = net.two.weight[:8, :8] + net.two.weight[:8, 8:]
    assert torch.allclose(plain.two.weight, expected, atol=1e-8)


@pytest.mark.parametrize("strength", [0.0, 1e-3, 0.1, 10.0])
def test_no_layer_is_worse_than_the_cut_left_it(strength: float) -> None:
    net, x = networks.make(networks.Residual)
    plan = resolve(net, make_plan(net, x, "50%", "static"))
    fits = compensate(narrowed(net, plan), net, plan, [torch.randn(8, *x.shape[1:])], strength=strength)
    assert {f.module for f in fits} == {n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert all(f.after <= f.before + 1e-9 and not f.reason for f in fits)
    assert sum(f.after for f in fits) < 0.9 * sum(f.before for f in fits) or strength > 1


KINDS = [networks.Residual, networks.ZeroPad, networks.Dense, networks.Inverted, networks.Grouped]


@pytest.mark.parametrize("network", KINDS, ids=lambda network: network.__name__)
def test_it_comes_nearer_to_the_original(network: Any) -> None:
    """On the images that it is fitted on, the network's output as a whole is nearer than without."""
    net, x = networks.make(network)
    plan = resolve(net, make_plan(net, x, "50%", "static"))
    batches = [torch.randn(16, *x.shape[1:], generator=torch.Generator().manual_seed(i)) for i in range(2)]
    plain, wanted = narrowed(net, plan), outputs(net, batches)
    before = (outputs(plain, batches) - wanted).square().mean()
    compensate(plain, net, plan, batches)
    assert (outputs(plain, batches) - wanted).square().mean() < 0.5 * before


def test_one_dimension_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(4, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 16, 3, bias=False), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 6, 3),
    ).eval()  # fmt: skip
    batches = [torch.randn(64, 4, 8)]
    plan = resolve(net, make_plan(net, batches[0][:1], "50%", "static"))
    plain = narrowed(net, plan)
    before = (outputs(plain, batches) - outputs(net, batches)).square().mean()
    fits = compensate(plain, net, plan, batches)
    assert [f.module for f in fits] == ["0", "2", "6"] and not any(f.reason for f in fits)
    assert (outputs(plain, batches) - outputs(net, batches)).square().mean() < 0.5 * before


class Odd(nn.Module):
    """A transposed convolution, a weight used twice, a layer never called, and one whose calls are hidden in a try."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.a, self.b, self.twice = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.b.weight = self.a.weight
        self.never, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.stem(x)
        except Exception:  # noqa: BLE001 - as careless code has it
            x = x.new_zeros(len(x), 8, *x.shape[2:])
        return self.head(self.twice(self.twice(self.b(self.a(self.up(x))))).mean((2, 3)))


def test_what_is_not_fitted_has_a_reason_and_a_repeated_layer_is_fitted_on_all_its_calls() -> None:
    torch.manual_seed(0)
    net, x = Odd(), torch.randn(4, 3, 8, 8)
    plan = resolve(net, make_plan(net, x[:1], "60%", "static"))
    fits = {f.module: f for f in compensate(narrowed(net, plan), net, plan, [x, x[:2]])}
    assert fits["up"].reason == "it is a transposed convolution"
    assert fits["a"].reason == fits["b"].reason == "it shares its weight with another layer"
    assert fits["never"].reason == "it was not called on these batches"
    assert not fits["stem"].reason and not fits["twice"].reason


def test_settling_norms_changes_what_they_hold_and_not_what_they_compute() -> None:
    net, x = networks.make(networks.Residual)
    batch = 3 * torch.randn(32, *x.shape[1:]) + 1
    before, norm = outputs(net, [batch]), copy.deepcopy(net.stem[1])
    settle_norms(net, [batch])
    assert (outputs(net, [batch]) - before).abs().max() < 1e-4
    assert (net.stem[1].running_mean - norm.running_mean).abs().max() > 0.1
    training = copy.deepcopy(net).train()
    with torch.no_grad():  # the batch it was estimated on normalises alike, but for the n / (n - 1) of the variance
        assert (training(batch) - before).abs().max() < 0.02 * before.abs().max()


# ---- conversion and callback -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["static", "dynet"])
def test_both_arms_start_from_the_same_weights(method: str) -> None:
    net, x = networks.make(networks.Residual)
    plan = resolve(net, make_plan(net, x, "50%", method, options={"placement": "all"} if method == "dynet" else None))
    batches = [torch.randn(8, *x.shape[1:])]
    student = convert(net, plan, calibrate=batches)
    reference = narrowed(net, plan)
    compensate(reference, net, plan, batches)
    assert any(isinstance(m, DynamicConv) for m in student.modules()) == (method == "dynet")
    assert (outputs(student, batches) - outputs(reference, batches)).abs().max() < 1e-3


def test_same_seed_and_batches_same_student() -> None:
    net, x = networks.make(networks.Residual)
    before = copy.deepcopy(net.state_dict())
    plan, batches = make_plan(net, x, "50%"), [torch.randn(8, *x.shape[1:])]
    a, b = (convert(net, plan, seed=3, calibrate=batches).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    c = convert(net, plan, seed=3, calibrate=iter(batches), warm_start="plain").state_dict()
    assert any(not torch.equal(a[k], c[k]) for k in a if k.endswith("weight"))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_copies_hold_no_discarded_filters() -> None:
    """Around the static kernel, atoms of "copies" are noise of a fifth of its rms; discarded filters are elsewhere."""
    net, x = networks.make(networks.Residual)
    plan = make_plan(net, x, "50%", "dynet", options={"placement": "all"})
    banks = {b: convert(net, plan, warm_start=WarmStart(bank=b)).blocks[1].conv2.bank for b in ("filters", "copies")}
    static = narrowed(net, plan).blocks[1].conv2.weight.unsqueeze(1)
    away = {b: ((bank[:, 1:] - static).square().mean() / static.square().mean()).sqrt() for b, bank in banks.items()}
    assert abs(away["copies"] - 0.2) < 0.03 and away["filters"] > 0.5


class Start(DynCompress):
    """Keeps the weights that the first batch finds."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.start = getattr(self, "start", weights(pl_module.net))
        super().on_train_batch_start(trainer, pl_module, *args)


def test_the_callback_starts_as_convert_does() -> None:
    module, callback = classifier()(), Start("50%", recalibrate=2, seed=5)
    original = copy.deepcopy(module.net)
    fit(module, callback, limit_train_batches=1)
    plan = plan_of(module.net)
    assert plan is not None
    expected = convert(original, plan, seed=5, calibrate=[x for x, _ in list(loader())[:2]])
    assert all(torch.allclose(v, callback.start[k], atol=1e-6) for k, v in weights(expected).items())
    assert not equal(convert(original, plan, seed=5), callback.start)


def test_a_resumed_run_fits_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = classifier()()
    original = copy.deepcopy(module)
    fit(module, Start("50%"), limit_train_batches=1).save_checkpoint(tmp_path / "last.ckpt")

    def refuse(*_: Any) -> None:
        raise AssertionError("a trained student was given a start")

    monkeypatch.setattr("dyncompress.student.Student.started", refuse)
    trained, resumed = weights(module.net), Start("50%")
    again = fit(original, resumed, ckpt_path=tmp_path / "last.ckpt", limit_train_batches=1, max_epochs=2)
    assert again.global_step == 2
    assert all(torch.equal(v, resumed.start[k]) for k, v in trained.items())


@pytest.mark.parametrize("given", ["best", 3, None])
def test_an_unknown_warm_start_is_refused(given: Any) -> None:
    with pytest.raises(DynCompressError, match="choose 'ridge' or 'plain'"):
        DynCompress("50%", warm_start=given)


def test_bad_numbers_are_refused() -> None:
    for strength in (-1, float("nan"), True, "0.1"):
        with pytest.raises(DynCompressError, match="strength"):
            WarmStart(strength=strength)  # type: ignore[arg-type]
    with pytest.raises(DynCompressError, match="rows 0"):
        WarmStart(rows=0)
    net, x = networks.make(networks.Residual)
    plan = resolve(net, make_plan(net, x, "50%"))
    with pytest.raises(DynCompressError, match="no batch"):
        compensate(narrowed(net, plan), net, plan, [])
    with pytest.raises(DynCompressError, match="one tensor"):
        convert(net, plan, calibrate=x)
    with pytest.raises(DynCompressError, match=r"what 'stem\.0' reads"):
        convert(net, plan, calibrate=[x * float("nan")])
