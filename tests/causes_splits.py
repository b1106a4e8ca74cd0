"""Channels that forward's code counts: split, sliced, picked by number, shifted, sorted, written in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Head, conv_bn


class MixedKernels(nn.Module):
    """Unequal pieces, their sizes in a tuple attribute: a depthwise kernel size for each (MixNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.splits = conv_bn(3, 32), (16, 10, 6)
        self.convs = nn.ModuleList(
            [nn.Conv2d(c, c, k, padding=k // 2, groups=c) for c, k in zip(self.splits, (3, 5, 7), strict=True)]
        )
        self.bn, self.project, self.head = nn.BatchNorm2d(32), conv_bn(32, 32, 1), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(self.stem(x), self.splits, 1)
        x = torch.cat([conv(piece) for conv, piece in zip(self.convs, pieces, strict=True)], 1)
        return self.head(self.project(F.relu(self.bn(x))))


class Hierarchical(nn.Module):
    """Pieces of a width kept as an int attribute, each added to the next (Res2Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 12
        self.stem, self.reduce = conv_bn(3, 32), conv_bn(32, 48, 1)
        self.convs = nn.ModuleList([conv_bn(12, 12) for _ in range(3)])
        self.expand, self.head = nn.Sequential(nn.Conv2d(48, 32, 1, bias=False), nn.BatchNorm2d(32)), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        spx = torch.split(self.reduce(x), self.width, 1)
        out: list[Tensor] = []
        for i, conv in enumerate(self.convs):
            out.append(conv(spx[i] if i == 0 else out[-1] + spx[i]))
        return self.head(F.relu(x + self.expand(torch.cat([*out, spx[-1]], 1))))


class DualPath(nn.Module):
    """A residual part that is added and a dense part that is concatenated, cut apart by an int attribute (DPN)."""

    class Block(nn.Module):
        def __init__(self, i: int, kept: int, grown: int) -> None:
            super().__init__()
            self.kept = kept
            self.body = nn.Sequential(conv_bn(i, 24, 1), conv_bn(24, 24, groups=4), conv_bn(24, kept + grown, 1))

        def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            out = self.body(torch.cat(x, 1))
            return x[0] + out[:, : self.kept, :, :], torch.cat([x[1], out[:, self.kept :, :, :]], 1)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dense = conv_bn(3, 24), conv_bn(3, 8)
        self.blocks = nn.Sequential(self.Block(32, 24, 8), self.Block(40, 24, 8))
        self.head = Head(48)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat(self.blocks((self.stem(x), self.dense(x))), 1))


class CrossStage(nn.Module):
    """Halves by ``x.shape[1] // 2``, one of them past the blocks (CSP)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 32)
        self.body, self.fuse, self.head = (
            nn.Sequential(conv_bn(16, 24, 1), conv_bn(24, 16)),
            conv_bn(32, 32, 1),
            Head(32),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        half = x.shape[1] // 2
        left, right = x[:, :half], x[:, half:]
        return self.head(self.fuse(torch.cat((left, right + self.body(right)), dim=1)))


class EvenOdd(nn.Module):
    """Even and odd channels apart by strided slices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.even, self.odd, self.head = conv_bn(3, 32), conv_bn(16, 24), conv_bn(16, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.even(x[:, ::2]) + self.odd(x[:, 1::2]))


class TemporalShift(nn.Module):
    """A fold of channels moved one frame back, another one forth, written into zeros (TSM). (B, 4, 3, 12, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head, self.fold = conv_bn(3, 32), conv_bn(32, 32), Head(32), 8

    def shift(self, x: Tensor, frames: int) -> Tensor:
        bt, c, h, w = x.size()
        x = x.view(bt // frames, frames, c, h, w)
        fold = c // self.fold
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return out.view(bt, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        x = self.stem(x.flatten(0, 1))
        x = x + self.conv(self.shift(x, t))
        return self.head(x).view(b, t, -1).mean(1)


class PartialInPlace(nn.Module):
    """A convolution of the first channels, written over them (FasterNet at inference)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.width = conv_bn(3, 32), 8
        self.partial, self.mlp = (
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.Sequential(conv_bn(32, 64, 1), conv_bn(64, 32, 1)),
        )
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x.clone()
        y[:, : self.width, :, :] = self.partial(x[:, : self.width, :, :])
        return self.head(x + self.mlp(y))


class Permuted(nn.Module):
    """A fixed permutation of the channels, in a buffer of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.last, self.head = conv_bn(3, 32), conv_bn(32, 32), conv_bn(32, 24), Head(24)
        self.register_buffer("order", torch.randperm(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.mid(self.stem(x))[:, self.order]))


class ReverseAndRoll(nn.Module):
    """Channels in reverse, then shifted round by some."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.last, self.head = conv_bn(3, 24), conv_bn(24, 24), conv_bn(24, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(torch.flip(self.stem(x), dims=(1,)))
        return self.head(self.last(torch.roll(x, shifts=5, dims=1)))


class GatedUnits(nn.Module):
    """Gates chunked off the convolution's result, and ``nn.GLU``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 48, 3, padding=1), nn.Conv2d(24, 64, 3, padding=1)
        self.glu, self.head = nn.GLU(dim=1), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv1(x).chunk(2, dim=1)
        return self.head(self.glu(self.conv2(value * torch.sigmoid(gate))))


class SortedChannels(nn.Module):
    """Channels sorted at every position (group sort), and the largest few of them averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.last, self.head = conv_bn(3, 24), conv_bn(24, 24), conv_bn(24, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(torch.sort(self.stem(x), dim=1)[0])
        top = x.topk(4, dim=1).values.mean(dim=1, keepdim=True)
        return self.head(self.last(x - top))


class Ghost(nn.Module):
    """Half the channels made cheaply from the other half, cropped to the width asked for (GhostNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = conv_bn(3, 24), 30
        self.primary, self.cheap = conv_bn(24, 16, 1), conv_bn(16, 16, groups=16)
        self.last, self.head = conv_bn(30, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(self.stem(x))
        return self.head(self.last(torch.cat([x, self.cheap(x)], dim=1)[:, : self.out, :, :]))


class Narrowed(nn.Module):
    """Channels repeated, taken by ``narrow`` and ``index_select``, two of them swapped by a list of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = conv_bn(6, 24), conv_bn(24, 32)
        self.a, self.b, self.head = conv_bn(12, 24), conv_bn(20, 24), Head(24)
        self.register_buffer("second", torch.arange(12, 32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.stem(x.repeat(1, 2, 1, 1)))
        return self.head(self.a(x.narrow(1, 0, 12)) + self.b(x.index_select(1, self.second))[:, [1, 0, *range(2, 24)]])


class Inverse(nn.Module):
    """An additive coupling: the halves update each other (RevNet, i-RevNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f, self.g, self.head = conv_bn(3, 48), conv_bn(24, 24), conv_bn(24, 24), Head(48)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = torch.tensor_split(self.stem(x), 2, dim=1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return self.head(torch.cat([y1, y2], dim=1))


EXAMPLES = {TemporalShift: (4, 3, 12, 12)}
READ_ACROSS = [SortedChannels]
CAUSES = [
    MixedKernels, Hierarchical, DualPath, CrossStage, EvenOdd, TemporalShift, PartialInPlace, Permuted,
    ReverseAndRoll, GatedUnits, SortedChannels, Ghost, Narrowed, Inverse,
]  # fmt: skip
