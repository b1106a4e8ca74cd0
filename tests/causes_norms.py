"""What is indexed by channel beside the weights: norms of every kind, fixed buffers, gains, shifts and embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Head, conv_bn


class Between(nn.Module):
    """Convolution, the subclass's layer, convolution, the layer at another width, head."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.conv1, self.layer1 = nn.Conv2d(3, 24, 3, padding=1), layers[0]
        self.conv2, self.layer2 = nn.Conv2d(24, 32, 3, padding=1), layers[1]
        self.conv3, self.head = nn.Conv2d(32, 24, 3, padding=1), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layer2(self.conv2(F.relu(self.layer1(self.conv1(x))))))
        return self.head(F.relu(self.conv3(x)))


class BlurPool(Between):
    """Anti-aliasing: a fixed kernel registered once per channel, and one repeated in forward, depthwise."""

    class Registered(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.channels = channels
            a = torch.tensor([1.0, 2.0, 1.0])
            filt = a[:, None] * a[None, :]
            self.register_buffer("filt", (filt / filt.sum())[None, None].repeat((channels, 1, 1, 1)))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filt, stride=2, groups=x.shape[1])

    class Repeated(Registered):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.filt = self.filt[:1].clone()

        def forward(self, x: Tensor) -> Tensor:
            filt = self.filt.expand(self.channels, -1, -1, -1)
            return F.conv2d(F.pad(x, (1, 1, 1, 1)), filt, stride=2, groups=self.channels)

    def __init__(self) -> None:
        super().__init__(self.Registered(24), self.Repeated(32))


