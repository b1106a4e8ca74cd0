"""CIFAR-10 and the CIFAR ResNets of He et al. (Deep Residual Learning, CVPR 2016, section 4.2).

The shortcuts have no parameters: where the shape changes they drop every second pixel and pad channels with zeros.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from pyarrow import parquet
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F

from batches import Batches
from classifier import Classifier
from dyncompress.errors import RecipeError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HUB = ("uoft-cs/cifar10", "plain_text/{split}-00000-of-00001.parquet")


class PadShortcut(nn.Module):
    """Every second pixel, and zero channels on both sides: (B, C_in, H, W) -> (B, C_out, H/2, W/2).

    A module of its own: the channel graph follows it, and re-indexes it when the channels before and after it are cut.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convs around a shortcut: (B, C_in, H, W) -> (B, C_out, H', W')."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        wider = in_channels != out_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, 2 if wider else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = PadShortcut(in_channels, out_channels) if wider else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels: (B, 3, 32, 32) -> (B, 10).

    Args:
        depth: 6n + 2 layers, n blocks a stage: 20, 32, 44, 56, ...
    """

    def __init__(self, depth: int = 20) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise RecipeError(f"depth {depth} is not a CIFAR ResNet: it must be 6n + 2; use 20, 32, 44 or 56.")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = depth // 6
        self.layer1 = self.stage(16, 16, blocks)
        self.layer2 = self.stage(16, 32, blocks)
        self.layer3 = self.stage(32, 64, blocks)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
        first, rest = BasicBlock(in_channels, out_channels), range(blocks - 1)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in rest))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


class Cifar10(Classifier):
    """A CIFAR `ResNet` under cross-entropy."""

    def __init__(self, depth: int = 20, lr: float = 0.1, weight_decay: float = 5e-4) -> None:
        super().__init__(ResNet(depth), classes=10, lr=lr, weight_decay=weight_decay)


class Cifar10Data(LightningDataModule):
    """50,000 training and 10,000 test images of 32x32 pixels, decoded once and kept in memory as bytes.

    Training images are shifted by up to four pixels and mirrored. Validation reads the test images, as most published
    CIFAR code does; nothing in the recipe selects by it. Hold training images out with `val_size` when you do select.

    Args:
        root: Folder with train.parquet and test.parquet (columns `img`, a struct with the encoded `bytes`, and
            `label`); when it is None, the public hub's copy is downloaded.
        batch_size: Training images per step.
        val_size: Training images held out for validation; 0 validates on the test images.
    """

    def __init__(self, root: str | None = None, batch_size: int = 128, val_size: int = 0) -> None:
        super().__init__()
        self.root = root
        self.batch_size = batch_size
        self.val_size = val_size
        self.splits: dict[str, tuple[Tensor, Tensor]] = {}

    def prepare_data(self) -> None:
        for split in ("train", "test"):
            parquet_file(self.root, split)

    def setup(self, stage: str) -> None:
        if not self.splits:
            images, labels = decode(parquet_file(self.root, "train"))
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
            val, train = order.split([self.val_size, len(labels) - self.val_size])
            test = decode(parquet_file(self.root, "test"))
            self.splits = {"train": (images[train], labels[train]), "test": test}
            self.splits["val"] = (images[val], labels[val]) if self.val_size else test

    def train_dataloader(self) -> Batches:
        augmentation = {"train": True, "shift": 4, "flip": True}
        return Batches(
            *self.splits["train"], self.batch_size, mean=MEAN, std=STD, seed=torch.initial_seed(), **augmentation
        )

    def val_dataloader(self) -> Batches:
        return Batches(*self.splits["val"], 500, mean=MEAN, std=STD)

    def test_dataloader(self) -> Batches:
        return Batches(*self.splits["test"], 500, mean=MEAN, std=STD)


def parquet_file(root: str | None, split: str) -> Path:
    """The file of a split: in `root`, or downloaded once to the hub's cache."""
    if root is not None:
        path = Path(root) / f"{split}.parquet"
        if not path.is_file():
            raise RecipeError(
                f"data.root {root!r} has no {path.name}. It must hold train.parquet and test.parquet; correct the "
                "path, or leave data.root out to download CIFAR-10 from the public hub."
            )
        return path
    repo, name = HUB
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, name.format(split=split), repo_type="dataset"))
    except (ImportError, OSError) as error:  # OSError: what the hub raises for no network, no entry, no space
        raise RecipeError(
            f"CIFAR-10 could not be downloaded from the hub's {repo} ({type(error).__name__}: {error}). Give a "
            "folder with train.parquet and test.parquet as --data.root FOLDER."
        ) from error


def decode(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) as bytes, and labels (N,)."""
    table = parquet.read_table(path, columns=["img", "label"])
    encoded = table["img"].combine_chunks().field("bytes")
    images = torch.empty(len(table), 32, 32, 3, dtype=torch.uint8)
    for i, image in enumerate(encoded):
        pixels = Image.open(io.BytesIO(image.as_py())).convert("RGB").tobytes()
        images[i] = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(32, 32, 3)
    return images.permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())
