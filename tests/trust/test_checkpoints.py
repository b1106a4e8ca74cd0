"""Checkpoints: what was saved comes back as it was, or is refused with its reason; never something in between."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelPruning
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dyncompress as dc
from dyncompress import DynCompress
from dyncompress.bundle import read_state
from dyncompress.conversion import plan_of
from dyncompress.errors import CheckpointError, DynCompressError
from dyncompress.layers import DynamicConv, list_methods
from tests.classifiers import CLASSES, Net, classifier, equal, fit, loader, trainer, weights

Classifier = classifier()
Figure = Callable[[str, object], None]
Door = Callable[[Path], None]


def fresh(kind: Callable[[], Any] = Classifier) -> Any:
    torch.manual_seed(0)
    return kind()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Trainer's checkpoint of one epoch, and the bundle of the same student."""
    folder = tmp_path_factory.mktemp("saved")
    module = fresh()
    fit(module, DynCompress("50%")).save_checkpoint(folder / "last.ckpt")
    dc.save(module.net, folder / "student.safetensors")
    return folder


# ---- what was wrong with the callback that Lightning had to remove -----------------------------------------------


class Pairs(torch.utils.data.Dataset[Any]):
    """Two images and a class."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        generator = torch.Generator().manual_seed(i)
        y = i % CLASSES
        a, b = (torch.randn(3, 8, 8, generator=generator) + y for _ in range(2))
        return a, b, y


class TwoInputs(nn.Module):
    """The network of #7926 with a head: two positional inputs, and a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, a: Tensor, b: Tensor, softmax: bool = False) -> Tensor:
        x = self.conv2(F.relu(self.conv1(a) + self.conv1(b)))
        x = self.linear(x.mean((2, 3)))
        return x.softmax(1) if softmax else x


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_16609_every_default_works_with_the_torch_that_is_installed(package: str, record_property: Figure) -> None:
    """The callback trains with nothing but its defaults and a target, for every method (Lightning #16609)."""
    terms = {}
    for method in list_methods():
        host = trainer(package, [DynCompress("45%", method=method)], limit_train_batches=1)
        host.fit(fresh(classifier(package)), loader(), loader(1))
        terms[method] = float(host.callback_metrics["distill/loss"])
    assert {"dynet", "static"} <= terms.keys()
    assert all(0 < term < float("inf") for term in terms.values())
    record_property("figure", f"methods {', '.join(terms)} with torch {torch.__version__.partition('+')[0]}")


def test_15862_a_network_called_by_keyword_trains(record_property: Figure) -> None:
    """A step that calls its network by keyword goes on working (Lightning #15862)."""

    class ByKeyword(Classifier):  # type: ignore[misc,valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(x=batch[0]), batch[1])

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x=x)

    module, plain = fresh(ByKeyword), fresh()
    terms = [fit(m, DynCompress("50%")).callback_metrics["distill/loss"] for m in (module, plain)]
    assert isinstance(module.net.conv2, DynamicConv)
    assert terms[0] == terms[1] > 0
    assert equal(module, weights(plain))
    record_property("figure", "the same weights as by position, bit by bit")


def test_12896_a_path_can_be_tested_after_the_fit(tmp_path: Path, record_property: Figure) -> None:
    """After a fit, `trainer.test(ckpt_path=...)` loads the compressed checkpoint (Lightning #12896)."""
    module = fresh()
    host = fit(module, DynCompress("50%"), max_epochs=2)
    path = tmp_path / "end.ckpt"
    host.save_checkpoint(path)
    (before,) = host.test(module, loader(2), verbose=False)
    with torch.no_grad():
        module.net.linear.weight.zero_()
    (other,) = host.test(module, loader(2), verbose=False)
    (same,) = host.test(module, loader(2), ckpt_path=path, verbose=False)
    (anew,) = trainer(callbacks=[DynCompress("50%")]).test(fresh(), loader(2), ckpt_path=path, verbose=False)
    assert before == same == anew != other
    record_property(
        "figure", f"test loss {before['test_loss']:.4f} in the run, in a new module {anew['test_loss']:.4f}"
    )


