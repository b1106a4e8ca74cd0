"""Channels that a view folds into several dimensions, or positions that it folds into channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks import Head, conv_bn


class UnbindStack(nn.Module):
    """Pieces unbound from a view, worked on, and stacked again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.head = conv_bn(3, 48), conv_bn(24, 24), conv_bn(24, 24), Head(48)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = (x := self.stem(x)).shape
        first, second = x.view(b, 2, -1, h, w).unbind(1)
        return self.head(torch.stack([self.left(first), self.right(second)], dim=1).flatten(1, 2))


class ShuffledGroups(nn.Module):
    """Grouped convolutions with a shuffle between them, its counts in attributes (ShuffleNet)."""

    class Shuffle(nn.Module):
        def __init__(self, channels: int, groups: int) -> None:
            super().__init__()
            self.channels, self.groups = channels, groups

        def forward(self, x: Tensor) -> Tensor:
            b, _, h, w = x.size()
            x = x.view(b, self.groups, self.channels // self.groups, h, w)
            return torch.transpose(x, 1, 2).contiguous().view(b, self.channels, h, w)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 36)
        self.body = nn.Sequential(
            conv_bn(36, 36, 1, groups=3), self.Shuffle(36, 3), conv_bn(36, 36, groups=36), conv_bn(36, 36, 1, groups=3)
        )
        self.head = Head(36)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.body(x))


class ShuffleModule(nn.Sequential):
    """``nn.ChannelShuffle`` between grouped convolutions that mix groups of another count."""

    def __init__(self) -> None:
        super().__init__(
            conv_bn(3, 32), conv_bn(32, 32, groups=4), nn.ChannelShuffle(4), conv_bn(32, 48, groups=2), Head(48)
        )  # fmt: skip


class SpaceToDepth(nn.Module):
    """Blocks of positions folded into channels by view and permute (the stem of YOLOv2's passthrough)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = conv_bn(3, 24), conv_bn(96, 32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = (x := self.stem(x)).shape
        x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).contiguous()
        return self.head(self.mid(x.view(b, c * 4, h // 2, w // 2)))


class PixelUnshuffle(nn.Module):
    """Downsampling without loss, as an op, and four strided slices concatenated (Focus, of YOLOv5)."""

    def __init__(self) -> None:
        super().__init__()
        self.focus, self.down = conv_bn(12, 24), nn.PixelUnshuffle(2)
        self.mid, self.head = conv_bn(96, 32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        return self.head(self.mid(self.down(self.focus(x))))


class Involution(nn.Module):
    """Kernels made from the input at every position, multiplied with unfolded patches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.groups = conv_bn(3, 32), 4
        self.reduce, self.span = conv_bn(32, 16, 1), nn.Conv2d(16, 9 * 4, 1)
        self.unfold, self.last, self.head = nn.Unfold(3, padding=1), conv_bn(32, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = (x := self.stem(x)).shape
        kernel = self.span(self.reduce(x)).view(b, self.groups, 9, h, w).unsqueeze(2)
        patches = self.unfold(x).view(b, self.groups, c // self.groups, 9, h, w)
        return self.head(self.last((kernel * patches).sum(dim=3).view(b, c, h, w)))


class Maxout(nn.Module):
    """The largest of several pieces, by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = 2
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 48, 3, padding=1), nn.Conv2d(24, 64, 3, padding=1), Head(32)

    def maxout(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, c // self.pieces, self.pieces, h, w).max(dim=2)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maxout(self.conv2(self.maxout(self.conv1(x)))))


class Capsules(nn.Module):
    """Channels grouped in vectors of eight that are squashed to at most unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.primary = conv_bn(3, 32, stride=2), nn.Conv2d(32, 4 * 8, 3, 2, 1)
        self.vote = nn.Parameter(torch.randn(4 * 16, 5, 8, 6) / 8)

    def forward(self, x: Tensor) -> Tensor:
        b = x.size(0)
        u = self.primary(self.stem(x)).view(b, 4, 8, -1).permute(0, 1, 3, 2).reshape(b, -1, 8)
        norm = u.norm(dim=-1, keepdim=True)
        u = u * norm / (1 + norm**2)
        votes = torch.matmul(u[:, :, None, None, :], self.vote).squeeze(3)
        return votes.mean(1).norm(dim=-1)


class HardUnflatten(nn.Module):
    """Positions and channels flattened and unflattened with counts that are written down."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            conv_bn(3, 24, stride=2), conv_bn(24, 16, stride=2), nn.Flatten(), nn.Linear(256, 20)
        )
        self.decode = nn.Sequential(
            nn.Linear(20, 256), nn.Unflatten(1, (16, 4, 4)), nn.ConvTranspose2d(16, 24, 2, 2), nn.BatchNorm2d(24),
            nn.ReLU(), nn.ConvTranspose2d(24, 3, 2, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class GridHead(nn.Module):
    """Predictions viewed as (anchors, box and classes, rows, columns), as detectors do (YOLO)."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors, self.outputs = 3, 7
        self.body, self.predict = (
            nn.Sequential(conv_bn(3, 24, stride=2), conv_bn(24, 48, stride=2)),
            nn.Conv2d(48, 21, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.predict(self.body(x))
        b, _, h, w = x.shape
        x = x.view(b, self.anchors, self.outputs, h, w).permute(0, 1, 3, 4, 2).contiguous()
        xy, wh, rest = x.sigmoid().split((2, 2, self.outputs - 4), dim=4)
        ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        return torch.cat(((xy + torch.stack((xs, ys), -1)) / w, wh**2, rest), 4).view(b, -1, self.outputs)


EXAMPLES = {}
READ_ACROSS = [Capsules]
CAUSES = [
    UnbindStack, ShuffledGroups, ShuffleModule, SpaceToDepth, PixelUnshuffle, Involution, Maxout, Capsules,
    HardUnflatten, GridHead,
]  # fmt: skip
