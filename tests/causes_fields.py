"""Convolutions themselves (transposed, 1-d, 3-d, padded, dilated, multiplied) and unusual ops in the middle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Head, conv_bn


class TransposedGroups(nn.Module):
    """Transposed convolutions: grouped, depthwise, with output padding."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(conv_bn(3, 24, stride=2), conv_bn(24, 32, stride=2))
        self.up1 = nn.ConvTranspose2d(32, 24, 3, 2, 1, output_padding=1, groups=4, bias=False)
        self.bn1, self.up2 = nn.BatchNorm2d(24), nn.ConvTranspose2d(24, 24, 4, 2, 1, groups=24)
        self.out = nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up2(F.relu(self.bn1(self.up1(self.down(x))))))


class Wave(nn.Module):
    """Gated dilated layers, residual and skip split from one convolution, causal padding (WaveNet). (B, 4, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.residual = nn.Conv1d(4, 24, 1), 24
        self.gates = nn.ModuleList([nn.Conv1d(24, 2 * 24, 2, dilation=2**i) for i in range(3)])
        self.outs = nn.ModuleList([nn.Conv1d(24, 24 + 32, 1) for _ in range(3)])
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(32, 24, 1), nn.ReLU(), nn.Conv1d(24, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.start(x), 0.0
        for i, (gate, out) in enumerate(zip(self.gates, self.outs, strict=True)):
            a, b = gate(F.pad(x, (2**i, 0))).chunk(2, dim=1)
            y = out(torch.tanh(a) * torch.sigmoid(b))
            x, skips = x + y[:, : self.residual], skips + y[:, self.residual :]
        return self.end(skips)


class Chomped(nn.Module):
    """Causal by padding both ends and cutting the last positions off (TCN). (B, 4, 64)."""

    class Chomp(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, : -self.size].contiguous()

    def __init__(self) -> None:
        super().__init__()
        widths = ((4, 24), (24, 32), (32, 32))
        self.convs = nn.ModuleList()
        for n, (i, o) in enumerate(widths):
            conv = nn.Conv1d(i, o, 3, padding=2 * 2**n, dilation=2**n)
            self.convs.append(nn.Sequential(conv, self.Chomp(2 * 2**n), nn.BatchNorm1d(o), nn.ReLU()))
        self.downs = nn.ModuleList([nn.Conv1d(i, o, 1) if i != o else None for i, o in widths])
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, down in zip(self.convs, self.downs, strict=True):
            x = F.relu(conv(x) + (x if down is None else down(x)))
        return self.head(x[:, :, -1])


class Factorised3d(nn.Module):
    """Space, then time, with a width between that keeps the parameters (R(2+1)D), and I3D's pools. (B, 3, 4, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial, self.bn1 = nn.Conv3d(3, 29, (1, 3, 3), padding=(0, 1, 1), bias=False), nn.BatchNorm3d(29)
        self.temporal, self.bn2 = nn.Conv3d(29, 24, (3, 1, 1), padding=(1, 0, 0), bias=False), nn.BatchNorm3d(24)
        self.separate = nn.Conv3d(24, 24, 3, padding=1, groups=24)
        self.pool, self.last, self.head = (
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            nn.Conv3d(24, 32, 1),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.temporal(F.relu(self.bn1(self.spatial(x))))))
        x = F.relu(self.last(self.separate(self.pool(x))))
        return self.head(F.adaptive_avg_pool3d(x, (1, 1, 1)).flatten(1))


