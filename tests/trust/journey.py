"""One training's whole way in one Lightning package: fitted, resumed, from the command line, loaded again.

`python -m tests.trust.journey PACKAGE HIDDEN...` goes it where the hidden distributions are not installed, as far as
Python can tell, and prints what was measured as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import Distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from tests.classifiers import classifier, loader, trainer

# What each of the two installs: names to import, and the names of its distributions.
OWNS = {
    "lightning.pytorch": {"lightning"},
    "pytorch_lightning": {"pytorch_lightning", "lightning_fabric", "pytorch-lightning"},
}
PACKAGES = list(OWNS)


class Hiding:
    """A finder of modules that finds all but some: an installation without them."""

    def __init__(self, finder: Any, hidden: set[str]) -> None:
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self.hidden else self.finder.find_spec(name, path, target)

    def find_distributions(self, *args: Any) -> Iterator[Distribution]:
        find = getattr(self.finder, "find_distributions", lambda *_: ())
        return (found for found in find(*args) if found.metadata["Name"] not in self.hidden)

    def invalidate_caches(self) -> None:
        getattr(self.finder, "invalidate_caches", lambda: None)()


def difference(one: nn.Module, other: nn.Module) -> float:
    """Largest over all weights and statistics, which must have the same names and shapes."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def journey(package: str, folder: Path) -> dict[str, float]:
    """What each way of training and loading differs by from one `fit` of two epochs; it should be nothing."""
    from dyncompress import DynCompress, load_from_checkpoint
    from dyncompress.conversion import plan_of
    from dyncompress.layers import DynamicConv

    kind = classifier(package)

    def train(epochs: int, resumed: Path | None = None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        module, host = kind(), trainer(package, [DynCompress("50%")], max_epochs=epochs)
        host.fit(module, loader(), loader(1), ckpt_path=resumed)
        return module, host

    whole, host = train(2)
    assert sum(isinstance(m, DynamicConv) for m in whole.modules()) == 2
    assert host.callback_metrics["distill/loss"] > 0
    host.save_checkpoint(folder / "whole.ckpt")
    train(1)[1].save_checkpoint(folder / "half.ckpt")
    resumed, second = train(2, folder / "half.ckpt")
    assert (second.global_step, plan_of(resumed)) == (8, plan_of(whole))
    loaded = load_from_checkpoint(kind, folder / "whole.ckpt")

    cli = command_line(package, kind, folder, "fit")
    cli.trainer.save_checkpoint(folder / "cli.ckpt")
    (told,) = host.test(whole, loader(1), verbose=False)
    tested = command_line(package, kind, folder, "test", f"--ckpt_path={folder / 'cli.ckpt'}")
    return {
        "resumed": difference(resumed, whole),
        "loaded": difference(loaded, whole),
        "command line": difference(cli.model, whole),
        "tested": abs(tested.trainer.callback_metrics["test_loss"].item() - told["test_loss"]),
    }


def command_line(package: str, kind: type[Any], folder: Path, *words: str) -> Any:
    """What `python train.py WORDS` does where train.py is one line of LightningCLI."""
    pl = import_module(package)

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

        def val_dataloader(self) -> Any:
            return loader(1)

        test_dataloader = val_dataloader

    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    ours = {"class_path": "dyncompress.DynCompress", "init_args": {"target": "50%"}}
    config = {"seed_everything": 0, "trainer": {**quiet, "max_epochs": 2, "callbacks": [ours]}}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    cli = import_module(f"{package}.cli").LightningCLI
    with patch.object(sys, "argv", ["train.py", words[0], f"--config={folder / 'config.yaml'}", *words[1:]]):
        return cli(kind, Data, save_config_callback=None)


if __name__ == "__main__":
    package, *hidden = sys.argv[1:]
    sys.meta_path[:] = [Hiding(finder, set(hidden)) for finder in sys.meta_path]
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        measured = journey(package, Path(folder))
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & set().union(*OWNS.values()))
    sys.stdout.write(f"\n{json.dumps({'measured': measured, 'loaded': loaded})}\n")
