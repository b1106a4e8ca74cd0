"""Engine: whatever the Trainer's flags do to a training, they do to the student's."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

from tests.classifiers import BATCH, CLASSES, equal, loader, weights
from tests.trust.witness import check, clean, contrasting, taught

# Trainer arguments; optimizer steps and validations of four batches an epoch; student runs that are taught
FLAGS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "none": ({}, 4, 1, 4),
    "accumulate_grad_batches": ({"accumulate_grad_batches": 2}, 2, 1, 4),
    "accumulate, uneven": ({"accumulate_grad_batches": 3}, 2, 1, 4),
    "gradient_clip_val": ({"gradient_clip_val": 0.1}, 4, 1, 4),
    "gradient_clip_algorithm": ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, 4, 1, 4),
    "detect_anomaly": ({"detect_anomaly": True}, 4, 1, 4),
    "deterministic": ({"deterministic": True}, 4, 1, 4),
    "deterministic warn": ({"deterministic": "warn"}, 4, 1, 4),
    "benchmark": ({"benchmark": True}, 4, 1, 4),
    "sync_batchnorm": ({"sync_batchnorm": True}, 4, 1, 4),
    "reload_dataloaders": ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, 8, 2, 8),
    "val_check_interval": ({"val_check_interval": 2}, 4, 2, 4),
    "val_check_interval, share": ({"val_check_interval": 0.25}, 4, 4, 4),
    "check_val_every_n_epoch": ({"check_val_every_n_epoch": 2, "max_epochs": 2}, 8, 1, 8),
    "max_steps": ({"max_steps": 3, "max_epochs": -1}, 3, 0, 3),
    "max_steps beyond an epoch": ({"max_steps": 6, "max_epochs": -1}, 6, 1, 6),
    "min_epochs": ({"min_epochs": 2, "max_epochs": 3}, 12, 3, 12),
    "fast_dev_run": ({"fast_dev_run": True}, 1, 1, 1),
    "fast_dev_run 3": ({"fast_dev_run": 3}, 3, 1, 3),
    "overfit_batches": ({"overfit_batches": 2, "max_epochs": 2}, 4, 2, 4),
    "limit_train_batches": ({"limit_train_batches": 3}, 3, 1, 3),
    "limit_train_batches, share": ({"limit_train_batches": 0.5}, 2, 1, 2),
    "limit_val_batches": ({"limit_val_batches": 1}, 4, 1, 4),
    "without validation": ({"limit_val_batches": 0}, 4, 0, 4),
    "num_sanity_val_steps": ({"num_sanity_val_steps": 2}, 4, 1, 4),
    "inference_mode off": ({"inference_mode": False}, 4, 1, 4),
    "barebones": ({"barebones": True}, 4, 1, 4),
    "log_every_n_steps": ({"log_every_n_steps": 1}, 4, 1, 4),
    "use_distributed_sampler": ({"use_distributed_sampler": False}, 4, 1, 4),
    "profiler": ({"profiler": "simple"}, 4, 1, 4),
    "enable_model_summary": ({"enable_model_summary": True}, 4, 1, 4),
    "enable_progress_bar": ({"enable_progress_bar": True}, 4, 1, 4),
}


@pytest.fixture
def _defaults() -> Any:
    """What the Trainer sets for the whole process goes back to what it was."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.usefixtures("_defaults")
# Lightning's, on what was asked for: anomaly detection is slow; the classifier logs, and barebones logs nothing.
@pytest.mark.filterwarnings("ignore:You have turned on `Trainer.detect_anomaly")
@pytest.mark.filterwarnings("ignore:You are trying to `self.log.*barebones=True")
@pytest.mark.parametrize("flag", FLAGS)
def test_flag(flag: str, record_property: Callable[..., None]) -> None:
    """A flag of the Trainer works beside compression: as many steps and validations as without, each step taught."""
    options, steps, validations, runs = FLAGS[flag]
    run = taught(contrasting(), options=options)
    check(run, steps)
    assert (run.validations, len(run.terms)) == (validations, runs)
    assert len(run.logged) == (0 if flag == "barebones" else runs)
    record_property("figure", f"{flag}: {steps} steps, {runs} of {runs} batches taught, {validations} validations")


def test_max_time(record_property: Callable[..., None]) -> None:
    """A training that is limited in time stops in time, and leaves a trained student."""
    limit = timedelta(seconds=1)
    run = taught(contrasting(), options={"max_time": limit, "max_epochs": -1})
    check(run)
    assert 0 < run.host.global_step == len(run.terms)
    record_property("figure", f"stopped after {run.host.global_step} steps in 1 s")


def test_other_stages(record_property: Callable[..., None]) -> None:
    """Validation, test and prediction of a student give the same numbers with and without inference mode."""
    scores = []
    for mode in (True, False):
        run = taught(
            contrasting(), options={"inference_mode": mode, "limit_test_batches": 2, "limit_predict_batches": 3}
        )
        before = weights(run.module)
        (validated,) = run.host.validate(run.module, loader(2), verbose=False)
        (tested,) = run.host.test(run.module, loader(2), verbose=False)
        predicted = run.host.predict(run.module, loader())
        assert len(predicted) == 3
        assert validated["val_loss"] == pytest.approx(tested["test_loss"])
        assert equal(run.module, before)
        clean(run.module)
        scores.append(
            torch.cat([torch.tensor([validated["val_loss"], tested["test_loss"]]), *map(torch.ravel, predicted)])
        )
    assert scores[0].isfinite().all() and len(scores[0]) == 2 + 3 * BATCH * CLASSES
    assert torch.equal(*scores)
    record_property("figure", f"{len(scores[0])} of {len(scores[0])} numbers equal")
