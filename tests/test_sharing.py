"""Which layers are built together: alone, by block, by stage."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import dyncompress
import networks
from cifar10 import ResNet
from digits import DigitsNet
from dyncompress.conversion import convert, narrowed
from dyncompress.cost import count_params, measure_macs
from dyncompress.graph import Operation
from dyncompress.layers import C2sp, ConvSpec, DyNet, KernelWarehouse, Method, Static
from dyncompress.layers.warehouse import WarehouseConv
from dyncompress.plan import Plan
from dyncompress.planning import make_plan
from dyncompress.sharing import share_of


def op(side: int, stride: int = 1, block: str = "layer1.0", runs: int = 1, ndim: int = 2) -> Operation:
    spec = ConvSpec(8, 8, (3,) * ndim, (stride,) * ndim, (1,) * ndim)
    positions = side**ndim
    return Operation("conv", "conv", "conv.weight", 1, (), positions, spec, block, runs=((positions, 1),) * runs)


def test_layers_share_what_their_method_says() -> None:
    methods: list[tuple[Method, str]] = [
        (Static(), ""),
        (C2sp(), ""),
        (DyNet(router="layer"), ""),
        (DyNet(), "layer1.0"),
        (KernelWarehouse(), "stage 64, 2d"),
    ]
    for method, share in methods:
        assert share_of(op(56), method) == share


def test_a_strided_layer_belongs_to_the_stage_that_it_reads() -> None:
    method = KernelWarehouse()
    sides = [(56, 1), (28, 2), (28, 1), (14, 2), (14, 1), (7, 2), (7, 1)]
    assert [share_of(op(*each), method) for each in sides] == [
        f"stage {side}, 2d" for side in (64, 64, 32, 32, 16, 16, 8)
    ]
    assert share_of(op(57, 2), method) == share_of(op(113), method)  # 57 is half of 113, rounded up


def test_layers_of_other_dimensions_or_of_several_runs_do_not_share() -> None:
    method = KernelWarehouse()
    assert share_of(op(8, ndim=1), method) == "stage 8, 1d" != share_of(op(8, ndim=3), method) == "stage 8, 3d"
    assert share_of(op(8, runs=2), method) == ""


def test_a_student_that_shares_by_stage_is_what_its_plan_says() -> None:
    net, x = networks.make(networks.Residual)
    plan = make_plan(net, x, "60%", "kernelwarehouse")
    assert any(share for share in {choice.share for choice in plan.choices})
    assert Plan.from_json(json.dumps(json.loads(plan.to_json()))) == plan
    student = convert(net, plan).eval()
    assert measure_macs(student, x) == plan.macs_after
    assert count_params(student) == plan.params_after
    with torch.no_grad():
        y = student(x)
        torch.testing.assert_close(y, narrowed(net, plan).eval()(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dyncompress.fold(student)(x), y, rtol=1e-4, atol=1e-5)


def test_a_student_with_even_kernels_folds_and_costs_what_its_plan_says() -> None:
    net, x = networks.make(networks.Residual)
    for g in (1, 2):
        plan = make_plan(net, x, "40%", "c2sp", options={"g": g})
        student = convert(net, plan).eval()
        assert measure_macs(student, x) == plan.macs_after
        assert count_params(student) == plan.params_after
        folded = dyncompress.fold(student)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.stem.modules())
        with torch.no_grad():
            torch.testing.assert_close(folded(x), student(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["50%", "33%", "25%"])
@pytest.mark.parametrize(
    ("make", "size"), [(lambda: ResNet(20), (3, 32, 32)), (DigitsNet, (1, 8, 8))], ids=["resnet20", "digits"]
)
def test_networks_that_share_by_stage_are_about_as_wide_as_static_ones(make: Any, size: Any, target: str) -> None:
    """The convolutions have 0.9 of the widths, so 0.81 of the MACs at least; cells are a third of a kernel or more."""
    net, x = make(), torch.zeros(1, *size)
    static, plan = (make_plan(net, x, target, method) for method in ("static", "kernelwarehouse"))
    convolving, reference = (sum(m.conv for m, _ in p.costs.layers(p.widths).values()) for p in (plan, static))
    assert convolving >= 0.9**2 * reference
    assert sum(plan.widths) >= 0.85 * sum(static.widths)
    assert plan.params_after < plan.params_before
    student = convert(net, plan).eval()
    assert measure_macs(student, x) == plan.macs_after
    assert count_params(student) == plan.params_after
    layers = [m for m in student.modules() if isinstance(m, WarehouseConv)]
    assert all(layer.grid.pieces <= 3 * layer.grid.space for layer in layers)
    assert len({layer.warehouse for layer in layers}) < len(layers)
