"""From a trained network to a file that ships: what a method owes a whole network, as functions of one step each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyncompress.bundle import load, save
from dyncompress.conversion import convert, narrowed
from dyncompress.exporting import export
from dyncompress.folding import fold
from dyncompress.formats import reopen
from dyncompress.layers import DynamicConv
from dyncompress.plan import Plan
from dyncompress.planning import make_plan
from dyncompress.schedules import anneal


def planned(net: nn.Module, x: Tensor, share: float, method: str, **options: Any) -> Plan:
    """A plan that lands within 1 % below a share of the MACs."""
    plan = make_plan(net, x, share, method, options=options)
    assert 0.99 * share <= plan.macs_after / plan.macs_before <= share
    return plan


def started(net: nn.Module, x: Tensor, plan: Plan) -> nn.Module:
    """The student, which starts as its narrowed network and has dynamic layers."""
    student = convert(net, plan).eval()
    assert any(isinstance(m, DynamicConv) for m in student.modules())
    with torch.no_grad():
        expected = narrowed(net, plan).eval()(x)
        assert (student(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    return student


def train(student: nn.Module, x: Tensor, steps: int = 2) -> None:
    """Steps after which kernels depend on the image: every parameter of a router has moved."""
    routers = {name: p.detach().clone() for name, p in student.named_parameters() if "router" in name}
    optimizer = torch.optim.SGD(student.train().parameters(), lr=0.1)
    anneal(student, 1.0)  # as at the end of a schedule, during which some routers wait
    for _ in range(steps):
        optimizer.zero_grad()
        student(x).square().mean().backward()
        optimizer.step()
    student.eval()
    after = dict(student.named_parameters())
    assert routers and not [name for name, before in routers.items() if torch.equal(after[name], before)]


def ships(student: nn.Module, original: nn.Module, x: Tensor, folder: Path, suffixes: Sequence[str]) -> None:
    """Saved, folded and exported it returns the same, and files take any batch."""
    with torch.no_grad():
        expected = student(x)
        assert torch.equal(load(save(student, folder / "student.safetensors"), original).eval()(x), expected)
        assert (fold(student)(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        for suffix in suffixes:
            found = reopen(export(student, folder / f"student{suffix}", x))
            for batch in (1, 3, 5):
                images = torch.randn(batch, *x.shape[1:])
                expected = student(images)
                assert (found(images) - expected).abs().max() <= 1e-4 * expected.abs().max()
