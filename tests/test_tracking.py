"""A report in every kind of logger, read back from what the logger wrote."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn

from dyncompress.arms import Arm, Score
from dyncompress.latency import Latency
from dyncompress.plan import Plan
from dyncompress.planning import make_plan
from dyncompress.report import Report
from dyncompress.tracking import log_report, scalars
from tests.wandb_offline import Run, read

REPORT = Report(
    target="50%",
    method="dynet",
    original=Arm("", 1000, 400, Score.of({0: 0.75}), 0, {1: Latency(2.0, 1.0, 0.01), 32: Latency(40.0, 1.0, 0.01)}),
    student=Arm(
        "dynet",
        500,
        300,
        Score.of({0: 0.5, 1: 0.625}),
        64,
        {1: Latency(3.0, 1.5, 0.01), 32: Latency(20.0, 0.5, 0.01)},
    ),
    static=Arm("static", 500, 200, Score.of({0: 0.5, 1: 0.25})),
    name="tiny|net",
    epochs=3,
)
NUMBERS = {
    "compress/macs": 500,
    "compress/ratio": 0.5,
    "compress/params": 300,
    "compress/params_ratio": 0.75,
    "compress/bank_bytes": 64,
    "compress/score": 0.5625,
    "compress/score_best": 0.625,
    "compress/score_original": 0.75,
    "compress/score_static": 0.375,
    "compress/latency_ratio": 1.5,
    "compress/latency_ratio_b32": 0.5,
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 2))
    return make_plan(net, torch.zeros(1, 3, 8, 8), target="50%", tolerance=0.2)


def test_the_numbers_under_their_names() -> None:
    assert scalars(REPORT) == NUMBERS


def test_what_was_not_measured_is_left_out() -> None:
    bare = replace(REPORT, student=Arm("dynet", 500, 300), static=None)
    assert scalars(bare).keys() == NUMBERS.keys() - {
        "compress/score",
        "compress/score_best",
        "compress/score_static",
        "compress/latency_ratio",
        "compress/latency_ratio_b32",
    }


@pytest.fixture
def wandb_run(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Run:
    import wandb

    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))  # where artifacts are staged
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    logger.log_metrics({"loss": 1.0}, step=7)
    logger.log_hyperparams({"user": "mine"})
    logger.experiment.define_metric("compress/*", summary="none")  # a user who keeps the summary tidy
    log_report(REPORT, logger, plan)
    logger.experiment.finish()
    wandb.teardown()  # finish() leaves the last records unwritten
    return read(tmp_path)


def table(folder: Path, key: str) -> dict[str, Any]:
    (path,) = folder.rglob(f"files/media/table/{key}_*.table.json")
    return json.loads(path.read_text("utf-8"))


def test_wandb_offline_run_reads_back(wandb_run: Run, tmp_path: Path, plan: Plan) -> None:
    assert wandb_run.finished
    assert {key: wandb_run.summary[key] for key in NUMBERS} == NUMBERS
    assert [row for row in wandb_run.history if row.items() >= NUMBERS.items()]
    assert wandb_run.history[0]["loss"] == 1.0

    assert wandb_run.config["user"] == "mine"
    facts = wandb_run.config["compress"]
    assert facts["target"] == {"asked": "50%", "quantity": "macs", "asked_ratio": 0.5, "achieved": 0.5}
    assert facts["notes"] == REPORT.notes()
    assert facts["environment"]["versions"]["torch"] == torch.__version__

    arms = table(tmp_path, "compress/tradeoff")
    assert [row[arms["columns"].index("arm")] for row in arms["data"]] == ["original", "static", "student"]
    assert [row[arms["columns"].index("macs")] for row in arms["data"]] == [1000, 500, 500]
    layers = table(tmp_path, "compress/plan")
    assert [row[layers["columns"].index("name")] for row in layers["data"]] == [row.name for row in plan.layers]

    (picture,) = tmp_path.rglob("files/media/images/compress/tradeoff_plot_*.png")
    assert picture.stat().st_size > 10_000
    assert ("plan", f"plan-{wandb_run.id}", ["plan.json"]) in wandb_run.artifacts


def test_wandb_artifact_is_the_plan(wandb_run: Run, tmp_path: Path, plan: Plan) -> None:
    staged = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert plan.to_json() in [path.read_text("utf-8") for path in staged]


def test_tensorboard_reads_back(tmp_path: Path, plan: Plan) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    log_report(REPORT, logger, plan, step=5)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    found = {key: events.Scalars(key) for key in NUMBERS}
    assert {key: value[0].value for key, value in found.items()} == pytest.approx(NUMBERS)
    assert {value[0].step for value in found.values()} == {5}
    (text,) = events.Tensors("compress/tradeoff/text_summary")
    (markdown,) = text.tensor_proto.string_val
    assert b"| student | dynet | 50% | 0.5625 |" in markdown
    assert b"* slower than the original at batch 1 (1.50x) although FLOPs fell to 50%" in markdown
    assert plan.layers[0].name in str(events.Tensors("compress/plan/text_summary")[0].tensor_proto.string_val)
    (picture,) = events.Images("compress/tradeoff_plot")
    assert picture.width > 1500 and len(picture.encoded_image_string) > 10_000


def test_csv_logger_reads_back(tmp_path: Path, plan: Plan) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=4)
    log_report(REPORT, logger, plan, step=5)
    logger.save()
    folder = Path(logger.log_dir)
    with (folder / "metrics.csv").open(newline="") as file:
        first, last = csv.DictReader(file)
    assert (first["step"], first["loss"], last["step"]) == ("4", "1.0", "5")
    assert {key: float(last[key]) for key in NUMBERS} == NUMBERS
    assert (folder / "report.csv").read_text("utf-8").startswith("arm,method,target,val_acc_mean")
    assert Plan.load(folder / "plan.json").to_json() == plan.to_json()


class Foreign(Logger):
    """Knows metrics and nothing else, as a logger of somebody's own."""

    name = version = "foreign"

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, float], int | None]] = []

    @property
    def experiment(self) -> object:
        return object()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((metrics, step))

    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        raise AssertionError("the hyperparameters are the user's")


def test_a_foreign_logger_gets_the_numbers(plan: Plan) -> None:
    logger = Foreign()
    log_report(REPORT, logger, plan, step=9)
    assert logger.seen == [(NUMBERS, 9)]


def test_several_loggers_none_and_a_stand_in(plan: Plan) -> None:
    one, other = Foreign(), Foreign()
    log_report(REPORT, [one, None, DummyLogger(), other], plan)
    assert one.seen == other.seen == [(NUMBERS, None)]
    log_report(REPORT, None, plan)
