"""Plans, weights and whole modules read back from files of every kind; and files that are none."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dyncompress.bundle import save
from dyncompress.callback import DynCompress
from dyncompress.checkpoint import load_from_checkpoint, load_weights, read_plan
from dyncompress.conversion import convert_, plan_of
from dyncompress.errors import CheckpointError, PlanError
from dyncompress.plan import Plan
from dyncompress.planning import make_plan
from tests.classifiers import Net, classifier, loader, trainer

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
Classifier = classifier()
PLAN = make_plan(Net(), torch.zeros(1, 3, 8, 8), "50%")


def compressed(package: str = PACKAGES[0], **options: Any) -> tuple[Any, Any]:
    """A module that was compressed and trained for two steps, and its Trainer."""
    module = classifier(package)(**options)
    host = trainer(package, [DynCompress("50%")], limit_train_batches=2)
    host.fit(module, loader(), loader(1))
    return module, host


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- modules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_module_comes_back_as_it_was_saved(package: str, weights_only: bool, tmp_path: Path) -> None:
    module, host = compressed(package, width=12)
    host.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    kind = classifier(package)
    loaded = load_from_checkpoint(kind, tmp_path / "a.ckpt", lr=0.5)
    assert type(loaded) is kind
    assert_equal(loaded, module)
    assert loaded.hparams == {"width": 12, "lr": 0.5}
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert kind.on_load_checkpoint is import_module(package).LightningModule.on_load_checkpoint


def test_a_class_with_its_own_hook_keeps_it(tmp_path: Path) -> None:
    seen = []

    class Own(Classifier):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append(plan_of(self.net) is not None)

    own = Own.on_load_checkpoint
    _, host = compressed()
    host.save_checkpoint(tmp_path / "a.ckpt")
    load_from_checkpoint(Own, tmp_path / "a.ckpt")
    assert seen == [True]  # after the network was rebuilt
    assert Own.on_load_checkpoint is own


def test_a_class_that_converts_itself_is_not_converted_again(tmp_path: Path) -> None:
    module, host = compressed()
    host.save_checkpoint(tmp_path / "a.ckpt")
    plan = plan_of(module)
    assert plan is not None

    class Converting(Classifier):
        def __init__(self) -> None:
            super().__init__()
            convert_(self.net, plan)

    assert_equal(load_from_checkpoint(Converting, tmp_path / "a.ckpt"), module)


def test_checkpoints_of_lightning_cli_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In subclass mode they name the class themselves, and Lightning lets no other class read them."""
    here = ModuleType("somebodys_models")
    here.Model = type("Model", (Classifier,), {"__module__": here.__name__})  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, here.__name__, here)
    path = tmp_path / "a.ckpt"
    arguments = ["--model", "somebodys_models.Model", "--model.width", "12", "--trainer.accelerator", "cpu"]
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    cli = import_module("lightning.pytorch.cli").LightningCLI(
        Classifier, subclass_mode_model=True, run=False, save_config_callback=None, seed_everything_default=1
    )
    host = trainer(callbacks=[DynCompress("50%")], limit_train_batches=1)
    host.fit(cli.model, loader(), loader(1))
    host.save_checkpoint(path)
    named = "_class_path" in torch.load(path, weights_only=False)["hyper_parameters"]
    assert named == hasattr(import_module("lightning.pytorch.cli"), "instantiate_module")  # Lightning 2.2 has no such
    loaded = load_from_checkpoint(here.Model, path)  # type: ignore[attr-defined]
    assert type(loaded) is here.Model  # type: ignore[attr-defined]
    assert_equal(loaded, cli.model)


