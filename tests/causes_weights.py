"""Weights that are computed on the way to the convolution: standardised, normalised, masked, factored, put together."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from networks import Head, conv_bn


class StandardisedConv(nn.Conv2d):
    """Zero mean and unit variance of every filter, by hand (BiT)."""

    def forward(self, x: Tensor) -> Tensor:
        v, m = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        w = (self.weight - m) / torch.sqrt(v + 1e-10)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Standardised(nn.Module):
    """Weight-standardised subclass and GroupNorm, pre-activation, identity shortcut (BiT ResNetV2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = StandardisedConv(3, 32, 3, padding=1, bias=False)
        self.norm1, self.conv1 = nn.GroupNorm(4, 32), StandardisedConv(32, 48, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(4, 48), StandardisedConv(48, 32, 1, bias=False)
        self.norm, self.head = nn.GroupNorm(4, 32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.head(F.relu(self.norm(x)))


class NormaliserFree(nn.Module):
    """Filters standardised by ``F.batch_norm`` of the weight, a gain per filter, scaled residuals (NFNet)."""

    class Conv(nn.Conv2d):
        def __init__(self, *args: int, **options: int) -> None:
            super().__init__(*args, **options)
            self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)
            self.scale = self.weight[0].numel() ** -0.5

        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(
                self.weight.reshape(1, self.out_channels, -1), None, None,
                weight=(self.gain * self.scale).view(-1), training=True, momentum=0.0, eps=1e-6,
            ).reshape_as(self.weight)  # fmt: skip
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = self.Conv(3, 32, 3, padding=1), self.Conv(32, 48, 1)
        self.conv2, self.conv3 = self.Conv(48, 48, 3, padding=1, groups=3), self.Conv(48, 32, 1)
        self.skip_gain, self.head = nn.Parameter(torch.ones(())), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.conv3(F.silu(self.conv2(F.silu(self.conv1(F.silu(x)) * 1.7)) * 1.7))
        return self.head(out * 0.2 * self.skip_gain + x)


class WeightNormed(nn.Module):
    """Parametrised by direction and length (``parametrizations.weight_norm``)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = parametrizations.weight_norm(nn.Conv2d(3, 24, 3, padding=1))
        self.conv2 = parametrizations.weight_norm(nn.Conv2d(24, 32, 3, padding=1))
        self.conv3, self.head = parametrizations.weight_norm(nn.Conv2d(32, 24, 1)), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.conv3(F.elu(self.conv2(F.elu(self.conv1(x)))))))


class OldWeightNormed(nn.Module):
    """The same by the older hook, whose weight is neither a parameter nor a leaf (vocoders). (B, 4, 64)."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.conv1 = nn.utils.weight_norm(nn.Conv1d(4, 24, 5, padding=2))
            self.conv2 = nn.utils.weight_norm(nn.Conv1d(24, 32, 3, padding=2, dilation=2))
            self.out = nn.utils.weight_norm(nn.ConvTranspose1d(32, 2, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.out(F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), 0.1)), 0.1)))


class SpectrallyNormed(nn.Module):
    """Divided by the largest singular value, power iteration in buffers (discriminators)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            parametrizations.spectral_norm(nn.Conv2d(3, 24, 4, 2, 1)), nn.LeakyReLU(0.2),
            parametrizations.spectral_norm(nn.Conv2d(24, 48, 4, 2, 1)), nn.LeakyReLU(0.2),
            nn.utils.spectral_norm(nn.Conv2d(48, 32, 3, 1, 1)), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.out = parametrizations.spectral_norm(nn.Conv2d(32, 1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


class OwnParametrisation(nn.Module):
    """A user's own parametrisation of some weights: kernels symmetric in the columns, biases not negative."""

    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return (w + w.flip(-1)) / 2

    class Positive(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return F.softplus(bias)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.last = (
            nn.Conv2d(3, 24, 3, padding=1),
            nn.Conv2d(24, 32, 3, padding=1),
            conv_bn(32, 24),
        )
        parametrize.register_parametrization(self.stem, "bias", self.Positive())
        parametrize.register_parametrization(self.conv, "weight", self.Symmetric())
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(F.relu(self.conv(F.relu(self.stem(x))))))