class TwoAndThreeD(nn.Module):
    """Frames through a 2-d network, put together, then through a 3-d one. (B, 3, 4, 12, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.frame, self.video, self.head = (
            nn.Sequential(conv_bn(3, 24), conv_bn(24, 32, stride=2)),
            nn.Conv3d(32, 24, 3),
            nn.Linear(24, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, t, h, w = x.shape
        x = self.frame(x.transpose(1, 2).reshape(n * t, c, h, w))
        x = x.view(n, t, *x.shape[1:]).permute(0, 2, 1, 3, 4)
        return self.head(F.relu(self.video(x)).mean((2, 3, 4)))


class Fourier(nn.Module):
    """Weights on the spectrum of every channel (GFNet), then channels mixed there by complex einsum (FNO)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight = conv_bn(3, 24), nn.Parameter(torch.randn(24, 16, 9, 2) / 4)
        self.mid, self.mix = conv_bn(24, 24), nn.Parameter(torch.randn(24, 24, 5, 5, 2) / 24)
        self.bypass, self.last, self.head = nn.Conv2d(24, 24, 1), conv_bn(24, 32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.rfft2(self.stem(x), norm="ortho") * torch.view_as_complex(self.weight)
        x = self.mid(torch.fft.irfft2(x, s=(16, 16), norm="ortho"))
        low = torch.einsum("bixy,ioxy->boxy", torch.fft.rfft2(x)[:, :, :5, :5], torch.view_as_complex(self.mix))
        x = torch.fft.irfft2(low, s=(16, 16)) + self.bypass(x)
        return self.head(self.last(F.gelu(x)))


class Einsum(nn.Module):
    """Channels mixed by einsum with a parameter, pooled by einsum with soft assignments (NetVLAD)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = conv_bn(3, 24), nn.Parameter(torch.randn(24, 32) / 5)
        self.bn, self.assign = nn.BatchNorm2d(32), nn.Conv2d(32, 6, 1)
        self.centroids, self.head = nn.Parameter(torch.randn(6, 32)), nn.Linear(6 * 32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(torch.einsum("bchw,cd->bdhw", self.stem(x), self.mix)))
        soft = self.assign(x).flatten(2).softmax(dim=1)
        vlad = torch.einsum("bkn,bcn->bkc", soft, x.flatten(2)) - soft.sum(-1)[..., None] * self.centroids
        return self.head(vlad.flatten(1))


class Warped(nn.Module):
    """Positions moved by a predicted flow (``grid_sample``), by an affine grid (STN), and resized."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.flow, self.theta = conv_bn(3, 24), nn.Conv2d(24, 2, 3, padding=1), nn.Linear(24, 6)
        self.mid, self.last, self.head = conv_bn(24, 32), conv_bn(32, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        grid = F.affine_grid(self.theta(x.mean((2, 3))).view(-1, 2, 3), list(x.size()), align_corners=False)
        x = F.grid_sample(x, grid + self.flow(x).permute(0, 2, 3, 1), align_corners=False, padding_mode="border")
        x = F.interpolate(self.mid(x), scale_factor=0.5, mode="bicubic", align_corners=True)
        return self.head(self.last(F.interpolate(x, size=(12, 12), mode="bilinear", align_corners=False)))


class CoordConv(nn.Module):
    """Coordinates of the positions concatenated, and the image itself at every level."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.head = conv_bn(5, 24), conv_bn(29, 32), conv_bn(37, 24), Head(24)

    @staticmethod
    def coordinates(x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        ys = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(b, 1, h, w)
        xs = torch.linspace(-1, 1, w).view(1, 1, 1, w).expand(b, 1, h, w)
        return torch.cat([x, ys, xs], dim=1)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(self.coordinates(image)), 2)
        x = F.avg_pool2d(self.conv2(torch.cat([self.coordinates(x), F.avg_pool2d(image, 2)], 1)), 2)
        return self.head(self.conv3(torch.cat([self.coordinates(x), F.adaptive_avg_pool2d(image, x.shape[-2:])], 1)))


class Fused(nn.Module):
    """Branches of several resolutions exchange their maps twice (HRNet)."""

    class Exchange(nn.Module):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.a, self.b = conv_bn(a, a), conv_bn(b, b)
            self.down = nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b))
            self.up = nn.Sequential(nn.Conv2d(b, a, 1, bias=False), nn.BatchNorm2d(a), nn.Upsample(scale_factor=2))

        def forward(self, xs: list[Tensor]) -> list[Tensor]:
            a, b = self.a(xs[0]), self.b(xs[1])
            return [F.relu(a + self.up(b)), F.relu(b + self.down(a))]

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.transition = conv_bn(3, 24), conv_bn(24, 40, stride=2)
        self.stages, self.last, self.head = (
            nn.Sequential(self.Exchange(24, 40), self.Exchange(24, 40)),
            conv_bn(64, 32, 1),
            Head(32),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = self.stages([x, self.transition(x)])
        return self.head(self.last(torch.cat([a, F.interpolate(b, size=a.shape[-2:], mode="bilinear")], 1)))


class Hypercolumns(nn.Module):
    """All levels resized and concatenated; pyramid pooling of the last one (PSPNet), atrous rates (ASPP)."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv_bn(3, 24), conv_bn(24, 32, stride=2)])
        self.atrous = nn.ModuleList()
        for rate in (1, 2, 4):
            conv = nn.Conv2d(32, 16, 3, padding=rate, dilation=rate, bias=False)
            self.atrous.append(nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU()))
        self.pools = nn.ModuleList(
            [nn.Sequential(nn.AdaptiveAvgPool2d(s), nn.Conv2d(32, 8, 1), nn.ReLU()) for s in (1, 2)]
        )
        self.out = nn.Sequential(conv_bn(24 + 48 + 16, 24), nn.Conv2d(24, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        low = self.stages[0](x)
        x = self.stages[1](low)
        maps = [low, *(atrous(x) for atrous in self.atrous), *(pool(x) for pool in self.pools)]
        return self.out(
            torch.cat([F.interpolate(m, low.shape[-2:], mode="bilinear", align_corners=False) for m in maps], 1)
        )


class Paddings(nn.Module):
    """Reflected, circular, replicated and "same" padding, by the convolution itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 24, 3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(24)
        self.conv2, self.bn2 = nn.Conv2d(24, 32, 5, padding=2, padding_mode="circular"), nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 24, (1, 3), padding=(0, 2), dilation=2, padding_mode="replicate")
        self.conv4, self.head = nn.Conv2d(24, 32, 5, padding="same", groups=4), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(F.relu(self.conv4(F.relu(self.conv3(x)))))


class Multiplier(nn.Module):
    """Two filters for each input channel, a grouped convolution that doubles the width, dilation (Xception)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.widen = conv_bn(3, 24), nn.Conv2d(24, 48, 3, padding=2, dilation=2, groups=24, bias=False)
        self.bn, self.point, self.wide = nn.BatchNorm2d(48), conv_bn(48, 32, 1), conv_bn(32, 64, groups=8)
        self.head = Head(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(self.point(F.relu(self.bn(self.widen(self.stem(x)))))))


class Concatenated(nn.Module):
    """Activations that change the width: concatenated signs (CReLU), a zero map appended, maps of constants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.head = conv_bn(3, 16), conv_bn(32, 24), conv_bn(28, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.conv2(torch.cat([F.relu(x), F.relu(-x)], dim=1))
        spread = x.var(dim=0, unbiased=False, keepdim=True).mean().expand(x.shape[0], 1, *x.shape[2:])
        zeros = torch.zeros(x.shape[0], 3, *x.shape[2:])
        return self.head(self.conv3(torch.cat([x, zeros, spread], dim=1)))


class Wavelet(nn.Module):
    """Sub-bands by sums and differences of strided slices of positions, and back, written into an empty map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.expand, self.out = (
            conv_bn(3, 24),
            conv_bn(96, 32),
            conv_bn(32, 64),
            nn.Conv2d(16, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        top, bottom = x[:, :, 0::2, :] / 2, x[:, :, 1::2, :] / 2
        a, b, c, d = top[..., 0::2], bottom[..., 0::2], top[..., 1::2], bottom[..., 1::2]
        x = self.expand(self.mid(torch.cat((a + b + c + d, -a - b + c + d, -a + b - c + d, a - b - c + d), 1)))
        n, c4, h, w = x.size()
        x1, x2, x3, x4 = (x[:, i * c4 // 4 : (i + 1) * c4 // 4] / 2 for i in range(4))
        out = torch.zeros([n, c4 // 4, h * 2, w * 2]).to(x)
        out[:, :, 0::2, 0::2], out[:, :, 1::2, 0::2] = x1 - x2 - x3 + x4, x1 - x2 + x3 - x4
        out[:, :, 0::2, 1::2], out[:, :, 1::2, 1::2] = x1 + x2 - x3 - x4, x1 + x2 + x3 + x4
        return self.out(out)


class Indices(nn.Module):
    """Maxima remembered and put back by ``MaxUnpool2d`` (SegNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.pool, self.unpool = (
            conv_bn(3, 24),
            nn.MaxPool2d(2, 2, return_indices=True),
            nn.MaxUnpool2d(2, 2),
        )
        self.mid, self.out = nn.Sequential(conv_bn(24, 32), conv_bn(32, 24)), nn.Conv2d(24, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x, indices = self.pool(self.down(x))
        return self.out(self.unpool(self.mid(x), indices))


class Points(nn.Module):
    """1x1 convolutions of points, a learned transform of them, the largest over all points (PointNet). (B, 3, 50)."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Sequential(
            nn.Conv1d(3, 24, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(24, 9)
        )
        self.conv1, self.conv2, self.head = nn.Conv1d(3, 24, 1), nn.Conv1d(24, 48, 1), nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Tensor:
        turn = self.transform(x).view(-1, 3, 3) + torch.eye(3)
        x = F.relu(self.conv1(torch.bmm(x.transpose(2, 1), turn).transpose(2, 1)))
        y = torch.max(self.conv2(x), 2, keepdim=True)[0]
        return self.head(torch.cat([x, y.expand(-1, -1, x.shape[2])], 1).mean(2))


EXAMPLES = {
    Wave: (4, 64), Chomped: (4, 64), Factorised3d: (3, 4, 8, 8), TwoAndThreeD: (3, 4, 12, 12), Points: (3, 50),
}  # fmt: skip
READ_ACROSS = [Fourier, Concatenated]
CAUSES = [
    TransposedGroups, Wave, Chomped, Factorised3d, TwoAndThreeD, Fourier, Einsum, Warped, CoordConv, Fused,
    Hypercolumns, Paddings, Multiplier, Concatenated, Wavelet, Indices, Points,
]  # fmt: skip
