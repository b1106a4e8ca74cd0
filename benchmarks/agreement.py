"""Do our layers compute what their inventors' code computes? One function per peer; each also writes a small file.

The inventors' code is read from a clone on this machine and stays there (`benchmarks/speed/peers.py` says which). The
files hold random weights, an input and the outputs of that code, so that the test-suite can compare without it:

    python -m benchmarks.agreement kernelwarehouse /path/to/KernelWarehouse
    python -m benchmarks.agreement odconv /path/to/ODConv
    python -m benchmarks.agreement dcd /path/to/dcd    # github.com/liyunsheng13/dcd, seen at 6a5e27f
    python -m benchmarks.agreement drconv /path/to/DRConv  # github.com/megvii-research/DRConv, seen at 063a8e5
    python -m benchmarks.agreement condconv .zoo       # timm's
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed.peers import load
from dyncompress.layers import CondConv, ConvSite, ConvSpec, Dcd, DRConv, Method, ODConv

DATA = Path(__file__).parents[1] / "tests/layers/data"
TOLERANCE = 1e-5

Case = tuple[str, nn.Module, Tensor, Tensor]
"""A name, our layer with their weights, an input, and what theirs returns."""

_WAREHOUSES = {
    "whole": (1, 1, 1),
    "half": (0.5, 0.5, 1),
    "double": (2, 1, 1),
    "linear": (1, 1, 1),
    "basis": (0.5, 0.5, 0.5),
}
"""Cells over those of the kernels, their width over the common divisor, and the basis of logits over other cells."""
_LAYERS = {
    "half": [(4, 4, (2, 2), 1, (1, 0), "conv2d"), (4, 8, 1, 2, 0, "conv2d")],
    "linear": [(4, 8, 1, 1, 0, "linear"), (8, 4, 1, 1, 0, "linear")],
}
_CONVS = [(4, 4, (2, 2), 1, (1, 0), "conv2d"), (4, 8, (1, 3), 2, (0, 1), "conv2d"), (8, 4, 1, 1, 0, "conv2d")]


def kernelwarehouse(clone: Path) -> dict[str, Tensor]:
    """Two or three layers with a warehouse each time, by the authors' code (seen at a4ac17d); tau 0.3, 0, 1, 0.3."""
    module = load(clone / "modules/kernel_warehouse.py")
    torch.manual_seed(0)
    found: dict[str, Tensor] = {"x": torch.randn(2, 4, 5, 5)}
    for (name, (number, width, basis)), tau in zip(_WAREHOUSES.items(), (0.3, 0.0, 1.0, 0.3, 0.0), strict=True):
        manager = module.Warehouse_Manager(
            cell_num_ratio=number, cell_outplane_ratio=width, cell_inplane_ratio=width, norm_layer=nn.LayerNorm,
            nonlocal_basis_ratio=basis,
        )  # fmt: skip
        shapes = _LAYERS.get("half" if name == "basis" else name, _CONVS)
        layers = [manager.reserve(i, o, k, s, p, bias=False, layer_type=kind) for i, o, k, s, p, kind in shapes]
        net = nn.Sequential(*layers)
        manager.store()
        manager.allocate(net)
        for p in (*net.parameters(), *manager.parameters()):
            nn.init.normal_(p, std=0.5)
        x = found["x"].flatten(2).mT if name == "linear" else found["x"]
        first, cells = 0, manager.weights[0].detach().flatten(3)[..., 0]
        for index, layer in enumerate(net):
            attention = getattr(layer, "conv", layer).attention
            attention.update_temperature(tau)
            beta = attention.temp_bias.reshape(-1, attention.kw_planes_per_mixture)
            owned = int(beta[:, :-1].sum()) if number < 1 else attention.num_local_cell
            parts = {"cells": cells[first : first + owned], "beta": beta, "tau": torch.tensor(tau)}
            if basis < 1:
                parts |= {"offset": attention.basis_bias, "basis.weight": attention.fc3.weight}
            for ours, theirs in (("reduce", "fc1"), ("norm", "norm1"), ("router", "fc2")):
                parts |= {f"{ours}.{key}": value for key, value in getattr(attention, theirs).state_dict().items()}
            x = layer(x)
            found |= {f"{name}.{index}.{key}": value.detach().clone() for key, value in parts.items()}
            found[f"{name}.{index}.y"] = x.detach().clone().contiguous()
            first += owned
    return found