class SamePadding(nn.Module):
    """A subclass that pads by the input's size, as TensorFlow does (EfficientNet's ports)."""

    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            ih, iw = x.size()[-2:]
            kh, kw = self.weight.size()[-2:]
            sh, sw = self.stride
            pad_h = max((-(ih // -sh) - 1) * sh + (kh - 1) * self.dilation[0] + 1 - ih, 0)
            pad_w = max((-(iw // -sw) - 1) * sw + (kw - 1) * self.dilation[1] + 1 - iw, 0)
            if pad_h > 0 or pad_w > 0:
                x = F.pad(x, [pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2])
            return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = self.Conv(3, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = self.Conv(32, 32, 3, stride=2, groups=32, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.bn3, self.head = self.Conv(32, 48, 1, bias=False), nn.BatchNorm2d(48), Head(48)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn2(self.conv2(F.silu(self.bn1(self.conv1(x))))))
        return self.head(F.silu(self.bn3(self.conv3(x))))


class OwnMask(nn.Module):
    """Causal kernels: a buffer of zeros and ones, as large as the weight, multiplied with it (PixelCNN)."""

    class Masked(nn.Conv2d):
        def __init__(self, i: int, o: int, k: int, kind: str) -> None:
            super().__init__(i, o, k, padding=k // 2)
            self.register_buffer("mask", torch.ones_like(self.weight))
            self.mask[:, :, k // 2, k // 2 + (kind == "B") :] = 0
            self.mask[:, :, k // 2 + 1 :] = 0

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = self.Masked(3, 24, 5, "A"), nn.BatchNorm2d(24)
        self.conv2, self.bn2, self.out = self.Masked(24, 32, 3, "B"), nn.BatchNorm2d(32), nn.Conv2d(32, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))))


class MaskInPlace(OwnMask):
    """The same written into the parameter's data at every call (the usual PixelCNN code)."""

    class Masked(OwnMask.Masked):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data *= self.mask
            return nn.Conv2d.forward(self, x)


class Pruned(nn.Module):
    """Weights behind ``torch.nn.utils.prune``: some elements, and some whole filters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.last, self.head = conv_bn(3, 24), conv_bn(24, 32), conv_bn(32, 24), Head(24)
        prune.l1_unstructured(self.conv[0], "weight", amount=0.3)
        prune.ln_structured(self.last[0], "weight", amount=0.25, n=2, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.conv(self.stem(x))))


class LowRank(nn.Module):
    """The weight is the product of two parameters; an update of low rank is added to a frozen one (LoRA)."""

    class Factored(nn.Module):
        def __init__(self, i: int, o: int, rank: int = 6) -> None:
            super().__init__()
            self.i, self.o = i, o
            self.u, self.v = nn.Parameter(torch.randn(o, rank) / 3), nn.Parameter(torch.randn(rank, i * 9) / 5)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, (self.u @ self.v).view(self.o, self.i, 3, 3), padding=1)

    class Adapted(nn.Conv2d):
        def __init__(self, i: int, o: int, rank: int = 4) -> None:
            super().__init__(i, o, 3, padding=1)
            self.weight.requires_grad = False
            self.lora_a, self.lora_b = (
                nn.Parameter(torch.randn(rank * 3, i * 3)),
                nn.Parameter(torch.zeros(o * 3, rank * 3)),
            )

        def forward(self, x: Tensor) -> Tensor:
            update = (self.lora_b @ self.lora_a).view(self.weight.shape)
            return self._conv_forward(x, self.weight + update, self.bias)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.factored, self.bn1 = conv_bn(3, 24), self.Factored(24, 32), nn.BatchNorm2d(32)
        self.adapted, self.bn2, self.head = self.Adapted(32, 24), nn.BatchNorm2d(24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.factored(self.stem(x))))
        return self.head(F.relu(self.bn2(self.adapted(x))))


class Quaternion(nn.Module):
    """A weight of signed blocks, put together by ``cat`` of four parameters."""

    class Conv(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.r, self.i, self.j, self.k = (nn.Parameter(torch.randn(o // 4, i // 4, 3, 3) / i) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            r, i, j, k = self.r, self.i, self.j, self.k
            rows = [(r, -i, -j, -k), (i, r, -k, j), (j, k, r, -i), (k, -j, i, r)]
            return F.conv2d(x, torch.cat([torch.cat(row, dim=1) for row in rows], dim=0), padding=1)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q1, self.bn1 = conv_bn(3, 32), self.Conv(32, 48), nn.BatchNorm2d(48)
        self.q2, self.bn2, self.head = self.Conv(48, 32), nn.BatchNorm2d(32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.q1(self.stem(x))))
        return self.head(F.relu(self.bn2(self.q2(x))))


class FakeQuantised(nn.Module):
    """Weights and activations rounded with a straight-through gradient, scales per filter in a parameter."""

    class Conv(nn.Conv2d):
        def __init__(self, i: int, o: int) -> None:
            super().__init__(i, o, 3, padding=1, bias=False)
            self.step = nn.Parameter(torch.full((o, 1, 1, 1), 0.02))

        def forward(self, x: Tensor) -> Tensor:
            w = (self.weight / self.step).clamp(-8, 7)
            w = (w + (w.round() - w).detach()) * self.step
            return F.conv2d(x, w, None, self.stride, self.padding)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = self.Conv(3, 24), nn.BatchNorm2d(24)
        self.conv2, self.bn2, self.head = self.Conv(24, 32), nn.BatchNorm2d(32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))))


class Demodulated(nn.Module):
    """Input channels of the weight scaled by a style, filters renormalised, one group an image (StyleGAN2)."""

    class Conv(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.weight, self.style = nn.Parameter(torch.randn(1, o, i, 3, 3)), nn.Linear(7, i)
            self.out_channel = o

        def forward(self, x: Tensor, style: Tensor) -> Tensor:
            b, c, h, w = x.shape
            weight = self.weight * self.style(style).view(b, 1, c, 1, 1)
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8).view(b, self.out_channel, 1, 1, 1)
            out = F.conv2d(x.view(1, b * c, h, w), weight.view(b * self.out_channel, c, 3, 3), padding=1, groups=b)
            return out.view(b, self.out_channel, h, w)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = conv_bn(3, 24), self.Conv(24, 32), self.Conv(32, 24)
        self.rgb = nn.Conv2d(24, 3, 1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(self.stem(x), style), 0.2)
        return self.rgb(F.leaky_relu(self.conv2(x, style), 0.2))


class Reparametrised(nn.Module):
    """Three branches by kernel size that are added: 3x3, 1x1, identity through BatchNorm (RepVGG)."""

    class Block(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.dense = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
            self.one = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))
            self.identity = nn.BatchNorm2d(c)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.dense(x) + self.one(x) + self.identity(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.last = (
            conv_bn(3, 24),
            nn.Sequential(self.Block(24), self.Block(24)),
            conv_bn(24, 32),
        )
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(x))))


EXAMPLES = {
    OldWeightNormed: (4, 64),
    Demodulated: lambda batch: (torch.randn(batch, 3, 16, 16), torch.randn(batch, 7)),
}
READ_ACROSS = [Standardised, NormaliserFree, WeightNormed, OldWeightNormed, SpectrallyNormed, LowRank, Demodulated]
CAUSES = [
    Standardised, NormaliserFree, WeightNormed, OldWeightNormed, SpectrallyNormed, OwnParametrisation, SamePadding,
    OwnMask, MaskInPlace, Pruned, LowRank, Quaternion, FakeQuantised, Demodulated, Reparametrised,
]  # fmt: skip
