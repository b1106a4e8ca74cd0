"""ResNets as in He et al., "Deep Residual Learning for Image Recognition", and ConvNeXt-T, for ImageNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv(i: int, o: int, k: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o))


class Block(nn.Module):
    """3x3 and 3x3, or 1x1, 3x3 and 1x1 with an expansion of 4; the first, or the 3x3 of three, has the stride."""

    def __init__(self, i: int, width: int, stride: int, expansion: int, project: bool, early: bool) -> None:
        super().__init__()
        o = width * expansion
        first = [conv(i, width, 3, stride)]
        if expansion > 1:
            one, other = (stride, 1) if early else (1, stride)
            first = [conv(i, width, 1, one), nn.ReLU(), conv(width, width, 3, other)]
        self.body = nn.Sequential(*first, nn.ReLU(), conv(width, o, 3 if expansion == 1 else 1))
        self.shortcut = conv(i, o, 1, stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """Of four stages.

    Args:
        blocks: Blocks of each stage.
        expansion: 1 for basic blocks, 4 for bottlenecks.
        project: Whether the first block has a projection even where its widths agree.
        early: Whether the first 1x1 of a bottleneck has the stride, as in the paper; torchvision's 3x3 has it.
    """

    def __init__(self, blocks: tuple[int, ...], expansion: int, project: bool = False, early: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        i, layers = 64, []
        for stage, count in enumerate(blocks):
            for index in range(count):
                width, stride = 64 << stage, 2 if stage and not index else 1
                first = project and not stage and not index
                first = first or stride > 1 or i != width * expansion
                layers.append(Block(i, width, stride, expansion, first, early))
                i = width * expansion
        self.blocks, self.fc = nn.Sequential(*layers), nn.Linear(i, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def resnet(depth: int, **options: bool) -> ResNet:
    """ResNet-10, 18, 50 or 101."""
    blocks = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth]
    return ResNet(blocks, 1 if depth < 50 else 4, **options)


class Norm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A depthwise 7x7, then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width, eps=1e-6)
        self.expand, self.project = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(nn.functional.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt-T: stages of 3, 3, 9 and 3 blocks of 96 to 768 channels."""

    def __init__(self) -> None:
        super().__init__()
        widths = (96, 192, 384, 768)
        layers: list[nn.Module] = [nn.Conv2d(3, 96, 4, 4), Norm(96, eps=1e-6)]
        for stage, (width, count) in enumerate(zip(widths, (3, 3, 9, 3), strict=True)):
            if stage:
                layers += [Norm(widths[stage - 1], eps=1e-6), nn.Conv2d(widths[stage - 1], width, 2, 2)]
            layers += [ConvNeXtBlock(width) for _ in range(count)]
        self.layers, self.norm, self.fc = nn.Sequential(*layers), nn.LayerNorm(768, eps=1e-6), nn.Linear(768, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.layers(x).mean((2, 3))))
