"""The CamVid recipe on scenes made here: the files it reads, what is ignored, the network, the score."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from pytorch_lightning import Trainer, seed_everything

import dyncompress as dc
from camvid import CLASSES, IGNORED, CamVid, CamVidData, SceneNet, Scenes
from dyncompress.cost import measure_macs
from dyncompress.errors import RecipeError


def encoded(picture: Image.Image) -> dict[str, object]:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write(root: Path, *, left: int = 3, right: int = 11) -> Path:
    """Splits of scenes, 48x32 pixels: the left half of one class and colour, the right half of another."""
    for split, count in (("train", 9), ("val", 2), ("test", 3)):
        image, mask = Image.new("RGB", (48, 32), (200, 0, 0)), Image.new("L", (48, 32), right)
        image.paste((0, 0, 200), (0, 0, 24, 32))
        mask.paste(left, (0, 0, 24, 32))
        rows = [{"image": encoded(image), "mask": encoded(mask)} for _ in range(count)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"{split}.parquet")
    return root


def test_files_are_read_and_unlabelled_pixels_marked(tmp_path: Path) -> None:
    data = CamVidData(str(write(tmp_path)), batch_size=2, crop=None)
    data.setup("fit")
    images, labels = data.splits["train"]
    assert images.shape == (9, 3, 32, 48) and labels.shape == (9, 32, 48)
    assert (images[0, :, 0, 0].tolist(), images[0, :, 0, 47].tolist()) == ([0, 0, 200], [200, 0, 0])
    assert labels[0, 0].tolist() == [3] * 24 + [IGNORED] * 24
    assert len(data.train_dataloader()) == 4 and sum(len(x) for x, _ in data.test_dataloader()) == 3


def test_a_label_goes_where_its_pixel_goes(tmp_path: Path) -> None:
    data = CamVidData(str(write(tmp_path, right=5)), batch_size=8, crop=(16, 40))
    data.setup("fit")
    torch.manual_seed(3)
    loader = data.train_dataloader()
    (images, labels), (_, again) = next(iter(loader)), next(iter(loader))
    assert images.shape == (8, 3, 16, 40) and labels.shape == (8, 16, 40)
    assert torch.equal(labels == 3, images[:, 0] < 0)  # no red on the left
    assert 0 < (labels[:, 0, 0] == 3).sum() < 8  # some are mirrored
    assert not torch.equal(labels, again)
    twin = Scenes(*data.splits["train"], 8, crop=(16, 40), train=True, seed=3)
    assert torch.equal(next(iter(twin))[1], labels)


def test_missing_files_and_odd_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no '.*train.parquet'.*columns image and mask"):
        CamVidData(str(tmp_path)).setup("fit")
    with pytest.raises(RecipeError, match=r"classes \[12\] in its masks - 0 to 10, and 11"):
        CamVidData(str(write(tmp_path, left=12))).setup("fit")


def test_network_answers_for_every_pixel_at_its_price() -> None:
    net = SceneNet((4, 8), blocks=1)
    # 1/2 (24x16): stem 3*9*4, up (8 + 4)*9*4, head 4*11; 1/4 (12x8): down 4*9*8, block 2*(8*9*8)
    assert measure_macs(net, torch.zeros(1, 3, 32, 48)) == 384 * (108 + 432 + 44) + 96 * (288 + 1152)
    assert net(torch.zeros(2, 3, 33, 47)).shape == (2, CLASSES, 33, 47)  # sizes that nothing divides
    assert 1.0e9 < measure_macs(SceneNet(), torch.zeros(1, 3, 180, 240)) < 1.2e9


@pytest.mark.parametrize("method", ["static", "dynet"])
def test_it_is_narrowed_across_its_skip_connections(method: str) -> None:
    net, example = SceneNet((16, 24, 32), blocks=1).eval(), torch.randn(1, 3, 48, 64)
    plan = dc.make_plan(net, example, "50%", method)
    student = dc.convert(net, plan)
    assert plan.ratio == pytest.approx(0.5, rel=0.03) and set(plan.graph.pinned) == {"head"}
    assert measure_macs(student, example) == plan.macs_after
    assert student(torch.randn(2, 3, 33, 47)).shape == (2, CLASSES, 33, 47)


def test_it_learns_and_void_counts_for_nothing(tmp_path: Path) -> None:
    seed_everything(0)
    data = CamVidData(str(write(tmp_path)), batch_size=3, crop=(32, 40))
    model = CamVid(lr=1e-2, widths=(4, 8))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
               "enable_model_summary": False}  # fmt: skip
    trainer = Trainer(max_epochs=30, **options)  # type: ignore[arg-type]
    before = trainer.test(model, data, verbose=False)[0]["test_miou"]
    trainer.fit(model, data)
    # class 3 everywhere: where it is labelled that is right, and what it says of unlabelled pixels costs nothing
    assert before < 0.5 and trainer.test(model, data, verbose=False)[0]["test_miou"] == pytest.approx(1.0, abs=0.02)