def condconv(clone: Path) -> Iterator[Case]:
    """Timm's layer, routed as its networks do: sigmoid(Linear(GAP(x)))."""
    sys.path.append(str(clone))
    from timm.layers import CondConv2d

    theirs = CondConv2d(8, 12, 3, stride=2, padding=1, groups=4, num_experts=4)
    router = nn.Linear(8, 4)
    x = torch.randn(3, 8, 7, 6)
    ours = _layer(CondConv(4), ConvSpec(8, 12, (3, 3), (2, 2), (1, 1), groups=4, bias=False))
    ours.bank.copy_(theirs.weight.reshape(ours.bank.shape))
    ours.router.load_state_dict(router.state_dict())
    yield "grouped", ours, x, theirs(x, torch.sigmoid(router(F.adaptive_avg_pool2d(x, 1).flatten(1))))


def odconv(clone: Path) -> Iterator[Case]:
    """The authors' layer in eval mode, its BatchNorm part of our squeeze, its kernels divided by our factors 2."""
    module = load(clone / "modules/odconv.py")
    shapes = {
        "1x": (1, ConvSpec(8, 12, (3, 3), (2, 2), (1, 1), groups=4, bias=False)),
        "4x": (4, ConvSpec(8, 12, (3, 3), (1, 1), (1, 1), bias=False)),
        "pointwise": (1, ConvSpec(8, 12, (1, 1), bias=False)),
        "depthwise": (2, ConvSpec(8, 8, (3, 3), (1, 1), (1, 1), groups=8, bias=False)),
    }
    for name, (kernels, spec) in shapes.items():
        theirs = module.ODConv2d(
            spec.in_channels, spec.out_channels, spec.kernel_size[0], spec.stride[0], spec.pads[0][0],
            groups=spec.groups, kernel_num=kernels,
        )  # fmt: skip
        _randomise(theirs)
        theirs.update_temperature(3.0)
        their = theirs.attention
        ours = _layer(ODConv(kernels), spec)
        ours.temperature.value.fill_(3.0)
        scale, shift = _affine(their.bn)
        ours.squeeze.reduce.weight.copy_(scale[:, None] * their.fc.weight.flatten(1))
        ours.squeeze.reduce.bias.copy_(shift)
        heads = [
            head for kind in ("channel", "filter", "spatial", "kernel") if (head := getattr(their, f"{kind}_fc", None))
        ]
        ours.router.weight.copy_(torch.cat([head.weight.flatten(1) for head in heads]))
        ours.router.bias.copy_(torch.cat([head.bias for head in heads]))
        twos = sum(hasattr(their, f"{kind}_fc") for kind in ("channel", "filter", "spatial"))
        stack = theirs.weight / 2**twos
        if ours.taps:
            stack = stack.flatten(3).permute(3, 0, 1, 2)
        ours.bank.copy_(stack.reshape(ours.bank.shape))
        x = torch.randn(3, spec.in_channels, 7, 6)
        yield name, ours, x, theirs.eval()(x)


