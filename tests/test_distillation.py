"""The settings of a distillation, what they add up to, and who teaches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dyncompress.distillation import (
    KINDS,
    DistillConfig,
    Ensemble,
    Teacher,
    Votes,
    features_loss,
    fingerprint,
    output_loss,
)
from dyncompress.errors import DistillationError
from dyncompress.losses import (
    attention_loss,
    channel_loss,
    decoupled_loss,
    hint_loss,
    logit_loss,
    relation_loss,
    squared_loss,
)

A = torch.zeros(2, 3)

# ---- the output term ---------------------------------------------------------------------------------------------


def drawn(*shape: int) -> Any:
    return torch.randn(2, *shape, dtype=torch.float64).unbind(0)


def test_kinds_and_pairs_are_averaged() -> None:
    s, t = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [0.0]])
    assert output_loss(s, t, DistillConfig(kind="mse")).item() == pytest.approx(5)  # (1 + 9) / 2
    assert output_loss([s, s], [t, s], DistillConfig(kind="mse")).item() == pytest.approx(2.5)


def test_every_kind_is_its_own_loss_with_its_own_weights() -> None:
    s, t = drawn(2, 4, 5)
    labels = torch.tensor([[0, 1, 2, 3, 0], [1, 1, 2, 2, 3]])
    expected = {
        "logits": logit_loss(s, t, 2.0),
        "dist": relation_loss(s, t, 2.0, 1.0),
        "dkd": decoupled_loss(s, t, 2.0, 8.0, labels),
        "channels": channel_loss(s, t, 2.0),
        "mse": squared_loss(s, t),
    }
    assert set(expected) == set(KINDS)
    for kind, value in expected.items():
        config = DistillConfig(temperature=2.0, kind=kind)  # type: ignore[arg-type]
        assert output_loss(s, t, config, labels=labels).item() == value.item()
        assert output_loss(s, t, replace(config, temperature=9.0), 2.0, labels).item() == value.item()
    for kind, loss in (("dist", relation_loss), ("dkd", decoupled_loss)):
        config = DistillConfig(temperature=2.0, kind=kind, beta=0.25)  # type: ignore[arg-type]
        assert output_loss(s, t, config).item() == loss(s, t, 2.0, 0.25).item()


def test_named_outputs_add_up_by_weight() -> None:
    s, t = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [0.0]])  # 5, and twice as far 20
    config = DistillConfig(kind="mse", outputs={"output['out']": 1.0, "output['aux']": 0.5})
    assert output_loss({"out": s, "aux": 2 * s, "z": s}, {"out": t, "aux": t}, config).item() == pytest.approx(15)
    with pytest.raises(DistillationError, match=r"the student has no output output\['aux'\]"):
        output_loss({"out": s}, {"out": t}, config)


@pytest.mark.parametrize("kind", KINDS)
def test_several_teachers_are_averaged_after_the_softmax(kind: Any) -> None:
    s, t = drawn(2, 4, 5)
    other = torch.randn(2, 4, 5, dtype=torch.float64)
    config = DistillConfig(kind=kind, temperature=2.0)
    both = output_loss(s, Votes([t, other]), config).item()
    dim, shape = (2, s.shape) if kind == "channels" else (1, s.shape)
    mean = torch.stack([(x / 2).softmax(dim=dim) for x in (t, other)]).mean(dim=0).log() * 2
    if kind == "mse":
        mean = (t + other) / 2
    assert both == pytest.approx(output_loss(s, mean.view(shape), config).item())
    assert output_loss(s, Votes([t, t]), config).item() == pytest.approx(output_loss(s, t, config).item())
    # Teachers may answer in different containers.
    assert output_loss({"out": s}, Votes([t, {"out": other}]), config).item() == pytest.approx(both)


# ---- features ----------------------------------------------------------------------------------------------------


def test_features_add_up_by_weight() -> None:
    s, t = drawn(2, 4, 3, 3)
    config = DistillConfig(features={"a": 3.0, "b": 5.0}, hints={"c": 7.0, "b": 2.0})
    loss = features_loss({"a": s, "b": t, "c": s}, {"a": t, "b": t, "c": t}, config)  # b is equal in both
    assert loss.item() == pytest.approx(3 * attention_loss(s, t).item() + 7 * hint_loss(s, t).item())


def test_a_hint_sees_the_channels_that_are_kept() -> None:
    s, t = torch.randn(2, 2, 3), torch.randn(2, 4, 3)
    kept = {"a": [(1, torch.tensor([1, 3]))]}
    loss = features_loss({"a": s}, {"a": t}, DistillConfig(hints={"a": 2.0}), kept)
    assert loss.item() == pytest.approx(2 * hint_loss(s, t[:, [1, 3]]).item())


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({}, {"a": A}, "the student's 'a' returned nothing: it did not run"),
        ({"a": (A,)}, {"a": A}, "the student's 'a' returned tuple"),
        ({"a": torch.zeros(2, 4, 3, 3)}, {"a": torch.zeros(2, 4, 5, 5)}, r"\(2, 4, 3, 3\) .* \(2, 4, 5, 5\)"),
        ({"a": A}, {"a": A}, "takes .B, C, "),
    ],
)
def test_features_that_cannot_be_compared_are_refused(student: Any, teacher: Any, message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        features_loss(student, teacher, DistillConfig(features={"a": 1.0}))


# ---- the teacher -------------------------------------------------------------------------------------------------


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1)))


def test_the_teacher_is_frozen_and_answers_without_a_graph() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    teacher = Teacher(net.train())
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    answer, features = teacher.answer((x,), {}, ["0"])
    assert not answer.requires_grad
    assert features["0"].shape == (2, 4, 3, 3)
    assert torch.equal(answer, teacher.answer((x,), {})[0])  # no dropout, no statistics
    assert net[1].num_batches_tracked == 0
    teacher.follow(torch.device("cpu"), torch.float64)
    assert teacher.answer((x.double(),), {})[0].dtype == torch.float64


def test_several_teachers_are_one_network_in_all_but_their_answers() -> None:
    first, second = stack(), stack()
    teacher = Teacher(Ensemble([first, second]))
    x = torch.randn(1, 3, 5, 5)
    answer, features = teacher.answer((x,), {}, ["0"])
    assert isinstance(answer, Votes)
    assert torch.equal(answer[0], first(x)) and torch.equal(answer[1], second(x))
    assert torch.equal(features["0"], first[0](x))
    assert teacher.fingerprint not in (Teacher(first).fingerprint, Teacher(Ensemble([second, first])).fingerprint)
    teacher.follow(torch.device("cpu"), torch.float64)
    assert all(p.dtype == torch.float64 and not p.requires_grad for n in (first, second) for p in n.parameters())


def test_weights_of_another_teacher_are_refused() -> None:
    teacher = Teacher(stack())
    with pytest.raises(DistillationError, match="the weights are of another teacher than Sequential, or of several"):
        teacher.load(Ensemble([stack(), stack()]).state_dict(), "0")


def test_a_fingerprint_tells_weights_apart_and_nothing_else() -> None:
    first, second = stack(), stack()
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second.eval().requires_grad_(False))
    with torch.no_grad():
        second[0].bias[0] += 1e-6
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(nn.BatchNorm1d(2)) != fingerprint(nn.BatchNorm1d(3))
    assert fingerprint(first.bfloat16()) == fingerprint(first)  # every dtype has bytes


# ---- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": -1}, "alpha -1 is not a number from 0 on"),
        ({"alpha": math.nan}, "alpha nan"),
        ({"alpha": "1"}, "alpha '1'"),
        ({"alpha": True}, "alpha True"),
        ({"temperature": 0}, "temperature 0 is not a positive number"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"kind": "logit"}, "kind 'logit' is unknown; choose one of logits, dist, dkd, channels, mse"),
        ({"ramp": "step"}, "ramp 'step' is unknown; choose one of linear, cosine"),
        ({"alpha_end": -1}, "alpha_end -1 is not a number from 0 on"),
        ({"temperature_end": 0}, "temperature_end 0 is not a positive number"),
        ({"beta": math.inf, "kind": "dkd"}, "beta inf is not a number from 0 on"),
        ({"beta": 1.0}, "beta is for the kinds dist and dkd; leave it out with 'logits'"),
        ({"labels": 1}, "labels are for kind 'dkd'; leave them out with 'logits'"),
        ({"labels": 1.0, "kind": "dkd"}, "labels 1.0 is no place in a batch; give an index, such as 1"),
        ({"labels": True, "kind": "dkd"}, "labels True is no place in a batch"),
        ({"hints": {1: 1.0}}, "hints names 1; the names of modules are text, such as 'layer3'"),
        ({"outputs": ["out"]}, r"outputs .'out'. is no mapping; give names of outputs .* {'output\[0\]': 10.0}"),
        ({"features": ["layer1"]}, "features .'layer1'. is no mapping"),
        ({"features": {"layer1": 0}}, r"features\['layer1'\] is 0"),
    ],
)
def test_config_refuses_by_name_and_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        DistillConfig(**values)


def test_alpha_zero_is_a_control_and_allowed() -> None:
    assert DistillConfig(alpha=0).alpha == 0


def test_schedules_are_functions_of_progress_alone() -> None:
    assert DistillConfig().at(0.7) == (1.0, 4.0)
    assert not DistillConfig().changes
    linear = DistillConfig(alpha=2.0, alpha_end=0.0, temperature=1.0, temperature_end=5.0)
    assert linear.changes
    assert [linear.at(p) for p in (0.0, 0.25, 1.0)] == [(2.0, 1.0), (1.5, 2.0), (0.0, 5.0)]
    cosine = replace(linear, temperature_end=None, ramp="cosine")
    # (1 - cos(60 degrees)) / 2 = 1/4 of the way after a third of the time.
    assert cosine.at(1 / 3) == pytest.approx((1.5, 1.0))
    assert cosine.at(0.5) == pytest.approx((1.0, 1.0))
    assert cosine.at(1.0) == pytest.approx((0.0, 1.0))