class Holding(Classifier):  # type: ignore[misc,valid-type]
    """Its network is an argument, and a hyperparameter, as in templates that build everything from a file."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters("net")
        self.net = net


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`")
@pytest.mark.skipif(
    "weights_only" not in signature(Classifier.load_from_checkpoint).parameters, reason="this Lightning loads anything"
)
def test_a_network_among_the_hyperparameters_is_loaded_where_the_file_is_trusted(tmp_path: Path) -> None:
    module = Holding(Net())
    host = trainer(callbacks=[DynCompress("50%")], limit_train_batches=1)
    host.fit(module, loader(), loader(1))
    host.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"hyperparameters of Holding, for instance.*pass weights_only=False"):
        load_from_checkpoint(Holding, tmp_path / "a.ckpt")
    loaded = load_from_checkpoint(Holding, tmp_path / "a.ckpt", weights_only=False)
    assert_equal(loaded, module)
    assert plan_of(loaded.net) == plan_of(module.net)


def damaged(kind: str, path: Path) -> None:
    if kind == "truncated":
        _, host = compressed()
        host.save_checkpoint(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "text":
        path.write_text("no checkpoint")
    elif kind == "foreign":
        torch.save({"weights": [1, 2]}, path)
    elif kind == "plain":
        host = trainer(max_epochs=0)
        host.fit(Classifier(), loader(), loader(1))
        host.save_checkpoint(path)
    elif kind == "other":
        _, host = compressed()
        host.save_checkpoint(path)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", CheckpointError, "there is no file"),
        ("truncated", CheckpointError, r"can't be loaded into Classifier .RuntimeError: PytorchStreamReader"),
        ("text", CheckpointError, "can't be loaded into Classifier"),
        ("foreign", CheckpointError, "can't be loaded into Classifier .KeyError"),
        ("plain", CheckpointError, r"holds no plan: .* read it with Classifier\.load_from_checkpoint"),
        ("other", PlanError, "the plan was made for another network: "),
    ],
)
def test_what_is_no_checkpoint_of_the_class_is_refused(
    kind: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.ckpt"
    damaged(kind, path)
    with pytest.raises(error, match=message):
        load_from_checkpoint(Classifier, path, **({"width": 24} if kind == "other" else {}))
    assert "on_load_checkpoint" not in vars(Classifier)


def test_a_plain_network_is_sent_to_the_right_door(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"use dyncompress\.load"):
        load_from_checkpoint(Net, tmp_path / "a.ckpt")


def test_a_checkpoint_of_another_module_names_what_is_missing(tmp_path: Path) -> None:
    class Other(Classifier):
        def __init__(self) -> None:
            super().__init__()
            del self.net
            self.model = Net()

    _, host = compressed()
    host.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="plan is of 'net', which Other does not have"):
        load_from_checkpoint(Other, tmp_path / "a.ckpt")


# ---- plans -------------------------------------------------------------------------------------------------------


def test_a_plan_is_read_from_whatever_holds_it(tmp_path: Path) -> None:
    module, host = compressed()
    plan = plan_of(module)
    assert plan is not None
    host.save_checkpoint(tmp_path / "full.ckpt")
    host.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    save(module.net, tmp_path / "bundle.safetensors")
    save_file(module.state_dict(), tmp_path / "module.safetensors")
    torch.save(module.net.state_dict(), tmp_path / "net.pt")
    plan.save(tmp_path / "plan.json")
    for path in tmp_path.iterdir():
        assert read_plan(path) == plan, path
        assert read_plan(str(path)) == plan


def test_a_sharded_checkpoint_has_its_plan_beside_the_shards(tmp_path: Path) -> None:
    """Lightning writes a folder; its meta.pt is the checkpoint without the state dict."""
    module, host = compressed()
    host.save_checkpoint(tmp_path / "full.ckpt")
    checkpoint = torch.load(tmp_path / "full.ckpt", weights_only=True)
    del checkpoint["state_dict"]
    (tmp_path / "sharded").mkdir()
    torch.save(checkpoint, tmp_path / "sharded" / "meta.pt")
    assert read_plan(tmp_path / "sharded") == plan_of(module)
    torch.save({"callbacks": {}}, tmp_path / "sharded" / "meta.pt")
    with pytest.raises(CheckpointError, match="holds no plan"):
        read_plan(tmp_path / "sharded")


def test_files_without_one_plan_are_refused(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match=r"plain\.pt' holds no plan"):
        read_plan(tmp_path / "plain.pt")
    two = nn.ModuleDict({"a": convert_(Net(), PLAN), "b": convert_(Net(), PLAN)})
    torch.save(two.state_dict(), tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"holds 2 plans, of 'a\.', 'b\.'"):
        read_plan(tmp_path / "two.pt")
    with pytest.raises(PlanError, match="no plan at"):
        read_plan(tmp_path / "missing.json")
    with pytest.raises(CheckpointError, match="no file"):
        read_plan(tmp_path / "missing.ckpt")
    assert isinstance(PLAN, Plan)


# ---- weights -----------------------------------------------------------------------------------------------------


def named(net: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in net.state_dict().items()}


@pytest.mark.parametrize("kind", ["plain", "nested", "prefixed", "compiled", "safetensors"])
def test_weights_are_read_from_whatever_holds_them(kind: str, tmp_path: Path) -> None:
    source, target = Net(), Net()
    path = tmp_path / "w.pt"
    if kind == "plain":
        torch.save(source.state_dict(), path)
    elif kind == "nested":
        torch.save({"state_dict": source.state_dict(), "accuracy": 0.5}, path)
    elif kind == "prefixed":
        torch.save({"state_dict": {**named(source, "net."), **named(Net(), "other.")}, "epoch": 3}, path)
    elif kind == "compiled":
        torch.save({"state_dict": named(source, "net._orig_mod.")}, path)
    else:
        path = tmp_path / "w.safetensors"
        save_file(named(source, "net."), path)
    load_weights(target, path, prefix="net.")
    assert_equal(target, source)


def test_weights_of_another_network_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    path, net = tmp_path / "w.pt", Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.save(Net(8).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"'stem\.0\.weight' is \(16, 3, 3, 3\), \(8, 3, 3, 3\) in the file"):
        load_weights(net, path)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"'stem\.0\.weight' is \(16, 3, 3, 3\), missing in the file"):
        load_weights(net, path, prefix="net.")
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
