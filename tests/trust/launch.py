"""Runs jobs of tests/trust/jobs.py as users run training scripts: in processes of their own, on this machine only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "tests" / "trust" / "jobs.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass(frozen=True)
class Run:
    """What became of a job: what its processes told by name, how it ended, what it printed, how long it took."""

    told: dict[str, Any]
    returncode: int
    output: str
    seconds: float


def launch(job: str, folder: Path, *arguments: object, by: tuple[str, ...] = (), timeout: float = 240) -> Run:
    """Run a job to its end; past the timeout its whole process group is killed and `subprocess.TimeoutExpired` raised.

    Lightning finds a free port itself, and so does torchrun with --standalone.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *by, str(JOBS), job, str(folder), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=timeout)[0]
    except BaseException:
        os.killpg(process.pid, 9)
        process.communicate()
        raise
    told = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return Run(told, process.returncode, output, time.monotonic() - started)


def succeed(job: str, folder: Path, *arguments: object, by: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the processes of a job told that must end well."""
    run = launch(job, folder, *arguments, by=by)
    assert run.returncode == 0, run.output[-4000:]
    return run.told
