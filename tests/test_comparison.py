"""`dyncompress methods`: what each method costs on one convolution, by hand."""

from __future__ import annotations

import json

import pytest
import torch

from dyncompress.cli import main
from dyncompress.comparison import Entry, compare, reference
from dyncompress.errors import DynCompressError
from dyncompress.layers import C2sp, CondConv, Dcd, DyNet, Macs, Static, list_methods


def entry(site_options: dict[str, int], method: object) -> Entry:
    (found,) = compare(reference(**site_options), [method])  # type: ignore[list-item]
    return found


def test_the_reference_by_hand() -> None:
    # P = 64 * 64 * 9 = 36,864 weights at 28 * 28 = 784 positions; CondConv mixes four of them by 64 * 4 products.
    found = entry({}, CondConv(4))
    assert found.macs == Macs(36_864 * 784, 4 * 36_864, 256)
    assert found.params == 4 * 36_864 + 65 * 4
    assert found.macs_ratio == pytest.approx(1 + (4 * 36_864 + 256) / (36_864 * 784))
    assert found.params_ratio == pytest.approx(4 + 260 / 36_864)
    assert (found.adapts, found.sharing, found.placed, found.refused) == ("a mix per layer", "layer", "", "")


def test_even_kernels_cost_four_ninths() -> None:
    found = entry({}, C2sp())
    assert found.macs_ratio == found.params_ratio == pytest.approx(4 / 9)
    assert "warm_start_is_the_static_network" in found.exceptions and found.adapts == "nothing"


def test_costs_are_those_with_a_bank_and_placement_is_told_beside_them() -> None:
    # 256 * 256 * 9 weights at 49 positions: mixing four kernels costs 4 / 49 of the convolution, too much to be placed.
    found = entry({"channels": 256, "size": 7}, CondConv(4))
    assert found.macs is not None and found.macs.kernels == 4 * 256 * 256 * 9
    assert found.placed.startswith("static: mixing 9.4 MB of kernels")


def test_a_method_that_cannot_be_there_says_why() -> None:
    found = entry({"kernel": 1}, C2sp())
    assert (found.macs, found.params, found.macs_ratio, found.latency) == (None, None, None, None)
    assert found.refused.startswith("static: ")


def test_measured_are_ratios_to_the_static_convolution() -> None:
    site = reference(channels=8, size=8)
    static, dynet, dcd = compare(site, [Static(), DyNet(), Dcd()], example=torch.randn(1, 8, 8, 8))
    assert static.latency is not None and static.latency.ratio == 1
    assert dynet.latency is not None and dynet.latency.ratio > 1 and dynet.latency.median_ms > 0
    assert dcd.latency is not None and dcd.latency.ratio > 1
    (even,) = compare(reference(8, kernel=1, size=8), [C2sp()], example=torch.randn(1, 8, 8, 8))
    assert even.latency is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size 0 is not positive"),
        ({"channels": 6, "groups": 4}, "in_channels 6 is no multiple of groups 4"),
        ({"dims": 4}, "has 4 dimensions; 1, 2 or 3"),
        ({"kernel": 0}, "positive integers"),
        ({"dims": 0}, "has 0 dimensions"),
    ],
)
def test_no_such_convolution(options: dict[str, int], message: str) -> None:
    with pytest.raises(DynCompressError, match=message):
        reference(**options)


def test_the_command_fits_100_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyncompress.cli.WIDTH", 100)
    assert main("methods --channels 16 --size 14 --kernel 1 --dims 1".split()) == 0
    out = capsys.readouterr().out
    assert "16 -> 16, 1, no bias, 14 positions" in out
    assert max(map(len, out.splitlines())) <= 100 and "…" not in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert set(list_methods()) <= set(rows)
    # 256 weights at 14 positions; four kernels of them are 4 / 14 of that, and 16 * 4 products 1 / 56.
    condconv = next(line for line in out.splitlines() if line.startswith("condconv  "))
    assert condconv.split()[-5:] == ["1.000", "0.286", "0.0179", "1.304", "4.27"]


def test_the_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("methods --json --groups 64".split()) == 0
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert set(found) == set(list_methods())
    assert found["odconv"]["options"]["kernels"] == 1 and found["odconv"]["options"]["spatial"] is True
    assert found["dyco3d"]["macs"] is None and found["static"]["macs"]["conv"] == 64 * 9 * 784


def test_what_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("methods --channels 10 --groups 3".split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("dyncompress: in_channels 10 is no multiple") and err.count("\n") == 1
