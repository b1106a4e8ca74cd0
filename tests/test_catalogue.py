"""`dyncompress presets`: every name, with what its paper says."""

from __future__ import annotations

import pytest

from dyncompress.cli import main
from dyncompress.presets import list_presets


def test_every_preset_is_listed_with_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    rows = [line.split("  ") for line in lines]
    assert {preset.name for preset in list_presets()} <= {row[0] for row in rows}
    (found,) = [[cell.strip() for cell in row if cell] for row in rows if row[0] == "odconv-resnet18-4x"]
    assert found == ["odconv-resnet18-4x", "ResNet of basic blocks", "ResNet-18", "44.9 M", "1,916 M", "2209.07947"]


def test_those_of_one_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("presets --method dynet".split()) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("dy")}
    assert names == {"dy-mobile", "dy-resnet18", "dy-resnet50", "dy-shuffle"}


@pytest.mark.parametrize(
    ("method", "message"),
    [("condconv", "method condconv has no preset; these have some: dcd, dyconv, dynet,"), ("odconf", "odconf")],
)
def test_a_method_without_any_is_one_line(capsys: pytest.CaptureFixture[str], method: str, message: str) -> None:
    assert main(["presets", "--method", method]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
