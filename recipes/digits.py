"""scikit-learn's handwritten digits (8x8 pixels, inside its wheel) and a small residual network.

The recipe that `make quickstart` runs: no download, seconds per arm, and few enough training images that a network
narrowed too far loses something that one can see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pytorch_lightning import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from batches import Batches
from classifier import Classifier


class Block(nn.Module):
    """Two 3x3 convs and a shortcut, a 1x1 conv where the width changes: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """One residual block per width, at full resolution throughout: (B, 1, 8, 8) -> (B, 10)."""

    def __init__(self, widths: Sequence[int] = (16, 16, 32, 32)) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.blocks = nn.Sequential(*map(Block, [widths[0], *widths[:-1]], widths))
        self.linear = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


class Digits(Classifier):
    """`DigitsNet` under cross-entropy."""

    def __init__(self, widths: Sequence[int] = (16, 16, 32, 32), lr: float = 0.1, weight_decay: float = 5e-4) -> None:
        super().__init__(DigitsNet(widths), classes=10, lr=lr, weight_decay=weight_decay)


class DigitsData(LightningDataModule):
    """1797 digits in a fixed stratified split; training images are shifted by up to one pixel.

    Args:
        batch_size: Training images per step.
        train_size: Training images; few on purpose, see the module's first lines.
        val_size: Validation images; whatever remains is the test set.
    """

    def __init__(self, batch_size: int = 32, train_size: int = 300, val_size: int = 297) -> None:
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        images = torch.tensor(digits.images / 16 * 255, dtype=torch.uint8).unsqueeze(1)
        labels = torch.tensor(digits.target)
        train, rest = train_test_split(range(len(labels)), train_size=train_size, stratify=labels, random_state=0)
        val, test = train_test_split(rest, train_size=val_size, stratify=labels[rest], random_state=0)
        self.splits = {name: (images[i], labels[i]) for name, i in (("train", train), ("val", val), ("test", test))}

    def batches(self, split: str, **augmentation: bool | int) -> Batches:
        images, labels = self.splits[split]
        size = self.batch_size if split == "train" else 500
        return Batches(images, labels, size, mean=(0.305,), std=(0.376,), **augmentation)

    def train_dataloader(self) -> Batches:
        return self.batches("train", train=True, shift=1, seed=torch.initial_seed())

    def val_dataloader(self) -> Batches:
        return self.batches("val")

    def test_dataloader(self) -> Batches:
        return self.batches("test")
