"""DRConv: its equation position by position, two ways to compute it, the softmax behind the argmax, what it costs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cifar10 import Cifar10
from dyncompress.callback import DynCompress
from dyncompress.checkpoint import load_from_checkpoint
from dyncompress.conversion import convert
from dyncompress.errors import DynCompressError
from dyncompress.folding import fold
from dyncompress.layers import ConvSite, ConvSpec, DRConv, Macs, Static
from dyncompress.layers.drconv import DRConvLayer, _by_kernel
from dyncompress.planning import make_plan
from tests.classifiers import Net, classifier, fit
from tests.layers import life, published
from tests.newer import writes_onnx

SPEC = ConvSpec(8, 12, (3, 3), padding=(1, 1))
SPECS = [
    SPEC,
    ConvSpec(8, 12, (3, 2), (2, 1), (1, 2), (1, 2), groups=4, bias=False),
    ConvSpec(8, 12, (3, 3), padding="same", padding_mode="reflect"),
    ConvSpec(8, 8, (3, 3), groups=8),
    ConvSpec(8, 12, (1, 1), (2, 2)),
]


def layer(spec: ConvSpec = SPEC, regions: int = 3, kernels: int = 4) -> DRConvLayer:
    (built,) = DRConv(regions, kernels).build([ConvSite("conv", spec, positions=64)])
    assert isinstance(built, DRConvLayer)
    return built


def randomised(spec: ConvSpec = SPEC, **sizes: int) -> DRConvLayer:
    conv = layer(spec, **sizes).double()
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    return conv


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 8, 6, 5, dtype=torch.float64)


def test_one_channel_by_hand() -> None:
    conv = layer(ConvSpec(1, 1, (1,)), regions=2, kernels=2)
    with torch.no_grad():
        conv.bank.copy_(torch.tensor([1.0, 10.0]).reshape(1, 2, 1, 1, 1))
        conv.bias.copy_(torch.tensor([0.5]))  # type: ignore[union-attr]
        conv.guide.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1))  # positive numbers are of region 0
        conv.router.weight.zero_()
        conv.router.bias.copy_(torch.tensor([0.0, math.log(3), -math.log(3), 0.0]))
    # c = sigmoid(r): region 0 has 1/2 * 1 + 3/4 * 10 = 8, region 1 has 1/4 * 1 + 1/2 * 10 = 5.25.
    result = conv(torch.tensor([1.0, -1.0, 2.0, -4.0]).reshape(1, 1, 4)).flatten().tolist()
    assert result == pytest.approx([8.5, -4.75, 16.5, -20.5])


def reference(conv: DRConvLayer, x: Tensor) -> Tensor:
    """Section 3 of the paper with loops over images, positions, output channels and groups."""
    spec, (m, count) = conv.spec, (conv.regions, conv.kernels)
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    padded = F.pad(x, [side for pair in reversed(spec.pads) for side in pair], mode=mode)
    rows, columns = spec.output_size(x.shape[2:])
    out = torch.zeros(len(x), spec.out_channels, rows, columns, dtype=x.dtype)
    wide, deep = spec.out_channels // spec.groups, spec.in_channels // spec.groups
    for b, i, j in itertools.product(range(len(x)), range(rows), range(columns)):
        mix = 2 / count * torch.sigmoid(conv.router.weight @ x[b].mean((1, 2)) + conv.router.bias).reshape(m, count)
        (h, w), (s, t), (d, e) = spec.kernel_size, spec.stride, spec.dilation
        window = padded[b, :, i * s : i * s + d * (h - 1) + 1 : d, j * t : j * t + e * (w - 1) + 1 : e]
        region = max(range(m), key=lambda r: float((conv.guide[r] * window).sum()))
        kernel = sum(mix[region, n] * conv.bank[0, n] for n in range(count))
        assert isinstance(kernel, Tensor)
        for o in range(spec.out_channels):
            group = o // wide
            out[b, o, i, j] = (kernel[o] * window[group * deep : (group + 1) * deep]).sum()
            out[b, o, i, j] += 0 if conv.bias is None else conv.bias[o]
    return out


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equation_position_by_position(spec: ConvSpec) -> None:
    conv, x = randomised(spec), images(2)
    assert len(conv.logits(x).argmax(1).unique()) == 3  # all regions take part
    torch.testing.assert_close(conv(x), reference(conv, x), rtol=1e-12, atol=1e-12)


def test_kernels_equal_those_of_the_authors_code() -> None:
    """Their filter generator runs anywhere; their operator runs on GPUs only, and returns zeros elsewhere."""
    published.assert_equal("drconv", "kernels", layer(ConvSpec(8, 12, (3, 3), (1, 1), (1, 1)), regions=8, kernels=8))


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_by_region_and_by_kernel_are_the_same(spec: ConvSpec) -> None:
    conv, x = randomised(spec), images()
    out = _by_kernel(x, conv.bank, conv.coefficients(x), conv.logits(x), spec)
    out = out if conv.bias is None else out + conv.bias[:, None, None]
    torch.testing.assert_close(conv(x), out, rtol=1e-12, atol=1e-12)


def test_a_region_without_positions() -> None:
    conv, x = randomised(), images().abs()
    with torch.no_grad():
        conv.guide.copy_(torch.tensor([-1.0, 1.0, -2.0]).reshape(3, 1, 1, 1))
    kernels = (conv.coefficients(x)[:, 1, :, None] * conv.bank.flatten(2)).sum(1).unflatten(1, SPEC.weight_shape)
    expected = torch.cat([F.conv2d(x[[b]], kernels[b], conv.bias, padding=1) for b in range(3)])
    torch.testing.assert_close(conv(x), expected)


def test_gradients_are_those_of_a_softmax_behind_the_mask() -> None:
    """dL/dF_r at a position is <dL/dy, what region r's kernel returns there>, through a softmax; the rest is hard."""
    conv, x = randomised(), images().requires_grad_()
    grad = torch.randn(3, 12, 6, 5, dtype=torch.float64)
    names = [n for n, _ in conv.named_parameters()]
    found = torch.autograd.grad(conv(x), [*conv.parameters(), x], grad)
    # The same by hand: all regions' outputs by convolutions of their own.
    mix, logits = conv.coefficients(x), conv.logits(x)
    each = torch.stack(
        [
            torch.stack([
                F.conv2d(x[b], (mix[b, r, :, None, None, None, None] * conv.bank[0]).sum(0), conv.bias, padding=1)
                for r in range(3)
            ])
            for b in range(3)
        ]
    )  # fmt: skip
    hard = F.one_hot(logits.argmax(1), 3).movedim(-1, 1).to(x).unsqueeze(2)
    to_mask = (each * grad.unsqueeze(1)).sum(2).detach()
    loss = ((each * hard).sum(1) * grad).sum() + (logits.softmax(1) * to_mask).sum()
    expected = torch.autograd.grad(loss, [*conv.parameters(), x])
    for name, a, b in zip([*names, "x"], found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_a_warm_start_tells_regions_apart_within_two_steps() -> None:
    conv, x = layer(), torch.randn(4, 8, 6, 5)
    conv.load_static(torch.randn(12, 8, 3, 3), torch.zeros(12))
    assert len(conv.logits(x).argmax(1).unique()) == 3
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        conv(x).square().mean().backward()
        optimizer.step()
    assert [name for name, p in conv.named_parameters() if p.grad is None or not p.grad.any()] == []
    mix = conv.coefficients(x)
    assert (mix[:, 0] - mix[:, 1]).abs().max() > 1e-4 < (mix[..., 0] - mix[..., 1]).abs().max()


@torch.no_grad()
def test_half_precision_moves_few_positions() -> None:
    """The clauses that it does not promise: rounding can move a position to a region that was as close."""
    conv, x = randomised().float(), images().float()
    expected, chosen = conv(x), conv.logits(x).argmax(1)
    half = conv.bfloat16()
    same = half.logits(x.bfloat16()).argmax(1) == chosen
    assert same.float().mean() > 0.9
    error = (half(x.bfloat16()).float() - expected).abs().amax(1)[same]
    assert error.max() < 0.05 * expected.abs().max()


def test_absorbs_an_affine_map() -> None:
    conv, x = randomised(), images()
    scale, shift = torch.randn(12).double(), torch.randn(12).double()
    expected = conv(x) * scale[:, None, None] + shift[:, None, None]
    conv.absorb(scale, shift)
    torch.testing.assert_close(conv(x), expected)


def test_placement() -> None:
    def placed(method: DRConv, spec: ConvSpec, positions: int) -> tuple[Any, str]:
        return method.place(ConvSite("conv", spec, positions))

    wide = ConvSpec(64, 64, (3, 3))
    # 64 kernels of P against S = 784 positions, and 8 guides against 64 channels: 8 + 13 % of the convolution.
    assert placed(DRConv(), wide, 784) == (DRConv(), "")
    assert placed(DRConv(), wide, 160)[1].startswith("static: guide and kernels of 8 regions take 53 %")
    assert placed(DRConv(), ConvSpec(64, 8, (1, 1)), 784)[1].startswith("static: guide and kernels of 8 regions take")
    assert placed(DRConv(), ConvSpec(64, 64, (3, 3), groups=64), 784)[0] == Static()
    assert placed(DRConv(), ConvSpec(4, 4, (1, 1)), 49)[1].startswith("static: tiny")
    everywhere = DRConv(placement="all")
    assert placed(everywhere, ConvSpec(4, 4, (1, 1)), 1) == (everywhere, "")


def test_cost_by_hand() -> None:
    site = ConvSite("conv", ConvSpec(64, 128, (3, 3), stride=(2, 2)), positions=784)
    # P = 128 * 64 * 9 = 73,728; a guide of 8 * 64 * 9 = 4,608 weights; 64 coefficients of 64 channels each.
    assert DRConv().macs([site]) == [Macs(73_728 * 784, 64 * 73_728, 4_608 * 784 + 64 * 64)]
    assert DRConv().params([site]) == [8 * 73_728 + 128 + 4_608 + 64 * 65]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_every_position_is_multiplied_once_whatever_the_mask(share: float) -> None:
    conv, x = layer(regions=4), torch.randn(1, 8, 6, 5)
    with torch.no_grad():
        conv.guide[1:] *= share  # zeros lose against what is positive
    (macs,) = DRConv(4, 4).macs([ConvSite("conv", SPEC, positions=30)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        conv(x)
    assert counter.get_total_flops() == 2 * macs.total


def test_a_traced_graph_runs_all_kernels() -> None:
    """What an exported file costs: K convolutions, and m * K multiply-adds per position; no kernels are assembled."""
    conv, x = layer(regions=3, kernels=4).eval(), torch.randn(1, 8, 6, 5)
    graph = torch.export.export(conv, (x,)).module()
    with FlopCounterMode(display=False) as counter:
        graph(x)
    (macs,) = DRConv(3, 4).macs([ConvSite("conv", SPEC, positions=30)])
    assert counter.get_total_flops() == 2 * (4 * macs.conv + 3 * 4 * 30 + macs.router)


@pytest.mark.parametrize(
    "options", [{"regions": 1}, {"regions": 2.0}, {"kernels": 1}, {"kernels": 65}, {"placement": "none"}], ids=str
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DynCompressError, match=f"^{next(iter(options))} "):
        DRConv(**options)


def test_repr_says_what_it_is() -> None:
    assert "drconv, 8 -> 12, 3x3, padding 1, regions=3, kernels=4" in repr(layer())


# ---- whole networks ----------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"regions": 2, "kernels": 2, "placement": "all"}


def network(dims: int) -> tuple[nn.Module, Tensor]:
    conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    norm: Any = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    net = nn.Sequential(
        conv(3, 24, 3, padding=1),
        nn.ReLU(),
        conv(24, 32, 3, padding=1, bias=False),
        norm(32),
        nn.ReLU(),
        conv(32, 24, 1),
        nn.ReLU(),
        conv(24, 3, 1),
    )
    return net.eval(), torch.randn(4, 3, *{1: (40,), 2: (9, 8), 3: (5, 4, 4)}[dims])


@writes_onnx
@pytest.mark.parametrize("dims", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_from_plan_to_file(dims: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net, x = network(dims)
    student = life.started(net, x, life.planned(net, x, 0.5, "drconv", **OPTIONS))
    life.train(student, x)
    life.ships(student, net, x, tmp_path, [".onnx"] if dims == 2 else [".pt2"])


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "planned", "filed"), [(8, 20.217, 85.816), (2, 20.127, 30.880)])
def test_what_a_file_of_resnet20_costs(kernels: int, planned: float, filed: float) -> None:
    """The figures of docs/methods/drconv.md, in millions of multiply-adds."""
    net, x = Cifar10(depth=20, lr=0.1, weight_decay=0.0).net.eval(), torch.randn(1, 3, 32, 32)
    plan = make_plan(net, x, "50%", "drconv", options={"kernels": kernels, "placement": "all"})
    student = convert(net, plan).eval()
    graph = torch.export.export(fold(student), (x,)).module()
    for run, macs in ((student, planned), (graph, filed)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(x)
        assert counter.get_total_flops() / 2e6 == pytest.approx(macs, abs=1e-3)
    assert plan.macs_after / 1e6 == pytest.approx(planned, abs=1e-3)


def test_callback_and_checkpoint(tmp_path: Path) -> None:
    module = classifier()()
    host = fit(module, DynCompress("50%", method="drconv", options=OPTIONS))
    assert isinstance(module.net.conv2, DRConvLayer) and module.net.conv2.router.weight.any()
    host.save_checkpoint(tmp_path / "a.ckpt")
    loaded, x = load_from_checkpoint(classifier(), tmp_path / "a.ckpt"), torch.randn(4, 3, 8, 8)
    assert isinstance(loaded.net, Net) and torch.equal(loaded.eval()(x), module.eval()(x))
