"""A patch is invisible to whoever inspects or copies the patched object, and leaves no trace."""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from torch import nn

from dyncompress.patch import Patch


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def step(self, batch: str, index: int = 0) -> str:
        """What the user wrote."""
        self.calls.append(batch)
        return f"{batch}{index}"


def louder(host: Host) -> Patch:
    return Patch(host, "step", lambda *args, **kwargs: patch_result(host, *args, **kwargs))


def patch_result(host: Host, *args: Any, **kwargs: Any) -> str:
    return Host.step(host, *args, **kwargs).upper()


def test_the_replacement_runs_until_it_is_undone() -> None:
    host = Host()
    patch = louder(host)
    assert host.step("a", index=1) == "A1"
    assert patch.original("a") == "a0"
    patch.undo()
    patch.undo()  # twice does no harm
    assert host.step("a") == "a0"
    assert "step" not in vars(host)


def test_it_looks_like_what_it_replaces() -> None:
    host = Host()
    before = inspect.signature(host.step)
    patch = louder(host)
    assert inspect.signature(patch) == before
    assert patch.__wrapped__.__code__ is Host.step.__code__  # how Lightning asks whether a hook is overridden
    assert patch.__doc__ == "What the user wrote."


@pytest.mark.parametrize("copy", [deepcopy, lambda host: pickle.loads(pickle.dumps(host))], ids=["deepcopy", "pickle"])
def test_a_copy_has_the_method_and_not_the_patch(copy: Callable[[Host], Host]) -> None:
    host = Host()
    louder(host)
    twin = copy(host)
    assert twin.step("a") == "a0"
    assert twin.calls == ["a"]
    assert host.calls == []
    assert host.step("a") == "A0"


def test_lifted_it_is_away_for_a_while_and_comes_back_after_an_error() -> None:
    host = Host()
    patch = louder(host)
    with pytest.raises(ZeroDivisionError), patch.lifted() as original:
        assert host.step("a") == original("a") == "a0"
        raise ZeroDivisionError
    assert host.step("a") == "A0"


def test_somebody_elses_patch_is_put_back() -> None:
    host = Host()
    host.step = lambda batch, index=0: "theirs"  # type: ignore[method-assign]
    patch = louder(host)
    with patch.lifted():
        assert host.step("a") == "theirs"
    assert host.step("a") == "A0"
    patch.undo()
    assert host.step("a") == "theirs"


def test_under_somebody_elses_patch_it_falls_silent() -> None:
    host = Host()
    patch = louder(host)
    below = host.step
    theirs = functools.partial(lambda *args: f"<{below(*args)}>")
    host.step = theirs  # type: ignore[method-assign]
    with patch.lifted():
        assert host.step is theirs  # it was not there to be lifted
    assert host.step is theirs
    patch.undo()
    assert host.step("a") == "<a0>"


def test_before_and_after_run_around_the_method() -> None:
    host = Host()
    first = Patch.before(host, "step", lambda batch, index=0: host.calls.append(f"before {batch}{index}"))
    then = Patch.after(host, "step", lambda: host.calls.append("after"))
    assert host.step("a", 2) == "a2"
    assert host.calls == ["before a2", "a", "after"]
    then.undo()
    first.undo()
    assert vars(host).keys().isdisjoint({"step"})
