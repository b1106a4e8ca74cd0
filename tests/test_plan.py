from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import networks
from dyncompress.conversion import convert
from dyncompress.cost import measure_macs
from dyncompress.errors import PlanError
from dyncompress.plan import Plan
from dyncompress.planning import make_plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(*networks.make(networks.Residual), "50%")


def test_json_and_back_is_the_same_plan(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.to_json() == plan.to_json()


def test_plans_are_deterministic(plan):
    assert make_plan(*networks.make(networks.Residual), "50%").to_json() == plan.to_json()


def test_an_edited_width_is_what_gets_built(plan):
    data = json.loads(plan.to_json())
    data["groups"][0]["keep"] = 9
    data["groups"][1]["keep"] = "0-3,8"
    edited = Plan.from_json(json.dumps(data))
    assert edited.widths[:2] == [9, 5] and edited.keep[1] == (0, 1, 2, 3, 8)
    assert edited.allocation == "edited"
    net, x = networks.make(networks.Residual)
    student = convert(net, edited)
    assert student.stem[0].out_channels == 9
    assert measure_macs(student, x) == edited.macs_after  # the numbers follow the edit, not the file's summary


def test_an_edited_method_is_what_gets_built(plan):
    data = json.loads(plan.to_json())
    layer = next(entry for entry in data["layers"] if entry["name"] == "blocks.2.conv2")
    layer |= {"method": "static", "options": {}, "share": ""}
    student = convert(networks.make(networks.Residual)[0], Plan.from_json(json.dumps(data)))
    assert type(student.blocks[2].conv2).__name__ == "Conv2d"


def test_the_table_shows_every_layer_and_both_costs(plan):
    text = str(plan)
    for row in plan.layers:
        assert row.name in text
    assert f"{plan.ratio:.2%}" in text and "50%" in text
    assert sum(row.macs_after for row in plan.layers) == plan.macs_after
    assert sum(row.macs_before for row in plan.layers) == plan.macs_before


def test_asked_and_achieved_stand_beside_each_other():
    plan = make_plan(*networks.make(networks.Residual), "60%, 40% params", "static")
    (macs, params), text = plan.asked, " ".join(str(plan).split())
    assert [(limit.text, asked) for limit, asked, _ in plan.asked] == [("60%", 0.6), ("40% params", 0.4)]
    assert (macs[2], params[2]) == (plan.ratio, plan.params_ratio)
    assert f"asked 60.00% of the MACs, achieved {plan.ratio:.2%}; asked 40.00% of the parameters" in text
    summary = json.loads(plan.to_json())["summary"]["asked"]
    assert summary == {"60%": [0.6, round(plan.ratio, 6)], "40% params": [0.4, round(plan.params_ratio, 6)]}


def test_plans_from_before_importance_was_named_are_read(plan):
    data = json.loads(plan.to_json())
    del data["importance"]
    assert Plan.from_json(json.dumps(data)) == plan


def corrupt(plan, **changes):
    return json.dumps({**json.loads(plan.to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[1]", "no plan"),
        ("{}", "no plan"),
        ('{"schema": 99}', "schema 99, this version reads 2"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_what_is_no_plan(text, said):
    with pytest.raises(PlanError, match="dyncompress plan") as error:
        Plan.from_json(text)
    assert said in str(error.value)


@pytest.mark.parametrize("keep", [0, -1, 17, "3-99", "x", None, 1.5, True, "5-2"])
def test_widths_that_a_group_does_not_have(plan, keep):
    data = json.loads(plan.to_json())
    data["groups"][0]["keep"] = keep
    with pytest.raises(PlanError, match=r"keep|malformed"):
        Plan.from_json(json.dumps(data))


def test_other_malformed_plans(plan):
    with pytest.raises(PlanError, match="malformed"):
        Plan.from_json(corrupt(plan, groups=[]))
    with pytest.raises(PlanError, match="the network's are"):
        Plan.from_json(corrupt(plan, layers=[]))
    with pytest.raises(PlanError, match="target 'a bit' is unreadable"):
        Plan.from_json(corrupt(plan, target="a bit"))
    layers = json.loads(plan.to_json())["layers"]
    layers[1]["method"] = "dynett"
    with pytest.raises(PlanError, match="did you mean 'dynet'"):
        Plan.from_json(corrupt(plan, layers=layers))


def test_a_missing_file(tmp_path):
    with pytest.raises(PlanError, match=r"no plan at .*nowhere.json.*dyncompress plan"):
        Plan.load(tmp_path / "nowhere.json")


def test_the_table_names_what_the_example_never_ran():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.last, self.spare = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 4, 1), nn.Conv2d(64, 4, 1)

        def forward(self, x):
            return (self.last if x.shape[2] < 100 else self.spare)(self.used(x))

    plan = make_plan(Spare(), torch.zeros(1, 3, 16, 16), "50%", "static")
    assert plan.graph.unseen == ("spare",)
    assert "the example never ran spare: left as they are" in " ".join(str(plan).split())
