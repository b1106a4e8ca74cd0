"""docs/adding_a_method.md: its example, as it stands there, is a method like any other."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dyncompress as dc
from dyncompress.cli import main
from dyncompress.errors import CheckpointError, DynCompressError, PlanError, UnknownMethodError
from dyncompress.layers import ConvSite, ConvSpec, Macs, Static, list_methods, method
from dyncompress.recipe import read_recipe
from tests.layers.contract import BLOCKS, CLAUSES, keeps

PAGE = Path(__file__).parents[1] / "docs/adding_a_method.md"
MODULE = "gated_of_the_page"


@pytest.fixture
def gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's block as a module of its own; what it registers is forgotten afterwards."""
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S) if "@reg" in b)
    (tmp_path / f"{MODULE}.py").write_text(block, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with monkeypatch.context() as registry:
        registry.setattr(method, "_METHODS", dict(method._METHODS))
        yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)
    assert "gated" not in list_methods()


@pytest.mark.parametrize("block", BLOCKS)
def test_it_keeps_the_contract(gated: Any, block: str) -> None:
    for clause in CLAUSES:
        keeps(gated.Gated(), clause, block)


def test_it_keeps_the_contract_with_options(gated: Any) -> None:
    for clause in CLAUSES:
        keeps(gated.Gated(hidden=3, placement="all"), clause, "2d")


def test_the_contract_notices_what_is_wrong(gated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, spec: ConvSpec) -> int:
        return spec.in_channels

    monkeypatch.setattr(gated.Gated, "_router", wrong)
    for clause in ("macs_are_what_torch_counts", "params_are_what_torch_holds"):
        with pytest.raises(AssertionError):
            keeps(gated.Gated(), clause, "2d")


def test_one_channel_by_hand(gated: Any) -> None:
    (layer,) = gated.Gated().build([ConvSite("c", ConvSpec(1, 1, (1,)), positions=2)])
    for parameter, value in (
        (layer.bank, 2.0),
        (layer.bias, 0.5),
        (layer.router.weight, 1.0),
        (layer.router.bias, -1.0),
    ):
        nn.init.constant_(parameter, value)
    # Positions 1 and 3 have the mean 2: a gate of 1 + tanh(2 - 1) = 1.76159.
    assert layer(torch.tensor([[[1.0, 3.0]]])).flatten().tolist() == pytest.approx([4.02319, 11.06956], abs=1e-5)
    assert gated.Gated(hidden=4).macs([ConvSite("c", ConvSpec(8, 16, (3,)), 10)]) == [Macs(3840, 0, 96)]
    assert gated.Gated().place(ConvSite("c", ConvSpec(8, 8, (3,)), 10))[0] == Static()
    with pytest.raises(DynCompressError, match="hidden -1 is no number of units"):
        gated.Gated(hidden=-1)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    net(torch.randn(16, 3, 16, 16))  # BatchNorm has statistics
    return net.eval()


def test_it_plans_converts_trains_folds_saves_and_exports(gated: Any, tmp_path: Path) -> None:
    net, example = network(), torch.randn(2, 3, 16, 16)
    plan = dc.make_plan(net, example, "50%", "gated", options={"hidden": 8})
    assert plan.ratio == pytest.approx(0.5, rel=0.02)
    student = dc.convert(net, plan)
    assert sum(isinstance(layer, gated.GatedConv) for layer in student.modules()) == 2  # the first one stays static
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    student(example).square().sum().backward()
    optimizer.step()
    student.eval()
    expected = student(example)
    torch.testing.assert_close(dc.fold(student)(example), expected, rtol=1e-4, atol=1e-5)
    bundle = dc.save(student, tmp_path / "student.safetensors")
    torch.save({"state_dict": student.state_dict()}, tmp_path / "student.ckpt")
    for path in (bundle, tmp_path / "student.ckpt"):
        assert torch.equal(dc.load(path, network()).eval()(example), expected)
    program = torch.export.load(dc.export(student, tmp_path / "student.pt2", example)).module()
    torch.testing.assert_close(program(example), expected, rtol=1e-4, atol=1e-5)


def test_it_is_listed(gated: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    # 64 * 64 products of the router beside 36,864 weights at 784 positions
    assert re.search(r"gated +a scale per channel +layer +1\.000 +- +0\.0001 +1\.000 +1\.11", out)


def test_a_recipe_knows_what_its_network_s_module_registers(
    gated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(method._METHODS, "gated")
    sys.modules.pop(MODULE)
    (tmp_path / "net_of_mine.py").write_text(f"from {MODULE} import Gated\n\nclass Net: ...\n", "utf-8")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {class_path: net_of_mine.Net}\ndata: {class_path: x.Y}\ntarget: 50%\n", "utf-8")
    words = [str(recipe), "--method", "gated", "--options", '{"hidden": 4}']
    assert read_recipe(words).options == {"hidden": 4}
    sys.modules.pop("net_of_mine")


def test_files_of_a_method_that_is_not_imported_say_so(gated: Any, tmp_path: Path, monkeypatch: Any) -> None:
    net, example = network(), torch.randn(2, 3, 16, 16)
    student = dc.convert(net, plan := dc.make_plan(net, example, "50%", "gated"))
    bundle = dc.save(student, tmp_path / "student.safetensors")
    monkeypatch.delitem(method._METHODS, "gated")
    what = "no method 'gated'; known: auto, c2sp, .*once the module that registers it is imported"
    with pytest.raises(PlanError, match=what):
        dc.Plan.from_json(plan.to_json())
    with pytest.raises((PlanError, CheckpointError), match=what):
        dc.load(bundle, network())
    with pytest.raises(UnknownMethodError, match=what):
        dc.make_plan(net, example, "50%", "gated")
