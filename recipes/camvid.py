"""CamVid street scenes (Brostow et al. 2009), 11 classes, and a small encoder-decoder with skip connections.

A dense prediction on images larger than CIFAR's: arithmetic is its time, and the assembly of a kernel is cheap beside
the positions that the kernel is applied to.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pyarrow import parquet
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from dyncompress.errors import RecipeError

CLASSES = 11
VOID, IGNORED = 11, 255  # unlabelled pixels: in the files, and in what the data module gives
MEAN, STD = (0.41, 0.42, 0.43), (0.30, 0.31, 0.30)


def conv_bn(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class Block(nn.Module):
    """Two 3x3 convs and a shortcut: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_bn(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.conv(self.first(x))))


class SceneNet(nn.Module):
    """A residual encoder down to 1/16 of the size, and back over skip connections: (B, 3, H, W) -> (B, 11, H, W).

    Any size will do: maps are resized to that of the skip connection, and the logits to that of the image.

    Args:
        widths: Channels at 1/2, 1/4, 1/8 and 1/16.
        blocks: Residual blocks at each but the first.
    """

    def __init__(self, widths: Sequence[int] = (24, 48, 96, 128), blocks: int = 2) -> None:
        super().__init__()
        self.stem = conv_bn(3, widths[0], 2)
        self.down = nn.ModuleList(
            nn.Sequential(conv_bn(before, width, 2), *(Block(width) for _ in range(blocks)))
            for before, width in pairwise(widths)
        )
        wide, narrow = widths[:0:-1], widths[-2::-1]
        self.up = nn.ModuleList(conv_bn(w + n, n) for w, n in zip(wide, narrow, strict=True))
        self.head = nn.Conv2d(widths[0], CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        skips = []
        for stage in self.down:
            skips.append(x)
            x = stage(x)
        for stage, skip in zip(self.up, reversed(skips), strict=True):
            x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
            x = stage(torch.cat([x, skip], 1))
        return F.interpolate(self.head(x), images.shape[-2:], mode="bilinear", align_corners=False)


class CamVid(LightningModule):
    """Cross-entropy with weights for rare classes, AdamW, mean intersection over union as ``test_miou``.

    Weights are ``1 / log(1.02 + share of the pixels)`` (Paszke et al., ENet, 2016, section 5.2), with the shares of
    CamVid's training images.

    Args:
        lr: Peak learning rate of one cycle.
        weight_decay: Of AdamW.
        widths: As for `SceneNet`.
    """

    SHARES = (0.1744, 0.2419, 0.0102, 0.3310, 0.0467, 0.1011, 0.0122, 0.0117, 0.0611, 0.0067, 0.0030)

    def __init__(self, lr: float = 2e-3, weight_decay: float = 1e-2, widths: Sequence[int] = (24, 48, 96, 128)) -> None:
        super().__init__()
        self.net = SceneNet(widths)
        self.lr, self.weight_decay = lr, weight_decay
        weight = 1 / torch.log(1.02 + torch.tensor(self.SHARES))
        self.register_buffer("weight", weight / weight.mean(), persistent=False)
        self.val_miou = MulticlassJaccardIndex(CLASSES, ignore_index=IGNORED)
        self.test_miou = MulticlassJaccardIndex(CLASSES, ignore_index=IGNORED)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, self.weight, ignore_index=IGNORED)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.val_miou(self(images), labels)
        self.log("val_miou", self.val_miou, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_miou(self(images), labels)
        self.log("test_miou", self.test_miou, on_step=False, on_epoch=True, batch_size=len(labels))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class Scenes:
    """Iterates over (images, labels); training passes shuffle, mirror and crop anew, reproducibly under `seed`.

    Args:
        images: (N, 3, H, W), bytes.
        labels: (N, H, W), bytes: 0 to 10, and `IGNORED`.
        batch_size: Images per batch.
        crop: Height and width of a random window, the same for the whole batch; None for whole images.
        train: Shuffle, augment, and drop the last incomplete batch.
        seed: Of order and augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        crop: tuple[int, int] | None = None,
        train: bool = False,
        seed: int = 0,
    ) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.crop, self.train, self.seed = crop, train, seed
        self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1) * 255 for v in (MEAN, STD))
        self.passes = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole if self.train else whole + (rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(self.seed + self.passes)
        order = torch.arange(len(self.images))
        if self.train:
            self.passes += 1
            order = torch.randperm(len(self.images), generator=random)
        for at in order.split(self.batch_size)[: len(self)]:
            images, labels = self.images[at], self.labels[at]
            if self.train:
                images, labels = self.augment(images, labels, random)
            images = (images.float() - self.mean) / self.std
            yield images.contiguous(memory_format=torch.channels_last), labels.long()

    def augment(self, images: Tensor, labels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """One window of the whole batch, half of the images mirrored; labels follow their images."""
        if self.crop is not None:
            room = [have - want + 1 for have, want in zip(images.shape[-2:], self.crop, strict=True)]
            top, left = (int(torch.randint(r, (), generator=random)) for r in room)
            window = (..., slice(top, top + self.crop[0]), slice(left, left + self.crop[1]))
            images, labels = images[window], labels[window]
        mirrored = torch.rand(len(images), generator=random) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        return images, torch.where(mirrored.view(-1, 1, 1), labels.flip(-1), labels)


class CamVidData(LightningDataModule):
    """367 training, 101 validation and 233 test images of 240x180 pixels, decoded once and kept in memory as bytes.

    Args:
        root: Folder with train.parquet, val.parquet and test.parquet: columns `image` and `mask`, structs with the
            encoded `bytes`; a mask's pixels are classes 0 to 10, and 11 where nothing was labelled.
        batch_size: Training images per step.
        crop: Height and width of the windows that training sees; None for whole images.
    """

    def __init__(self, root: str, batch_size: int = 8, crop: tuple[int, int] | None = (144, 192)) -> None:
        super().__init__()
        self.root, self.batch_size, self.crop = Path(root), batch_size, crop
        self.splits: dict[str, tuple[Tensor, Tensor]] = {}

    def setup(self, stage: str) -> None:
        if not self.splits:
            self.splits = {split: decode(self.root / f"{split}.parquet") for split in ("train", "val", "test")}

    def train_dataloader(self) -> Scenes:
        seed = torch.initial_seed()
        return Scenes(*self.splits["train"], self.batch_size, crop=self.crop, train=True, seed=seed)

    def val_dataloader(self) -> Scenes:
        return Scenes(*self.splits["val"], 8)

    def test_dataloader(self) -> Scenes:
        return Scenes(*self.splits["test"], 8)


def decode(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) and labels (N, H, W), as bytes; unlabelled pixels are `IGNORED`."""
    if not path.is_file():
        raise RecipeError(
            f"there is no '{path}' - data.root is a folder with train.parquet, val.parquet and test.parquet of CamVid"
            " (columns image and mask) - correct the path"
        )
    table = parquet.read_table(path, columns=["image", "mask"])
    pictures = [
        np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"])).convert(mode)) for row in table[column].to_pylist()])
        for column, mode in (("image", "RGB"), ("mask", "L"))
    ]
    images, labels = (torch.from_numpy(each) for each in pictures)
    odd = sorted(set(labels.unique().tolist()) - set(range(VOID + 1)))
    if odd:
        raise RecipeError(f"'{path}' has classes {odd[:5]} in its masks - 0 to 10, and 11 for unlabelled - correct it")
    labels[labels == VOID] = IGNORED
    return images.permute(0, 3, 1, 2).contiguous(), labels
