"""Presets on small networks of the papers' forms: placement, widths, targets, exact starts, and every way in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from benchmarks.zoo import LIBRARIES, ROOT, environment
from classifiers import classifier, fit
from dyncompress import DynCompress, Plan, convert, export, load_from_checkpoint, make_plan
from dyncompress.conversion import narrowed, plan_of
from dyncompress.errors import DynCompressError, PlanError
from dyncompress.presets import find_preset, list_presets
from dyncompress.recipe import Recipe
from newer import writes_onnx
from papers.mobiles import Inverted, Shuffled, conv
from papers.resnets import Block, ConvNeXtBlock, Norm

Classifier = classifier()
IMAGE = torch.zeros(1, 3, 32, 32)


class Head(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((2, 3)))


def basic() -> nn.Module:
    blocks = [Block(16, 16, 1, 1, False, False), Block(16, 32, 2, 1, True, False)]
    return nn.Sequential(conv(3, 16, 3, act=nn.ReLU), *blocks, Head(32))


def bottleneck() -> nn.Module:
    blocks = [Block(16, 16, 1, 4, True, False), Block(64, 16, 1, 4, False, False)]
    return nn.Sequential(conv(3, 16, 3, act=nn.ReLU), *blocks, Head(64))


def mobile(gate: bool = False) -> nn.Module:
    act = nn.ReLU
    blocks = [Inverted(16, 96, 16, 3, 1, act, gate), Inverted(16, 96, 24, 3, 2, act, gate)]
    return nn.Sequential(conv(3, 16, 3, 2, act=act), *blocks, conv(24, 48, 1, act=act), Head(48))


def shuffle() -> nn.Module:
    blocks = [Shuffled(16, 64, 2), Shuffled(64, 64, 1)]
    return nn.Sequential(conv(3, 16, 3, act=nn.ReLU), *blocks, conv(64, 64, 1, act=nn.ReLU), Head(64))


def convnext() -> nn.Module:
    blocks = [ConvNeXtBlock(16), nn.Sequential(Norm(16), nn.Conv2d(16, 32, 2, 2)), ConvNeXtBlock(32)]
    for i in (0, 2):
        nn.init.ones_(blocks[i].scale)  # so that what a block computes is seen behind it
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 2, 2), Norm(16)), *blocks, Head(32))


FORMS = {
    "basic": basic,
    "bottleneck": bottleneck,
    "mobile": mobile,
    "gated": lambda: mobile(gate=True),
    "shuffle": shuffle,
    "linear": convnext,
}
SMALL = [preset.name for preset in list_presets() if preset.form in FORMS]
# One of every method and form; kernels of a warehouse at a ratio below 1 only come near the static ones.
EXACT = [name for name in SMALL if find_preset(name).method != "kernelwarehouse"]


def settled(net: nn.Module) -> nn.Module:
    """A network whose BatchNorms have seen something."""
    net(torch.randn(8, 3, 32, 32))
    return net.eval()


@pytest.mark.parametrize("name", EXACT)
def test_a_preset_starts_exactly_trains_and_comes_back_from_its_file(name, tmp_path):
    net = settled(FORMS[find_preset(name).form]())
    plan = make_plan(net, IMAGE, preset=name)
    assert plan.allocation == name
    assert any(choice.method.name == find_preset(name).method for choice in plan.choices)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    student = convert(net, plan)
    assert sum(p.numel() for p in student.parameters()) == plan.params_after
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(student.eval()(x), narrowed(net, plan)(x), rtol=1e-3, atol=1e-4)
    student.train()
    nn.functional.cross_entropy(student(x), torch.tensor([0, 1])).backward()
    grads = [p.grad for p in student.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    torch.optim.SGD(student.parameters(), 0.01).step()
    assert student(x).isfinite().all()


def test_dy_resnet_halves_what_its_blocks_write_and_nothing_else():
    plan = make_plan(basic(), IMAGE, preset="dy-resnet18")
    widths = {row.name: (row.out_after, row.method) for row in plan.layers}
    assert widths == {
        "0.0": (8, "static"),  # added to what the first block writes
        "1.body.0.0": (8, "dynet"),
        "1.body.2.0": (8, "dynet"),
        "2.body.0.0": (16, "dynet"),
        "2.body.2.0": (16, "dynet"),
        "2.shortcut.0": (16, "dynet"),
        "3.fc": (3, "static"),
    }
    projected = make_plan(bottleneck(), IMAGE, preset="dy-resnet50")
    assert projected.layers[0].out_after == 16


def test_dy_mobile_has_no_expansion_and_groups_of_six():
    net = mobile()
    plan = make_plan(net, IMAGE, preset="dy-mobile")
    assert [row.out_after for row in plan.layers] == [16, 18, 18, 16, 24, 24, 24, 48, 3]
    student = convert(net, plan)
    assert [student.get_submodule(f"{i}.body.1.0").groups for i in (1, 2)] == [3, 4]
    assert student.get_submodule("1.body.1.0").bank.shape == (18, 6, 6, 3, 3)


def test_dy_shuffle_narrows_branches_that_the_split_feeds():
    net = shuffle()
    plan = make_plan(net, IMAGE, preset="dy-shuffle")
    rows = {row.name: row for row in plan.layers}
    assert rows["2.right.1.0"].out_after == 8
    assert rows["1.right.1.0"].out_after == 32
    assert rows["1.left.0.0"].method == rows["1.left.1.0"].method == "static"
    student = convert(net, plan)
    assert student.get_submodule("2.right.1.0").groups == 2
    assert student.get_submodule("1.right.1.0").groups == 32


def test_odconv_leaves_stem_and_shortcuts():
    plan = make_plan(bottleneck(), IMAGE, preset="odconv-resnet50-4x")
    methods = {choice.name: choice.method.name for choice in plan.choices}
    assert {name for name, method in methods.items() if method == "static"} == {"0.0", "1.shortcut.0"}
    assert plan.widths == [group.channels for group in plan.graph.groups]


LINEAR = {f"{block}.{layer}" for block in (1, 3) for layer in ("expand", "project")}


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("odconv-convnextt-1x", LINEAR | {"1.depthwise", "3.depthwise", "2.1"}),
        ("odconv-convnextt-4x", LINEAR | {"1.depthwise", "3.depthwise", "2.1"}),
        ("dcd-convnextt", LINEAR),
    ],
)
def test_of_a_convnext_linear_layers_are_dynamic_too(name, dynamic):
    plan = make_plan(convnext(), IMAGE, preset=name)
    reasons = {c.name: c.reason for c in plan.choices if c.method.name == "static"}
    assert {c.name for c in plan.choices} - reasons.keys() == dynamic
    assert reasons["4.fc"] == f"static: classifier, which {name} leaves as it is"
    assert plan.widths == [group.channels for group in plan.graph.groups]


def test_macs_of_linear_layers_by_hand():
    """16 -> 64 on 16x16 tokens: attention to 16 + 64 channels from 16 units; a latent space of 4, 4 hidden units."""
    for name, kernels, router in (
        ("odconv-convnextt-1x", 0, 16 * (16 + 16 + 64)),
        ("odconv-convnextt-4x", 4 * 16 * 64, 16 * (16 + 16 + 64 + 4)),
        ("dcd-convnextt", 4 * (16 + 4 + 64) * 256, 4 * (16 + 4 + 16 + 64)),
    ):
        plan = make_plan(convnext(), IMAGE, preset=name)
        found = plan.costs.layers(plan.widths)["1.expand"][0]
        assert (found.conv, found.kernels, found.router) == (16 * 64 * 256, kernels, router)


class Tokens(Classifier):
    """Of 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = convnext()


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("odconv-convnextt-1x", "pt2"),
        pytest.param("odconv-convnextt-4x", "onnx", marks=writes_onnx),
        ("dcd-convnextt", "pt2"),
    ],
)
def test_a_convnext_is_trained_saved_loaded_and_exported(name, suffix, tmp_path):
    if suffix == "onnx":
        pytest.importorskip("onnxruntime")
    module = Tokens()
    fit(module, DynCompress(preset=name), limit_train_batches=2).save_checkpoint(tmp_path / "a.ckpt")
    plan = plan_of(module.net)
    assert plan is not None and plan.allocation == name
    loaded = load_from_checkpoint(Tokens, tmp_path / "a.ckpt").eval()
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(loaded(x), module.eval()(x))
    assert export(loaded.net, tmp_path / f"a.{suffix}", x).is_file()  # which is compared with the student before


