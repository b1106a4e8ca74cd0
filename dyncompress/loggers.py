"""Where the runs of a recipe are logged: CSV files always, Weights & Biases unless told not to."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOGS = "logs"  # below a run's folder: what each training logged and printed
WANDB_HOST = "https://api.wandb.ai"


def wandb_mode() -> tuple[str, str]:
    """How to run W&B, and why: ``WANDB_MODE`` where it is set, else online where a key is, else offline."""
    if mode := os.environ.get("WANDB_MODE"):
        mode = "offline" if mode == "dryrun" else "online" if mode == "run" else mode  # W&B's former names
        return mode, f"WANDB_MODE is {mode}"
    if os.environ.get("WANDB_API_KEY"):
        return "online", "WANDB_API_KEY is set"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_HOST)).hostname or ""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        found = path.is_file() and netrc.netrc(path).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError) as error:
        return "offline", f"{path} cannot be read ({error})"
    return ("online", f"{path} has a key") if found else ("offline", "no key is set")


@contextmanager
def run_loggers(
    lightning: Any, folder: Path, project: str | None, group: str, run: str, config: Mapping[str, Any]
) -> Iterator[list[Any]]:
    """The loggers of one training; W&B's run is finished when the context ends, as failed when an error ends it.

    Args:
        lightning: The Lightning package whose loggers to use.
        folder: Folder of the results: CSV goes to ``folder/logs/run``, W&B to ``folder/wandb``.
        project: Project in W&B; None keeps W&B out.
        group: Group of the W&B run: all trainings of one recipe.
        run: Name of this training.
        config: What it was started with.
    """
    loggers = import_module(f"{lightning.__name__}.loggers")
    found: list[Any] = [loggers.CSVLogger(folder / LOGS, name=run, version="")]
    mode, _ = wandb_mode()
    if project is None or mode == "disabled":
        yield found
        return
    import wandb

    # WandbLogger(offline=True) would set WANDB_MODE for the whole process and what it starts, so the run is made here.
    experiment = wandb.init(
        project=project,
        group=group,
        name=run,
        dir=str(folder),
        mode=mode,  # type: ignore[arg-type]
        config=dict(config),
        settings=wandb.Settings(silent=True),
    )
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    found.append(loggers.WandbLogger(experiment=experiment, save_dir=folder))
    failed = True
    try:
        yield found
        failed = False
    finally:
        experiment.finish(exit_code=int(failed))
