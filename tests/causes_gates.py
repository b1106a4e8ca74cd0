"""Channels that weigh channels or positions: gates, channel and spatial attention, mixtures of branches and kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Head, conv_bn


class Gated(nn.Module):
    """A stem, a convolution, a gate that keeps the shape, a convolution, a head: the gate is the subclass's."""

    def __init__(self, gate: nn.Module, channels: int = 32) -> None:
        super().__init__()
        self.stem, self.conv, self.gate = conv_bn(3, 24), conv_bn(24, channels), gate
        self.last, self.head = conv_bn(channels, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.gate(self.conv(self.stem(x)))))


class LinearSE(Gated):
    """Squeeze-and-excite with linear layers and views (SENet's own code)."""

    class Gate(nn.Module):
        def __init__(self, channel: int, reduction: int = 4) -> None:
            super().__init__()
            self.avg_pool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Sequential(
                nn.Linear(channel, channel // reduction, bias=False), nn.ReLU(inplace=True),
                nn.Linear(channel // reduction, channel, bias=False), nn.Sigmoid(),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            b, c, _, _ = x.size()
            y = self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)
            return x * y.expand_as(x)

    def __init__(self) -> None:
        super().__init__(self.Gate(32))


class ConvOverChannels(Gated):
    """A 1-d convolution along the channels makes their weights (ECA)."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = F.adaptive_avg_pool2d(x, 1)
            y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
            return x * y.sigmoid()

    def __init__(self) -> None:
        super().__init__(self.Gate())


class ChannelAndSpatial(Gated):
    """Mean and maximum over positions through one MLP, then mean and maximum over channels (CBAM)."""

    class Gate(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.mlp = nn.Sequential(
                nn.Conv2d(channels, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, channels, 1, bias=False)
            )
            self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x * torch.sigmoid(self.mlp(x.mean((2, 3), keepdim=True)) + self.mlp(x.amax((2, 3), keepdim=True)))
            pooled = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
            return x * torch.sigmoid(self.spatial(pooled))

    def __init__(self) -> None:
        super().__init__(self.Gate(32))


class GatherExcite(Gated):
    """A strided depthwise convolution gathers context, resized to excite."""

    class Gate(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.gather = nn.Sequential(
                nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)
            )

        def forward(self, x: Tensor) -> Tensor:
            return x * F.interpolate(self.gather(x), size=x.shape[-2:]).sigmoid()

    def __init__(self) -> None:
        super().__init__(self.Gate(32))


class GlobalContext(Gated):
    """One softmax over all positions pools the context that is added (GCNet)."""

    class Gate(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.mask = nn.Conv2d(channels, 1, 1)
            self.add = nn.Sequential(
                nn.Conv2d(channels, 8, 1), nn.LayerNorm([8, 1, 1]), nn.ReLU(), nn.Conv2d(8, channels, 1)
            )

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.size()
            weights = F.softmax(self.mask(x).view(b, 1, h * w), dim=2).unsqueeze(-1)
            return x + self.add(torch.matmul(x.view(b, c, h * w).unsqueeze(1), weights).view(b, c, 1, 1))

    def __init__(self) -> None:
        super().__init__(self.Gate(32))


class NonLocal(Gated):
    """Every position looks at every other: two matrix products of activations."""

    class Gate(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.inter_channels = channels // 2
            self.theta, self.phi, self.g = (nn.Conv2d(channels, self.inter_channels, 1) for _ in range(3))
            self.out = nn.Sequential(nn.Conv2d(self.inter_channels, channels, 1), nn.BatchNorm2d(channels))

        def forward(self, x: Tensor) -> Tensor:
            b = x.size(0)
            g = self.g(x).view(b, self.inter_channels, -1).permute(0, 2, 1)
            theta = self.theta(x).view(b, self.inter_channels, -1).permute(0, 2, 1)
            phi = self.phi(x).view(b, self.inter_channels, -1)
            y = torch.matmul(F.softmax(torch.matmul(theta, phi), dim=-1), g).permute(0, 2, 1).contiguous()
            return x + self.out(y.view(b, self.inter_channels, *x.size()[2:]))

    def __init__(self) -> None:
        super().__init__(self.Gate(32))


class ChannelSelfAttention(Gated):
    """Channels look at channels: their Gram matrix, a softmax, and a gain that starts at zero (DANet)."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.full((1,), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.size()
            query = x.view(b, c, -1)
            energy = torch.bmm(query, query.permute(0, 2, 1))
            attention = torch.softmax(energy.max(-1, keepdim=True)[0].expand_as(energy) - energy, dim=-1)
            return self.gamma * torch.bmm(attention, query).view(b, c, h, w) + x

    def __init__(self) -> None:
        super().__init__(self.Gate())


class SoftmaxOverChannels(Gated):
    """Weights that sum to one over the channels."""

    class Gate(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.score = nn.Conv2d(channels, channels, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.softmax(self.score(F.adaptive_avg_pool2d(x, 1)), dim=1)

    def __init__(self) -> None:
        super().__init__(self.Gate(32))


class SelectiveKernel(nn.Module):
    """Branches stacked in a new dimension, weighed by a softmax over it (SKNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 24)
        self.convs = nn.ModuleList([conv_bn(24, 32, k) for k in (3, 5)])
        self.fc, self.fcs = nn.Conv2d(32, 12, 1), nn.ModuleList([nn.Conv2d(12, 32, 1) for _ in range(2)])
        self.last, self.head = conv_bn(32, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        feats = torch.stack([conv(x) for conv in self.convs], dim=1)
        z = F.relu(self.fc(feats.sum(dim=1).mean((-2, -1), keepdim=True)))
        weights = torch.softmax(torch.stack([fc(z) for fc in self.fcs], dim=1), dim=1)
        return self.head(self.last((feats * weights).sum(dim=1)))


class SplitAttention(nn.Module):
    """A grouped convolution of radix x width, a softmax over the radix (ResNeSt)."""

    def __init__(self) -> None:
        super().__init__()
        self.radix = 2
        self.stem, self.conv = conv_bn(3, 24), nn.Conv2d(24, 64, 3, padding=1, groups=2, bias=False)
        self.bn0, self.fc1 = nn.BatchNorm2d(64), nn.Conv2d(32, 16, 1)
        self.fc2, self.last, self.head = nn.Conv2d(16, 64, 1), conv_bn(32, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv(self.stem(x))))
        b, rc, h, w = x.shape
        x = x.reshape(b, self.radix, rc // self.radix, h, w)
        gap = F.relu(self.fc1(x.sum(dim=1).mean((2, 3), keepdim=True)))
        atten = self.fc2(gap).view(b, 1, self.radix, -1).transpose(1, 2)
        atten = F.softmax(atten, dim=1).reshape(b, -1, 1, 1)
        out = (x * atten.reshape(b, self.radix, rc // self.radix, 1, 1)).sum(dim=1).contiguous()
        return self.head(self.last(out))


class OwnDynamicConv(nn.Module):
    """A user's own mixture of kernels, by sample, as one convolution with a group for each image (CondConv)."""

    class Mixed(nn.Module):
        def __init__(self, i: int, o: int, experts: int = 3) -> None:
            super().__init__()
            self.out_channels, self.kernel_size = o, 3
            self.bank = nn.Parameter(torch.randn(experts, o, i, 3, 3) / (i * 9) ** 0.5)
            self.routing = nn.Linear(i, experts)

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.shape
            route = torch.sigmoid(self.routing(F.adaptive_avg_pool2d(x, 1).flatten(1)))
            weight = torch.matmul(route, self.bank.flatten(1)).view(b * self.out_channels, c, 3, 3)
            out = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
            return out.view(b, self.out_channels, *out.shape[-2:])

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixed, self.bn = conv_bn(3, 24), self.Mixed(24, 32), nn.BatchNorm2d(32)
        self.last, self.head = conv_bn(32, 32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(F.relu(self.bn(self.mixed(self.stem(x))))))


class Hyper(nn.Module):
    """Scale and shift of the channels come from a second input (FiLM). Two inputs: image and code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.code = conv_bn(3, 24), conv_bn(24, 32), nn.Linear(7, 2 * 32)
        self.last, self.head = conv_bn(32, 24), Head(24)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        gamma, beta = self.code(code).chunk(2, dim=-1)
        x = self.conv2(self.conv1(x))
        return self.head(self.last(x * (1 + gamma[..., None, None]) + beta[..., None, None]))


class AttentionGate(nn.Module):
    """The skip of a U-Net, weighed by a map made from it and from the coarser level (Attention U-Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = conv_bn(3, 24), conv_bn(24, 32, stride=2)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), conv_bn(32, 24))
        self.w_g, self.w_x, self.psi = nn.Conv2d(24, 12, 1), nn.Conv2d(24, 12, 1), nn.Conv2d(12, 1, 1)
        self.merge, self.out = conv_bn(48, 24), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        g = self.up(self.deep(skip))
        psi = torch.sigmoid(self.psi(F.relu(self.w_g(g) + self.w_x(skip), inplace=True)))
        return self.out(self.merge(torch.cat((skip * psi, g), dim=1)))


class PixelAttention(Gated):
    """A weight for every channel at every position."""

    class Gate(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.mul(x, self.conv(x).sigmoid_())

    def __init__(self) -> None:
        super().__init__(self.Gate(32))


class Coordinate(Gated):
    """Pools of rows and of columns through one convolution, then split by position (coordinate attention)."""

    class Gate(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.squeeze = conv_bn(channels, 12, 1)
            self.conv_h, self.conv_w = nn.Conv2d(12, channels, 1), nn.Conv2d(12, channels, 1)

        def forward(self, x: Tensor) -> Tensor:
            _, _, h, w = x.size()
            rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).permute(0, 1, 3, 2)
            rows, columns = torch.split(self.squeeze(torch.cat([rows, columns], dim=2)), [h, w], dim=2)
            return x * self.conv_h(rows).sigmoid() * self.conv_w(columns.permute(0, 1, 3, 2)).sigmoid()

    def __init__(self) -> None:
        super().__init__(self.Gate(32))


class Normalised(Gated):
    """Unit length over the channels at every position, times a learned scale (ParseNet, SSD)."""

    class Gate(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((channels,), 10.0))

        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(x, dim=1) * self.weight[None, :, None, None]

    def __init__(self) -> None:
        super().__init__(self.Gate(32))


class Parameterless(Gated):
    """Energy of every position against the map's mean: a gate with no parameter (SimAM)."""

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[2] * x.shape[3] - 1
            d = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
            return x * torch.sigmoid(d / (4 * (d.sum(dim=[2, 3], keepdim=True) / n + 1e-4)) + 0.5)

    def __init__(self) -> None:
        super().__init__(self.Gate())


class Bilinear(nn.Module):
    """Outer product of two branches, pooled, with signed roots: the classifier reads C x C features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 24), conv_bn(24, 16), conv_bn(24, 12)
        self.fc = nn.Linear(16 * 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = self.a(x).flatten(2), self.b(x).flatten(2)
        phi = torch.bmm(a, b.transpose(1, 2)).flatten(1) / a.shape[-1]
        return self.fc(torch.sign(phi) * torch.sqrt(phi.abs() + 1e-6))


EXAMPLES = {Hyper: lambda batch: (torch.randn(batch, 3, 16, 16), torch.randn(batch, 7))}
READ_ACROSS = [
    ConvOverChannels, ChannelAndSpatial, GlobalContext, NonLocal, ChannelSelfAttention, SoftmaxOverChannels, Normalised,
    OwnDynamicConv,
]  # fmt: skip
CAUSES = [
    LinearSE, ConvOverChannels, ChannelAndSpatial, GatherExcite, GlobalContext, NonLocal, ChannelSelfAttention,
    SoftmaxOverChannels, SelectiveKernel, SplitAttention, OwnDynamicConv, Hyper, AttentionGate, PixelAttention,
    Coordinate, Normalised, Parameterless, Bilinear,
]  # fmt: skip
