"""Plans as files: from earlier versions, damaged, edited beyond sense, or made to do harm."""

from __future__ import annotations

import copy
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dyncompress.bundle import load
from dyncompress.conversion import convert, plan_of
from dyncompress.errors import CheckpointError, PlanError
from dyncompress.plan import Plan
from dyncompress.planfile import CHANNELS, LONGEST
from dyncompress.planning import make_plan

DATA = Path(__file__).parent / "data"
SECONDS, BYTES = 1.0, 50e6


def network_of_schema_1() -> nn.Module:
    """What the fixtures were made from, with the code of the first and of the last day of schema 1."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
              nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
              nn.Linear(12, 5)]  # fmt: skip
    return nn.Sequential(*layers).eval()


class Counting(nn.Module):
    """Its code counts channels in an attribute and in a list, so that its plan does too."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.sizes = 32, [16, 16]
        self.stem, self.body = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(torch.relu(self.stem(x)).view(len(x), self.width, 12, 12))
        a, b = x.split(self.sizes, dim=1)
        return self.head(a * b)


@pytest.fixture(scope="module")
def counting() -> dict[str, Any]:
    torch.manual_seed(0)
    plan = make_plan(Counting(), torch.randn(1, 3, 12, 12), "50%", "dynet", options={"placement": "all"})
    data: dict[str, Any] = json.loads(plan.to_json())
    assert ":width" in data["network"]["counts"] and ":sizes:0" in data["network"]["counts"]
    return data


