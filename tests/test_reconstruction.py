"""Dynamics that are fitted before training: what a layer depended on is found again, and no layer gets worse."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import networks
from dyncompress import DynCompress, DynCompressError, make_plan
from dyncompress.compensation import Fit, WarmStart, evaluating
from dyncompress.conversion import convert, plan_of, resolve
from dyncompress.gradual import channels_of
from dyncompress.layers import DynamicConv
from dyncompress.narrowing import positions
from dyncompress.recipe import read_recipe
from dyncompress.reconstruction import reconstruct
from tests.classifiers import Net, classifier, equal, fit, loader, weights

FITTED = WarmStart(dynamics="fitted")
ALL = {"placement": "all"}
METHODS: dict[str, dict[str, Any]] = {
    "dynet": ALL, "condconv": ALL, "dyconv": ALL, "odconv": ALL, "dcd": ALL, "drconv": ALL, "kernelwarehouse": ALL
}  # fmt: skip


def images(count: int = 20) -> list[Tensor]:
    """Of different brightness, so that there is something to tell them by."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return list((x + 2 * torch.randn(count, 1, 1, 1, generator=generator)).split(8))


class Two(nn.Module):
    """A convolution that stays static, and one that becomes dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


def of_layer(net: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """What a layer computes on all images."""
    seen: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out))
    with evaluating(net), torch.no_grad():
        for x in batches:
            net(x)
    handle.remove()
    return torch.cat(seen)


def whole(method: str) -> tuple[nn.Module, Any]:
    """A network and a plan that keeps all of its channels, and makes ``two`` dynamic."""
    torch.manual_seed(0)
    net = Two()
    plan = make_plan(net, torch.zeros(1, 3, 8, 8), "60%", method, options=ALL)
    return net, dataclasses.replace(plan, keep=tuple(tuple(range(group.channels)) for group in plan.graph.groups))


# ---- one layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dynet", "condconv"])
def test_a_router_is_found_again(method: str) -> None:
    """The original's layer is the student's, with a router that sees the input: nine tenths of that are explained."""
    net, plan = whole(method)
    student = convert(net, plan)
    original = copy.deepcopy(student)
    layer: Any = original.two
    nn.init.normal_(layer.router.weight, std=1.0)
    batches = images(160)
    before = (of_layer(student, "two", batches) - of_layer(original, "two", batches)).square().mean()
    (found, _) = reconstruct(student, original, plan, batches, rate=3e-2)
    after = (of_layer(student, "two", batches) - of_layer(original, "two", batches)).square().mean()
    assert found.module == "two" and found.before > 0.01
    assert found.after < 0.1 * found.before and after < 0.1 * before


def held_out(net: nn.Module, original: nn.Module, kept: list[int], batches: list[Tensor]) -> Tensor:
    """Mean squared error of ``two`` on every fifth image."""
    away = of_layer(net, "two", batches) - of_layer(original, "two", batches)[:, kept]
    return away[4::5].square().mean()


@pytest.mark.parametrize(("method", "rate"), [("dynet", 1e-3), ("dynet", 1e3), ("odconv", 1e-2), ("dcd", 1.0)])
def test_no_layer_gets_worse_on_images_that_are_held_out(method: str, rate: float) -> None:
    torch.manual_seed(1)
    net, batches = Two(), images(40)
    plan = resolve(net, make_plan(net, batches[0][:1], "60%", method, options=ALL))
    rows = 40 * 64  # every place of every image
    student = convert(net, plan, calibrate=batches)
    start = copy.deepcopy(student)
    found = {f.module: f for f in reconstruct(student, net, plan, batches, rows=rows, rate=rate)}
    kept = positions(plan.graph.axes["two.weight:0"], channels_of(plan))
    before, after = (held_out(each, net, kept, batches) for each in (start, student))
    assert after <= before * (1 + 1e-5)
    assert abs(found["two"].after / found["two"].before - after / before) < 1e-3


# ---- networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_through(method: str) -> None:
    net, x = networks.make(Net)
    batches = images()
    plan = resolve(net, make_plan(net, x, "70%", method, options=METHODS[method]))
    zero = convert(net, plan, calibrate=batches)
    student = convert(net, plan, calibrate=batches, warm_start=FITTED)
    layers = [m for m in student.modules() if isinstance(m, DynamicConv)]
    assert layers and all(p.isfinite().all() for p in student.parameters())
    assert not equal(zero, student.state_dict())
    with torch.no_grad():
        assert all(student.eval()(b).isfinite().all() for b in batches)


def test_cells_that_layers_share_are_not_moved_by_one_of_them() -> None:
    net, x = networks.make(Net)
    plan = resolve(net, make_plan(net, x, "70%", "kernelwarehouse", options=ALL))
    student = convert(net, plan)
    before = weights(student)
    reconstruct(student, net, plan, images())
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert {"conv1.cells", "conv2.cells"} <= before.keys() - moved and "conv2.router.weight" in moved


def test_every_layer_is_at_most_as_far_away_as_it_starts() -> None:
    net, x = networks.make(Net)
    batches = images()
    plan = resolve(net, make_plan(net, x, "70%", "dynet", options=ALL))
    student = convert(net, plan)
    found = reconstruct(student, net, plan, batches)
    dynamic = {name for name, m in student.named_modules() if isinstance(m, DynamicConv)}
    assert {f.module for f in found} >= dynamic and all(f.after <= f.before and not f.reason for f in found)
    assert [f.module for f in found] == ["conv1", "conv2", "linear"]


def test_a_static_student_is_what_it_was() -> None:
    net, x = networks.make(Net)
    plan, batches = make_plan(net, x, "50%", "static"), images()
    zero, fitted = (convert(net, plan, calibrate=batches, warm_start=each) for each in (WarmStart(), FITTED))
    assert equal(zero, fitted.state_dict())


def test_same_seed_same_student_and_the_network_is_left_alone() -> None:
    net, x = networks.make(Net)
    before = copy.deepcopy(net.state_dict())
    plan, batches = make_plan(net, x, "70%", "dynet", options=ALL), images()
    torch.manual_seed(1)
    a = convert(net, plan, seed=3, calibrate=batches, warm_start=FITTED)
    torch.manual_seed(2)
    b = convert(net, plan, seed=3, calibrate=iter(batches), warm_start=FITTED)
    assert equal(a, b.state_dict()) and equal(net, before)
    assert all(p.grad is None and p.requires_grad for p in a.parameters())


def test_in_training_mode_it_starts_from_what_it_computes() -> None:
    net, x = networks.make(Net)
    batches = [torch.cat(images(32))]
    student = convert(net, make_plan(net, x, "70%", "dynet", options=ALL), calibrate=batches, warm_start=FITTED)
    with torch.no_grad():
        wanted = student.eval()(batches[0])
        assert (student.train()(batches[0]) - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_temperatures_are_at_their_end_where_dynamics_are_fitted() -> None:
    net, x = networks.make(Net)
    plan, batches = resolve(net, make_plan(net, x, "70%", "odconv", options=ALL)), images()
    student: Any = convert(net, plan)
    layers = {name: m for name, m in student.named_modules() if isinstance(m, DynamicConv)}
    assert {float(m.temperature.value) for m in layers.values()} == {30.0}
    better = {f.module for f in reconstruct(student, net, plan, batches) if f.after < f.before}
    assert "conv1" in better
    assert all(float(m.temperature.value) == (1.0 if name in better else 30.0) for name, m in layers.items())


def test_too_few_images_leave_a_layer_as_it_is() -> None:
    net, plan = whole("dynet")
    student = convert(net, plan)
    before = copy.deepcopy(student.state_dict())
    found = reconstruct(student, copy.deepcopy(student), plan, [torch.randn(4, 3, 8, 8)])
    assert found[0] == Fit("two", reason="there are fewer than 5 images, of which one in 5 is held out")
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in before.items() if k.startswith("two"))


# ---- callback and recipe -----------------------------------------------------------------------------------------


class Start(DynCompress):
    """Keeps the weights that the first batch finds."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.start = getattr(self, "start", weights(pl_module.net))
        super().on_train_batch_start(trainer, pl_module, *args)


