"""MobileNetV2 (Sandler et al., CVPR 2018, table 2) for CIFAR-10's 32x32 pixels.

Images this small leave nothing to shrink at the start: the stem and the second stage keep the resolution, where the
paper halves it.
"""

from __future__ import annotations

from torch import Tensor, nn

from classifier import Classifier

STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, output channels, blocks, stride of the first block."""


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class InvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project: (B, C_in, H, W) -> (B, C_out, H', W')."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [*conv_bn(in_channels, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        spatial = [*conv_bn(hidden, hidden, 3, stride, hidden), nn.ReLU6()]
        self.layers = nn.Sequential(*expand, *spatial, *conv_bn(hidden, out_channels, 1))
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """17 inverted residuals between two convolutions: (B, 3, 32, 32) -> (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        blocks, channels = [], 32
        for expansion, width, count, stride in STAGES:
            for i in range(count):
                blocks.append(InvertedResidual(channels, width, expansion, 1 if i else stride))
                channels = width
        self.stem = nn.Sequential(*conv_bn(3, 32, 3), nn.ReLU6())
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*conv_bn(channels, 1280, 1), nn.ReLU6())
        self.linear = nn.Linear(1280, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.head(self.blocks(self.stem(x))).mean((2, 3)))
        return logits


class Cifar10MobileNet(Classifier):
    """`MobileNetV2` under cross-entropy."""

    def __init__(self, lr: float = 0.1, weight_decay: float = 5e-4) -> None:
        super().__init__(MobileNetV2(), classes=10, lr=lr, weight_decay=weight_decay)
