"""A tiny classifier as a LightningModule of either package, and the data to train it for a few steps."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES, BATCH = 3, 4


class Net(nn.Module):
    """Two narrowable widths, BatchNorm, a block with a shortcut. Images are 3 x 8 x 8."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def loader(batches: int = 4) -> DataLoader[Any]:
    """Noise with a class-dependent brightness."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(batches * BATCH) % CLASSES
    x = torch.randn(batches * BATCH, 3, 8, 8, generator=generator) + y.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def classifier(package: str = "lightning.pytorch") -> type[Any]:
    """An ordinary LightningModule class that knows nothing of compression."""
    pl = import_module(package)

    class Classifier(pl.LightningModule):
        def __init__(self, width: int = 16, lr: float = 0.01) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = Net(width)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("val_loss", F.cross_entropy(self(x), y))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])

    Classifier.__qualname__ = "Classifier"
    return Classifier


def trainer(package: str = "lightning.pytorch", callbacks: Any = (), **options: Any) -> Any:
    """A silent Trainer on one CPU core for one epoch."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return import_module(package).Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(module: Any, *callbacks: Any, batches: int = 4, ckpt_path: Any = None, **options: Any) -> Any:
    """Train the module with these callbacks; its Trainer."""
    host = trainer(callbacks=callbacks, **options)
    host.fit(module, loader(batches), loader(1), ckpt_path=ckpt_path)
    return host


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of its state dict."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(module: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether its state dict is that, bit by bit."""
    now = module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())
