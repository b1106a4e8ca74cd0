"""The page on warm starts has the numbers that were measured."""

from __future__ import annotations

import csv

from benchmarks.warmstart import MARK, PAGE, RESULTS, dynamics_jobs, dynamics_table, with_table


def test_the_page_is_its_results() -> None:
    page = PAGE.read_text("utf-8")
    with (RESULTS / "warmstart_dynamics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert page.count(MARK) == 2 and with_table(page, rows) == page


def test_a_row_of_the_table_needs_both_starts() -> None:
    rows = [
        {"target": "25%", "method": "dynet", "images": "256", "start": "ridge", "accuracy": "50.00", "seconds": "3.4"},
        {"target": "25%", "method": "dynet", "images": "256", "start": "fitted", "accuracy": "52.25", "seconds": "9"},
        {"target": "33%", "method": "dynet", "images": "256", "start": "ridge", "accuracy": "60.00", "seconds": "3"},
    ]
    assert dynamics_table(rows).splitlines()[2:] == ["| 25 % | dynet | 256 | 50.0 | 52.2 | 3 s | 9 s |"]


def test_every_start_is_measured_beside_the_other() -> None:
    starts = [(job["images"], job["target"], job["method"], job["start"]) for job in dynamics_jobs()]
    assert len(set(starts)) == 2 * 2 * 2 * 2