class FrozenNorm(Between):
    """BatchNorm as four buffers, for fine-tuning detectors (FrozenBatchNorm2d)."""

    class Norm(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.register_buffer("weight", torch.rand(n) + 0.5)
            self.register_buffer("bias", torch.randn(n) / 2)
            self.register_buffer("running_mean", torch.randn(n) / 4)
            self.register_buffer("running_var", torch.rand(n) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
            rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
            scale = w * (rv + 1e-5).rsqrt()
            return x * scale + (b - rm * scale)

    def __init__(self) -> None:
        super().__init__(self.Norm(24), self.Norm(32))


class Rescaled(nn.Module):
    """LayerScale of (C, 1, 1), a bias of the same shape, a scalar gain, a bias of one element (Fixup)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv_bn(3, 24), nn.Sequential(conv_bn(24, 32), nn.Conv2d(32, 24, 1))
        self.gamma, self.beta = nn.Parameter(torch.rand(24, 1, 1)), nn.Parameter(torch.randn(24, 1, 1))
        self.gain, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.zeros(1))
        self.last, self.head = conv_bn(24, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.gamma * (self.body(x + self.shift) * self.gain) + self.beta
        return self.head(self.last(F.relu(x)))


class PositionMap(nn.Module):
    """Learned embeddings of position: (1, C, H, W) in the maps, (1, N, C) in the tokens, then LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.map = conv_bn(3, 24, stride=2), nn.Parameter(torch.randn(1, 24, 8, 8))
        self.patch, self.pos = nn.Conv2d(24, 32, 2, 2), nn.Parameter(torch.randn(1, 16, 32))
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(self.conv(x) + self.map).flatten(2).transpose(1, 2) + self.pos
        return self.head((x + self.fc2(F.gelu(self.fc1(self.norm(x))))).mean(dim=1))


class LayerNormFirst(Between):
    """LayerNorm over channels that come first: mean and variance by hand, and by permuting (ConvNeXt's two)."""

    class ByHand(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
            self.normalized_shape = (dim,)

        def forward(self, x: Tensor) -> Tensor:
            u = x.mean(1, keepdim=True)
            s = (x - u).pow(2).mean(1, keepdim=True)
            return self.weight[:, None, None] * ((x - u) / torch.sqrt(s + 1e-6)) + self.bias[:, None, None]

    class Permuted(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            x = x.permute(0, 2, 3, 1)
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
            return x.permute(0, 3, 1, 2)

    def __init__(self) -> None:
        super().__init__(self.ByHand(24), self.Permuted(32))


class LayerNormBare(nn.Module):
    """LayerNorm without weights, by ``F.layer_norm`` of a width in an attribute, and as a module over (C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 32
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 16, 3, 2, 1)
        self.norm, self.whole = nn.LayerNorm(16, elementwise_affine=False), nn.LayerNorm([16, 8, 8])
        self.conv3, self.head = nn.Conv2d(16, 24, 3, padding=1), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(self.conv1(x).permute(0, 2, 3, 1), (self.dim,)).permute(0, 3, 1, 2)
        x = self.whole(F.gelu(self.conv2(x)))
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(F.gelu(self.conv3(x)))


class InstanceNormed(Between):
    """InstanceNorm with weights, and without."""

    def __init__(self) -> None:
        super().__init__(nn.InstanceNorm2d(24, affine=True), nn.InstanceNorm2d(32))


class InstanceAndBatch(nn.Module):
    """Half the channels through InstanceNorm, half through BatchNorm, by an int attribute (IBN-Net)."""

    class Norm(nn.Module):
        def __init__(self, planes: int) -> None:
            super().__init__()
            self.half = planes // 2
            self.instance, self.batch = nn.InstanceNorm2d(self.half, affine=True), nn.BatchNorm2d(planes - self.half)

        def forward(self, x: Tensor) -> Tensor:
            split = torch.split(x, self.half, 1)
            return torch.cat((self.instance(split[0].contiguous()), self.batch(split[1].contiguous())), 1)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last, self.head = nn.Conv2d(3, 32, 3), self.Norm(32), conv_bn(32, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(F.relu(self.norm(self.conv(x)))))


class RootMeanSquare(nn.Module):
    """RMSNorm: torch's own over channels last, and one by hand over channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.scale = nn.Conv2d(3, 24, 3, padding=1), nn.Parameter(torch.ones(24))
        self.conv2, self.norm = nn.Conv2d(24, 32, 3, padding=1), nn.RMSNorm(32)
        self.fc, self.head = nn.Linear(32, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x * torch.rsqrt(x.pow(2).mean(dim=1, keepdim=True) + 1e-6) * self.scale.view(1, -1, 1, 1)
        x = self.norm(self.conv2(F.gelu(x)).permute(0, 2, 3, 1))
        return self.head(F.gelu(self.fc(x)).mean((1, 2)))


class ResponseNorm(nn.Module):
    """The norm over positions of a channel, divided by the mean of all (GRN, ConvNeXtV2)."""

    class GRN(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.gamma, self.beta = nn.Parameter(torch.rand(1, 1, 1, dim)), nn.Parameter(torch.zeros(1, 1, 1, dim))

        def forward(self, x: Tensor) -> Tensor:
            gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
            nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
            return self.gamma * (x * nx) + self.beta + x

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 24, 4, 4), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.norm, self.expand = nn.LayerNorm(24, eps=1e-6), nn.Linear(24, 96)
        self.grn, self.project, self.head = self.GRN(96), nn.Linear(96, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.project(self.grn(F.gelu(self.expand(y))))
        return self.head(x + y.permute(0, 3, 1, 2))


class OneGroup(nn.Module):
    """GroupNorm with one group, pooling minus the identity, LayerScale viewed in forward (PoolFormer)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1, self.norm2 = nn.Conv2d(3, 32, 4, 4), nn.GroupNorm(1, 32), nn.GroupNorm(1, 32)
        self.pool, self.scale = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Parameter(torch.rand(32))
        self.fc1, self.fc2, self.head = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 32, 1), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm1(x)
        x = x + self.scale.view(32, 1, 1) * (self.pool(y) - y)
        return self.head(x + self.scale.unsqueeze(-1).unsqueeze(-1) * self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class OwnGroupNorm(Between):
    """GroupNorm by hand, and FRN with thresholds: views in groups, statistics over positions."""

    class Groups(nn.Module):
        def __init__(self, channels: int, groups: int) -> None:
            super().__init__()
            self.groups = groups
            self.weight, self.bias = (
                nn.Parameter(torch.ones(1, channels, 1, 1)),
                nn.Parameter(torch.zeros(1, channels, 1, 1)),
            )

        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = x.size()
            x = x.view(n, self.groups, -1)
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()
            return x.view(n, c, h, w) * self.weight + self.bias

    class FRN(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            shape = (1, channels, 1, 1)
            self.gamma, self.beta, self.tau = (nn.Parameter(torch.randn(shape)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x * torch.rsqrt(x.pow(2).mean(dim=[2, 3], keepdim=True) + 1e-6)
            return torch.max(self.gamma * x + self.beta, self.tau)

    def __init__(self) -> None:
        super().__init__(self.Groups(24, 4), self.FRN(32))


class PartialNorms(Between):
    """BatchNorm without weights, BatchNorm without statistics, LocalResponseNorm over neighbouring channels."""

    def __init__(self) -> None:
        bare, batch = nn.BatchNorm2d(24, affine=False), nn.BatchNorm2d(24, track_running_stats=False)
        super().__init__(nn.Sequential(bare, nn.ReLU(), batch), nn.LocalResponseNorm(5))


class InputStatistics(nn.Module):
    """The image is normalised by buffers, activations whitened by running statistics kept by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1), persistent=False)
        self.register_buffer("average", torch.zeros(24))
        self.register_buffer("steps", torch.tensor(0))
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 24, 3), conv_bn(24, 32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1((x - self.pixel_mean) / self.pixel_std)
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.9).add_(x.mean((0, 2, 3)), alpha=0.1)
                self.steps += 1
        return self.head(self.conv2(F.relu(x - self.average[None, :, None, None])))


EXAMPLES = {}
READ_ACROSS = [
    PositionMap, LayerNormFirst, LayerNormBare, RootMeanSquare, ResponseNorm, OneGroup, OwnGroupNorm, PartialNorms,
]  # fmt: skip
CAUSES = [
    BlurPool, FrozenNorm, Rescaled, PositionMap, LayerNormFirst, LayerNormBare, InstanceNormed, InstanceAndBatch,
    RootMeanSquare, ResponseNorm, OneGroup, OwnGroupNorm, PartialNorms, InputStatistics,
]  # fmt: skip
