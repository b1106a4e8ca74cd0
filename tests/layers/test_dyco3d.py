"""DyCo3D: generated kernels by hand, instances of real points, where it is placed and what it costs."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompress.callback import DynCompress
from dyncompress.checkpoint import load_from_checkpoint
from dyncompress.errors import DynCompressError
from dyncompress.layers import ConvSite, ConvSpec, DyCo3d, Macs, Static
from dyncompress.layers.dyco3d import DyCo3dConv
from tests.classifiers import Net, classifier, fit
from tests.layers import life
from tests.newer import writes_onnx

SPEC = ConvSpec(8, 12, (1,))
SPECS = [SPEC, ConvSpec(8, 12, (1, 1), (2, 1), groups=4, bias=False), ConvSpec(8, 12, (1, 1, 1), padding=(0, 1, 0))]


def layer(spec: ConvSpec = SPEC, hidden: int = 5, random: bool = False) -> DyCo3dConv:
    (built,) = DyCo3d(hidden).build([ConvSite("conv", spec, positions=64)])
    assert isinstance(built, DyCo3dConv)
    if random:
        for parameter in built.double().parameters():
            nn.init.normal_(parameter)
    return built


def test_one_channel_by_hand() -> None:
    conv = layer(ConvSpec(1, 1, (1,)), hidden=2)
    with torch.no_grad():
        reduce: Any = conv.squeeze.reduce
        reduce.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        reduce.bias.copy_(torch.tensor([0.0, 1.0]))
        conv.router.weight.copy_(torch.tensor([[2.0, 50.0], [3.0, 70.0]]))
        conv.router.bias.copy_(torch.tensor([10.0, 0.5]))
    # Points 1 and 3 have the mean 2: h = (2, 0); the kernel is 10 + 2 * 2, the bias 0.5 + 3 * 2.
    assert conv(torch.tensor([[[1.0, 3.0]]])).flatten().tolist() == [14 + 6.5, 3 * 14 + 6.5]


@torch.no_grad()
@pytest.mark.parametrize("hidden", [5, 0])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equation_instance_by_instance(spec: ConvSpec, hidden: int) -> None:
    conv = layer(spec, hidden, random=True)
    x = torch.randn(3, 8, *(4, 5, 6)[: spec.ndim], dtype=torch.float64)
    convolve: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spec.ndim]
    for instance, result in zip(x, conv(x), strict=True):
        h = instance.flatten(1).mean(1)
        if conv.squeeze.reduce is not None:
            h = (conv.squeeze.reduce.weight @ h + conv.squeeze.reduce.bias).relu()
        made = conv.router.weight @ h + conv.router.bias
        kernel, bias = made[: spec.kernel_params].reshape(spec.weight_shape), made[spec.kernel_params :]
        given = (spec.stride, spec.padding, spec.dilation, spec.groups)
        expected = convolve(instance.unsqueeze(0), kernel, bias if spec.bias else None, *given)[0]
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_a_head_of_two_layers_tells_an_instance_from_its_neighbours() -> None:
    """The paper's use: features and positions relative to an instance's centre go in, a mask comes out, per instance.

    Three clusters of points on a line. Which points are of an instance depends on where its centre is, and no kernel
    for all instances can tell: the features say, of an instance, only how far its points reach.
    """
    generator = torch.Generator().manual_seed(0)
    reach = torch.tensor([0.5, 1.0, 2.0])
    offsets = torch.rand(3, 1, 60, generator=generator) * 8 - 4  # positions relative to the centre of each instance
    target = (offsets.abs() < reach.reshape(3, 1, 1)).float()
    x = torch.cat([reach.reshape(3, 1, 1).expand(-1, 1, 60), offsets.abs()], 1)  # [instances, C + 1, N]

    def loss_of(head: nn.Module, steps: int = 300) -> float:
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(head(x), target)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    torch.manual_seed(0)
    sites = [ConvSite("conv", ConvSpec(2, 4, (1,)), 60), ConvSite("mask", ConvSpec(4, 1, (1,)), 60)]
    first, last = DyCo3d(placement="all").build(sites)
    assert loss_of(nn.Sequential(first, nn.ReLU(), last)) < 0.1


def test_the_example_of_its_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs/methods/dyco3d.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["masks"].shape == (7, 1, 500)


def test_a_warm_start_learns_all_of_it_within_two_steps() -> None:
    conv, x = layer(), torch.randn(4, 8, 30)
    conv.load_static(torch.randn(12, 8, 1), torch.randn(12))
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        conv(x).square().mean().backward()
        optimizer.step()
    assert [name for name, p in conv.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_absorbs_an_affine_map(spec: ConvSpec) -> None:
    conv, x = layer(spec, random=True), torch.randn(3, 8, *(4, 5, 6)[: spec.ndim], dtype=torch.float64)
    scale, shift = torch.randn(12).double(), torch.randn(12).double()
    ones = (1,) * spec.ndim
    expected = conv(x) * scale.reshape(-1, *ones) + shift.reshape(-1, *ones)
    assert conv.absorb(scale, shift)
    torch.testing.assert_close(conv(x), expected)


def test_placement() -> None:
    def placed(method: DyCo3d, spec: ConvSpec, positions: int) -> tuple[Any, str]:
        return method.place(ConvSite("conv", spec, positions))

    wide = ConvSpec(64, 64, (1,))
    assert placed(DyCo3d(), wide, 40) == (DyCo3d(), "")  # 8 multiply-adds per weight to generate it, 40 to use it
    assert placed(DyCo3d(), wide, 39)[1].startswith("static: generating the kernel takes 21 %")
    assert placed(DyCo3d(hidden=0), wide, 319)[0] == Static()  # 64 inputs
    assert placed(DyCo3d(hidden=0), wide, 320)[0] == DyCo3d(hidden=0)
    assert placed(DyCo3d(), ConvSpec(8, 8, (1,)), 64)[1].startswith("static: tiny, 4,096")
    assert placed(DyCo3d(placement="all"), ConvSpec(8, 8, (1,)), 1)[1] == ""
    assert placed(DyCo3d(placement="all"), ConvSpec(64, 64, (1, 3)), 999) == (
        Static(),
        "static: a kernel of 1x3, and only pointwise ones are generated",
    )


def test_cost_by_hand() -> None:
    site = ConvSite("conv", ConvSpec(64, 128, (1,), groups=2), positions=1024)
    # P = 128 * 32 = 4,096 weights and 128 biases, each generated from 8 units.
    assert DyCo3d().macs([site]) == [Macs(4_096 * 1024, 8 * 4_224, 64 * 8)]
    assert DyCo3d().params([site]) == [9 * 4_224 + 65 * 8]
    assert DyCo3d(hidden=0).macs([site]) == [Macs(4_096 * 1024, 64 * 4_224, 0)]
    assert DyCo3d(hidden=0).params([site]) == [65 * 4_224]


def test_generates_as_many_numbers_as_the_papers_controller() -> None:
    """Two layers on c = 16 features and 3 coordinates: (c + 3) c + c weights, c + 1 biases, from 16 features."""
    head = [ConvSpec(19, 16, (1,)), ConvSpec(16, 1, (1,))]
    rows = [conv.router.out_features for conv in map(layer, head)]
    assert sum(rows) == (16 + 3) * 16 + 16 + 16 + 1 == 337


@pytest.mark.parametrize("options", [{"hidden": -1}, {"hidden": 2.0}, {"hidden": 1025}, {"placement": "none"}], ids=str)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DynCompressError, match=f"^{next(iter(options))} "):
        DyCo3d(**options)


def test_repr_says_what_it_is() -> None:
    assert "dyco3d, 8 -> 12, 1, hidden=5" in repr(layer())


# ---- whole networks ----------------------------------------------------------------------------------------------


class PointNet(nn.Module):
    """Points [B, 3, N] -> classes: the same layers for every point, and the largest of each feature."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 64, 64, 128)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Conv1d(i, o, 1, bias=False), nn.BatchNorm1d(o), nn.ReLU()) for i, o in pairwise(widths))
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(x).amax(2))
        return out


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits as clouds of their 64 pixels: two coordinates and a brightness, each within -1 and 1."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    pixels = torch.from_numpy(found.images).float() / 8 - 1
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 8)] * 2).T
    clouds = torch.cat([grid.expand(len(pixels), 2, 64), pixels.reshape(-1, 1, 64)], 1)
    return clouds, torch.from_numpy(found.target)


