"""The CIFAR recipe on data made here: the network of the paper, the files it reads, the errors it gives."""

from __future__ import annotations

import io
from pathlib import Path

import huggingface_hub
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from cifar10 import Cifar10Data, PadShortcut, ResNet
from dyncompress.cost import count_params, measure_macs
from dyncompress.errors import RecipeError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder like the real one: 12 training and 6 test images, each of a single colour that tells its label."""
    for split, count in (("train", 12), ("test", 6)):
        rows = []
        for i in range(count):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (20 * (i % 10), 0, 255)).save(file, "JPEG", quality=95)
            rows.append({"img": {"bytes": file.getvalue(), "path": None}, "label": i % 10})
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    return tmp_path


def test_resnet20_is_the_one_of_the_paper() -> None:
    net = ResNet(20)
    # stem 27*16*1024; stages 6, 5.5, 5.5 convs of 16*16*9*1024 (the first conv of a stage reads half the channels);
    # linear 64*10
    assert measure_macs(net, torch.zeros(1, 3, 32, 32)) == 442_368 + 17 * 2_359_296 + 640
    assert count_params(net) == 269_722
    keys = set(net.state_dict())
    assert {"conv1.weight", "layer1.0.conv1.weight", "layer3.2.bn2.running_var", "linear.bias"} <= keys
    assert not any("shortcut" in key for key in keys)


@pytest.mark.parametrize("depth", [7, 2, 21])
def test_depth_that_no_resnet_has_is_refused(depth: int) -> None:
    with pytest.raises(RecipeError, match=f"depth {depth} .* 6n \\+ 2; use 20"):
        ResNet(depth)


def test_shortcut_subsamples_and_pads_on_both_sides() -> None:
    x = torch.rand(2, 4, 6, 6)
    y = PadShortcut(4, 8)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].abs().sum() == y[:, 6:].abs().sum() == 0


def test_images_and_labels_come_out_as_they_went_in(root: Path) -> None:
    data = Cifar10Data(str(root), batch_size=4)
    data.prepare_data()
    data.setup("fit")
    images, labels = data.splits["train"]
    assert images.shape == (12, 3, 32, 32) and images.dtype == torch.uint8
    assert sorted(labels.tolist()) == sorted(i % 10 for i in range(12))
    assert (images[:, 0, 5, 5].float() - 20 * labels).abs().max() <= 4  # JPEG's loss
    batch, _ = next(iter(data.train_dataloader()))
    assert batch.shape == (4, 3, 32, 32)
    blue = next(iter(data.test_dataloader()))[0][:, 2]
    assert blue.mean().item() == pytest.approx((1 - 0.406) / 0.225, abs=0.1)


def test_validation_is_the_test_set_unless_images_are_held_out(root: Path) -> None:
    sizes = {}
    for val_size in (0, 5):
        data = Cifar10Data(str(root), val_size=val_size)
        data.setup("fit")
        sizes[val_size] = [len(data.splits[name][1]) for name in ("train", "val", "test")]
    assert sizes == {0: [12, 6, 6], 5: [7, 5, 6]}


def test_missing_folder_says_what_it_must_hold_and_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.root '.*nowhere' has no train.parquet.*leave data.root out"):
        Cifar10Data(str(tmp_path / "nowhere")).prepare_data()


def test_no_folder_and_no_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(RecipeError, match=r"no route to host.*--data.root FOLDER"):
        Cifar10Data().prepare_data()
