"""Linear layers as operations that a method can replace: pointwise convolutions over the tokens of an image."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompress as dc
from dyncompress.conversion import narrowed
from dyncompress.cost import count_params, measure_macs
from dyncompress.errors import PlanError
from dyncompress.layers import ConvSite, ConvSpec, Dcd, KernelWarehouse, Method, ODConv, Static, TokenConv
from dyncompress.layers.warehouse import WarehouseConv
from dyncompress.plan import Plan
from dyncompress.planning import make_plan, reachable
from dyncompress.schedules import anneal


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attn = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norms[0](x))
        return x + self.fc2(F.gelu(self.fc1(self.norms[1](x))))


class ViT(nn.Module):
    """Patches of 4x4 of 32x32 images, and a class token."""

    def __init__(self, width: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token, self.places = (nn.Parameter(torch.randn(1, n, width)) for n in (1, 65))
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Encoder(nn.Module):
    """Torch's own encoder layer, whose code reads the weights of its linear layers; one has the batch second."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 16, 4, 4), batch_first
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2)
        x = x.mT if self.first else x.permute(2, 0, 1)
        return self.head(self.mix(self.layer(x)).mean(1 if self.first else 0))


IMAGES = torch.randn(2, 3, 32, 32)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return ViT().eval()


@pytest.fixture(scope="module")
def plan(net: nn.Module) -> Plan:
    return make_plan(net, IMAGES, "90%", "kernelwarehouse")


@pytest.fixture(scope="module")
def student(net: nn.Module, plan: Plan) -> nn.Module:
    """With coefficients that depend on the image."""
    found = dc.convert(net, plan).eval()
    anneal(found, 1.0)
    for layer in found.modules():
        if isinstance(layer, WarehouseConv):
            nn.init.normal_(layer.router.weight, std=0.3)
    return found


