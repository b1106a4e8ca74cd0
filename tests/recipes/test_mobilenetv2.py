"""The MobileNetV2 of the recipe: the paper's network at a resolution of its own."""

from __future__ import annotations

import torch

from dyncompress.cost import count_params, measure_macs
from mobilenetv2 import Cifar10MobileNet, InvertedResidual, MobileNetV2


def test_it_has_the_parameters_of_the_paper_and_keeps_the_resolution() -> None:
    net = MobileNetV2()
    # ImageNet's 3,504,872 with 1000 classes (1,281,000 parameters of 1280 inputs) instead of ten (12,810)
    assert count_params(net) == 3_504_872 - 1_281_000 + 12_810
    blocks = [m for m in net.modules() if isinstance(m, InvertedResidual)]
    assert len(blocks) == 17 and sum(block.residual for block in blocks) == 10
    assert net.blocks(net.stem(torch.zeros(1, 3, 32, 32))).shape == (1, 320, 4, 4)


def test_one_block_at_its_price() -> None:
    block = InvertedResidual(8, 16, 6, 2)
    # expand 8*48 at 64 positions; 9 per channel and project 48*16 at 16 positions
    assert measure_macs(block, torch.zeros(1, 8, 8, 8)) == 64 * 384 + 16 * (9 * 48 + 48 * 16)
    assert not block.residual and InvertedResidual(8, 8, 1, 1).residual


def test_the_module_is_that_of_the_recipe() -> None:
    assert Cifar10MobileNet(lr=0.2)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