@pytest.mark.parametrize("method", ["dynet", "static"])
def test_11047_pruning_beside_compression(method: str, tmp_path: Path, record_property: Figure) -> None:
    """Lightning's ModelPruning prunes the compressed network, and its checkpoint loads (Lightning #11047)."""
    module = fresh()
    host = fit(module, DynCompress("50%", method=method), ModelPruning("l1_unstructured", amount=0.5), max_epochs=2)
    host.save_checkpoint(tmp_path / "pruned.ckpt")
    pruned = [m.weight for m in module.net.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    share = sum(int((w == 0).sum()) for w in pruned) / sum(w.numel() for w in pruned)
    assert 0.45 < share < 0.95  # half, and more in the second epoch
    again = fresh()
    trainer(callbacks=[DynCompress("50%")]).test(again, loader(1), ckpt_path=tmp_path / "pruned.ckpt", verbose=False)
    assert equal(again, weights(module))
    record_property("figure", f"{share:.0%} of the weights are zero")


@pytest.mark.parametrize("lottery", [True, False])
def test_11047_pruning_of_layers_that_are_gone_is_refused(lottery: bool) -> None:
    """ModelPruning that noted the original's layers is told to come second, instead of pruning layers that are gone."""
    module = fresh()
    before = weights(module)
    pruning = ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=lottery)
    with pytest.raises(DynCompressError, match=r"ModelPruning .* list DynCompress before it"):
        fit(module, pruning, DynCompress("50%"))
    assert equal(module, before)


def test_7926_two_inputs_and_a_keyword(tmp_path: Path, record_property: Figure) -> None:
    """A network with two inputs and a keyword is compressed, trained, saved and loaded (Lightning #7926)."""

    class Lit(Classifier):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.net = TwoInputs()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            a, b, y = batch
            return F.nll_loss(self.net(a, b, softmax=True).clamp(1e-6).log(), y)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self.net(batch[0], b=batch[1]), batch[2]))

    module = fresh(Lit)
    host = trainer(callbacks=[DynCompress("50%")])
    host.fit(module, DataLoader(Pairs(), batch_size=4), DataLoader(Pairs(), batch_size=4))
    assert isinstance(module.net.conv2, DynamicConv)
    assert host.callback_metrics["distill/loss"] > 0
    host.save_checkpoint(tmp_path / "a.ckpt")
    again = dc.load_from_checkpoint(Lit, tmp_path / "a.ckpt").eval()
    a, b, _ = next(iter(DataLoader(Pairs(), batch_size=4)))
    difference = (again.net(a, b, softmax=True) - module.eval().net(a, b, softmax=True)).abs().max()
    assert difference == 0
    record_property("figure", f"largest difference after loading {difference:.0f}")


# ---- damaged and foreign files at every door ---------------------------------------------------------------------


def by_load(path: Path) -> None:
    net = fresh().net
    before = weights(net)
    try:
        dc.load(path, net)
    finally:
        assert equal(net, before)


def by_load_from_checkpoint(path: Path) -> None:
    try:
        dc.load_from_checkpoint(Classifier, path)
    finally:
        assert "on_load_checkpoint" not in vars(Classifier)


def by_fit(callback: DynCompress, ckpt_path: Path | None = None) -> None:
    module = fresh()
    before, layers = weights(module), list(module.net.children())
    try:
        fit(module, callback, ckpt_path=ckpt_path)
    finally:
        assert equal(module, before)
        assert plan_of(module) is None and [type(m) for m in module.net.children()] == [type(m) for m in layers]
        assert vars(module).keys().isdisjoint({"training_step", "on_load_checkpoint"})


DOORS: dict[str, Door] = {
    "load": by_load,
    "load_from_checkpoint": by_load_from_checkpoint,
    "teacher=": lambda path: by_fit(DynCompress("50%", teacher=path)),
    "plan=": lambda path: by_fit(DynCompress(plan=path)),
    "ckpt_path=": lambda path: by_fit(DynCompress("50%"), path),
}


class Foreign:
    """Somebody's class."""

    weights = (1, 2)


