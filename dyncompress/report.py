"""The honest report of one compression: what was asked, what came out, and what it did not buy.

As a table, as files in the run's folder (report.json, report.csv, tradeoff.png; keys in docs/report.md), and
side by side with the reports of other runs.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyncompress import __version__
from dyncompress.arms import Arm, Outcome, Score, are_shares, notes
from dyncompress.budget import Budget, Limit, readable
from dyncompress.errors import DynCompressError
from dyncompress.latency import Latency
from dyncompress.plotting import Panel, Point, draw
from dyncompress.provenance import Environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

VERSION = 1
WIDTH = 100  # columns of the text form
TABLE_STYLE: dict[str, Any] = {"box": None, "padding": (0, 1, 0, 0), "pad_edge": False, "header_style": "dim"}
ARMS = ("original", "static", "student")

KEY = "Bars: one sample standard deviation. Faint dots: single seeds."

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What a compression was asked for and what came out.

    Attributes:
        target: The target as asked: "33%", "1.2G", "40% params", "60% latency".
        method: Name of the student's method.
        original: The network before.
        student: The compressed network.
        static: The control: narrowed to the same MACs, without dynamic convolutions, trained alike.
        name: What was compressed, such as the name of the recipe.
        score_name: What the scores are, such as "val_acc"; higher is better.
        epochs: Epochs that control and student were trained for.
        environment: Where the numbers come from.
    """

    target: str
    method: str
    original: Arm
    student: Arm
    static: Arm | None = None
    name: str = ""
    score_name: str = "val_acc"
    epochs: int | None = None
    environment: Environment = field(default_factory=Environment.here)

    @property
    def arms(self) -> dict[str, Arm]:
        """The arms by name, in the order original, static, student; a missing control is left out."""
        return {name: arm for name in ARMS if (arm := getattr(self, name)) is not None}

    @property
    def macs_ratio(self) -> float:
        """MACs of the student / MACs of the original."""
        return self.student.macs / self.original.macs

    @property
    def params_ratio(self) -> float:
        """Parameters of the student / parameters of the original."""
        return self.student.params / self.original.params

    @property
    def latency_ratio(self) -> dict[int, float]:
        """Latency of the student / latency of the original, by batch size."""
        return {size: latency.ratio for size, latency in self.student.latency.items()}

    @property
    def limits(self) -> list[Outcome]:
        """What each limit of the target asked for and what came of it."""
        budget = Budget.parse(self.target)
        return [Outcome(limit, self._asked(limit), self._achieved(limit.quantity)) for limit in budget.limits]

    @property
    def quantity(self) -> str:
        """What the target limits (its first limit): "macs", "params" or "latency" (at batch 1)."""
        return self.limits[0].limit.quantity

    @property
    def asked(self) -> float:
        """The target (its first limit) as a fraction of the original."""
        return self.limits[0].asked

    @property
    def achieved(self) -> float | None:
        """What was reached of the quantity asked for, as a fraction of the original; None if not measured."""
        return self.limits[0].achieved

    def _asked(self, limit: Limit) -> float:
        return limit.value if limit.relative else limit.fraction(getattr(self.original, limit.quantity))

    def _achieved(self, quantity: str) -> float | None:
        if quantity == "latency":
            return self.latency_ratio.get(1)
        return self.params_ratio if quantity == "params" else self.macs_ratio

    def notes(self) -> list[str]:
        """Sentences that a reader of the table must not miss; empty when there is nothing to warn of.

        The target was missed (by more than 1 %, a latency by more than 5 %): a limit is exceeded, or none is reached.
        And what :func:`dyncompress.arms.notes` finds.
        """
        measured = [outcome for outcome in self.limits if outcome.achieved is not None]
        timed = any(outcome.limit.quantity == "latency" for outcome in self.limits)
        missed = any(outcome.above for outcome in measured) or (bool(measured) and all(o.below for o in measured))
        return [
            *([f"the target was missed: {self._asked_and_achieved()}"] if missed else []),
            *notes(self.original, self.static, self.student, timed),
        ]

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per arm, as written to report.csv; None where nothing was measured."""
        rows = []
        for name, arm in self.arms.items():
            row: dict[str, Any] = {"arm": name, "method": arm.method, "target": self.target}
            row |= {f"{self.score_name}_mean": arm.score.mean, f"{self.score_name}_std": arm.score.std}
            row |= {"seeds": arm.score.n, "macs": arm.macs, "macs_ratio": arm.macs / self.original.macs}
            row |= {"params": arm.params, "params_ratio": arm.params / self.original.params}
            row |= {"bank_bytes": arm.bank_bytes}
            for size in self._batch_sizes():
                measured = asdict(arm.latency[size]) if size in arm.latency else {}
                for key in ("median_ms", "ratio", "iqr"):
                    row[f"latency_{key}_b{size}"] = measured.get(key)
            rows.append(row)
        return rows

    def table(self) -> Table:
        """The arms as a table that fits a terminal of 80 columns."""
        from rich.table import Table

        title = self._title()
        width = min(len(title), WIDTH)  # a narrow table would break its title
        table = Table(title=title, title_justify="left", title_style="bold", min_width=width, **TABLE_STYLE)
        table.add_column("network", overflow="fold", min_width=8)  # where space is short a name breaks, a number never
        for heading in (self.score_name + " %" * self._percent(), "seeds", "MACs", "params", "banks"):
            table.add_column(heading, justify="right", no_wrap=True)
        for size in self._batch_sizes():
            table.add_column(f"ms\nbatch {size}", justify="right", no_wrap=True)
        for name, arm in self.arms.items():
            table.add_row(
                arm.method if name == "student" else name,
                _score_text(arm.score, self._percent()),
                str(arm.score.n),
                f"{readable(arm.macs)} {arm.macs / self.original.macs:6.1%}",
                f"{readable(arm.params)} {arm.params / self.original.params:.2f}x",
                f"{readable(arm.bank_bytes)}B" if arm.bank_bytes else "-",
                *(_latency_text(arm.latency.get(size)) for size in self._batch_sizes()),
                style="bold" if name == "student" else "",
            )
        return table

    def figure(self) -> Figure:
        """Score against MACs and measured latency, every seed a dot; save it with ``.savefig(path)``."""
        return _draw([self])

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json, documented in docs/report.md."""
        return {
            "version": VERSION,
            "name": self.name,
            "method": self.method,
            "target": {
                "asked": self.target,
                "quantity": self.quantity,
                "asked_ratio": self.asked,
                "achieved": self.achieved,
            },
            "limits": [
                {"asked": o.limit.text, "quantity": o.limit.quantity, "asked_ratio": o.asked, "achieved": o.achieved}
                for o in self.limits
            ],
            "macs_ratio": self.macs_ratio,
            "params_ratio": self.params_ratio,
            "latency_ratio": {str(size): ratio for size, ratio in self.latency_ratio.items()},
            "score_name": self.score_name,
            "score": {name: arm.score.to_dict() for name, arm in self.arms.items()},
            "arms": {name: arm.to_dict() for name, arm in self.arms.items()},
            "epochs": self.epochs,
            "notes": self.notes(),
            "environment": asdict(self.environment),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that gave this content; ratios and notes are computed anew."""
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']!r}; dyncompress {__version__} reads version {VERSION}")
        arms = {name: Arm.from_dict(arm, data["score"][name]) for name, arm in data["arms"].items()}
        return cls(
            target=data["target"]["asked"],
            method=data["method"],
            original=arms["original"],
            student=arms["student"],
            static=arms.get("static"),
            name=data["name"],
            score_name=data["score_name"],
            epochs=data["epochs"],
            environment=Environment(**data["environment"]),
        )

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.csv (one row per arm) and tradeoff.png.

        Args:
            folder: Made when missing; an earlier report there is replaced.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / "report.json").write_text(content + "\n", "utf-8")
        self.write_csv(folder / "report.csv")
        self.figure().savefig(folder / "tradeoff.png")
        return folder

    def write_csv(self, path: str | Path) -> None:
        """Write one row per arm."""
        rows = self.rows()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report that :meth:`save` wrote.

        Args:
            path: The folder, or its report.json.

        Raises:
            DynCompressError: If there is none or it cannot be read.
        """
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        try:
            return cls.from_dict(json.loads(path.read_text("utf-8")))
        except OSError as error:
            problem = error.strerror or str(error)
        except (ValueError, KeyError, TypeError, AttributeError, DynCompressError) as error:
            problem = f"not a report ({type(error).__name__}: {error})"
        raise DynCompressError(
            f"{path}: {problem} - a folder that Report.save wrote, or its report.json - check the path"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()
        yield from (f"! {note}" for note in self.notes())
        yield str(self.environment)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None, highlight=False, markup=False).print(self)
        return text.getvalue()

    def _title(self) -> str:
        return f"{self.name or 'network'} with {self.method}: {self._asked_and_achieved()}"

    def _asked_and_achieved(self) -> str:
        return "; ".join(map(str, self.limits))

    def _percent(self) -> bool:
        return are_shares(value for arm in self.arms.values() for value in arm.score.values)

    def _batch_sizes(self) -> list[int]:
        return sorted({size for arm in self.arms.values() for size in arm.latency})


def collect(folder: str | Path) -> list[Report]:
    """Every report below a folder, oldest first; an unreadable one is skipped, and a warning names it."""
    found = []
    for path in sorted(Path(folder).rglob("report.json")):
        try:
            found.append(Report.load(path))
        except DynCompressError as error:
            log.warning("skipped %s", error)
    return sorted(found, key=lambda report: report.environment.date)


def tradeoff_table(reports: Sequence[Report]) -> Table:
    """One line per report: what was asked and achieved, what it scores beside its control, how fast it is."""
    from rich.table import Table

    table = Table(**TABLE_STYLE)
    for heading in ("network", "method"):
        table.add_column(heading, overflow="fold")
    table.add_column("asked", no_wrap=True)
    for heading in ("MACs", "params", "time\nb1", "time\nb32", *ARMS):
        table.add_column(heading, justify="right", no_wrap=True)
    for report in sorted(reports, key=lambda report: (report.name, report.macs_ratio, report.method)):
        scores = (arm.score if (arm := report.arms.get(name)) else Score() for name in ARMS)
        table.add_row(
            report.name,
            report.method,
            report.target,
            f"{report.macs_ratio:.1%}",
            f"{report.params_ratio:.2f}x",
            *(f"{ratio:.2f}x" if (ratio := report.latency_ratio.get(size)) else "-" for size in (1, 32)),
            *(_score_text(score, report._percent()) for score in scores),
        )
    return table


def tradeoff_plot(reports: Sequence[Report], path: str | Path) -> Path:
    """Draw the trade-off of all reports, one row per network, and save it as a picture."""
    if not reports:
        raise DynCompressError("no report to draw - at least one - run `dyncompress run` first, or name another folder")
    _draw(reports).savefig(path)
    return Path(path)


def _draw(reports: Sequence[Report]) -> Figure:
    panels = []
    for name, score_name in dict.fromkeys((report.name, report.score_name) for report in reports):
        mine = [report for report in reports if (report.name, report.score_name) == (name, score_name)]
        points = [point for report in mine for point in _points(report)]
        original = mine[-1].original.score.values
        percent = all(report._percent() for report in mine)
        title = mine[0]._title() if len(mine) == 1 else name or "network"
        panels.append(Panel(title, score_name, percent, original, points))
    sizes = sorted({size for report in reports for size in report.latency_ratio})
    kinds = ["MACs", *(f"batch-{size} latency" for size in sizes)]
    return draw(panels, kinds, footer=f"{KEY}\n{reports[-1].environment}")


def _points(report: Report) -> list[Point]:
    points = []
    for name, arm in report.arms.items():
        if name != "original":
            costs = {f"batch-{size} latency": latency.ratio for size, latency in arm.latency.items()}
            costs["MACs"] = arm.macs / report.original.macs
            points.append(Point(arm.method, costs, arm.score.values))
    return points


def _score_text(score: Score, percent: bool) -> str:
    if score.mean is None:
        return "-"
    scale, digits = (100, "{:.2f}") if percent else (1, "{:.4g}")
    spread = "" if score.std is None else " ±" + digits.format(scale * score.std)
    return digits.format(scale * score.mean) + spread


def _latency_text(latency: Latency | None) -> str:
    return f"{latency.median_ms:.3g} {latency.ratio:.2f}x" if latency else "-"
