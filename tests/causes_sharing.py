"""Modules and parameters that are used more than once, and networks that are functions of their parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Head, conv_bn


class Siamese(nn.Module):
    """One encoder for two inputs, compared by distance and by product. Two images."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_bn(3, 24), conv_bn(24, 32, stride=2))
        self.last, self.head = conv_bn(96, 24), Head(24)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.encoder(a), self.encoder(b)
        return self.head(self.last(torch.cat([torch.abs(a - b), a * b, torch.maximum(a, b)], 1)))


class CrossCorrelation(nn.Module):
    """The features of one image are the kernel for those of the other (SiamFC, SiamRPN). Two images."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 24, stride=2), nn.Conv2d(24, 32, 3))
        self.head = nn.Sequential(conv_bn(32, 24, 1), nn.Conv2d(24, 2, 1))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        z, x = self.backbone(z), self.backbone(x)
        b, c, h, w = x.shape
        out = F.conv2d(x.reshape(1, b * c, h, w), z.reshape(b * c, 1, *z.shape[2:]), groups=b * c)
        return self.head(out.reshape(b, c, *out.shape[2:]))


class OneParameter(nn.Module):
    """Two modules that hold one and the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1, self.bn2 = conv_bn(3, 24), nn.BatchNorm2d(24), nn.BatchNorm2d(24)
        self.near, self.far = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=2, dilation=2)
        self.far.weight = self.near.weight
        self.last, self.head = conv_bn(24, 32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.last(F.relu(self.bn1(self.near(x)) + self.bn2(self.far(x)))))


class Tied(nn.Module):
    """The decoder uses the encoder's weights, transposed (autoencoder)."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = nn.Conv2d(3, 24, 4, 2, 1), nn.Conv2d(24, 32, 4, 2, 1)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enc2(F.relu(self.enc1(x))))
        x = F.relu(F.conv_transpose2d(x, self.enc2.weight, self.bias2, stride=2, padding=1))
        return torch.sigmoid(F.conv_transpose2d(x, self.enc1.weight, self.bias1, stride=2, padding=1))


class TiedLinear(nn.Module):
    """A classifier whose weight is also an embedding's, and a projection used in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.embed = nn.Sequential(conv_bn(3, 24), conv_bn(24, 32, stride=2)), nn.Embedding(7, 32)
        self.fc = nn.Linear(32, 7, bias=False)
        self.fc.weight = self.embed.weight
        self.project = nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).mean((2, 3))
        x = x + self.embed(torch.arange(len(x)) % 7)
        return self.fc(F.linear(F.relu(self.project(x)), self.project.weight.t()))


class LevelHeads(nn.Module):
    """A pyramid whose levels share two towers, with a scale of their own (FPN, RetinaNet, FCOS)."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 32, 40)
        self.body = nn.ModuleList([conv_bn(i, o, stride=2) for i, o in zip((3, *widths), widths, strict=False)])
        self.lateral = nn.ModuleList([nn.Conv2d(w, 32, 1) for w in widths])
        self.smooth = nn.ModuleList([nn.Conv2d(32, 32, 3, padding=1) for _ in widths])
        self.tower = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU())
        self.logits, self.boxes = nn.Conv2d(32, 6, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)
        self.scales = nn.ModuleList([self.Scale() for _ in widths])

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        levels = []
        for stage in self.body:
            x = stage(x)
            levels.append(x)
        inner = [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]
        for i in (1, 0):
            inner[i] = inner[i] + F.interpolate(inner[i + 1], size=inner[i].shape[-2:], mode="nearest")
        towers = [self.tower(smooth(level)) for smooth, level in zip(self.smooth, inner, strict=True)]
        boxes = [F.relu(scale(self.boxes(t))) for scale, t in zip(self.scales, towers, strict=True)]
        return [self.logits(t) for t in towers], boxes


class Repeated(nn.Module):
    """One convolution applied a few times, the image fed in each time (recurrent CNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.inject, self.step, self.steps = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), 3
        self.norms = nn.ModuleList([nn.BatchNorm2d(32) for _ in range(3)])
        self.last, self.head = conv_bn(32, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        h = feed = self.inject(x)
        for i in range(self.steps):
            h = F.relu(self.norms[i](self.step(h) + feed))
        return self.head(self.last(h))


class SharedBlock(nn.Module):
    """One block object under two names, called from both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, block = conv_bn(3, 24), nn.Sequential(conv_bn(24, 40, 1), conv_bn(40, 24))
        self.stage1, self.stage2 = nn.Sequential(block, nn.MaxPool2d(2)), nn.Sequential(block, conv_bn(24, 32))
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.stem(x))))


class ParameterLists(nn.Module):
    """Weights in lists and dicts of parameters, applied by ``F.conv2d`` (MAML and its kin)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.norms = nn.ParameterList(), nn.ParameterDict()
        for n, (i, o) in enumerate([(3, 24), (24, 32), (32, 24)]):
            self.weights.append(nn.Parameter(torch.randn(o, i, 3, 3) / (9 * i) ** 0.5))
            self.weights.append(nn.Parameter(torch.zeros(o)))
            self.norms[f"scale{n}"], self.norms[f"shift{n}"] = nn.Parameter(torch.ones(o)), nn.Parameter(torch.zeros(o))
        self.weights.append(nn.Parameter(torch.randn(5, 24) / 5))

    def forward(self, x: Tensor) -> Tensor:
        for n in range(3):
            x = F.conv2d(x, self.weights[2 * n], self.weights[2 * n + 1], padding=1)
            x = F.batch_norm(x, None, None, self.norms[f"scale{n}"], self.norms[f"shift{n}"], training=True)
            x = F.relu(x)
        return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.weights[-1])


