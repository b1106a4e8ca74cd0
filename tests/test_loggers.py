"""Where runs are logged: what decides W&B's mode, and that a run is closed whatever happens in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import pytorch_lightning
import wandb

from dyncompress.loggers import run_loggers, wandb_mode
from tests.wandb_offline import read


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a key, and an environment that says nothing of W&B."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_without_a_key_it_is_offline(home: Path) -> None:
    assert wandb_mode() == ("offline", "no key is set")


def test_a_key_in_the_environment_makes_it_online(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode() == ("online", "WANDB_API_KEY is set")


def test_a_key_in_netrc_makes_it_online_for_that_host_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".netrc").write_text("machine api.wandb.ai login user password 123\n")
    assert wandb_mode() == ("online", f"{home / '.netrc'} has a key")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert wandb_mode()[0] == "offline"


def test_a_damaged_netrc_is_told_and_does_no_harm(home: Path) -> None:
    (home / ".netrc").write_text("machine\n")
    mode, reason = wandb_mode()
    assert mode == "offline" and ".netrc cannot be read" in reason


@pytest.mark.parametrize(("asked", "mode"), [("disabled", "disabled"), ("offline", "offline"), ("dryrun", "offline")])
def test_wandb_mode_has_the_last_word(home: Path, monkeypatch: pytest.MonkeyPatch, asked: str, mode: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", asked)
    assert wandb_mode() == (mode, f"WANDB_MODE is {mode}")


def test_a_run_is_written_grouped_and_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    with run_loggers(pytorch_lightning, tmp_path, "project", "digits now", "static-seed0", {"epochs": 3}) as loggers:
        for logger in loggers:
            logger.log_metrics(metrics={"loss": 0.5}, step=2)
            logger.save()
        run = loggers[1].experiment
        assert (run.project, run.group, run.name) == ("project", "digits now", "static-seed0")
    assert wandb.run is None
    assert "WANDB_MODE" not in os.environ  # Lightning's own WandbLogger(offline=True) would have set it
    wandb.teardown()
    found = read(tmp_path / "wandb")
    assert found.finished and found.config["epochs"] == 3
    assert found.history[0]["loss"] == 0.5 and found.history[0]["trainer/global_step"] == 2
    assert (tmp_path / "logs/static-seed0/metrics.csv").read_text() == "loss,step\n0.5,2\n"


def test_a_run_is_finished_when_its_training_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        with run_loggers(pytorch_lightning, tmp_path, "project", "group", "run", {}):
            raise ZeroDivisionError
    assert wandb.run is None


@pytest.mark.parametrize(("project", "mode"), [(None, "offline"), ("project", "disabled")])
def test_without_wandb_the_csv_files_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: str | None, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with run_loggers(pytorch_lightning, tmp_path, project, "group", "run", {}) as loggers:
        assert [type(logger).__name__ for logger in loggers] == ["CSVLogger"]
    assert not (tmp_path / "wandb").exists()
