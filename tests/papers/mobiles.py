"""MobileNetV2, MobileNetV3 and ShuffleNetV2 for ImageNet, as in the papers of these names."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv(
    i: int, o: int, k: int, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU6
) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([act()] if act else []))


def rounded(channels: float) -> int:
    """The nearest multiple of 8 that is not more than a tenth smaller."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = rounded(channels / 4)
        self.gate = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * nn.functional.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))


class Inverted(nn.Module):
    """Expand, depthwise, project."""

    def __init__(
        self, i: int, hidden: int, o: int, k: int, stride: int, act: type[nn.Module] = nn.ReLU6, gate: bool = False
    ) -> None:
        super().__init__()
        expand = [conv(i, hidden, 1, act=act)] if hidden != i else []
        self.body = nn.Sequential(
            *expand,
            conv(hidden, hidden, k, stride, hidden, act),
            *([Squeeze(hidden)] if gate else []),
            conv(hidden, o, 1, act=None),
        )
        self.identity = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.identity else self.body(x)


class MobileNetV2(nn.Module):
    """Of a width multiplier."""

    def __init__(self, multiplier: float = 1.0) -> None:
        super().__init__()
        i = rounded(32 * multiplier)
        layers: list[nn.Module] = [conv(3, i, 3, 2)]
        for expansion, width, count, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
        ):  # fmt: skip
            o = rounded(width * multiplier)
            for index in range(count):
                layers.append(Inverted(i, i * expansion, o, 3, 1 if index else stride))
                i = o
        last = rounded(1280 * max(1.0, multiplier))
        self.features = nn.Sequential(*layers, conv(i, last, 1))
        self.classifier = nn.Linear(last, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


_R, _H = nn.ReLU, nn.Hardswish
_SMALL = (
    (3, 16, 16, True, _R, 2), (3, 72, 24, False, _R, 2), (3, 88, 24, False, _R, 1), (5, 96, 40, True, _H, 2),
    (5, 240, 40, True, _H, 1), (5, 240, 40, True, _H, 1), (5, 120, 48, True, _H, 1), (5, 144, 48, True, _H, 1),
    (5, 288, 96, True, _H, 2), (5, 576, 96, True, _H, 1), (5, 576, 96, True, _H, 1),
)  # fmt: skip
_LARGE = (
    (3, 16, 16, False, _R, 1), (3, 64, 24, False, _R, 2), (3, 72, 24, False, _R, 1), (5, 72, 40, True, _R, 2),
    (5, 120, 40, True, _R, 1), (5, 120, 40, True, _R, 1), (3, 240, 80, False, _H, 2), (3, 200, 80, False, _H, 1),
    (3, 184, 80, False, _H, 1), (3, 184, 80, False, _H, 1), (3, 480, 112, True, _H, 1), (3, 672, 112, True, _H, 1),
    (5, 672, 160, True, _H, 2), (5, 960, 160, True, _H, 1), (5, 960, 160, True, _H, 1),
)  # fmt: skip


class MobileNetV3(nn.Module):
    """Small or large."""

    def __init__(self, large: bool) -> None:
        super().__init__()
        i, layers = 16, [conv(3, 16, 3, 2, act=nn.Hardswish)]
        for k, hidden, o, gate, act, stride in _LARGE if large else _SMALL:
            layers.append(Inverted(i, hidden, o, k, stride, act, gate))
            i = o
        last, head = 6 * i, 1280 if large else 1024
        self.features = nn.Sequential(*layers, conv(i, last, 1, act=nn.Hardswish))
        self.classifier = nn.Sequential(nn.Linear(last, head), nn.Hardswish(), nn.Linear(head, 1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Shuffled(nn.Module):
    """A block of ShuffleNetV2: the second half of the channels is computed on; at stride 2 all of them, twice."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        half, enters = o // 2, i if stride > 1 else i // 2
        self.left = nn.Sequential(conv(i, i, 3, stride, i, None), conv(i, half, 1, act=nn.ReLU)) if stride > 1 else None
        self.right = nn.Sequential(
            conv(enters, half, 1, act=nn.ReLU),
            conv(half, half, 3, stride, half, None),
            conv(half, half, 1, act=nn.ReLU),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.left is None else (self.left(x), x)
        both = torch.cat([left, self.right(right)], dim=1)
        batch, channels, height, width = both.shape
        return both.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(both.shape)


class ShuffleNetV2(nn.Module):
    """At 1.0."""

    def __init__(self, widths: tuple[int, ...] = (116, 232, 464)) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv(3, 24, 3, 2, act=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
        i = 24
        for width, count in zip(widths, (4, 8, 4), strict=True):
            for index in range(count):
                layers.append(Shuffled(i, width, 1 if index else 2))
                i = width
        self.features, self.fc = nn.Sequential(*layers, conv(i, 1024, 1, act=nn.ReLU)), nn.Linear(1024, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))
