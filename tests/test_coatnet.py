"""A network of CoAtNet's form: convolutions, then attention whose scores have a bias for every relative position.

Dai, Liu, Le, Tan, "CoAtNet: Marrying Convolution and Attention for All Data Sizes", NeurIPS 2021, arXiv 2106.04803,
section 2: a stem, MBConv stages with squeeze and excitation, transformer stages, each of which begins by halving the
map; y_i = sum_j softmax_j(q_i k_j + w_{i - j}) v_j.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompress.conversion import convert
from dyncompress.layers import DynamicConv
from dyncompress.layers.c2sp import EvenConv
from tests.layers import life
from tests.newer import writes_onnx


class MBConv(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection; the shortcut is pooled and projected."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        wide = 4 * o
        self.norm = nn.BatchNorm2d(i)
        self.expand = nn.Sequential(nn.Conv2d(i, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.GELU())
        depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(wide), nn.GELU())
        self.squeeze, self.excite = nn.Conv2d(wide, o // 4, 1), nn.Conv2d(o // 4, wide, 1)
        self.project = nn.Conv2d(wide, o, 1)
        self.pool = nn.MaxPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(self.norm(x)))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        out: Tensor = self.shortcut(self.pool(x)) + self.project(y * gate)
        return out


class Attention(nn.Module):
    """Heads with a bias per relative position, on a map of side x side."""

    def __init__(self, channels: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.bias = nn.Parameter(0.02 * torch.randn(heads, (2 * side - 1) ** 2))
        place = torch.stack(torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None] + side - 1
        self.register_buffer("index", apart[0] * (2 * side - 1) + apart[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (channels // self.heads) ** -0.5 + self.bias[:, self.index]
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        out: Tensor = self.out(mixed)
        return out


class Transformer(nn.Module):
    """Attention and a feed-forward part behind norms of their own; the first of a stage halves the map."""

    def __init__(self, i: int, o: int, side: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(o), nn.LayerNorm(o)
        self.project = nn.Conv2d(i, o, 1) if i != o else nn.Identity()
        self.pool = nn.MaxPool2d(2) if i != o else nn.Identity()
        self.attention = Attention(o, 4, side)
        self.mlp = nn.Sequential(nn.Linear(o, 4 * o), nn.GELU(), nn.Linear(4 * o, o))

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.pool(x))
        y = x.flatten(2).transpose(1, 2)
        y = y + self.attention(self.norm1(y))
        y = y + self.mlp(self.norm2(y))
        return y.transpose(1, 2).reshape(x.shape)


class CoAtNet(nn.Module):
    """C-C-T-T behind a stem, for images of 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.GELU(), nn.Conv2d(16, 16, 3, 1, 1)
        )
        self.stages = nn.Sequential(
            MBConv(16, 24, 1), MBConv(24, 24, 1), MBConv(24, 32, 2), MBConv(32, 32, 1),
            Transformer(32, 48, 4), Transformer(48, 48, 4), Transformer(48, 64, 2),
        )  # fmt: skip
        self.norm, self.head = nn.BatchNorm2d(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.stages(self.stem(x))).mean((2, 3)))
        return out


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = CoAtNet(), torch.randn(4, 3, 32, 32)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
    with torch.no_grad():
        net(x)  # statistics that are not 0 and 1
    return net.eval(), x


OPTIONS: dict[str, dict[str, Any]] = {
    "dynet": {},
    "odconv": {"placement": "all"},
    "kernelwarehouse": {},
    "drconv": {"regions": 2, "kernels": 2, "placement": "all"},
    "dyco3d": {"placement": "all"},
}


@pytest.mark.parametrize("method", OPTIONS)
def test_half_of_it_starts_where_it_was_cut_and_trains(method: str) -> None:
    net, x = network()
    plan = life.planned(net, x, 0.5, method, **OPTIONS[method])
    student = life.started(net, x, plan)
    life.train(student, x)


def test_even_kernels_replace_its_3x3_ones() -> None:
    """Their start is not the narrowed network: no 2x2 kernel computes what a 3x3 one does."""
    net, x = network()
    student = convert(net, life.planned(net, x, 0.5, "c2sp", g=2))
    even = [name for name, m in student.named_modules() if isinstance(m, EvenConv)]
    assert even == ["stem.3", *(f"stages.{i}.depthwise.0" for i in range(4))]
    life.train(student, x)


@writes_onnx
@pytest.mark.slow
@pytest.mark.parametrize("method", ["dynet", "drconv", "dyco3d"])
def test_ships(method: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net, x = network()
    student = life.started(net, x, life.planned(net, x, 0.5, method, **OPTIONS[method]))
    life.train(student, x)
    life.ships(student, net, x, tmp_path, [".pt2", ".onnx"])


def test_convolutions_are_dynamic_and_attention_is_narrowed_beside_them() -> None:
    net, x = network()
    plan = life.planned(net, x, 0.5, "dynet", placement="all")
    student = life.started(net, x, plan)
    dynamic = {name for name, m in student.named_modules() if isinstance(m, DynamicConv)}
    assert {"stages.0.expand.0", "stages.2.shortcut", "stages.4.project"} <= dynamic
    linear: Any = student.get_submodule("stages.4.mlp.0")
    assert linear.out_features < 192
