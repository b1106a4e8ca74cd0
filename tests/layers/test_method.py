"""The registry: names are unique, and a wrong one is answered with the right ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pytest

from dyncompress.errors import DynCompressError, UnknownMethodError
from dyncompress.layers import DyNet, Method, Static, get_method, list_methods, method, register_method


def test_the_methods_of_the_library() -> None:
    assert list_methods() == [
        "auto",
        "c2sp",
        "condconv",
        "dcd",
        "drconv",
        "dyco3d",
        "dyconv",
        "dynet",
        "kernelwarehouse",
        "odconv",
        "static",
    ]
    assert get_method("dynet") == DyNet()
    assert get_method("static") == Static()


@pytest.mark.parametrize("configured", [DyNet(g=6, router="layer", reduction=4, placement="all"), Static()])
def test_name_and_options_say_it_all(configured: DyNet | Static) -> None:
    assert get_method(configured.name, **asdict(configured)) == configured


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownMethodError, match=r"no method 'dinet'; known: .*; did you mean 'dynet'\?"):
        get_method("dinet")
    with pytest.raises(UnknownMethodError, match="use one of those"):
        get_method("winograd")


def test_an_unknown_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(DynCompressError, match=r"no option 'routers'; .*g, router, .*did you mean 'router'\?"):
        get_method("dynet", routers="layer")
    with pytest.raises(DynCompressError, match="no option 'g'; its options: none"):
        get_method("static", g=4)


def test_a_name_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method, "_METHODS", dict(method._METHODS))

    @register_method("mine")
    @dataclass(frozen=True)
    class Mine(Static):
        width: int = 1

    mine = get_method("mine", width=2)
    assert mine == Mine(2)
    assert isinstance(mine, Method)
    assert mine.name == "mine"
    assert Static.name == "static"
    with pytest.raises(DynCompressError, match=r"'mine' is already registered by .*Mine"):
        register_method("mine")(Mine)
