"""Compilers: a network that `torch.compile` wraps is converted, taught and trained as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from dyncompress import DynCompress
from dyncompress.graph import bare
from dyncompress.layers import DynamicConv
from tests.trust.witness import Run, check, contrasting, taught

EXAMPLE = torch.zeros(1, 3, 8, 8)


@cache
def eager() -> Run:
    run = taught(contrasting())
    check(run, steps=4)
    return run


def compiled(module: Any, how: str, backend: Any) -> None:
    if how == "wrapped":
        module.net = torch.compile(module.net, backend=backend)
    else:
        module.net.compile(backend=backend)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What a compiler keeps would be counted by tests that look for leaks."""
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.timeout(900)  # inductor calls a C++ compiler for every graph
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's own, in torch 2.13
@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, when: str, how: str, record_property: Callable[..., None]) -> None:
    """A network that is compiled before or after its conversion is taught as the same one without a compiler."""
    torch._dynamo.reset()
    frames: list[Any] = []
    real = torch._dynamo.lookup_backend(backend)

    def counting(graph: Any, inputs: Any) -> Any:
        frames.append(graph)
        return real(graph, inputs)

    module, callback = contrasting(), DynCompress("50%")
    if when == "after":
        callback.attach(module, EXAMPLE)
    compiled(module, how, counting)
    run = taught(module, callback=callback)
    check(run, steps=4)
    assert sum(isinstance(m, DynamicConv) for m in bare(module.net).modules()) == 2
    assert 1 <= len(frames) <= 3  # training, perhaps validation; not every step, and not to look or to recalibrate
    first = abs(run.terms[0] - eager().terms[0]) / eager().terms[0]
    worst = max(abs(a - b) / b for a, b in zip(run.terms, eager().terms, strict=True))
    assert first < 1e-5
    assert worst < 1e-3
    record_property("figure", f"{backend}, {when}, {how}: first term {first:.1e}, four steps on {worst:.1e} from eager")