class Small(nn.Module):
    """Two convolutions that can be cut, and one that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body, self.head = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(self.stem(x))))


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    torch.manual_seed(0)
    data: dict[str, Any] = json.loads(make_plan(Small(), torch.randn(1, 3, 16, 16), "50%").to_json())
    return data


# ---- versions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["first", "last"])
def test_plan_of_an_earlier_version(which: str, record_property: Any) -> None:
    """A plan that an earlier version wrote is read, and makes the network that it made then."""
    expected = json.loads((DATA / f"schema1-{which}.expected.json").read_text("utf-8"))
    plan = Plan.load(DATA / f"schema1-{which}.json")
    assert (plan.widths, plan.macs_after, plan.allocation) == (expected["widths"], expected["macs"], "uniform")
    student = convert(network_of_schema_1(), plan)
    saved = load_file(DATA / f"schema1-{which}.safetensors")
    now = {name: tuple(value.shape) for name, value in student.state_dict().items() if "_extra_state" not in name}
    assert now == {name: tuple(value.shape) for name, value in saved.items() if "_extra_state" not in name}
    assert Plan.from_json(plan.to_json()) == plan
    record_property("figure", f"{len(now)} of {len(saved) - 1} tensors of the same name and shape")


@pytest.mark.parametrize("which", ["first", "last"])
def test_weights_of_an_earlier_version(which: str, record_property: Any) -> None:
    """Weights that an earlier version saved load, and compute what they computed then."""
    expected = json.loads((DATA / f"schema1-{which}.expected.json").read_text("utf-8"))
    student = load(DATA / f"schema1-{which}.safetensors", network_of_schema_1()).eval()
    x = torch.sin(torch.arange(864.0)).reshape(2, 3, 12, 12)
    difference = (student(x) - torch.tensor(expected["output"])).abs().max().item()
    assert difference < 1e-6
    plan = plan_of(student)
    assert plan is not None and plan.widths == expected["widths"]
    again = convert(network_of_schema_1(), plan)
    again.load_state_dict(student.state_dict())  # today's text of the plan
    again.load_state_dict(load_file(DATA / f"schema1-{which}.safetensors"))  # the text of then
    record_property("figure", f"largest difference {difference:.0e}")


def test_weights_of_another_plan(small: dict[str, Any]) -> None:
    """Weights of another plan, of whichever version, are refused before they are loaded."""
    first, last = (load_file(DATA / f"schema1-{which}.safetensors") for which in ("first", "last"))
    student = convert(network_of_schema_1(), Plan.load(DATA / "schema1-first.json"))
    key = next(name for name in first if "_extra_state" in name)
    with pytest.raises(CheckpointError, match="another plan"):
        student.load_state_dict(first | {key: last[key]})
    with pytest.raises(CheckpointError, match="damaged"):
        student.load_state_dict(first | {key: last[key][:-9]})


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (3, "upgrade dyncompress"),
        (99, "upgrade dyncompress"),
        (0, "this version reads 2"),
        (-1, "make it again"),
        ("2", "make it again"),
        (2.0, "make it again"),
        (True, "make it again"),
        (None, "make it again"),
    ],
)
def test_version_that_is_not_known(small: dict[str, Any], schema: Any, said: str) -> None:
    """A plan of a later version says to upgrade; one of no version, to make it again."""
    with pytest.raises(PlanError, match=said):
        Plan.from_json(json.dumps(small | {"schema": schema}))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (("groups", 0), "'groups[0]' has an unknown field 'keeep'"),
        (("layers", 1), "'layers[1]' has an unknown field 'keeep'"),
        (("network", "operations", 0, "spec"), "'network.operations[0].spec' has an unknown field 'keeep'"),
        ((), "has an unknown field 'keeep'"),
    ],
)
def test_field_that_is_not_known(small: dict[str, Any], path: tuple[Any, ...], said: str) -> None:
    """A misspelt or unknown field is named, with the fields that there are."""
    data = copy.deepcopy(small)
    at(data, path)["keeep"] = 3
    with pytest.raises(PlanError) as error:
        Plan.from_json(json.dumps(data))
    assert said in str(error.value) and "its fields are" in str(error.value)


# ---- crafted files -----------------------------------------------------------------------------------------------


def at(data: Any, path: tuple[Any, ...]) -> Any:
    """The part of a document below a path."""
    for step in path:
        data = data[step]
    return data


def changed(data: Any, changes: dict[tuple[Any, ...], Any]) -> str:
    """The document with some parts replaced, as JSON."""
    data = copy.deepcopy(data)
    for path, value in changes.items():
        at(data, path[:-1])[path[-1]] = value
    return json.dumps(data)


OP = ("network", "operations", 0)
GROUP, KEPT = ("network", "groups", 0), ("groups", 0)
CRAFTED: dict[str, dict[tuple[Any, ...], Any]] = {
    "10**12 channels": {(*GROUP, 1): 10**12, (*KEPT, "channels"): 10**12},
    "10**12 channels, all named": {
        (*GROUP, 1): 10**12, (*KEPT, "channels"): 10**12, (*KEPT, "keep"): "0-999999999999"
    },
    "most channels, all named": {
        (*GROUP, 1): CHANNELS, (*KEPT, "channels"): CHANNELS, (*KEPT, "keep"): f"0-{CHANNELS - 1}"
    },
    "channels beyond the group": {(*KEPT, "keep"): "0-999999999999"},
    "one span 100,000 times": {(*KEPT, "keep"): ",".join(["0-15"] * 100_000)},
    "other digits": {(*KEPT, "keep"): "٠-٣"},
    "kernel of 10**9": {(*OP, "spec", "kernel_size"): [10**9, 10**9]},
    "groups of 10**9": {(*OP, "spec", "groups"): 10**9},
    "10**18 positions": {(*OP, "positions"): 10**18, (*OP, "runs"): [[10**18, 1]]},
    "10**18 images": {(*OP, "runs"): [[1, 10**18]]},
    "10**400 positions": {(*OP, "positions"): 10**400},
    "negative positions": {(*OP, "positions"): -1},
    "no runs": {(*OP, "runs"): []},
    "NaN": {(*OP, "fixed"): float("nan")},
    "infinite": {(*OP, "fixed"): float("inf")},
    "float for an integer": {(*OP, "fixed"): 1.0},
    "bool for an integer": {(*KEPT, "keep"): True},
    "text for an integer": {(*OP, "fixed"): "27"},
    "list for an object": {("network",): []},
    "object for a list": {("network", "operations"): {}},
    "deep nesting": {("options",): json.loads("[" * 900 + "]" * 900)},
    "a name of a MB": {(*GROUP, 0): "x" * 10**6, (*KEPT, "name"): "y" * 10**6},
    "half a character": {(*OP, "reason"): "\ud800"},
    "one name twice": {("network", "groups", 1, 0): "stem.0", ("network", "groups", 0, 0): "stem.0"},
    "group that is not there": {(*OP, "axes"): [[0, [[99, 1]]]]},
    "negative group": {(*OP, "axes"): [[0, [[-1, 1]]]]},
    "axis of another length": {("network", "axes", "stem.0.weight:0"): [[0, 0, 8, 1]]},
    "axis of 10**12": {("network", "axes", "stem.0.weight:0"): [[0, 0, 10**12, 1]]},
    "axis repeated 10**12 times": {("network", "axes", "stem.0.weight:0"): [[0, 0, 1, 10**12]]},
    "fixed channels of 10**12": {("network", "axes", "stem.0.weight:0"): [[-1, 0, 10**12, 1]]},
    "dimension 99": {("network", "axes", "stem.0.weight:99"): [[0, 0, 16, 1]]},
    "dimension that is none": {("network", "axes", "stem.0.weight:x"): [[0, 0, 16, 1]]},
    "parameter of another shape": {("network", "parameters", "stem.0.weight"): [10**12, 3, 3, 3]},
    "negative shape": {("network", "parameters", "stem.0.weight"): [-16, 3, 3, 3]},
    "seam of 10**12": {("network", "seams", "body"): [[[-1, 0, 10**12, 1]], [[-1, 0, 1, 1]]]},
    "seam at the root": {("network", "seams", ""): [[[-1, 0, 1, 1]], [[-1, 0, 1, 1]]]},
    "count of __class__": {("network", "counts", "stem:__class__"): [[0, 0, 16, 1]]},
    "count of nothing": {("network", "counts", "stem"): [[0, 0, 16, 1]]},
    "count at -1": {("network", "counts", "stem:sizes:-1"): [[0, 0, 16, 1]]},
    "other layers": {("layers", 0, "name"): "../../etc/passwd"},
    "10**9 kernels": {("layers", 1, "options"): {"g": 10**9}},
    "an option called name": {("options",): {"name": "static"}},
    "a method that is a list": {("method",): ["dynet"]},
    "no target": {("target",): "1e400%"},
    "a target of a MB": {("target",): "1" * 10**6 + "x"},
    "another fingerprint": {("network", "fingerprint"): "0" * 16},
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_plan(small: dict[str, Any], name: str, record_property: Any) -> None:
    """A plan made to exhaust or to deceive is refused within a second and 50 MB, with what to do."""
    text = changed(small, CRAFTED[name])
    seconds, peak, error = refused(text)
    assert any(
        word in error for word in ("make it again", "give", "choose", "keep 1", "it has 0", "write", "use one of")
    )
    assert len(error) < 2000
    record_property("figure", f"{name}: {1000 * seconds:.0f} ms, {peak / 1e6:.1f} MB")


TEXTS = {
    "100,000 brackets": "[" * 100_000,
    "100,000 objects": '{"a":' * 100_000,
    "100 MB of text": '{"schema": 2, "target": "' + "x" * 10**8 + '"}',
    "integer of 10,000 digits": '{"schema": ' + "9" * 10_000 + "}",
    "a field twice": '{"schema": 2, "schema": 2}',
    "nothing": "",
    "null": "null",
    "NUL": "\0",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_no_plan(name: str, record_property: Any) -> None:
    """Text that is no plan is refused within a second and 50 MB."""
    seconds, peak, error = refused(TEXTS[name])
    assert "dyncompress plan" in error and len(error) < 2000
    record_property("figure", f"{name}: {1000 * seconds:.0f} ms, {peak / 1e6:.1f} MB")


def refused(text: str) -> tuple[float, int, str]:
    """Seconds, bytes at the peak, and the error that reading a text takes and gives."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(PlanError) as error:
            Plan.from_json(text)
        seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < SECONDS and peak < BYTES, (seconds, peak)
    return seconds, peak, str(error.value)


