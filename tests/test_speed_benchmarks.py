"""The speed benchmark: its statistics, its verdicts, its page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.speed import plots, timing
from benchmarks.speed.distillation import REST
from benchmarks.speed.goals import GOALS, LOWER, Goal, geometric_mean, judge, verdicts
from benchmarks.speed.layers import RUNS, SHAPES
from benchmarks.speed.page import PAGE, RESULTS, publish, render
from benchmarks.speed.rows import Row, Section, from_csv, read, to_csv, write
from benchmarks.speed.section import SECTIONS
from benchmarks.speed.tables import TABLES
from benchmarks.speed.timing import Effort, Race
from dyncompress import latency

# ---- statistics --------------------------------------------------------------------------------------------------

# ratios B / A: 2, 3, 4, 5, 6; C / B: 1/2, 1, 1, 1, 2
TIMES = [[1.0, 2.0, 1.0], [1.0, 3.0, 3.0], [2.0, 8.0, 8.0], [1.0, 5.0, 5.0], [1.0, 6.0, 12.0]]


def row_of(rows: list[Row], arm: str, base: str) -> Row:
    (found,) = (row for row in rows if (row.arm, row.base) == (arm, base))
    return found


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    rows = Race(("A", "B", "C"), TIMES).rows(["B"], macs={"B": 0.5}, subject="net", setting="inference", batch=1)
    b = row_of(rows, "B", "A")
    assert (b.ms, b.ratio, b.iqr, b.n, b.macs) == (5000.0, 4.0, 5.0 - 3.0, 5, 0.5)
    c = row_of(rows, "C", "B")  # of the medians it would be 5 / 5 as well; of A's and C's, 5
    assert (c.ratio, c.iqr) == (1.0, 0.0)
    assert row_of(rows, "A", "B").ratio == 1 / 4  # and the other way round
    assert row_of(rows, "A", "A").iqr == 0.0  # of 1, 1, 2, 1, 1 over their median
    assert len(rows) == 3 + 2  # all against A, A and C against B


def test_a_base_that_did_not_run_is_left_out() -> None:
    rows = Race(("A", "B", "C"), TIMES).rows(["static"], subject="net", setting="inference", batch=1)
    assert {row.base for row in rows} == {"A"}


def test_an_arm_can_follow_from_others_round_by_round() -> None:
    race = Race(("A", "B", "C"), TIMES).with_arm("C - B", lambda seconds: seconds["C"] - seconds["B"])
    assert [row[3] for row in race.times] == [-1.0, 0.0, 0.0, 0.0, 6.0]


class Clock:
    """Stands in for the time module; calls move it forward."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = ""

    def perf_counter(self) -> float:
        return self.now

    def call(self, name: str, seconds: float) -> Any:
        def run() -> None:
            self.now += seconds
            self.calls += name

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(latency, "time", made)
    monkeypatch.setattr(timing, "time", made)
    yield made


def test_short_calls_are_repeated_all_equally_often(clock: Clock) -> None:
    # the faster takes 1 ms, so that a pass of 2 ms is two calls; one warm-up and one trial each, then rounds of A B B A
    race = Effort(rounds=5, seconds=0.0).race({"A": clock.call("A", 0.001), "B": clock.call("B", 0.0015)})
    assert clock.calls == "ABAB" + "AABBBBAA" * (1 + 5)
    (row,) = (row for row in race.rows(subject="", setting="", batch=1) if row.arm == "B")
    assert (row.ms, row.ratio) == (pytest.approx(1.5), pytest.approx(1.5))


def test_what_takes_long_is_timed_as_it_is(clock: Clock) -> None:
    effort = Effort(rounds=20, seconds=0.0)
    effort.race({"A": clock.call("A", 1.0)})
    assert clock.calls == "AA" + "AA" * (1 + 5)
    clock.calls = ""
    effort.time_once_each_way({"A": clock.call("A", 1.0), "B": clock.call("B", 2.0)})
    assert clock.calls == "ABBA" * (1 + 5)


# ---- verdicts ----------------------------------------------------------------------------------------------------


def networks(speedup: float, **more: Any) -> Row:
    row = Row("ResNet-18", "inference", 1, "original", "dynamic", ms=30.0, ratio=speedup, iqr=0.1, n=20)
    return replace(row, **more)


