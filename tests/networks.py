"""Small networks, one for each way in which channels travel. All take (B, 3, 16, 16) unless they say otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Head(nn.Module):
    """Pool and classify."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


class Residual(nn.Module):
    """A projection shortcut, then an identity shortcut."""

    class Block(nn.Module):
        def __init__(self, i: int, o: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
            self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
            self.down = conv_bn(i, o, 1, stride) if stride > 1 else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            out += self.down(x)
            return F.relu(out)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.blocks = nn.Sequential(self.Block(16, 16, 1), self.Block(16, 32, 2), self.Block(32, 32, 1))
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class ZeroPad(nn.Module):
    """Parameter-free shortcuts that pad channels, in a module of their own, with hard-coded counts."""

    class Pad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pad = conv_bn(3, 16), self.Pad()
        self.conv = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32))
        self.next, self.head = conv_bn(32, 32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.next(F.relu(self.conv(x) + self.pad(x))))


class InlineZeroPad(ZeroPad):
    """The same, padded in the code of forward: the padded channels can't be cut."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.next(F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))))


class Dense(nn.Module):
    """Concatenation: every layer reads all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.layers = nn.ModuleList([conv_bn(16 + 12 * i, 12) for i in range(3)])
        self.head = Head(16 + 36)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)))
        return self.head(torch.cat(parts, 1))


class Inverted(nn.Module):
    """Expand, depthwise, squeeze-and-excite, project, add (MobileNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.expand, self.depthwise = conv_bn(16, 48, 1), conv_bn(48, 48, 3, groups=48)
        self.reduce, self.excite = nn.Conv2d(48, 12, 1), nn.Conv2d(12, 48, 1)
        self.project = nn.Sequential(nn.Conv2d(48, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        y = y * torch.sigmoid(self.excite(F.relu(self.reduce(F.adaptive_avg_pool2d(y, 1)))))
        return self.head(x + self.project(y))


class Grouped(nn.Module):
    """A grouped convolution in a bottleneck (ResNeXt)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 32)
        self.body = nn.Sequential(conv_bn(32, 48, 1), conv_bn(48, 48, 3, groups=4), conv_bn(48, 32, 1))
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.body(x))


class Shuffle(nn.Module):
    """Channel split and shuffle (ShuffleNetV2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 32)
        self.branch = nn.Sequential(conv_bn(16, 16, 1), conv_bn(16, 16, 3, groups=16), conv_bn(16, 16, 1))
        self.mix, self.head = conv_bn(32, 32, 1), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = self.stem(x).chunk(2, 1)
        x = torch.cat([kept, self.branch(worked)], 1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(self.mix(x))


class Flatten(nn.Module):
    """Flattened positions into a linear layer, another linear layer after it (VGG)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 16, stride=2), nn.MaxPool2d(2), conv_bn(16, 32), nn.Flatten())
        self.fc1, self.fc2 = nn.Linear(32 * 16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(self.body(x))))


class HardView(nn.Module):
    """A view with the width written into the code: these channels can't be cut, the others can."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last, self.fc = conv_bn(3, 32), conv_bn(32, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.last(self.body(x)), 1).view(-1, 24))


class UNet(nn.Module):
    """Transposed convolution, skip by concatenation, dense output in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = conv_bn(3, 16), conv_bn(16, 32, stride=2)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.merge, self.out = conv_bn(32, 16), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        skip = self.down1(x)
        up = self.up(self.down2(skip))
        return {"out": self.out(self.merge(torch.cat([skip, up], 1)))}


class GroupNormed(nn.Module):
    """GroupNorm: groups stay equal. No BatchNorm, so no zeroing equivalence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.conv2, self.head = nn.Conv2d(32, 32, 3, padding=1), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.norm(self.conv1(x))))))


class ConvNeXt(nn.Module):
    """Depthwise, LayerNorm in channels-last, linear layers, LayerScale, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 4, 4)
        self.depthwise, self.norm = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.LayerNorm(24)
        self.expand, self.project = nn.Linear(24, 96), nn.Linear(96, 24)
        self.scale, self.head = nn.Parameter(torch.rand(24)), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.project(F.gelu(self.expand(y))) * self.scale
        return self.head(x + y.permute(0, 3, 1, 2))


class Attention(nn.Module):
    """Convolutions feeding attention: the queries' width stays, the rest can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = conv_bn(3, 16, stride=4), conv_bn(16, 32)
        self.attention, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.stem(x)).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class PReLUFrozen(nn.Module):
    """A learned slope per channel, and a frozen stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)), nn.PReLU(16)
        self.stem.requires_grad_(False)
        self.conv, self.head = conv_bn(16, 32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.act(self.stem(x))))


class Twice(nn.Module):
    """One convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = conv_bn(3, 16), conv_bn(16, 16), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(self.stem(x))))


class PixelShuffle(nn.Module):
    """Sub-pixel upsampling: r * r channels become one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.expand = conv_bn(3, 16), nn.Conv2d(16, 64, 3, padding=1)
        self.up, self.out = nn.PixelShuffle(2), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(self.expand(self.body(x))))


class OneD(nn.Module):
    """(B, 4, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(4, 16, 5),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 32, 3, 2),
            nn.BatchNorm1d(32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(2))


class ThreeD(nn.Module):
    """(B, 1, 8, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(1, 16, 3),
            nn.BatchNorm3d(16),
            nn.ReLU(),
            nn.Conv3d(16, 24, 3),
            nn.BatchNorm3d(24),
            nn.ReLU(),
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3, 4)))


EXAMPLES = {OneD: (4, 64), ThreeD: (1, 8, 8, 8)}
BATCH_NORMED = [
    Residual, ZeroPad, InlineZeroPad, Dense, Inverted, Grouped, Shuffle, Flatten, HardView, UNet, PReLUFrozen, Twice,
    PixelShuffle, OneD, ThreeD, Attention,
]  # fmt: skip
NETWORKS = [*BATCH_NORMED, GroupNormed, ConvNeXt]


def make(network: type[nn.Module], seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network with lively BatchNorm statistics, in eval mode, and a batch of two for it."""
    torch.manual_seed(seed)
    net = network().eval()
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, 0.5)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 2)
            nn.init.normal_(m.bias)
    return net, torch.randn(2, *EXAMPLES.get(network, (3, 16, 16)))
