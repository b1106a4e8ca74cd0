"""The comparison of methods: its rows, what counts as finished, its tables and its plot."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import dyncompress as dc
from benchmarks.methods import runs, times
from benchmarks.methods.__main__ import main
from benchmarks.methods.forms import FORMS
from benchmarks.methods.page import PAGE, RESULTS, filled, sections
from benchmarks.methods.plots import apart, draw
from benchmarks.methods.runs import Request, Run, finished
from benchmarks.methods.times import Time
from benchmarks.rowstore import RowStore
from benchmarks.speed.timing import Effort
from benchmarks.trainings import ROOT
from dyncompress.arms import Arm, Score
from dyncompress.layers import list_methods
from dyncompress.report import Report


@dataclass(frozen=True)
class Row:
    name: str
    count: int
    score: float
    spread: float | None = None


def test_rows_are_kept_and_replaced_by_their_key(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "deep/rows.csv", Row, ("name", "count"))
    store.put([])
    assert store.read() == [] and not store.path.exists()
    store.put([Row("a", 1, 0.5, 0.25), Row("b, c", 1, 0.123456)])
    store.put([Row("a", 1, 0.75), Row("a", 2, 1.0)])
    text = store.path.read_text("utf-8")
    assert text == 'name,count,score,spread\na,1,0.75,\n"b, c",1,0.1235,\na,2,1,\n'
    assert store.read() == [Row("a", 1, 0.75), Row("b, c", 1, 0.1235), Row("a", 2, 1.0)]


def test_forms_are_methods_with_their_options_and_folders_of_their_own() -> None:
    left = {"auto", "dyco3d"}  # one is whatever it chooses, the other has no 3x3 form
    assert {form.made().name for form in FORMS.values()} == set(list_methods()) - left
    assert FORMS["odconv 4x"].made().kernels == 4  # type: ignore[attr-defined]
    assert len({form.folder for form in FORMS.values()}) == len(FORMS)
    assert FORMS["kernelwarehouse 1/2"].folder == "kernelwarehouse-1-2"
    assert FORMS["odconv, no taps"].folder == "odconv-no-taps"
    assert next(iter(FORMS)) == "static"  # what times of layers are compared with


def report(method: str, scores: dict[int, float]) -> Report:
    student = Arm(method, macs=33, params=50, score=Score.of(scores), bank_bytes=80)
    return Report("33%", method, Arm("", 100, 40, Score.of(0.9)), student, name="net", epochs=4)


def request(tmp_path: Path, *seeds: int) -> Request:
    return Request(Path("data"), Path("weights.pt"), tmp_path, seeds=seeds)


def test_a_finished_folder_is_a_row_per_seed_and_is_not_trained_again(tmp_path: Path) -> None:
    report("odconv", {0: 0.8, 1: 0.9}).save(tmp_path / "odconv-4x")
    (tmp_path / "odconv-4x/commit.txt").write_text("abc\n", "utf-8")
    rows = list(finished(tmp_path))
    assert [(r.form, r.seed, r.accuracy, r.macs, r.original_macs) for r in rows] == [
        ("odconv 4x", 0, 0.8, 33, 100), ("odconv 4x", 1, 0.9, 33, 100),
    ]  # fmt: skip
    assert (rows[0].commit, rows[0].options, rows[0].bank_bytes) == ("abc", '{"kernels": 4}', 80)
    assert not request(tmp_path, 0).missing(FORMS["odconv 4x"])
    assert request(tmp_path, 0, 2).missing(FORMS["odconv 4x"])
    assert request(tmp_path, 0).missing(FORMS["odconv"])
    assert replace(request(tmp_path, 0), epochs=5).missing(FORMS["odconv 4x"])


def test_a_run_is_the_recipe_on_equal_terms(tmp_path: Path) -> None:
    words = request(tmp_path, 0, 1).command(FORMS["odconv 4x"])
    assert words[1:4] == ["-m", "benchmarks.remembered", str(tmp_path / "answers")]
    assert words[4:6] == ["run", str(ROOT / "recipes/cifar10_resnet20.yaml")]
    given = dict(zip(words[6::2], words[7::2], strict=True))
    assert (given["--method"], given["--options"], given["--seeds"]) == ("odconv", '{"kernels": 4}', "[0, 1]")
    assert (given["--control"], given["--threads"], given["--out"]) == ("false", "1", str(tmp_path / "odconv-4x"))


def test_what_is_missing_is_trained_and_a_failure_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = "import sys; print('said'); sys.exit(3)"
    monkeypatch.setattr(Request, "command", lambda self, form: [sys.executable, "-c", script])
    report("static", {0: 0.8}).save(tmp_path / "out/static")
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} --><!-- /{name} -->" for name in ("choice", "layers", "networks")), "utf-8")
    line = f"--data d --weights w --out {tmp_path}/out --results {tmp_path} --page {page} --only static dcd"
    assert main(line.split()) == 1
    said = capsys.readouterr().out
    assert "dcd: exit status 3" in said and "static:" not in said
    assert (tmp_path / "out/dcd.log").read_text("utf-8") == "said\n"
    assert "| static | 80.00 | 1 | 33.0% | 1.25x |" in page.read_text("utf-8")


def test_students_are_timed_in_turns_with_their_original(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 784, 2))

    assert times.students(tmp_path, network, "net", Effort(5, 0.1)) == []
    example = torch.randn(1, 3, 32, 32)
    for title in ("static", "dynet"):
        folder = tmp_path / FORMS[title].folder
        folder.mkdir()
        plan = dc.make_plan(network(), example, "40%", title)
        dc.save(dc.convert(network(), plan), folder / "student.safetensors")
    rows = times.students(tmp_path, network, "net", Effort(5, 0.1))
    assert [(r.form, r.batch) for r in rows] == [(f, b) for b in (1, 32) for f in ("original", "static", "dynet")]
    assert rows[0].ratio == rows[0].macs == 1 and rows[0].n == 5
    assert all(row.macs == pytest.approx(0.4, rel=0.02) for row in rows if row.form != "original")


# ---- page and plot -----------------------------------------------------------------------------------------------


def run(form: str, seed: int, accuracy: float, params: int = 50) -> Run:
    there = ("2026-01-02T00:00:00Z", "abc", "abacus", 1, "torch 9.9", "run")
    return Run("33%", 4, seed, accuracy, 33, params, 0, 0.9, 100, 40, *there, form=form, options="{}")


def timed(form: str, ratio: float) -> Time:
    return Time("net", form, 1, 10 * ratio, ratio, 0.1, 20, 0.33, 1.25)


ROWS = [run("static", 0, 0.80), run("static", 1, 0.82), run("dynet", 0, 0.85, 90)]
TIMED = [timed("original", 1.0), timed("static", 0.5), timed("dynet", 0.7)]


def test_the_table_averages_over_seeds(tmp_path: Path) -> None:
    runs.store(tmp_path / "cifar10_resnet20.csv").put(ROWS)
    times.store(tmp_path / "students.csv").put(TIMED)
    times.note(tmp_path / "students.csv", ["python"], Effort(5, 1.0))
    text = sections(tmp_path)["networks"]
    assert "| static | 81.00 ± 1.41 | 2 | 33.0% | 1.25x |  | 0.50 (0.10) | |" in text
    assert "| dynet | 85.00 | 1 | 33.0% | 2.25x |  | 0.70 (0.10) | |" in text
    assert "seeds 0, 1, 1 thread; abacus; torch 9.9; commit `abc`" in text


def test_labels_keep_apart_and_in_order() -> None:
    places = {"a": 0.98, "b": 0.99, "c": 0.97, "d": 0.0}
    found = apart(places, 0.1)
    assert found == {"d": 0.0, "c": pytest.approx(0.8), "a": pytest.approx(0.9), "b": pytest.approx(1.0)}


def test_the_plot_has_every_form_at_its_cost() -> None:
    left, right = draw(ROWS, TIMED).axes
    dots = [[list(line.get_xydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1] for axes in (left, right)]  # type: ignore[index]
    assert [0.5, pytest.approx(81)] in dots[0] and [0.7, pytest.approx(85)] in dots[0]
    assert [1.25, pytest.approx(81)] in dots[1] and [2.25, pytest.approx(85)] in dots[1]
    assert {text.get_text() for text in left.texts} == {"static 81.00", "dynet 85.00"}


def test_the_page_is_what_the_results_say() -> None:
    text = PAGE.read_text("utf-8")
    assert filled(text, sections(RESULTS)) == text, "python -m benchmarks.methods  writes it again"
    for path in RESULTS.glob("*.json"):
        assert json.loads(path.read_text("utf-8"))["threads"] == 1