class Banked(nn.Module):
    """All layers' kernels in one stacked parameter, and in slices of one template."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.kernels = conv_bn(3, 24), nn.Parameter(torch.randn(3, 24, 24, 3, 3) / 15)
        self.template = nn.Parameter(torch.randn(48, 24, 1, 1) / 5)
        self.norms, self.head = nn.ModuleList([nn.BatchNorm2d(24) for _ in range(3)]), Head(48)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            x = F.relu(x + norm(F.conv2d(x, kernel, padding=1)))
        return self.head(torch.cat([F.conv2d(x, self.template[:32]), F.conv2d(x, self.template[32:])], dim=1))


class Slimmable(nn.Module):
    """Convolutions that use the first rows and columns of their weight, as wide as an attribute says."""

    class Conv(nn.Conv2d):
        def __init__(self, i: int, o: int, widths: tuple[int, int]) -> None:
            super().__init__(i, o, 3, padding=1)
            self.active_in, self.active_out = widths

        def forward(self, x: Tensor) -> Tensor:
            weight, bias = self.weight[: self.active_out, : self.active_in], self.bias[: self.active_out]
            return F.conv2d(x, weight, bias, self.stride, self.padding)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = self.Conv(3, 32, (3, 24)), self.Conv(32, 40, (24, 32))
        self.last, self.head = conv_bn(32, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(F.relu(self.conv2(F.relu(self.conv1(x))))))


class Contrastive(nn.Module):
    """An encoder and its slow copy, which takes no gradient, on two views (MoCo). Two images."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(
            conv_bn(3, 24), conv_bn(24, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16)
        )
        self.key = nn.Sequential(
            conv_bn(3, 24), conv_bn(24, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16)
        )
        for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
            k.data.copy_(q.data)
            k.requires_grad = False
        self.register_buffer("queue", F.normalize(torch.randn(16, 10), dim=0))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        q = F.normalize(self.query(a), dim=1)
        with torch.no_grad():
            k = F.normalize(self.key(b), dim=1)
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
        return torch.cat([positive, torch.einsum("nc,ck->nk", q, self.queue.clone().detach())], dim=1)


def _pair(batch: int, size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 16, 16), torch.randn(batch, 3, size, size)


EXAMPLES = {Siamese: _pair, CrossCorrelation: lambda batch: _pair(batch, 24), Contrastive: _pair}
READ_ACROSS = [LevelHeads, CrossCorrelation, Contrastive]
CAUSES = [
    Siamese, CrossCorrelation, OneParameter, Tied, TiedLinear, LevelHeads, Repeated, SharedBlock, ParameterLists,
    Banked, Slimmable, Contrastive,
]  # fmt: skip
