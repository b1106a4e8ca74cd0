"""The loader: every image once per epoch, moved as told, and the same again under the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from batches import Batches


def loader(count: int = 10, size: int = 4, **options: Any) -> Any:
    images = torch.arange(count * size * size, dtype=torch.uint8).view(count, 1, size, size)
    return Batches(images, torch.arange(count), 4, mean=(0.0,), std=(1 / 255,), **options)


def labels(batches: Any) -> list[int]:
    return torch.cat([label for _, label in batches]).tolist()


def test_evaluation_yields_every_image_in_order_and_unchanged() -> None:
    batches = loader()
    assert len(batches) == len(list(batches)) == 3  # 4 + 4 + 2
    assert labels(batches) == list(range(10))
    pixels = torch.cat([images for images, _ in batches])
    assert torch.allclose(pixels.flatten(), torch.arange(160.0))  # std 1/255 and mean 0 give the bytes back


def test_images_are_scaled_then_normalised_per_channel() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    found, _ = next(iter(Batches(images, torch.zeros(1), 1, mean=(0.5, 0.75), std=(0.25, 0.5))))
    assert found.flatten().tolist() == pytest.approx([-2.0, 0.5])  # (0 - 0.5) / 0.25, (1 - 0.75) / 0.5


def test_training_drops_the_last_batch_and_shuffles_every_pass_anew() -> None:
    batches = loader(train=True, seed=1)
    first, second = labels(batches), labels(batches)
    assert len(batches) == 2 and len(set(first)) == len(first) == 8
    assert first != sorted(first) and first != second


def test_same_seed_same_batches_whatever_else_draws_random_numbers() -> None:
    def run(seed: int) -> list[Tensor]:
        batches = loader(train=True, shift=1, flip=True, seed=seed)
        torch.rand(seed + 1)
        return [images for _ in range(2) for images, _ in batches]

    one, again, other = run(3), run(3), run(4)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_shift_moves_each_image_by_its_own_draw_and_fills_with_the_mean() -> None:
    batches = loader(size=3, shift=1)
    image = torch.zeros(200, 1, 3, 3)
    image[:, :, 1, 1] = 1
    moved = batches.augment(image, torch.Generator().manual_seed(0))
    places = moved.flatten(1).argmax(1)
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(200))  # the dot never leaves, the rest is the fill
    assert set(places.tolist()) == set(range(9))  # 3 x 3 shifts of the centre


def test_flip_mirrors_half_of_the_images_left_to_right() -> None:
    batches = loader(flip=True)
    image = torch.arange(4.0).expand(400, 1, 2, 4)
    flipped = batches.augment(image, torch.Generator().manual_seed(0))[:, 0, :, 0]
    share = (flipped == 3).float().mean()
    assert set(flipped.flatten().tolist()) == {0.0, 3.0}
    assert 0.4 < share < 0.6