def dcd(clone: Path) -> Iterator[Case]:
    """The layer of the authors' bottleneck in eval mode. Its first BatchNorm has no shift, as ours has none there."""
    module = load(clone / "models/imagenet/resnet_dcd.py")
    for name, kernel, stride in (("3x3", 3, 2), ("1x1", 1, 1)):
        spec = ConvSpec(64, 12, (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2)
        theirs = module.conv_dy(64, 12, kernel, stride, kernel // 2)
        _randomise(theirs)
        for values in (theirs.bn1.bias, theirs.bn1.running_mean):
            values.zero_()
        (first, _), (second, shift) = _affine(theirs.bn1), _affine(theirs.bn2)
        ours = _layer(Dcd(), spec)
        phi = theirs.fc_phi.weight.unflatten(0, (8, 8)) * second[:, None, None]
        ours.weight.copy_(theirs.conv.weight)
        ours.q.copy_(theirs.q.weight * first[:, None, None, None])
        ours.p.copy_(theirs.p.weight)
        ours.bias.copy_(theirs.p.weight.flatten(1) @ shift)
        ours.reduce.weight.copy_(theirs.fc[0].weight)
        ours.gate.weight.copy_(theirs.fc[1].fc[0].weight)
        ours.router.weight.copy_(torch.cat([phi.flatten(0, 1), theirs.fc_scale.weight]))
        x = torch.randn(3, 64, 5, 4)
        yield name, ours, x, theirs.eval()(x)


def drconv(clone: Path) -> Iterator[Case]:
    """The kernels of the authors' layer. Its operator is compiled for CUDA, and returns zeros where there is none.

    So a module in the operator's place takes what their forward hands to it: the unfolded input, the regions' kernels
    and the mask. It returns the product that their CUDA source spells out. Coefficients, bank and layout are theirs,
    mask and product ours.
    """
    name = "Deformable_MatMul3"
    sys.modules[name] = ModuleType(name)
    sys.modules[f"{name}.{name}"] = product = ModuleType(f"{name}.{name}")
    product.Deformable_MatMul3 = _RegionProduct  # type: ignore[attr-defined]
    module = load(clone / "DRConv.py")
    spec = ConvSpec(8, 12, (3, 3), (1, 1), (1, 1))
    theirs = module.DRConv(8, 12, 3, padding=1)
    _randomise(theirs)
    ours = _layer(DRConv(), spec)
    nn.init.normal_(ours.guide)
    ours.bank.copy_(theirs.weight.T.reshape(ours.bank.shape))
    ours.bias.copy_(theirs.bias)
    ours.router.load_state_dict(theirs.routing_fc.state_dict())
    x = torch.randn(3, 8, 7, 6)
    logits = F.conv2d(x, ours.guide, padding=1)
    yield "kernels", ours, x, theirs(x, logits.argmax(1), logits.softmax(1))


class _RegionProduct(nn.Module):
    """Each column of inputs [B, n, *size] times the matrix of its region, of kernels [B, out, n, m]."""

    def forward(self, inputs: Tensor, kernels: Tensor, mask: Tensor, *_: Any) -> Tensor:
        chosen = F.one_hot(mask, kernels.shape[-1]).to(inputs)
        return torch.einsum("bnhw,bonm,bhwm->bohw", inputs, kernels, chosen)


@torch.no_grad()
def _compared(peer: Callable[[Path], Iterator[Case]], clone: Path) -> dict[str, Tensor]:
    """Cases of a peer, "name.": input x, output y, and our weights; refused where ours returns anything else."""
    torch.manual_seed(0)
    found: dict[str, Tensor] = {}
    for name, ours, x, expected in peer(clone):
        error = float((ours.eval()(x) - expected).abs().max() / expected.abs().max())
        if error > TOLERANCE:
            raise SystemExit(f"{name}: {error:.1e} of the largest output apart, more than {TOLERANCE:.0e}")
        sys.stdout.write(f"{name}: {error:.1e} of the largest output apart\n")
        tensors = {"x": x, "y": expected, **ours.state_dict()}
        found |= {f"{name}.{key}": value.detach().clone().contiguous() for key, value in tensors.items()}
    return found


def _layer(method: Method, spec: ConvSpec) -> Any:
    (built,) = method.build([ConvSite("conv", spec, positions=1)])
    return built


def _randomise(net: nn.Module) -> None:
    """Nothing is neutral, statistics of norms included."""
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(std=0.3)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as scale and shift."""
    values: Any = norm
    scale = values.weight / torch.sqrt(values.running_var + values.eps)
    return scale, values.bias - values.running_mean * scale


PEERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "kernelwarehouse": kernelwarehouse,
    "condconv": partial(_compared, condconv),
    "odconv": partial(_compared, odconv),
    "dcd": partial(_compared, dcd),
    "drconv": partial(_compared, drconv),
}


def main(name: str, clone: str) -> None:
    """Write what a peer computes."""
    save_file(PEERS[name](Path(clone)), DATA / f"{name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