@pytest.mark.parametrize(("speedup", "met"), [(1.99, False), (2.0, True), (2.5, True)])
def test_a_lower_limit(speedup: float, met: bool) -> None:
    verdict = judge(GOALS[0], (networks(speedup), networks(9.0, batch=32), networks(9.0, mode="bf16")))
    assert verdict is not None and (verdict.goal.limit, verdict.value, verdict.met) == (2.0, speedup, met)
    assert (verdict.spread, verdict.n) == ("iqr 0.1", 20)


@pytest.mark.parametrize(("ratio", "met"), [(0.45, True), (0.46, False)])
def test_an_upper_limit(ratio: float, met: bool) -> None:
    goal = Goal("", 0.45, "networks", "dynamic", "original", batch=32)
    verdict = judge(goal, (networks(ratio, arm="dynamic", base="original", batch=32),))
    assert verdict is not None and verdict.met is met


def test_a_goal_on_all_shapes_is_their_geometric_mean() -> None:
    (goal,) = (g for g in GOALS if g.arm == "ODConv 4x" and g.batch == 64)
    rows = [
        Row(shape, "training step", batch, "ODConv 4x", "dynet", ratio=ratio, iqr=0.1, n=n)
        for shape, batch, ratio, n in (("a", 64, 1.0, 20), ("b", 64, 4.0, 7), ("c", 8, 100.0, 5))
    ]
    verdict = judge(goal, tuple(rows))
    assert verdict is not None and verdict.met  # 2 against 1.6
    assert (verdict.value, verdict.spread, verdict.n) == (pytest.approx(2.0), "1.00 to 4.00, 2 shapes", 7)
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1.0)


def test_seconds_and_errors_are_judged_by_the_worst() -> None:
    rows = (
        Row("ResNet-50", "planning", 1, "make_plan", "make_plan", ms=4500.0, n=5),
        Row("ResNet-18", "onnxruntime", 1, "dynamic", "torch", error=1e-6),
        Row("ResNet-50", "onnxruntime", 8, "dynamic", "torch", error=3e-5),
    )
    plan, error = (next(g for g in GOALS if g.text.startswith(start)) for start in ("ResNet-50: `make", "onnxr"))
    found = judge(plan, rows), judge(error, rows)
    assert [v is not None and (v.value, v.met) for v in found] == [(4.5, True), (3e-5, False)]


def test_a_goal_that_was_not_measured_has_no_verdict() -> None:
    assert judge(GOALS[0], ()) is None
    assert list(verdicts({})) == []


def test_goals_are_about_what_is_measured() -> None:
    from benchmarks.speed.subjects import NETWORKS

    assert len({goal.text for goal in GOALS}) == len(GOALS) == 24
    assert {goal.section for goal in GOALS} <= set(SECTIONS) == set(TABLES)
    assert {goal.subject for goal in GOALS} - {"", LOWER} == set(NETWORKS)
    assert len(SHAPES) == 9
    assert {goal.batch for goal in GOALS if goal.section == "layers"} == set(RUNS["training step"])
    assert {goal.arm for goal in GOALS if goal.section == "distillation"} == {REST}


# ---- files and page ----------------------------------------------------------------------------------------------

PROVENANCE = {
    "date": "2026-01-02T00:00:00Z", "command": "make bench", "hardware": "abacus", "threads": 1, "seed": 0,
    "allocator": "freed memory kept", "versions": {"torch": "9.9"}, "rounds": 20, "seconds": 10.0,
}  # fmt: skip


def race(base_times: tuple[float, ...], names: tuple[str, ...], bases: list[str], **labels: Any) -> tuple[Row, ...]:
    """Rows of five equal rounds."""
    macs = {"original": 1.0, "static": 0.32, "dynamic": 0.33}
    return tuple(Race(names, [list(base_times)] * 5).rows(bases, macs=macs, **labels))


def made() -> dict[str, Section]:
    three, both = ("original", "static", "dynamic"), ["static", "dynamic"]
    rows = {
        "networks": race((0.03, 0.012, 0.016), three, both, subject="ResNet-18", setting="inference", batch=1),
        "layers": race(
            (0.001, 0.002, 0.003, 0.004), ("static", "dynet", "CondConv", "ODConv 4x"), ["dynet"],
            subject="3x3", setting="training step", batch=8,
        ),
        "planning": race((4.0, 1.5), ("make_plan", "convert"), [], subject="ResNet-50", setting="planning", batch=1),
        "distillation": tuple(
            Race(("plain", "distilled", "teacher"), [[1.0, 1.8, 0.7]] * 5)
            .with_arm(REST, lambda seconds: seconds["distilled"] - seconds["teacher"])
            .rows(subject="ResNet-18", setting="training step", batch=32)
        ),
        "deployment": (
            *race((0.02, 0.008, 0.01), three, both, subject="ResNet-18", setting="onnxruntime", batch=1),
            Row("ResNet-18", "onnxruntime", 8, "dynamic", "torch", error=2e-6),
        ),
    }  # fmt: skip
    return {name: Section(name, found, PROVENANCE) for name, found in rows.items()}