def wrong_files(saved: Path, folder: Path) -> list[Path]:
    """Damaged copies of a checkpoint and a bundle, and files that are something else."""
    content, bundle = (saved / "last.ckpt").read_bytes(), (saved / "student.safetensors").read_bytes()
    for length in (0, 1, 3, 4, 100, len(content) // 2, len(content) - 1):
        (folder / f"cut{length}.ckpt").write_bytes(content[:length])
    for length in (0, 7, 8, 100, len(bundle) // 2, len(bundle) - 1):
        (folder / f"cut{length}.safetensors").write_bytes(bundle[:length])
    with zipfile.ZipFile(saved / "last.ckpt") as archive:
        record = max(archive.infolist(), key=lambda r: r.file_size)
        at = content.index(archive.read(record)) + record.file_size // 2
    (folder / "flipped.ckpt").write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    at = len(bundle) - 99
    (folder / "flipped.safetensors").write_bytes(bundle[:at] + bytes([bundle[at] ^ 4]) + bundle[at + 1 :])
    (folder / "text.ckpt").write_text("epoch,loss\n0,1.5\n" * 40)
    (folder / "text.safetensors").write_text("epoch,loss\n0,1.5\n" * 40)
    plt.imsave(folder / "image.png", torch.rand(8, 8).numpy())
    torch.save(Foreign(), folder / "pickled.ckpt")
    torch.save(Net(width=8).state_dict(), folder / "other.ckpt")
    torch.save({1: torch.ones(3)}, folder / "numbers.pt")
    torch.save([torch.ones(3)], folder / "list.pt")
    save_file(Net(width=8).state_dict(), folder / "other.safetensors")
    with zipfile.ZipFile(folder / "something.ckpt", "w") as archive:
        archive.writestr("letter.txt", "Dear all")
    return sorted(folder.iterdir())


def refuse(door: str, files: list[Path]) -> str:
    for path in files:
        with pytest.raises(CheckpointError) as refused:
            DOORS[door](path)
        assert path.name in str(refused.value) and len(str(refused.value)) < 800
    return f"{door}: {len(files)} of {len(files)} files refused"


@pytest.mark.parametrize("door", DOORS)
def test_damaged_and_foreign_files_are_refused(door: str, saved: Path, tmp_path: Path, record_property: Figure) -> None:
    """A truncated, flipped or foreign file is refused with its reason, and nothing is changed."""
    files = wrong_files(saved, tmp_path)
    assert len(files) == 24
    if DOORS[door] not in (by_load, by_load_from_checkpoint):  # a Trainer each: the other two thirds are slow
        files = files[list(DOORS).index(door) % 3 :: 3]
    record_property("figure", refuse(door, files))


@pytest.mark.slow
@pytest.mark.parametrize("door", ["teacher=", "plan=", "ckpt_path="])
def test_all_damaged_and_foreign_files_are_refused_by_a_trainer(
    door: str, saved: Path, tmp_path: Path, record_property: Figure
) -> None:
    """The same for every such file, where a Trainer starts for each."""
    record_property("figure", refuse(door, wrong_files(saved, tmp_path)))


# ---- single bits -------------------------------------------------------------------------------------------------


FLIPS = [800, pytest.param(10_000, marks=pytest.mark.slow)]


def flips(path: Path, spans: list[tuple[int, int]], count: int, seed: int, folder: Path) -> tuple[int, int, list[int]]:
    """Read a file with one bit flipped, again and again: how often it was refused, harmless, and where neither."""
    content, expected, rng = path.read_bytes(), dict(read_state(path)), random.Random(seed)
    refused, harmless, missed = 0, 0, []
    for i in range(count):
        at = rng.randrange(*spans[i % len(spans)])
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.randrange(8)
        copy = folder / f"{i}{path.suffix}"
        copy.write_bytes(damaged)
        try:
            found = dict(read_state(copy))
        except CheckpointError:
            refused += 1
        else:
            same = found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
            harmless, missed = (harmless + 1, missed) if same else (harmless, [*missed, at])
        copy.unlink()
    return refused, harmless, missed


def spans_of(path: Path) -> list[tuple[int, int]]:
    """The parts of a file that a bit shall be flipped in: as often in its small directory as in its many weights."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        header = 8 + int.from_bytes(content[:8], "little")
        return [(0, 8), (8, header), (header, len(content)), (header, len(content))]
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        pickled = archive.getinfo(f"{archive.namelist()[0].partition('/')[0]}/data.pkl")
    return [(0, pickled.file_size), (0, directory), (directory, len(content)), (0, len(content))]


@pytest.mark.parametrize("count", FLIPS)
@pytest.mark.parametrize("name", ["student.safetensors", "last.ckpt"])
def test_any_flipped_bit_is_refused_or_harmless(
    name: str, count: int, saved: Path, tmp_path: Path, record_property: Figure
) -> None:
    """A file with any one bit flipped is refused, or gives the very same weights."""
    refused, harmless, missed = flips(saved / name, spans_of(saved / name), count, seed=count, folder=tmp_path)
    assert not missed and refused > 0.6 * count
    record_property("figure", f"{count} flips in {name}: {refused} refused, {harmless} harmless")


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="torch leaves them out since 2.6")
def test_checksums_that_were_left_out_are_not_asked_for(saved: Path, tmp_path: Path, record_property: Figure) -> None:
    """A checkpoint that torch was told to write without checksums still loads."""
    getter = import_module("torch.serialization")
    state = torch.load(saved / "last.ckpt", weights_only=True)
    before = getter.get_crc32_options()
    getter.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "unchecked.ckpt")
    finally:
        getter.set_crc32_options(before)
    assert equal(dc.load_from_checkpoint(Classifier, tmp_path / "unchecked.ckpt"), state["state_dict"])
    record_property("figure", f"{len(state['state_dict'])} tensors, equal")
