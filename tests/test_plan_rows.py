"""How a plan reads, as rows, table and JSON: every number by hand."""

from __future__ import annotations

import json
from dataclasses import astuple, replace

import pytest
import torch
from torch import nn

from dyncompress.errors import PlanError
from dyncompress.layers import get_method
from dyncompress.plan import Plan
from dyncompress.planning import make_plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Images of 8 x 8; the first convolution keeps 6 of 16 channels, the second 4 of 8, the transposed one 5 of 8."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.Conv2d(16, 8, 1),
        nn.ConvTranspose2d(8, 8, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    made = make_plan(net, torch.zeros(1, 3, 8, 8), "100%", "dynet", static=("1",))
    assert [group.name for group in made.graph.groups] == ["0", "1", "2"]
    return replace(made, keep=(6, (0, 1, 2, 5), 5), target="50%, 60% params")


BEFORE = 3 * 16 * 9 * 64 + 16 * 8 * 64 + 8 * 8 * 4 * 64 + 8 * 4
AFTER = 3 * 6 * 9 * 64 + 6 * 4 * 64 + 4 * 5 * 4 * 64 + 5 * 4
PARAMS_BEFORE = 3 * 16 * 9 + (16 * 8 + 8) + (8 * 8 * 4 + 8) + (8 * 4 + 4)
PARAMS_AFTER = 3 * 6 * 9 + (6 * 4 + 4) + (4 * 5 * 4 + 5) + (5 * 4 + 4)
ROWS = [
    ("0", "conv", "static", "static: the first convolution, which reads the input", 3, 3, 16, 6,
     3 * 16 * 9 * 64, 3 * 6 * 9 * 64, 3 * 16 * 9, 3 * 6 * 9),
    ("1", "conv", "static", "static: asked by '1'", 16, 6, 8, 4, 16 * 8 * 64, 6 * 4 * 64, 16 * 8 + 8, 6 * 4 + 4),
    ("2", "conv_transpose", "static", "static: ConvTranspose2d stays as it is", 8, 4, 8, 5,
     8 * 8 * 4 * 64, 4 * 5 * 4 * 64, 8 * 8 * 4, 4 * 5 * 4),
    ("5", "matmul", "static", "width kept: output of the network", 8, 5, 4, 4, 8 * 4, 5 * 4, 8 * 4, 5 * 4),
]  # fmt: skip


def test_rows_by_hand(plan: Plan) -> None:
    rows = [astuple(row) for row in plan.layers]
    assert [(*row[:3], *row[4:]) for row in rows] == [(*row[:3], *row[4:]) for row in ROWS]
    assert [row[3] for row in rows if row[1] != "conv_transpose"] == [
        row[3] for row in ROWS if row[1] != "conv_transpose"
    ]
    assert rows[2][3].startswith("static: ")


def test_sums_by_hand(plan: Plan) -> None:
    assert (plan.macs_before, plan.macs_after) == (BEFORE, AFTER)
    assert (plan.params_before, plan.params_after) == (PARAMS_BEFORE, PARAMS_AFTER)
    assert (plan.ratio, plan.params_ratio) == (AFTER / BEFORE, PARAMS_AFTER / PARAMS_BEFORE)


def test_the_table_line_by_line(plan: Plan) -> None:
    lines = [line.rstrip() for line in str(plan).splitlines()]
    assert max(map(len, lines)) <= 140
    text = " ".join(" ".join(lines).split())
    assert "dynet at 50%, 60% params: 17k of 52.3k MACs (32.62%), 299 of 868 parameters (34.45%)" in text
    assert (
        "asked 50.00% of the MACs, achieved 32.62%; asked 60.00% of the parameters, achieved 34.45%; widths: " in text
    )
    assert text.endswith("channels by magnitude; MACs of one image, kernel assembly and routers included")
    cells = [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in lines]
    shown = [row for row in cells if row]
    assert shown[0] == ["layer", "in", "out", "method", "MACs", "", "why"]
    assert shown[1][:6] == ["0", "3", "16 > 6", "static", "27.6k > 10.4k", "38%"]
    assert shown[2] == ["1", "16 > 6", "8 > 4", "static", "8.19k > 1.54k", "19%", "static: asked by '1'"]
    assert [row[:6] for row in shown if row[0] == "5"] == [["5", "8 > 5", "4", "static", "32 > 20", "62%"]]


def test_the_file_entry_by_entry(plan: Plan) -> None:
    data = json.loads(plan.to_json())
    assert data["summary"] == {
        "macs": [BEFORE, AFTER],
        "params": [PARAMS_BEFORE, PARAMS_AFTER],
        "ratio": 0.326164,
        "asked": {"50%": [0.5, 0.326164], "60% params": [0.6, 0.34447]},
    }
    assert data["groups"] == [
        {"name": "0", "channels": 16, "keep": 6},
        {"name": "1", "channels": 8, "keep": "0-2,5"},
        {"name": "2", "channels": 8, "keep": 5},
    ]
    assert [entry["name"] for entry in data["layers"]] == ["0", "1"]
    assert data["layers"][1] == {
        "name": "1", "method": "static", "options": {}, "share": "", "reason": "static: asked by '1'",
        "out": [8, 4], "macs": [16 * 8 * 64, 6 * 4 * 64],
    }  # fmt: skip
    assert (data["target"], data["method"], data["importance"]) == ("50%, 60% params", "dynet", "magnitude")
    assert data["options"] == {"g": 4, "router": "block", "reduction": None, "group_width": 1, "placement": "auto"}
    assert data["network"]["fingerprint"] == plan.fingerprint


def test_what_the_example_never_ran_is_named_up_to_five(plan: Plan) -> None:
    def caption(*unseen: str) -> str:
        return " ".join(str(replace(plan, graph=replace(plan.graph, unseen=unseen))).split())

    assert "never ran" not in caption()
    assert caption("a", "b").endswith("included; the example never ran a, b: left as they are")
    assert caption(*"abcde").endswith("never ran a, b, c, d, e: left as they are")
    assert caption(*"abcdef").endswith("never ran a, b, c, d, e and 1 more: left as they are")


def test_nothing_that_was_chosen_is_lost_on_the_way_through_a_file(plan: Plan) -> None:
    chosen = [replace(choice, method=get_method("dynet", g=2, router="layer")) for choice in plan.choices]
    told = replace(
        plan, choices=tuple(chosen), options={"g": 2}, method="dynet", target="1k", allocation="sensitivity",
        importance="taylor",
    )  # fmt: skip
    again = Plan.from_json(told.to_json())
    assert again == told
    assert (again.importance, again.allocation, again.choices[1].method.g) == ("taylor", "sensitivity", 2)  # type: ignore[attr-defined]


def test_layers_of_another_network_are_named(plan: Plan) -> None:
    data = json.loads(plan.to_json())
    data["layers"][0]["name"] = "zero"
    with pytest.raises(PlanError, match=r"its layers are \['zero', '1'\]; the network's are \['0', '1'\]"):
        Plan.from_json(json.dumps(data))