def test_rows_survive_their_csv() -> None:
    rows = made()["deployment"].rows
    back = from_csv(to_csv(rows))
    assert to_csv(back) == to_csv(rows)
    assert back[-1] == rows[-1] and back[0].n == 5 and back[0].macs == 1.0


def test_sections_are_read_as_they_were_written(tmp_path: Any) -> None:
    for section in made().values():
        write(tmp_path, section)
    found = read(tmp_path)
    assert set(found) == set(made())
    assert found["planning"].provenance == PROVENANCE
    assert render(found) == render(read(tmp_path))


def test_goals_come_first_and_the_missed_are_named() -> None:
    page = render(made())
    # met: ODConv's 4 / 2, CondConv's 3 / 2, both of planning and of deployment; missed: 30 / 16, 16 / 12, 1.8 - 0.7
    assert "6 of the 9 goals that were measured are met" in page
    assert "- ResNet-18, batch 1: time, of its static widths: 1.333, and ≤ 1.25 was asked." in page
    assert "- ResNet-18: distilled step less the teacher, of the plain step: 1.1, and ≤ 1.05 was asked." in page
    assert "| ResNet-18, batch 1: student, times as fast | ≥ 2 | 1.875 | iqr 0 | 5 | **missed** |" in page
    assert "| ResNet-50: `convert`, seconds | ≤ 2 | 1.5 |  | 5 | met |" in page
    assert page.index("## Goals") < page.index("## Networks") < page.index("## Layers")
    assert "unmeasured" not in page and "## Training" not in page


def test_tables_and_where_they_come_from() -> None:
    page = render(made())
    assert "| ResNet-18 | fp32 | 1 | dynamic | 33.0% | 16 | 0.53 (0) | 1.33 (0) | 5 |" in page
    assert "| fp32 | training step | 8 | 1.50 (1.50 to 1.50) | 2.00 (2.00 to 2.00) |" in page
    assert "| 3x3 | fp32 | training step | 8 | 1 | 2.00 (0) | 3.00 (0) | 4.00 (0) | 5 |" in page
    assert "| ResNet-50 | 4.00 | 1.50 | 5 |" in page
    assert "| ResNet-18 | 1e+03 | 700 | 1.8e+03 | 1.10 (" in page
    assert "- ResNet-18, batch 8: 2.0e-06" in page
    assert "2026-01-02, abacus, 1 thread, allocator: freed memory kept; seed 0, up to 20 rounds or 10 s" in page


def test_another_device_has_a_section_of_its_own() -> None:
    section = Section("networks-cuda", made()["networks"].rows, PROVENANCE)
    page = render({"networks-cuda": section})
    assert "## Networks, CUDA" in page and "## Goals" not in page


def test_bars_are_as_high_as_the_ratios() -> None:
    figure = plots.draw(made()["networks"])
    assert figure is not None
    (axes,) = figure.axes
    heights = {c.get_label(): c.patches[0].get_height() for c in axes.containers if hasattr(c, "patches")}
    assert heights == {"static": pytest.approx(0.4), "dynamic": pytest.approx(16 / 30)}
    layers = plots.draw(made()["layers"])
    assert layers is not None
    dots = {line.get_label(): list(line.get_xdata()) for line in layers.axes[0].lines if len(line.get_xdata()) == 1}
    assert dots == {"dynet": [pytest.approx(2)], "CondConv": [pytest.approx(3)], "ODConv 4x": [pytest.approx(4)]}
    assert plots.draw(made()["planning"]) is None


def test_publishing_writes_the_page_and_a_picture_a_section(tmp_path: Any) -> None:
    for section in made().values():
        write(tmp_path, section)
    written = {path.name for path in publish(tmp_path, tmp_path / "speed.md")}
    assert written == {"networks.png", "layers.png", "deployment.png", "speed.md"}
    assert (tmp_path / "speed.md").read_text("utf-8") == render(read(tmp_path))


def test_the_page_is_what_the_results_say() -> None:
    sections = read(RESULTS)
    assert PAGE.exists() == bool(sections)
    if sections:
        assert PAGE.read_text("utf-8") == render(sections), "python -m benchmarks.speed --only  writes it again"
