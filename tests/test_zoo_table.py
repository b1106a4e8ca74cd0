"""docs/zoo.md: a pure function of the results."""

from __future__ import annotations

import pytest

from benchmarks.table import render

HERE = {"date": "2026-01-02T00:00:00Z", "hardware": "abacus", "versions": {"torch": "9.9"}, "limit": 60.0, "jobs": 1}


def found(status="ok", reached=0.5, cpu=1.0, **more):
    return {"status": status, "reached": reached, "cpu": cpu, **more}


ROWS = [
    {"name": "timm/resnet50", "macs": 4_100_000_000, "targets": {"50": found(cpu=2), "25": found(reached=0.249)},
     "zeroing": {"distance": 1e-7, "control": 0.5, "wrong": ""}},
    {"name": "timm/tight", "macs": 1000, "pinned": {"count": 1, "first": {"head": "output | of the network"}},
     "targets": {"50": found(), "25": found("missed", 0.3, range=[0.3, 1.01])},
     "zeroing": {"distance": 1e-7, "control": 1e-9, "wrong": "n/a: the check shows nothing"}},
    {"name": "hand/refused",
     "targets": {t: {"status": "refused", "reason": "TraceError: no convolution"} for t in ("50", "25")}},
    {"name": "hand/slow", "macs": 1000,
     "targets": {"50": found("wrong", reason="step 0: off"), "25": {"status": "hang", "reason": "over"}}},
    {"name": "smp/absent", "targets": {}, "error": "ImportError: none"},
]  # fmt: skip
PEER = [
    {"name": "timm/resnet50", "targets": {"50": found(reached=0.501)}},
    {"name": "timm/tight", "targets": {"50": {"status": "crash", "reason": "IndexError"}}},
]


@pytest.fixture
def results():
    by_name = {arm: {row["name"]: row for row in rows} for arm, rows in (("ours", ROWS), ("peer", PEER))}
    return {"provenance": {"ours": HERE, "peer": HERE}, **by_name}


def test_counts_by_source_and_in_all(results):
    page = render(results)
    assert "| timm | 2 | 2 (100%) | 2 (100%) | 1 (50%) | 1 (50%) |" in page
    assert "| hand-made, one per cause | 2 | 0 (0%) | 0 (0%) | 0 (0%) |  |" in page
    assert "| **all** | 5 | 2 (40%) | 2 (40%) | 1 (20%) | 1 (50%) |" in page
    assert "- At 50 %: 2 ok, 1 refused, 1 wrong, 1 not built." in page
    assert "holds on 1 of the 1 networks where it proves something; largest distance there 1e-07" in page


def test_seconds_and_where_they_were_measured(results):
    page = render(results)
    assert "median 1.0 s, 95th percentile 2.0 s, slowest 2.0 s; ResNet-50 2.0 s." in page
    assert "`make zoo`, 2026-01-02, abacus, one thread a network, 1 at a time, limit 60 s a network; torch 9.9." in page


def test_one_row_a_network_both_arms_side_by_side(results):
    page = render(results)
    assert "| timm/resnet50 | 4.1G | 50.0% | 24.9% | 2.0 | 50.1% |" in page
    assert "| timm/tight | 1k | 50.0% | missed, 30.0% | 1.0 | crash |" in page
    assert "| smp/absent |  | not built | not built |  |  |" in page


def test_every_network_that_does_not_land_says_why(results):
    page = render(results)
    assert (
        "- timm/tight, 25 %: 30.0% to 101.0% (reached 30.0%); 1 layers keep their width: head: output \\| of the"
        in page
    )
    assert "- hand/refused, 50 % and 25 %: TraceError: no convolution" in page
    assert "- hand/slow, 50 %: step 0: off" in page
    assert "- hand/slow, 25 %: over" in page
    assert "- smp/absent, 50 % and 25 %: ImportError: none" in page
    order = [
        page.index(f"## {title}") for title in ("Out of reach", "Refused", "Wrong", "Over the time limit", "Not built")
    ]
    assert order == sorted(order)
    assert "## Crashed" not in page


def test_without_the_peer_its_column_is_empty(results):
    page = render({**results, "peer": {}})
    assert "torch-pruning at 50 %:" not in page
    assert "| timm/resnet50 | 4.1G | 50.0% | 24.9% | 2.0 |  |" in page
    assert render(results) == render(results)
