"""Bad input: every value of every argument either works or is refused in words."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dyncompress import DynCompress
from dyncompress.budget import Budget
from dyncompress.conversion import convert
from dyncompress.cost import count_params, measure_macs
from dyncompress.distillation import KINDS, DistillConfig
from dyncompress.errors import DynCompressError
from dyncompress.layers import ConvSite, ConvSpec, DyNet, configured, load_static
from dyncompress.plan import Plan
from dyncompress.planning import make_plan, reachable
from dyncompress.recipe import Recipe, read_recipe

MINIMAL = {"model": {"class_path": "digits.Digits"}, "data": {"class_path": "digits.DigitsData"}, "target": "33%"}
CASES = {"fast": 1, "thorough": 10}
EFFORTS = [pytest.param(times, id=name, marks=[pytest.mark.slow] * (times > 1)) for name, times in CASES.items()]


class Small(nn.Module):
    """Two convolutions that can be cut, and one that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))))


EXAMPLE = torch.zeros(1, 3, 12, 12)

# ---- values ------------------------------------------------------------------------------------------------------

STRANGE = st.sampled_from(
    [None, True, False, b"33%", bytearray(b"1"), 1e308, -0.0, 5e-324, math.nan, math.inf, -math.inf,
     10**400, -(10**400), 2**63,
     np.float32(0.5), np.float64(0.5), np.int64(3), np.bool_(True), np.array([0.5, 0.5]), np.array(0.5),
     torch.tensor(0.5),
     torch.tensor([0.5, 1]),
     Fraction(1, 3), Decimal("0.33"), Decimal("NaN"), 1j, object, int, range(3), Ellipsis, "", " ", "\0", "x" * 10_000,
     "1" * 10_000, "1" * 10_000 + "x", "{}", "[1", "*", "[!a]", "٣"]
)  # fmt: skip
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
ANY = STRANGE | JSON | st.sampled_from([0, 1, 2, 0.5, 8, "stem", "*", "uniform", "dynet", "static", "mse"])
TARGETS = (
    st.from_regex(
        r"\A *[+-]?\d{0,4}\.?\d{0,4}(e[+-]?\d{1,4})? ?(%|[kmgbtKMGBT])? ?(params|latency|macs|flops|joules)?\Z"
    )
    | st.floats()
    | st.sampled_from(["1e400%", "١٢%", "0x10", "nan", "inf", "1_0%", "33%%", "33 %,", ",", "1e-400", "NaN%", "−3%"])
    | ANY
)
REMEDIES = ("give", "choose", "write", "use", "ask", "at most",
            "allowed", "see", "correct", "raise", "usual", "such as", "did you mean", "say",
            "make", "add", "check", "match", "weighs", "lands", "is a", "needs", "leave", "reads", "keep")  # fmt: skip


def tried(values: st.SearchStrategy[Any], attempt: Callable[[Any], object], cases: int) -> str:
    """How many of many values worked, and how many were refused; any other error fails the test."""
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(values)
    def each(value: Any) -> None:
        try:
            attempt(value)
        except DynCompressError as error:
            outcomes["refused"] += 1
            said = str(error)
            assert 20 < len(said) < 3000 and any(word in said for word in REMEDIES), said
        else:
            outcomes["worked"] += 1

    each()
    assert outcomes.total() >= 0.9 * cases and min(outcomes["worked"], outcomes["refused"]) > 0, outcomes
    return f"{outcomes.total()} cases: {outcomes['worked']} work, {outcomes['refused']} are refused"


# ---- configuration -----------------------------------------------------------------------------------------------


def check_target(target: Any) -> None:
    budget = Budget.parse(target)
    for limit in budget.limits:
        assert type(limit.value) is float and 0 < limit.value <= 1e18
        assert limit.quantity != "macs" or not limit.relative or limit.value <= 1
    again = Budget.parse(str(budget))
    assert [(x.quantity, x.relative) for x in again.limits] == [(x.quantity, x.relative) for x in budget.limits]
    for new, old in zip(again.limits, budget.limits, strict=True):
        assert new.value == pytest.approx(old.value)


@pytest.mark.parametrize("times", EFFORTS)
def test_targets(times: int, record_property: Any) -> None:
    """Any target is read as what it says, or refused."""
    several = st.lists(TARGETS, max_size=3) | st.tuples(TARGETS, TARGETS)
    record_property("figure", tried(TARGETS | several, check_target, 800 * times))


