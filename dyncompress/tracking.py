"""What a compression leaves in an experiment's loggers. Any Lightning logger works; none is needed.

Loggers are known by what they can do, so neither Lightning nor W&B is imported here. W&B gets more, since its
scatter panel reads nothing but a run's summary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from .budget import readable
from .plan import LayerPlan, Plan
from .plotting import pixels
from .report import Report
from .search import Found

Cells = tuple[list[str], list[list[Any]]]
"""Columns and rows of a table."""


def scalars_of(plan: Plan) -> dict[str, float]:
    """What a plan costs, by the names under which it is logged."""
    return {
        "compress/macs": float(plan.macs_after),
        "compress/ratio": plan.ratio,
        "compress/params": float(plan.params_after),
    }


def scalars(report: Report) -> dict[str, float]:
    """The numbers of the student by the names under which they are logged; what was not measured is left out.

    ``compress/score`` is the mean over the seeds, ``compress/score_best`` the best of them;
    ``compress/latency_ratio`` is at batch 1, ``compress/latency_ratio_b32`` at batch 32.
    """
    found: dict[str, float | None] = {
        "compress/macs": report.student.macs,
        "compress/ratio": report.macs_ratio,
        "compress/params": report.student.params,
        "compress/params_ratio": report.params_ratio,
        "compress/bank_bytes": report.student.bank_bytes,
        "compress/score": report.student.score.mean,
        "compress/score_best": max(report.student.score.values, default=None),
        "compress/score_original": report.original.score.mean,
        "compress/score_static": report.static.score.mean if report.static else None,
    }
    for size, ratio in report.latency_ratio.items():
        found["compress/latency_ratio" + (f"_b{size}" if size != 1 else "")] = ratio
    return {name: value for name, value in found.items() if value is not None}


def reached(plan: Plan) -> str:
    """What a plan costs, as part of a sentence."""
    return (
        f"{plan.ratio:.2%} of the MACs ({readable(plan.macs_before)} > {readable(plan.macs_after)}) and"
        f" {plan.params_ratio:.2%} of the parameters ({readable(plan.params_before)} > {readable(plan.params_after)})"
    )


def log_plan(loggers: Sequence[Any], plan: Plan, settings: Mapping[str, Any], step: int) -> None:
    """Log what was decided, when training starts: scalars, hyper-parameters, and for W&B table and artifact.

    Args:
        loggers: The Trainer's loggers.
        plan: What the network was converted by.
        settings: How the student learns, as plain values.
        step: Global step.
    """
    decided = {
        "target": plan.target,
        "method": plan.method,
        "options": plan.options,
        "allocation": plan.allocation,
        "importance": plan.importance,
        "macs": [plan.macs_before, plan.macs_after],
        "params": [plan.params_before, plan.params_after],
        **settings,
    }
    for logger in loggers:
        logger.log_hyperparams({"dyncompress": decided})
        logger.log_metrics(metrics=scalars_of(plan), step=step)
        if _wandb_run(logger) is not None:
            _log_plan_to_wandb(logger, plan, None)


def log_search(found: Found, loggers: Sequence[Any], step: int | None = None) -> None:
    """Log what a search for the cheapest network came to; W&B gets its probes as a table, and a summary.

    Args:
        found: What it came to.
        loggers: The Trainer's loggers.
        step: Step to log at; default: the logger's own.
    """
    columns, rows = found.rows()
    for logger in loggers:
        logger.log_metrics(metrics=found.metrics(), step=step)
        run = _wandb_run(logger)
        if run is not None:
            logger.log_table(key="search/probes", columns=columns, data=rows, step=step)
            run.summary.update(found.metrics())


def log_summary(loggers: Sequence[Any], plan: Plan, best: Mapping[str, float]) -> None:
    """Put what a comparison of runs needs into the summary of W&B runs.

    Args:
        loggers: The Trainer's loggers.
        plan: What the network was converted by.
        best: Best value of every monitored metric, by its name.
    """
    for run in filter(None, map(_wandb_run, loggers)):
        run.summary.update({**scalars_of(plan), **{f"best/{name}": value for name, value in best.items()}})


def log_report(report: Report, logger: Any, plan: Plan | None = None, *, step: int | None = None) -> None:
    """Log a report, and the plan that led to it. In a distributed run, call it on rank 0.

    Every logger gets the numbers of :func:`scalars`. W&B gets them in the run's summary as well, with tables, the
    plot, the plan as an artifact, and the report's facts in the config. TensorBoard gets text and an image; a
    logger that writes to a folder gets report.csv and plan.json there.

    Args:
        report: What to log.
        logger: A Lightning logger, several of them in a list or tuple, or None for nowhere.
        plan: The student's plan.
        step: Step to log at; default: the logger's own.
    """
    if isinstance(logger, (list, tuple)):
        for one in logger:
            log_report(report, one, plan, step=step)
        return
    if logger is None:
        return
    logger.log_metrics(metrics=scalars(report), step=step)
    experiment, folder = logger.experiment, getattr(logger, "log_dir", None)
    if _wandb_run(logger) is not None:
        _log_to_wandb(report, logger, plan, step)
    elif hasattr(experiment, "add_text"):
        _log_to_tensorboard(report, experiment, plan, step)
    elif isinstance(folder, (str, Path)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        report.write_csv(Path(folder, "report.csv"))
        if plan is not None:
            plan.save(Path(folder, "plan.json"))


def _wandb_run(logger: Any) -> Any:
    """The logger's W&B run, or None.

    Lightning's stand-ins (fast_dev_run, rank > 0) have every attribute as a function that does nothing, so the
    summary is asked whether it is one.
    """
    run = getattr(logger, "experiment", None)
    return run if hasattr(getattr(run, "summary", None), "update") else None


def _log_to_wandb(report: Report, logger: Any, plan: Plan | None, step: int | None) -> None:
    content = report.to_dict()
    facts = ("name", "method", "target", "score_name", "epochs", "notes", "environment")
    logger.log_hyperparams({"compress": {key: content[key] for key in facts}})
    columns, rows = _comparison(report)
    logger.log_table(key="compress/tradeoff", columns=columns, data=rows, step=step)
    logger.log_image(key="compress/tradeoff_plot", images=[pixels(report.figure())], step=step)
    if plan is not None:
        _log_plan_to_wandb(logger, plan, step)
    logger.experiment.summary.update(scalars(report))  # last: the history replaces what it names


def _log_plan_to_wandb(logger: Any, plan: Plan, step: int | None) -> None:
    columns, rows = _layers(plan)
    logger.log_table(key="compress/plan", columns=columns, data=rows, step=step)
    run = logger.experiment
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        plan.save(path)
        run.log_artifact(str(path), name=f"plan-{run.id}", type="plan")


def _log_to_tensorboard(report: Report, experiment: Any, plan: Plan | None, step: int | None) -> None:
    notes = "".join(f"\n* {note}" for note in report.notes())
    experiment.add_text("compress/tradeoff", _markdown(*_comparison(report)) + "\n" + notes, step)
    experiment.add_image("compress/tradeoff_plot", pixels(report.figure()), step, dataformats="HWC")
    if plan is not None:
        experiment.add_text("compress/plan", _markdown(*_layers(plan)), step)


def _comparison(report: Report) -> Cells:
    rows = report.rows()
    return list(rows[0]), [list(row.values()) for row in rows]


def _layers(plan: Plan) -> Cells:
    return [field.name for field in fields(LayerPlan)], [list(astuple(layer)) for layer in plan.layers]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
