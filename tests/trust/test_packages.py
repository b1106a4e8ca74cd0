"""Both packages: `lightning` and `pytorch_lightning` each work, beside the other or alone."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from dyncompress import DistillConfig, DynCompress
from dyncompress.conversion import plan_of
from dyncompress.layers import DynamicConv
from tests.classifiers import classifier, loader, trainer
from tests.trust.journey import OWNS, PACKAGES, difference, journey

INSTALLED = {package: find_spec(package.partition(".")[0]) is not None for package in PACKAGES}
EACH = [
    pytest.param(package, marks=pytest.mark.skipif(not INSTALLED[package], reason=f"{package} is not installed"))
    for package in PACKAGES
]
both = pytest.mark.skipif(not all(INSTALLED.values()), reason="only one of the packages is installed")


def script(package: str, extra: list[Any]) -> tuple[Any, Any]:
    """Somebody's training script. It knows nothing of compression, and is not edited."""
    module = classifier(package)()
    host = import_module(package).Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=extra,
    )
    host.fit(module, loader(), loader(1))
    return module, host


@pytest.mark.parametrize("package", EACH)
def test_one_more_callback_compresses_somebodys_training(
    package: str, capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    """One more callback compresses a training script of either package, and nothing else in it changes."""
    plain, before = script(package, [])
    capsys.readouterr()
    module, host = script(package, [DynCompress(target="50%")])  # the one line

    assert {"train_loss", "val_loss"} <= before.callback_metrics.keys()
    assert host.callback_metrics.keys() == before.callback_metrics.keys() | {"distill/loss"}
    assert host.callback_metrics["distill/loss"] > 0
    assert sum(isinstance(m, DynamicConv) for m in module.modules()) == 2  # the first convolution reads the input
    assert plan_of(plain) is None
    plan = plan_of(module)
    assert plan is not None
    assert 0.49 <= plan.ratio <= 0.505
    assert "asked 50%, reached 49.71% of the MACs (618k > 307k)" in capsys.readouterr().out
    installed = [p for p in PACKAGES if INSTALLED[p]]
    assert all(isinstance(host.callbacks[0], import_module(f"{p}.callbacks").Callback) for p in installed)
    record_property("figure", "asked 50 %, reached 49.71 % of the MACs")


@pytest.mark.parametrize("package", EACH)
def test_lightning_cli_takes_it_from_yaml(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """LightningCLI of either package takes the callback and all of its arguments from a YAML file."""
    config = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [
                {
                    "class_path": "dyncompress.DynCompress",
                    "init_args": {
                        "target": "50%",
                        "method": "dynet",
                        "options": {"g": 2},
                        "distill": {"alpha": 0.5, "features": {"bn2": 10.0}},
                        "ignore": ["linear"],
                        "teacher": "teacher.ckpt",
                    },
                }
            ],
        },
        "model": {"width": 8},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(tmp_path / "config.yaml")])
    cli = import_module(f"{package}.cli").LightningCLI(classifier(package), run=False, save_config_callback=None)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, DynCompress))
    assert (callback.target, callback.method, callback.options) == ("50%", "dynet", {"g": 2})
    assert callback.teacher == "teacher.ckpt"
    assert callback.distill == DistillConfig(alpha=0.5, features={"bn2": 10.0})
    record_property("figure", "6 of 6 arguments arrive")


@pytest.mark.parametrize("package", EACH)
def test_every_way_to_train_ends_at_the_same_weights(package: str, tmp_path: Path, record_property: Any) -> None:
    """With both installed, a fit, a resumed fit, LightningCLI and a loaded checkpoint all give the same network."""
    measured = journey(package, tmp_path)
    assert max(measured.values()) <= 1e-6, measured
    record_property("figure", f"largest difference {max(measured.values()):.0e}")


@both
def test_both_packages_train_the_same_network(record_property: Any) -> None:
    """The same script trains the same weights in either package."""
    trained = []
    for package in PACKAGES:
        torch.manual_seed(0)
        trained.append(script(package, [DynCompress(target="50%")])[0])
    gap = difference(*trained)
    assert gap <= 1e-6
    record_property("figure", f"largest difference {gap:.0e}")


@both
@pytest.mark.parametrize(("first", "second"), [PACKAGES, PACKAGES[::-1]])
def test_a_checkpoint_moves_from_one_package_to_the_other(
    first: str, second: str, tmp_path: Path, record_property: Any
) -> None:
    """A training that one package began goes on in the other as if it had never moved."""

    def train(package: str, epochs: int, resumed: Path | None = None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        module, host = classifier(package)(), trainer(package, [DynCompress("50%")], max_epochs=epochs)
        host.fit(module, loader(), loader(1), ckpt_path=resumed)
        return module, host

    stayed, _ = train(first, 2)
    train(first, 1)[1].save_checkpoint(tmp_path / "half.ckpt")
    moved, host = train(second, 2, tmp_path / "half.ckpt")
    assert host.global_step == 8
    gap = difference(stayed, moved)
    assert gap <= 1e-6
    record_property("figure", f"largest difference {gap:.0e}")


@pytest.mark.slow
@pytest.mark.parametrize("package", EACH)
def test_one_package_alone_is_enough(package: str, record_property: Any) -> None:
    """Where only one of the packages is installed, fitting, resuming, loading and LightningCLI work all the same."""
    hidden = set().union(*(names for other, names in OWNS.items() if other != package))
    run = subprocess.run(
        [sys.executable, "-m", "tests.trust.journey", package, *sorted(hidden)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    assert set(told["loaded"]) == OWNS[package] - {"pytorch-lightning"}  # and nothing of the other
    assert max(told["measured"].values()) <= 1e-6, told
    record_property("figure", f"largest difference {max(told['measured'].values()):.0e}")