def test_the_callback_starts_as_convert_does() -> None:
    module = classifier()()
    callback = Start("70%", method="dynet", options=ALL, recalibrate=4, seed=5, warm_start=FITTED)
    original = copy.deepcopy(module.net)
    fit(module, callback, limit_train_batches=1)
    plan = plan_of(module.net)
    assert plan is not None
    batches = [x for x, _ in loader()]
    expected = convert(original, plan, seed=5, calibrate=batches, warm_start=FITTED)
    assert all(torch.allclose(v, callback.start[k], atol=1e-5) for k, v in weights(expected).items())
    assert not equal(convert(original, plan, seed=5, calibrate=batches), callback.start)


def test_a_recipe_asks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: {class_path: digits.Digits}\ndata: {class_path: digits.DigitsData}\ntarget: 33%\n"
        "warm_start: {fit: ridge, dynamics: fitted}\n",
        "utf-8",
    )
    assert read_recipe([str(path)]).warm_start == FITTED
    with pytest.raises(DynCompressError, match=r"warmup 0\.2 starts layers static"):
        read_recipe([str(path), "--warmup", "0.2"])


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(DynCompressError, match="choose 'zero' or 'fitted'"):
        WarmStart(dynamics="best")  # type: ignore[arg-type]
    with pytest.raises(DynCompressError, match="choose fit 'ridge'"):
        WarmStart(fit="plain", dynamics="fitted")
    with pytest.raises(DynCompressError, match="no batch to be fitted on"):
        DynCompress("50%", warm_start=FITTED, recalibrate=0)
    with pytest.raises(DynCompressError, match="choose warmup 0"):
        DynCompress("50%", warm_start=FITTED, warmup=0.2)
    net, x = networks.make(Net)
    plan = make_plan(net, x, "70%", "dynet", options=ALL)
    with pytest.raises(DynCompressError, match="as calibrate"):
        convert(net, plan, warm_start=FITTED)
    with pytest.raises(DynCompressError, match="is not finite"):
        convert(net, plan, calibrate=[b * float("nan") for b in images()], warm_start=FITTED)
