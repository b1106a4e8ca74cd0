"""Images that fit in memory, cut into batches and augmented a whole batch at a time.

Per-image Python would cost more than the small networks that these recipes train, and worker processes more than that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


class Batches:
    """Iterates over (images, labels); every pass shuffles and augments anew, reproducibly under `seed`.

    The order depends on the seed and on the number of the pass only, so that two networks fine-tuned under one seed
    see the same batches: their scores are a paired comparison.

    Args:
        images: (N, C, H, W), bytes.
        labels: (N,), class numbers.
        batch_size: Images per batch.
        mean: Per channel, of the images scaled to [0, 1].
        std: Per channel, likewise.
        train: Shuffle, augment, and drop the last incomplete batch; otherwise keep order, pixels and every image.
        shift: Largest random shift in pixels, filled with the mean.
        flip: Mirror half of the images.
        seed: Seed of order and augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        train: bool = False,
        shift: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.train, self.shift, self.flip, self.seed = train, shift, flip, seed
        self.mean = torch.tensor(mean).view(1, -1, 1, 1) * 255
        self.std = torch.tensor(std).view(1, -1, 1, 1) * 255
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
        for indices in order.split(self.batch_size)[: len(self)]:
            images = (self.images[indices].float() - self.mean) / self.std
            yield (self.augment(images, random) if self.train else images), self.labels[indices]

    def augment(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Shift and mirror each image by its own draw: (B, C, H, W) -> (B, C, H, W)."""
        batch, _, height, width = images.shape
        if self.shift:
            windows = F.pad(images, [self.shift] * 4).unfold(2, height, 1).unfold(3, width, 1)
            top, left = torch.randint(2 * self.shift + 1, (2, batch), generator=random)
            images = windows[torch.arange(batch), :, top, left]
        if self.flip:
            mirrored = torch.rand(batch, 1, 1, 1, generator=random) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        return images.contiguous(memory_format=torch.channels_last)  # convolutions on a CPU train up to a third faster