def some(**arguments: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the arguments, each as it should be or as anything."""
    return st.fixed_dictionaries({}, optional={name: values | ANY for name, values in arguments.items()})


@pytest.mark.parametrize("times", EFFORTS)
def test_distillation_settings(times: int, record_property: Any) -> None:
    """Any setting of the distillation gives a finite loss, or is refused."""

    def attempt(given: dict[str, Any]) -> None:
        config = DistillConfig(**given)
        ends = [value for share in (0.0, 0.5, 1.0) for value in config.at(share)]
        features = [*config.features.values(), *config.hints.values(), *config.outputs.values()]
        weights = [*ends, config.temperature**2, config.beta or 0.0, *features]
        assert torch.tensor(weights, dtype=torch.float32).isfinite().all() and config.temperature > 0

    values = some(
        alpha=st.floats(0, 10),
        temperature=st.floats(0.1, 10),
        features=st.dictionaries(st.just("stem"), st.floats(0.1, 10)),
        kind=st.sampled_from(KINDS),
        beta=st.none(),
        labels=st.none(),
        hints=st.dictionaries(st.just("stem"), st.floats(0.1, 10)),
        outputs=st.dictionaries(st.just("output[0]"), st.floats(0.1, 10)),
        alpha_end=st.floats(0, 10),
        temperature_end=st.floats(0.1, 10),
        ramp=st.sampled_from(["linear", "cosine"]),
    )
    record_property("figure", tried(values, attempt, 300 * times))


@pytest.mark.parametrize("times", EFFORTS)
def test_method_options(times: int, record_property: Any) -> None:
    """Any option of a method is one that a layer can be built with, or refused."""
    site = ConvSite("c", ConvSpec(4, 4, (3, 3)), positions=64)

    def attempt(given: tuple[Any, Any]) -> None:
        method = configured(*given)
        (layer,) = method.build([site])
        assert count_params(layer) == method.params([site])[0] > 0

    options = some(
        g=st.integers(-1, 9), router=st.just("layer"), reduction=st.integers(-1, 9), placement=st.just("all")
    )
    names = st.sampled_from(["dynet", "static", "dynett", ""])
    values = st.tuples(names | ANY, options | ANY) | st.tuples(st.just("dynet"), options)
    record_property("figure", tried(values, attempt, 300 * times))


@pytest.mark.parametrize("times", EFFORTS)
def test_callback_settings(times: int, record_property: Any) -> None:
    """Any setting of the callback is refused when it is made, not in the middle of a training."""

    def attempt(given: dict[str, Any]) -> None:
        callback = DynCompress(**{"target": "50%", **given})
        assert callback.recalibrate >= 0 and callback.seed >= 0

    values = some(
        target=TARGETS, method=st.just("static"), options=st.just({}), distill=st.booleans(), recalibrate=st.just(4),
        seed=st.integers(0, 9), allocation=st.sampled_from(["uniform", "importance", "sensitivity"]),
        importance=st.sampled_from(["magnitude", "bn", "taylor"]),
    )  # fmt: skip
    record_property("figure", tried(values, attempt, 300 * times))


@pytest.mark.parametrize("times", EFFORTS)
def test_arguments_of_a_plan(times: int, record_property: Any) -> None:
    """Any argument of a plan gives a plan within its target, or is refused."""
    net = Small()

    def attempt(given: dict[str, Any]) -> None:
        plan = make_plan(net, EXAMPLE, **{"target": "50%", **given})
        assert all(achieved <= asked + 1e-9 for _, asked, achieved in plan.asked)

    layers = st.lists(st.sampled_from(["stem", "body", "b*", nn.Conv2d, "Conv2d", "none", nn.Linear]), max_size=2)
    values = some(
        target=st.sampled_from(["60%", 0.5, "20%", "50k", "2%", "60%, 60% params"]), method=st.just("static"),
        options=st.just({}), allocation=st.sampled_from(["uniform", "importance", "sensitivity"]),
        importance=st.sampled_from(["magnitude", "bn", "taylor"]), ignore=layers, static=layers,
        floors=st.dictionaries(st.sampled_from(["stem", "body", "*"]) | ANY.filter(hashable), ANY, max_size=2),
        min_width=st.integers(-1, 40), tolerance=st.floats(0.001, 1.1), sensitivity=st.none(),
    )  # fmt: skip
    record_property("figure", tried(values, attempt, 120 * times))


def hashable(value: Any) -> bool:
    """Whether a value can be a key."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("times", EFFORTS[1:])  # reading one takes a tenth of a second
def test_recipes(times: int, tmp_path: Path, record_property: Any) -> None:
    """Any recipe is read, or refused with its file and key."""
    path = tmp_path / "recipe.yaml"

    def attempt(changes: dict[str, Any]) -> None:
        path.write_text(yaml.safe_dump({**MINIMAL, **changes}), "utf-8")
        assert isinstance(read_recipe([str(path)]), Recipe)

    keys = ["target", "method", "options", "allocation", "importance", "batches", "ignore", "static", "floors",
            "distill",
            "baseline", "epochs", "seeds", "score", "control", "trainer", "threads", "module", "wandb", "name", "model",
            "data", "epoch"]  # fmt: skip
    fair = st.sampled_from([1, 2, "33%", "dynet", {}, [], [1], "uniform", "magnitude", True, None])
    values = st.dictionaries(st.sampled_from(keys), fair | JSON, max_size=2)
    record_property("figure", tried(values, attempt, 60 * times))


# ---- plans -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """A valid plan's JSON."""
    torch.manual_seed(0)
    return json.loads(make_plan(Small(), EXAMPLE, "50%", "dynet", options={"placement": "all"}).to_json())  # type: ignore[no-any-return]


def paths(data: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document."""
    steps = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [above, *(path for step, value in steps for path in paths(value, (*above, step)))]


@pytest.mark.parametrize("times", EFFORTS)
def test_plans_changed_anywhere(times: int, document: dict[str, Any], record_property: Any) -> None:
    """A plan with any value changed, lost or doubled is refused, or makes exactly the network that it then tells of."""
    # Whether a layer runs once more, only a run of the network could tell.
    places = [path for path in paths(document) if path and path[-2:-1] != ("runs",)]
    net = Small()

    def attempt(change: tuple[tuple[Any, ...], str, Any]) -> None:
        path, act, value = change
        data = copy.deepcopy(document)
        parent = data
        for step in path[:-1]:
            parent = parent[step]
        if act == "replace":
            parent[path[-1]] = value
        elif act == "delete":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.append(parent[path[-1]])
        else:
            parent[f"{path[-1]}2"] = parent[path[-1]]
        plan = Plan.from_json(json.dumps(data))
        assert Plan.from_json(plan.to_json()) == plan and str(plan)
        student = convert(net, plan)
        assert measure_macs(student, EXAMPLE) == plan.macs_after
        assert count_params(student) == plan.params_after

    kept = [("groups", i, "keep") for i in range(len(document["groups"]))]
    numbers = JSON | st.integers(-2, 20) | st.sampled_from(["0-3", "0,2", "3-1", "0-99", 10**12, "dynet", "static"])
    values = st.tuples(
        st.sampled_from(places) | st.sampled_from(kept), st.sampled_from(["replace", "delete", "double"]), numbers
    )
    record_property("figure", tried(values, attempt, 400 * times))


# ---- layers ------------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: Any) -> dict[str, Any]:
    """Arguments of a convolution, now and then impossible ones."""
    ndim = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    few = st.integers(1, 2)
    per = lambda sizes: tuple(draw(st.lists(sizes, min_size=ndim, max_size=ndim)))  # noqa: E731
    arguments: dict[str, Any] = {
        "in_channels": groups * draw(few), "out_channels": groups * draw(few), "kernel_size": per(st.integers(1, 3)),
        "stride": per(few), "dilation": per(few), "groups": groups, "bias": draw(st.booleans()),
        "padding": draw(st.sampled_from(["same", "valid"])) if draw(st.booleans()) else per(st.integers(0, 2)),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }  # fmt: skip
    if draw(st.integers(0, 9)) == 0:
        arguments[draw(st.sampled_from(list(arguments)))] = draw(ANY | st.integers(-2, 5))
    return arguments


@pytest.mark.parametrize("times", EFFORTS)
# torch's remark on the memory that even kernels take with padding 'same'
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_layers_of_any_shape(times: int, record_property: Any) -> None:
    """A dynamic layer of any shape starts as the convolution that it replaces, or the shape is refused."""
    worst = 0.0

    def attempt(given: tuple[dict[str, Any], int, int]) -> None:
        nonlocal worst
        arguments, g, reduction = given
        spec = ConvSpec(**arguments)
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spec.ndim - 1]
        conv = kind(spec.in_channels, spec.out_channels, spec.kernel_size, spec.stride, spec.padding, spec.dilation,
                    spec.groups, spec.bias, spec.padding_mode)  # fmt: skip
        (layer,) = DyNet(g=g, reduction=reduction, placement="all").build([ConvSite("c", spec, positions=64)])
        load_static(layer, conv.weight, conv.bias)
        x = torch.randn(2, spec.in_channels, *[7] * spec.ndim)
        expected = conv(x)
        difference = (layer(x) - expected).abs().max().item()
        assert layer(x).shape == expected.shape and difference < 1e-4
        assert layer(x).shape[2:] == spec.output_size(x.shape[2:])
        worst = max(worst, difference)

    torch.manual_seed(0)
    cases = tried(st.tuples(convolutions(), st.integers(0, 6), st.integers(0, 4)), attempt, 400 * times)
    record_property("figure", f"{cases}; largest difference {worst:.0e}")


# ---- messages ----------------------------------------------------------------------------------------------------

MESSAGES: dict[str, tuple[Callable[[], object], tuple[str, str, str]]] = {
    "target, huge": (lambda: Budget.parse("1e400%"), ("'1e400%'", "at most 1e+18", "write a fraction")),
    "target, other digits": (lambda: Budget.parse("١٢%"), ("'١٢%'", "0.33 or '33%'", "write a fraction")),
    "target, hexadecimal": (lambda: Budget.parse("0x10"), ("'0x10'", "'1.2G'", "write")),
    "target, bytes": (lambda: Budget.parse(b"33%"), ("b'33%'", "'33%'", "write")),  # type: ignore[arg-type]
    "target, long": (lambda: Budget.parse("9" * 10**6 + "x"), ("'999", "'33%'", "write")),
    "target, huge integer": (lambda: Budget.parse(10**5000), ("16610 bits", "'1.2G'", "write")),
    "target, fraction": (lambda: Budget.parse(Fraction(1, 3)), ("Fraction(1, 3)", "0.33", "write")),  # type: ignore[arg-type]
    "target, above 1": (lambda: Budget.parse(1.5), ("1.5", "'1.2G'", "write")),
    "alpha": (lambda: DistillConfig(alpha=10**400), ("1329 bits", "from 0 on", "1 is usual")),
    "temperature": (lambda: DistillConfig(temperature=1e30), ("1e+30", "0.001 to 10000", "1 to 10 is usual")),
    "kind": (lambda: DistillConfig(kind=[]), ("[]", "logits, dist, dkd, channels, mse", "choose")),  # type: ignore[arg-type]
    "features": (lambda: DistillConfig(features={3: 1.0}), ("3", "names of modules are text", "such as 'layer3'")),  # type: ignore[dict-item]
    "method": (lambda: configured("dynett", {}), ("'dynett'", "known: auto, c2sp", "did you mean")),
    "method, no name": (lambda: configured(["dynet"], {}), ("['dynet']", "known: auto, c2sp", "did you mean")),  # type: ignore[arg-type]
    "option": (lambda: configured("dynet", {"G": 4}), ("'G'", "g, router, reduction, placement", "use one of those")),
    "option, no method": (lambda: DynCompress("50%", options={"g": 6}), ("{'g': 6}", "'auto'", "method='dynet'")),
    "options": (lambda: configured("dynet", [4]), ("[4]", "mapping of names", "give a dict")),  # type: ignore[arg-type]
    "g": (lambda: configured("dynet", {"g": True}), ("True", "2 to 1024", "give")),
    "kernel": (lambda: ConvSpec(1, 1, 3), ("3", "tuple of integers", "give one per")),  # type: ignore[arg-type]
    "channels": (lambda: ConvSpec(1.0, 1, (3,)), ("1.0", "no integer", "give at least 1")),  # type: ignore[arg-type]
    "tolerance": (lambda: make_plan(Small(), EXAMPLE, tolerance="1%"), ("'1%'", "between 0 and 1", "0.01 lands")),  # type: ignore[arg-type]
    "min_width": (lambda: make_plan(Small(), EXAMPLE, min_width=0), ("0", "positive integer", "give the channels")),
    "ignore": (lambda: make_plan(Small(), EXAMPLE, ignore=5), ("5", "names, globs or types", "give a list")),  # type: ignore[arg-type]
    "floors": (lambda: make_plan(Small(), EXAMPLE, floors={"stem": 1.5}), ("1.5", "up to 1.0", "give channels")),
    "quantity": (lambda: reachable(Small(), EXAMPLE, quantity="x"), ("'x'", "macs or params", "choose")),
    "distill": (lambda: DynCompress("50%", distill="yes"), ("'yes'", "True, False, or DistillConfig", "give")),  # type: ignore[arg-type]
    "seed": (lambda: DynCompress("50%", seed=-1), ("-1", "from 0 to 2**63 - 1", "as good as any")),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name: str, record_property: Any) -> None:
    """What is refused is told: the value, what is allowed, and what to do."""
    act, parts = MESSAGES[name]
    with pytest.raises(DynCompressError) as error:
        act()
    said = str(error.value)
    assert [part for part in parts if part not in said] == [], said
    assert len(said) < 400 and "\n" not in said
    record_property("figure", f"{name}: {said[:80]}...")
