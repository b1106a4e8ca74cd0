"""What is to be trained, what is there, and how long the rest takes.

OUT/NETWORK/original.pt is the original, where no weights were given; OUT/CASE/ARM/plan.json the arm's plan, the same
for all seeds; OUT/CASE/ARM/SEED a folder of `dyncompress run`.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.accuracy.arms import ARMS, Arm
from benchmarks.accuracy.networks import NETWORKS, Case, Network, as_json
from benchmarks.rowstore import RowStore
from benchmarks.trainings import Outcome, command, logged, outcomes, seconds, train
from benchmarks.zoo import environment


@dataclass(frozen=True)
class Row(Outcome):
    """What one training came to.

    Attributes:
        network: Key of `NETWORKS`.
        budget: As it was asked for.
        arm: Title of an `Arm`.
        seconds: That it took, measurements included; None where that isn't known.
    """

    network: str
    budget: str
    arm: str
    seconds: float | None


KEY = ("network", "budget", "arm", "epochs", "seed")


def store(path: Path) -> RowStore[Row]:
    """The rows in a CSV."""
    return RowStore(path, Row, KEY)


@dataclass(frozen=True)
class Job:
    """One student."""

    case: Case
    arm: Arm
    seed: int

    @property
    def network(self) -> Network:
        """Whose."""
        return NETWORKS[self.case.network]

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """Of its row."""
        return (self.case.network, self.case.budget, self.arm.title, self.case.epochs, self.seed)

    def __str__(self) -> str:
        return f"{self.case.network} at {self.case.budget}, {self.arm.title}, seed {self.seed}"


def jobs(cases: Sequence[Case], arms: Sequence[Arm] = tuple(ARMS.values())) -> list[Job]:
    """Every student, all arms of a seed one after the other.

    Two kinds are left out: torch-pruning has no target in time, and score drops of single groups are measured as a
    classifier's accuracy.
    """
    return [
        Job(case, arm, seed)
        for case in cases
        for seed in case.seeds
        for arm in arms
        if not (arm.pruner and case.timed) and not (NETWORKS[case.network].dense and arm.allocation == "sensitivity")
    ]


@dataclass(frozen=True)
class Workshop:
    """Where and on what jobs are done.

    Attributes:
        out: Folder of everything.
        data: Folder per data set.
        weights: Of originals, by network; those that are missing are trained.
        words: What is changed in every recipe: the accelerator, say.
        remember: Whether teachers remember their answers, on disk: it pays where a core computes them.
    """

    out: Path
    data: Mapping[str, Path]
    weights: Mapping[str, Path] = field(default_factory=dict)
    words: Mapping[str, Any] = field(default_factory=dict)
    remember: bool = True

    def place(self, job: Job) -> Path:
        """A job's folder."""
        return self.out / job.case.folder / job.arm.folder / f"seed{job.seed}"

    def checkpoint(self, network: str) -> Path:
        """An original's weights, there or not."""
        return self.weights.get(network, self.out / network / "original.pt")

    def common(self, network: str) -> dict[str, Any]:
        """What all trainings of a network have in common."""
        net = NETWORKS[network]
        return {**net.words, "data.root": self.data[net.data], "wandb": "null", **self.words}

    def words_of(self, job: Job) -> dict[str, Any]:
        """What a job changes in its recipe."""
        return {
            **self.common(job.case.network),
            **job.arm.words,
            "target": job.case.budget,
            "epochs": job.case.epochs,
            "seeds": as_json((job.seed,)),
            "control": "false",
            "baseline.checkpoint": self.checkpoint(job.case.network),
        }

    # ---- doing ---------------------------------------------------------------------------------------------------

    def original(self, network: str) -> int:
        """Train an original; returns the exit status."""
        words = {**self.common(network), "seeds": as_json((0,)), "out": self.out / network}
        recipe = [str(NETWORKS[network].path), *_options(words)]
        return train(self.out / network, [sys.executable, "-m", "benchmarks.accuracy.original", *recipe])

    def plan(self, job: Job) -> int:
        """Make a job's plan, unless another seed's job has made it; returns the exit status."""
        path = self.place(job).parent / "plan.json"
        if path.exists():
            return 0
        words = {k: v for k, v in self.words_of(job).items() if k != "seeds"} | {"seeds": as_json((0,))}
        program = ["dyncompress", "plan", str(job.network.path), *_options(words), "--out", str(path)]
        env = {"OMP_NUM_THREADS": "1"}  # as times are measured
        if job.arm.pruner:
            rest = [str(job.network.path), *_options(self._bare(words))]
            program = ["benchmarks.accuracy.pruned", str(path), job.case.budget, job.arm.pruner, *rest]
            env = environment()
        path.parent.mkdir(parents=True, exist_ok=True)
        return logged([sys.executable, "-m", *program], path.with_suffix(".log"), {**os.environ, **env})

    def run(self, job: Job) -> int:
        """Train a student; returns the exit status of what failed first."""
        code = self.plan(job)
        if code:
            return code
        folder = self.place(job)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "plan.json").exists():
            shutil.copy(folder.parent / "plan.json", folder / "plan.json")
        answers = self.out / job.case.network / "answers" if self.remember and not job.network.dense else None
        return train(folder, command(job.network.path, {**self.words_of(job), "out": folder}, answers))

    @staticmethod
    def _bare(words: Mapping[str, Any]) -> dict[str, Any]:
        """Without what a pruner decides itself."""
        own = ("target", "method", "control", "allocation", "importance", "options")
        return {key: value for key, value in words.items() if key not in own}

    # ---- what is there -------------------------------------------------------------------------------------------

    def finished(self, wanted: Sequence[Job]) -> Iterator[Row]:
        """The rows of finished jobs."""
        for job in wanted:
            folder = self.place(job)
            for outcome in outcomes(folder):
                if (outcome.seed, outcome.epochs) == (job.seed, job.case.epochs):
                    yield Row(
                        **asdict(outcome),
                        network=job.case.network,
                        budget=job.case.budget,
                        arm=job.arm.title,
                        seconds=seconds(folder),
                    )


def missing(wanted: Sequence[Job], rows: Sequence[Row]) -> list[Job]:
    """Jobs that have no row."""
    there = {tuple(getattr(row, name) for name in KEY) for row in rows}
    return [job for job in wanted if job.key not in there]


def estimate(job: Job, rows: Sequence[Row]) -> float | None:
    """Seconds that a job takes: those of an epoch in the median of the rows that are most like it, times its epochs.

    Rows of the same network and arm, else of the same network; None where there is none.
    """
    alike = [row for row in rows if row.network == job.case.network and row.seconds]
    found = [row for row in alike if row.arm == job.arm.title] or alike
    return statistics.median((row.seconds or 0) / row.epochs for row in found) * job.case.epochs if found else None


def _options(words: Mapping[str, Any]) -> list[str]:
    return [word for key, value in words.items() for word in (f"--{key}", str(value))]