def test_a_linear_layer_is_a_pointwise_convolution() -> None:
    linear = nn.Linear(6, 8)
    (conv,) = Static().build([ConvSite("c", ConvSpec.of(linear), 5)])
    conv.load_state_dict({"weight": linear.weight.unsqueeze(-1), "bias": linear.bias})
    for shape in ((3, 6), (3, 5, 6), (3, 2, 5, 6), (0, 5, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(TokenConv(conv)(x), linear(x))
        assert TokenConv(conv)(x).is_contiguous()  # whose view code may take, as it may a linear layer's


def test_the_layers_of_a_vit_share_one_warehouse(plan: Plan) -> None:
    by_name = {choice.name: choice for choice in plan.choices}
    inside = [name for name in by_name if name.startswith("blocks")]
    assert len(inside) == 8
    assert {by_name[name].share for name in inside} == {"stage 64, tokens"}  # 65 of them
    assert all(isinstance(by_name[name].method, KernelWarehouse) for name in inside)
    assert by_name["patches"].reason == "static: the first convolution, which reads the input"
    assert by_name["head"].reason.startswith("static: one output position; mixing 240 weights")


def test_macs_by_hand(net: nn.Module) -> None:
    """At full width: cells of 24 x 24, 3 + 1 + 2 + 2 in a block, 16 in the warehouse, one for each of two blocks."""
    plan = make_plan(net, IMAGES, str(reachable(net, IMAGES, "kernelwarehouse").highest), "kernelwarehouse")
    assert plan.widths == [g.channels for g in plan.graph.groups]
    found = {name: macs for name, (macs, _) in plan.costs.layers(plan.widths).items()}
    fc1 = found["blocks.0.fc1"]
    assert (fc1.conv, fc1.kernels, fc1.router) == (24 * 48 * 65, 2 * 16 * 24 * 24, 24 * 16 + 16 * 2 * 17)


def test_the_student_starts_as_the_narrowed_network_and_costs_what_the_plan_says(net: nn.Module, plan: Plan) -> None:
    fresh = dc.convert(net, plan).eval()
    expected = narrowed(net, plan).eval()(IMAGES)
    torch.testing.assert_close(fresh(IMAGES), expected, rtol=0, atol=1e-4)
    assert measure_macs(fresh, IMAGES) == plan.macs_after
    assert count_params(fresh) == plan.params_after
    assert plan.macs_after < plan.macs_before


def test_a_student_learns_reloads_and_is_shipped(net: nn.Module, student: nn.Module, tmp_path: Path) -> None:
    y = student(IMAGES)
    y.square().sum().backward()
    layers = [m for m in student.modules() if isinstance(m, WarehouseConv)]
    assert len(layers) == 8 and all(p.grad is not None for layer in layers for p in layer.parameters())
    assert not torch.allclose(y[0], student(IMAGES[:1].roll(1, 2))[0])
    torch.testing.assert_close(dc.fold(student)(IMAGES), y)
    path = tmp_path / "student.safetensors"
    dc.save(student, path)
    torch.testing.assert_close(dc.load(path, ViT()).eval()(IMAGES), y)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.filterwarnings("ignore")
def test_a_student_is_exported(student: nn.Module, suffix: str, tmp_path: Path) -> None:
    """Checked against the student by `export`, for any batch."""
    assert dc.export(student, tmp_path / f"student.{suffix}", IMAGES).is_file()


def test_plans_are_read_with_linear_layers_and_without(net: nn.Module, plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    older = make_plan(net, IMAGES, "80%", "static")  # whose linear layers are products and no more
    assert [op.kind for op in older.graph.operations].count("linear") == 0
    assert Plan.from_json(older.to_json()) == older
    torch.testing.assert_close(dc.convert(net, older).eval()(IMAGES), narrowed(net, older).eval()(IMAGES))


def test_a_linear_layer_of_a_false_shape_is_refused(plan: Plan) -> None:
    data = json.loads(plan.to_json())
    op = next(op for op in data["network"]["operations"] if op["kind"] == "linear")
    op["spec"] = dataclasses.asdict(ConvSpec(24, 72, (3,)))
    with pytest.raises(PlanError, match="a linear layer that is a pointwise one"):
        Plan.from_json(json.dumps(data))


def test_a_plan_is_refused_where_the_layer_is_another(plan: Plan) -> None:
    other = ViT()
    other.blocks[0].fc1 = nn.Linear(24, 48, bias=False)
    with pytest.raises(PlanError, match=r"blocks\.0\.fc1"):
        dc.convert(other, plan)


def test_layers_that_cannot_say_why() -> None:
    """Fused attention, code that reads weights, and a first dimension that is no batch."""
    torch.manual_seed(0)
    for first, words in ((True, "the network's code reads it"), (False, "reads 64 entries of one image")):
        net = Encoder(first).eval()
        plan = make_plan(net, IMAGES, "90%", "kernelwarehouse", options={"cell": 0.5})
        reasons = {row.name: row.reason for row in plan.layers}
        assert "a MultiheadAttention runs code of its own" in reasons["layer.self_attn"]
        assert words in reasons["layer.linear1"] and words in reasons["layer.linear2"]
        assert (words in reasons["mix"]) == (not first)
        student = dc.convert(net, plan).eval()
        with torch.no_grad():  # takes torch's fast path, where there is one
            torch.testing.assert_close(student(IMAGES), narrowed(net, plan).eval()(IMAGES), rtol=0, atol=1e-4)


def test_everything_where_it_is_asked_for() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(8, 4)).eval()  # fmt: skip
    everything = KernelWarehouse(placement="all")
    plan = make_plan(net, IMAGES, str(reachable(net, IMAGES, everything).highest), everything)
    assert [choice.method.name for choice in plan.choices] == ["static", "kernelwarehouse", "kernelwarehouse"]
    student = dc.convert(net, plan).eval()
    torch.testing.assert_close(student(IMAGES), net(IMAGES), rtol=0, atol=1e-4)
    assert measure_macs(student, IMAGES) == plan.macs_after


@pytest.mark.parametrize(
    "method",
    [ODConv(linear=True), ODConv(kernels=4, linear=True), Dcd(linear=True), Dcd(latent=3, linear=True)],
    ids=str,
)
def test_tokens_are_the_positions_of_a_pointwise_convolution(method: Method) -> None:
    """On tokens [B, H, W, C] a layer computes what the same layer does on images [B, C, H, W], with its 1x1 kernel."""
    pointwise, tokens = (method.build([ConvSite("c", ConvSpec(6, 8, (1,) * n), 20)])[0].double() for n in (2, 1))
    for p in pointwise.parameters():
        nn.init.normal_(p)  # nothing is neutral: what is squeezed counts
    tokens.load_state_dict({n: v.reshape(tokens.state_dict()[n].shape) for n, v in pointwise.state_dict().items()})
    x = torch.randn(3, 6, 4, 5, dtype=torch.double)
    found = TokenConv(tokens)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, pointwise(x), rtol=1e-12, atol=1e-12)
    zero = pointwise(0 * x)
    assert not torch.allclose(pointwise(2 * x) - zero, 2 * (pointwise(x) - zero), rtol=0.1)  # the mean has its say


@pytest.mark.parametrize("name", ["odconv", "dcd"])
def test_an_option_makes_them_dynamic_in_other_methods(net: nn.Module, name: str) -> None:
    assert [c.name for c in make_plan(net, IMAGES, "90%", name).choices] == ["patches"]
    plan = make_plan(net, IMAGES, "90%", name, options={"linear": True, "placement": "all"})
    assert {c.name for c in plan.choices if c.method.name == name} == {c.name for c in plan.choices} - {"patches"}
    student = dc.convert(net, plan).eval()
    torch.testing.assert_close(student(IMAGES), narrowed(net, plan).eval()(IMAGES), rtol=0, atol=1e-4)
    assert measure_macs(student, IMAGES) == plan.macs_after
    assert count_params(student) == plan.params_after


def test_only_methods_that_say_so_replace_them(net: nn.Module) -> None:
    plan = make_plan(net, IMAGES, "80%", "dynet")
    assert [choice.name for choice in plan.choices] == ["patches"]
    assert reachable(net, IMAGES, "kernelwarehouse").lowest > reachable(net, IMAGES, "dynet").lowest
