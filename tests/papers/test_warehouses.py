"""KernelWarehouse's networks: cells of every warehouse as the authors' code makes them, parameters as published."""

from __future__ import annotations

from collections import defaultdict

import pytest

from dyncompress.layers import KernelWarehouse
from dyncompress.plan import Plan
from dyncompress.presets import list_presets
from papers.counting import params, plan

QUICK = "MobileNetV2 0.5"  # the others take a minute to trace
ROWS = [
    pytest.param(
        preset.name, row.network, row.params, id=f"{preset.name}, {row.network}",
        marks=() if row.network == QUICK else pytest.mark.slow,
    )
    for preset in list_presets()
    if preset.method == "kernelwarehouse"
    for row in preset.published
]  # fmt: skip
# The authors' code at these options has 4,031,768 parameters, of which their table says 4.08 M.
COUNTED = {"kernelwarehouse-resnet18-0.25x": 4.032}


def cells(made: Plan) -> dict[str, str]:
    """Numbers and shapes of cells by the name of the warehouse."""
    model, members = made.costs, defaultdict(list)
    for op in made.graph.convs:
        choice = model.choices[op.module]
        if isinstance(choice.method, KernelWarehouse):
            members[choice.share, choice.method].append(model.site(op, made.widths))
    found = {}
    for (share, method), sites in members.items():
        (store,) = method._stores(sites)
        found[share] = f"{store.cells}x{store.out}x{store.into}"
    return found


def test_every_row_of_the_authors_table_is_there() -> None:
    assert len(ROWS) == 15


@pytest.mark.parametrize(("preset", "network", "published"), ROWS)
def test_parameters_are_those_of_the_authors_table(preset: str, network: str, published: float) -> None:
    """All but one within 0.2 %; that one to 1.2 %."""
    assert params(plan(preset, network)) == pytest.approx(COUNTED.get(preset, published), rel=0.002)
    assert params(plan(preset, network)) == pytest.approx(published, rel=0.012 if preset in COUNTED else 0.01)


def test_warehouses_of_mobilenet() -> None:
    """Two stages have one width at half the channels; the first bottleneck of a stage is of the one before."""
    assert cells(plan("kernelwarehouse-mobilenetv2-1x", QUICK)) == {
        "stem": "9x16x3",
        "stage 0, depthwise": "36x16x1", "stage 0, pointwise": "20x8x8",
        "stage 1, depthwise": "18x96x1", "stage 1, pointwise": "24x16x16",
        "stage 2, depthwise": "27x96x1", "stage 2, pointwise": "42x16x16",
        "stage 3, depthwise": "36x192x1", "stage 3, pointwise": "102x16x32",
        "stage 4, depthwise": "27x288x1", "stage 4, pointwise": "120x16x48",
        "stage 5, depthwise": "27x480x1", "stage 5, pointwise": "74x80x80",
    }  # fmt: skip


def test_warehouses_of_mobilenet_with_half_the_parameters() -> None:
    found = cells(plan("kernelwarehouse-mobilenetv2-0.5x", QUICK))
    assert found["classifier"] == "20x1000x32"
    assert found["stage 5, before"] == "6x240x40" and found["stage 5, after"] == "56x40x80"
    assert len(found) == 1 + 6 + 2 + 1  # stem, depthwise, pointwise of the last stage, classifier


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "network", "expected"),
    [
        ("kernelwarehouse-resnet18-1x", "ResNet-18", ["56x64x64", "47x128x128", "47x256x256", "27x512x512"]),
        ("kernelwarehouse-resnet50-1x", "ResNet-50", ["87x64x64", "104x128x128", "138x256x256", "47x512x512"]),
        ("kernelwarehouse-resnet50-0.5x", "ResNet-50", ["174x32x32", "208x64x64", "276x128x128", "94x256x256"]),
    ],
)
def test_warehouses_of_resnets(preset: str, network: str, expected: list[str]) -> None:
    assert cells(plan(preset, network)) == {f"stage {stage}": each for stage, each in enumerate(expected)}


@pytest.mark.slow
def test_warehouses_of_convnext() -> None:
    """Downsampling convolutions and the stem have their own; linear layers share by stage."""
    found = list(cells(plan("kernelwarehouse-convnextt-1x", "ConvNeXt-T")).values())
    assert found == [
        "16x96x3", "147x96x1", "24x96x96", "4x192x96", "147x192x1", "24x192x192", "4x384x192", "441x384x1",
        "72x384x384", "4x768x384", "147x768x1", "24x768x768",
    ]  # fmt: skip
