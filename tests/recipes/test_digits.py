"""The embedded recipe: what it is made of, and that it can be learned."""

from __future__ import annotations

import torch
from pytorch_lightning import Trainer, seed_everything

from digits import Digits, DigitsData, DigitsNet
from dyncompress.cost import measure_macs


def test_split_is_fixed_disjoint_and_stratified() -> None:
    torch.manual_seed(5)
    splits, again = DigitsData().splits, DigitsData().splits
    assert {name: len(labels) for name, (_, labels) in splits.items()} == {"train": 300, "val": 297, "test": 1200}
    assert all(torch.equal(splits[name][0], again[name][0]) for name in splits)
    counts = torch.stack([labels.bincount() / len(labels) for _, labels in splits.values()])
    assert (counts - counts[0]).abs().max() < 0.01
    images = torch.cat([images.flatten(1) for images, _ in splits.values()])
    assert images.unique(dim=0).shape[0] > 1790  # 1797 images; scikit-learn's set holds hardly any twice


def test_network_is_as_wide_and_as_dear_as_it_says() -> None:
    net = DigitsNet([8, 16])
    # stem 9*8, block 1 2*(8*9*8), block 2 8*9*16 + 16*9*16 + shortcut 8*16, each at 64 positions; linear 16*10
    assert measure_macs(net, torch.zeros(1, 1, 8, 8)) == 64 * (72 + 1152 + 1152 + 2304 + 128) + 160
    assert net(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_a_few_epochs_learn() -> None:
    seed_everything(0)
    model, data = Digits([8, 16]), DigitsData()
    trainer = Trainer(max_epochs=8, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)  # fmt: skip
    trainer.fit(model, data)
    assert trainer.test(model, data, verbose=False)[0]["test_acc"] > 0.5  # chance is 0.1