def test_file_that_is_no_plan(tmp_path: Path, record_property: Any) -> None:
    """A file that is too large, no text, or a folder is refused unread."""
    large, binary = tmp_path / "large.json", tmp_path / "binary.json"
    with large.open("wb") as file:
        file.truncate(LONGEST + 1)
    binary.write_bytes(b"\xff\xfe\x00" * 100)
    for path, said in ((large, "at most"), (binary, "no text"), (tmp_path, "no plan at")):
        with pytest.raises(PlanError, match=said):
            Plan.load(path)
    record_property("figure", f"at most {LONGEST / 1e6:.0f} MB")


HOSTILE: dict[str, dict[tuple[Any, ...], Any]] = {
    "forward": {("network", "counts", "body:forward"): [[0, 0, 32, 1]]},
    "a method of torch": {("network", "counts", ":to"): [[0, 0, 32, 1]]},
    "training": {("network", "counts", "body:training"): [[0, 0, 1, 1]]},
    "the parameters": {("network", "counts", "body:_parameters"): [[0, 0, 32, 1]]},
    "an attribute that is not there": {("network", "counts", ":depth"): [[0, 0, 32, 1]]},
    "an attribute that counts something else": {("network", "counts", ":width"): [[0, 0, 16, 1]]},
    "an entry beyond its list": {("network", "counts", ":sizes:2"): [[0, 0, 16, 1]]},
    "an entry of a number": {("network", "counts", ":width:0"): [[0, 0, 32, 1]]},
    "a module that is not there": {("network", "counts", "../other:width"): [[0, 0, 32, 1]]},
    "__class__ as a module": {("network", "counts", "__class__:width"): [[0, 0, 32, 1]]},
    "a seam that is not there": {("network", "seams", "__dict__"): [[[-1, 0, 4, 1]], [[-1, 0, 4, 1]]]},
    "a tensor that is not there": {("network", "axes", "__dict__:0"): [[0, 0, 32, 1]]},
    "padding of 10**9": {(*OP, "spec", "padding"): [10**9, 10**9]},
    "another stride": {(*OP, "spec", "stride"): [2, 2]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_plan_that_would_change_something_else(counting: dict[str, Any], name: str, record_property: Any) -> None:
    """A plan can change no attribute of a network but a number of channels, and leaves the network untouched."""
    plan = Plan.from_json(changed(counting, HOSTILE[name]))  # nothing is wrong with it until it meets the network
    net = Counting()
    before = {path: dict(vars(module)) for path, module in net.named_modules()}
    with pytest.raises(PlanError, match="made for another network"):
        convert(net, plan)
    assert {path: dict(vars(module)) for path, module in net.named_modules()} == before
    record_property("figure", f"{name}: refused")


def test_honest_plan_of_counts(counting: dict[str, Any], record_property: Any) -> None:
    """Numbers of channels that the network's own code reads do follow the plan."""
    student = convert(Counting(), Plan.from_json(json.dumps(counting)))
    assert student.width == student.stem.out_channels < 32
    assert sum(student.sizes) == student.body.out_channels < 32
    assert student(torch.zeros(2, 3, 12, 12)).shape == (2, 8, 12, 12)
    record_property("figure", f"width 32 > {student.width}, sizes [16, 16] > {student.sizes}")


def test_text_of_a_plan_is_shown_as_it_is(small: dict[str, Any]) -> None:
    """A plan's own words are shown as they are, whatever markup they look like."""
    plan = Plan.from_json(changed(small, {("layers", 1, "reason"): "[/red] [bold]x"}))
    assert "[/red] [bold]x" in str(plan)
