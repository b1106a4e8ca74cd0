"""The table of distillations: rows are written once, read back, and averaged over seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import distillation
from benchmarks.distillation import ARMS, Run, add, finished, main
from dyncompress.distillation import KINDS, DistillConfig


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(distillation, "ROWS", tmp_path / "results/rows.csv")
    return tmp_path / "results/rows.csv"


def test_rows_are_read_as_they_were_written(rows: Path) -> None:
    assert finished() == []
    runs = [Run("static", "33%", 100, 128, "dkd, beta 2", seed, 0.8 + seed / 100) for seed in (0, 1)]
    for run in runs:
        add(run)
    assert finished() == runs
    assert rows.read_text().splitlines()[1] == 'static,33%,100,128,"dkd, beta 2",0,0.8'


def test_the_table_has_mean_and_sample_deviation_best_first(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arm, seed, accuracy in (("logits", 0, 0.80), ("logits", 1, 0.82), ("dist", 0, 0.83)):
        add(Run("static", "33%", 100, 128, arm, seed, accuracy))
    main([])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "static, 33% of the MACs, 100 steps of 128 images; test accuracy in %"
    assert lines[1].split() == ["dist", "83.00", "n", "=", "1"]
    assert lines[2].split() == ["logits", "81.00", "±", "1.41", "n", "=", "2"]  # sqrt(2 * 1^2)


def test_every_kind_for_classes_has_an_arm() -> None:
    kinds = {config.kind for config in ARMS.values() if isinstance(config, DistillConfig)}
    assert kinds == set(KINDS) - {"channels", "mse"}