@writes_onnx
def test_point_clouds_from_plan_to_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    x, y = digits()
    torch.manual_seed(0)
    net = PointNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(4):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        accuracy = (net(x).argmax(1) == y).float().mean()
    assert accuracy > 0.5  # a tenth is guessing
    plan = life.planned(net, x[:4], 0.5, "dyco3d")
    assert plan.layers[1].method == "dyco3d"
    student = life.started(net, x[:4], plan)
    life.train(student, x[:64])
    life.ships(student, net, x[:4], tmp_path, [".onnx"])


@pytest.mark.parametrize("dims", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_images_and_volumes(dims: int, tmp_path: Path) -> None:
    conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    net = nn.Sequential(conv(3, 32, 3), nn.ReLU(), conv(32, 32, 1), nn.ReLU(), conv(32, 4, 1)).eval()
    x = torch.randn(4, 3, *(9, 8, 6)[:dims])
    plan = life.planned(net, x, 0.6, "dyco3d", placement="all", hidden=4)
    assert [layer.method for layer in plan.layers] == ["static", "dyco3d", "dyco3d"]
    student = life.started(net, x, plan)
    life.train(student, x)
    life.ships(student, net, x, tmp_path, [".pt2"])


def test_callback_and_checkpoint(tmp_path: Path) -> None:
    kind = classifier()

    class Clouds(kind):  # type: ignore[misc,valid-type]
        def __init__(self, width: int = 16, lr: float = 0.01) -> None:
            super().__init__(width, lr)
            self.net.conv1 = nn.Conv2d(width, 2 * width, 1)

    module = Clouds()
    host = fit(module, DynCompress("50%", method="dyco3d", options={"placement": "all"}))
    assert isinstance(module.net.conv1, DyCo3dConv) and module.net.conv1.router.weight.any()
    host.save_checkpoint(tmp_path / "a.ckpt")
    loaded, x = load_from_checkpoint(Clouds, tmp_path / "a.ckpt"), torch.randn(4, 3, 8, 8)
    assert isinstance(loaded.net, Net) and torch.equal(loaded.eval()(x), module.eval()(x))
