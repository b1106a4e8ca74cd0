"""What goes in and comes out: several inputs, dicts, lists; dicts, dataclasses, named tuples, inner feature maps."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Head, conv_bn


class LateFusion(nn.Module):
    """A colour image and a depth map through branches of their own, added and concatenated. Keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.colour, self.depth = (
            nn.ModuleList([conv_bn(3, 24), conv_bn(24, 32)]),
            nn.ModuleList([conv_bn(1, 24), conv_bn(24, 24)]),
        )
        self.fuse, self.head = conv_bn(56, 32), Head(32)

    def forward(self, rgb: Tensor, depth: Tensor | None = None) -> Tensor:
        x = self.colour[0](rgb)
        d = self.depth[0](depth if depth is not None else rgb[:, :1])
        return self.head(self.fuse(torch.cat([self.colour[1](x + d), self.depth[1](d)], dim=1)))


class Batch(nn.Module):
    """One argument, a dict with the image, a vector and what isn't a tensor; a dict of dicts comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.meta = nn.Sequential(conv_bn(3, 24), conv_bn(24, 32, stride=2)), nn.Linear(7, 12)
        self.classify, self.mask = nn.Linear(44, 5), nn.Conv2d(32, 2, 1)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        x = self.body(batch["image"])
        scores = self.classify(torch.cat([x.mean((2, 3)), F.relu(self.meta(batch["meta"]))], dim=-1))
        return {"scores": scores, "dense": {"mask": self.mask(x)}, "name": batch["name"]}


class ImageList(nn.Module):
    """A list of images of different sizes, padded into one batch; a list of dicts comes out (detectors)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(conv_bn(3, 24, stride=2), conv_bn(24, 32)), nn.Conv2d(32, 5, 1)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        h, w = (max(image.shape[d] for image in images) for d in (1, 2))
        batch = images[0].new_zeros(len(images), 3, h, w)
        for image, place in zip(images, batch, strict=True):
            place[:, : image.shape[1], : image.shape[2]].copy_(image)
        out = self.out(self.body(batch))
        return [{"scores": o[0].sigmoid(), "boxes": o[1:].flatten(1).t()} for o in out]


class Detections(nn.Module):
    """A plain dataclass comes out, a feature map of the inside in it."""

    @dataclass
    class Output:
        logits: Tensor
        features: Tensor
        aux: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.last, self.head = conv_bn(3, 24), conv_bn(24, 32), conv_bn(32, 24), Head(24)

    def forward(self, x: Tensor) -> Detections.Output:
        features = self.mid(self.stem(x))
        return self.Output(self.head(self.last(features)), features)


class Pyramid(nn.Module):
    """All the levels come out, as a named tuple with an ordered dict in it: only what is between can go."""

    class Output(NamedTuple):
        pooled: Tensor
        levels: OrderedDict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(conv_bn(3, 24), conv_bn(24, 16))
        self.stage2 = nn.Sequential(conv_bn(16, 48, 1), conv_bn(48, 48, stride=2, groups=48), conv_bn(48, 24, 1))

    def forward(self, x: Tensor) -> Pyramid.Output:
        c1 = self.stage1(x)
        c2 = self.stage2(c1)
        return self.Output(c2.mean((2, 3)), OrderedDict(c1=c1, c2=c2))


class DeepSupervision(nn.Module):
    """A prediction from every level, all resized to the input and fused (U-Net++, U2-Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([conv_bn(3, 24), conv_bn(24, 32), conv_bn(32, 40)])
        self.sides = nn.ModuleList([nn.Conv2d(c, 2, 3, padding=1) for c in (24, 32, 40)])
        self.fuse = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        size, outs = x.shape[-2:], []
        for level, side in zip(self.levels, self.sides, strict=True):
            x = level(x)
            outs.append(F.interpolate(side(x), size=size, mode="bilinear", align_corners=False))
            x = F.max_pool2d(x, 2, ceil_mode=True)
        return [torch.sigmoid(o) for o in (self.fuse(torch.cat(outs, 1)), *outs)]


class Several(nn.Module):
    """Tasks with a head each, a loss from targets if there are some, numbers and strings beside tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 24), conv_bn(24, 32, stride=2))
        self.heads = nn.ModuleDict({"kind": Head(32), "depth": nn.Sequential(conv_bn(32, 16), nn.Conv2d(16, 1, 1))})

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        x = self.body(pixel_values)
        out: dict[str, Any] = {name: head(x) for name, head in self.heads.items()}
        out["loss"] = None if labels is None else F.cross_entropy(out["kind"], labels)
        return {**out, "stride": 2}


class VariationalOutput(nn.Module):
    """A distribution is sampled in the middle, and comes out with the reconstruction (VAE)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(conv_bn(3, 24, stride=2), conv_bn(24, 32, stride=2), nn.Flatten())
        self.mu, self.logvar, self.up = nn.Linear(512, 12), nn.Linear(512, 12), nn.Linear(12, 512)
        self.decode = nn.Sequential(nn.ConvTranspose2d(32, 24, 2, 2), nn.ReLU(), nn.ConvTranspose2d(24, 3, 2, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encode(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar) if self.training else mu
        return self.decode(F.relu(self.up(z)).view(-1, 32, 4, 4)), mu, logvar


def _named(batch: int) -> dict[str, Tensor]:
    return {"rgb": torch.randn(batch, 3, 16, 16), "depth": torch.randn(batch, 1, 16, 16)}


def _collated(batch: int) -> tuple[dict[str, Any]]:
    return ({"image": torch.randn(batch, 3, 16, 16), "meta": torch.randn(batch, 7), "name": "frame"},)


EXAMPLES = {
    LateFusion: _named,
    Batch: _collated,
    ImageList: lambda batch: ([torch.randn(3, 16, 12 + 4 * i) for i in range(batch)],),
    Several: lambda batch: {"pixel_values": torch.randn(batch, 3, 16, 16), "labels": torch.arange(batch)},
}
READ_ACROSS = []
CAUSES = [LateFusion, Batch, ImageList, Detections, Pyramid, DeepSupervision, Several, VariationalOutput]