def test_a_target_is_landed_on_with_the_papers_placement():
    plan = make_plan(basic(), IMAGE, "40%", preset="odconv-resnet18-1x")
    assert 0.38 < plan.ratio <= 0.4
    assert {c.name for c in plan.choices if c.method.name == "odconv"} == {
        "1.body.0.0", "1.body.2.0", "2.body.0.0", "2.body.2.0"
    }  # fmt: skip
    assert plan.allocation == "uniform"


def test_options_go_before_the_presets_and_layers_can_be_left_alone():
    plan = make_plan(basic(), IMAGE, preset="dy-resnet18", options={"g": 2}, ignore=["1.body.0.0"], static=["2.*"])
    found = {c.name: c.method for c in plan.choices}
    assert plan.options["g"] == 2
    assert found["1.body.2.0"].g == 2
    assert found["1.body.0.0"].name == found["2.body.0.0"].name == "static"
    rows = {row.name: row.out_after for row in plan.layers}
    assert rows["1.body.0.0"] == rows["1.body.2.0"] == 16
    assert rows["2.body.2.0"] == 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "dy-resnet-18"}, "did you mean 'dy-resnet18'"),
        ({"preset": 7}, "no preset 7; choose one of dcd-convnextt"),
        ({"preset": "dy-resnet50"}, "looked for a ResNet of bottlenecks .* by role: 1 stem, 4 block, 1 shortcut"),
        ({"preset": "dy-mobile"}, "looked for a MobileNetV2"),
        ({"preset": "dy-resnet18", "method": "odconv"}, "'odconv' is given beside preset 'dy-resnet18'"),
        ({"preset": "dy-resnet18", "options": {"kernels": 4}}, "method 'dynet' has no option 'kernels'"),
        ({"preset": "dy-resnet18", "allocation": "importance"}, "and no target"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(DynCompressError, match=message):
        make_plan(basic(), IMAGE, **given)


def test_the_callback_takes_a_preset():
    module = Classifier()
    module.net = basic()
    callback = DynCompress(preset="dy-resnet18", options={"g": 2})
    assert callback.method == "dynet"
    fit(module, callback, limit_train_batches=2)
    plan = plan_of(module.net)
    assert plan is not None
    assert plan.allocation == "dy-resnet18"
    with pytest.raises(PlanError, match="beside a plan"):
        DynCompress(preset="dy-resnet18", plan=plan)
    with pytest.raises(PlanError, match="no preset"):
        DynCompress(preset="dy-resnet19000")


def test_a_recipe_takes_a_preset_and_is_read_back_as_it_was_written():
    recipe = Recipe(model={}, data={}, preset="odconv-resnet18-4x")
    assert recipe.method == "odconv"
    assert recipe.target is None
    assert Recipe(model={}, data={}, preset="odconv-resnet18-4x", method="odconv") == recipe
    with pytest.raises(PlanError, match="beside preset"):
        Recipe(model={}, data={}, preset="odconv-resnet18-4x", method="dynet")
    with pytest.raises(DynCompressError, match="target"):
        Recipe(model={}, data={})


OTHERS = """
import benchmarks.operators, timm, torch
import dyncompress as dc
for net, preset in (("resnet18", "dy-resnet18"), ("resnet50", "odconv-resnet50-1x"), ("mobilenetv2_100", "dy-mobile"),
                    ("mobilenetv3_small_100", "dycnn-mobilenetv3"), ("convnext_tiny", "odconv-convnextt-1x"),
                    ("convnext_tiny", "dcd-convnextt")):
    plan = dc.make_plan(timm.create_model(net), torch.zeros(1, 3, 64, 64), preset=preset)
    print(net, sum(c.method.name != "static" for c in plan.choices))
"""


@pytest.mark.slow
@pytest.mark.skipif(not (LIBRARIES / "installed").exists(), reason="run `make .zoo/installed`")
def test_networks_of_other_people_have_the_same_roles():
    command = [sys.executable, "-c", OTHERS]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment()}, check=True, capture_output=True, text=True
    )
    # 16 block convolutions and 3 shortcuts; 48; 17 depthwise ones and 33 others without stem and head; 33 outside
    # gates; 18 depthwise ones, 3 between the stages and 36 linear layers; these alone
    assert done.stdout.splitlines() == [
        "resnet18 19", "resnet50 48", "mobilenetv2_100 50", "mobilenetv3_small_100 33", "convnext_tiny 57",
        "convnext_tiny 36",
    ]  # fmt: skip
