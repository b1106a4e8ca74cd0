"""What auto chooses for a layer, by costs that a reader can add up."""

from __future__ import annotations

import math

import pytest

from dyncompress.errors import DynCompressError
from dyncompress.layers import Auto, ConvSite, ConvSpec, DyNet, ODConv, Static, auto
from dyncompress.layers.auto import CANDIDATES, Candidate

ATTENTION, BANK = ODConv(spatial=False), DyNet(g=4, router="layer")
SITE = ConvSite(
    "c", ConvSpec(64, 64, (3, 3), padding=(1, 1), bias=False), positions=784
)  # 64 * 64 * 9 = 36,864 weights


@pytest.fixture
def worths(monkeypatch):
    """A point per unit of ln(cost) is 10: attention may add e^0.1 - 1 = 10.5 %, a bank e^0.2 - 1 = 22 %."""
    monkeypatch.setattr(auto, "CANDIDATES", (Candidate("attention", ATTENTION, 1.0), Candidate("g=4", BANK, 2.0)))
    return Auto(rate=10)


def chosen(method, **costs):
    """The choice where forms cost as given, in microseconds."""
    by_form = {Static(): costs["static"], ATTENTION: costs["attention"], BANK: costs["bank"]}
    return method.choose(SITE, by_form.__getitem__, lambda each: f"{each} us")


@pytest.mark.parametrize(
    ("attention", "bank", "expected", "reason"),
    [
        (101, 101, BANK, "g=4 adds 1.0% to 100 us, worth up to 22%"),  # prices are equal: what is worth more
        (101, 115, ATTENTION, "attention adds 1.0% to 100 us, worth up to 11%"),  # 1 - 0.10 over 2 - 1.40
        (110, 121, BANK, "g=4 adds 21% to 100 us, worth up to 22%"),  # 2 - 1.91 over 1 - 0.95
        (111, 123, Static(), "static: attention would add 11% to 100 us, worth at most 11%"),  # -0.04 over -0.07
        (300, 280, Static(), "static: g=4 would add 180% to 100 us, worth at most 22%"),
        (100, 300, ATTENTION, "attention adds under 0.1% to 100 us, worth up to 11%"),
        (80, 100, ATTENTION, "attention saves 20% of 100 us"),  # 1 + 2.23 over 2
    ],
)
def test_the_largest_worth_less_price_is_chosen(worths, attention, bank, expected, reason):
    assert chosen(worths, static=100, attention=attention, bank=bank) == (expected, reason)


def test_a_higher_rate_makes_costs_dearer(worths):
    costs = {"static": 100, "attention": 105, "bank": 300}
    assert chosen(Auto(rate=10), **costs)[0] == ATTENTION  # 10 ln 1.05 = 0.49
    assert chosen(Auto(rate=21), **costs)[0] == Static()  # 21 ln 1.05 = 1.02


def test_by_macs_and_by_parameters_the_formulas_of_the_candidates_count(worths):
    """MACs: 16 * (64 + 64 + 64) = 3,072; 4 * 36,864 + 64 * 64 * 4 = 163,840. Parameters: 65 * 16 + 17 * 128 = 3,216."""
    assert Auto(rate=10).place(SITE) == (BANK, "g=4 adds 0.6% to 28,901,376 MACs, worth up to 22%")
    assert Auto(rate=400).place(SITE) == (ATTENTION, "attention adds under 0.1% to 28,901,376 MACs, worth up to 0.3%")
    by_params = Auto("params", rate=10).place(SITE)
    assert by_params == (ATTENTION, "attention adds 8.7% to 36,864 parameters, worth up to 11%")


def test_by_time_nothing_is_dynamic_before_it_is_measured():
    assert Auto("time").place(SITE) == (Static(), "static: not measured")


@pytest.mark.parametrize(
    ("spec", "positions", "reason"),
    [
        (ConvSpec(64, 64, (3, 3), groups=64), 3136, "static: depthwise, 576 weights"),
        (ConvSpec(8, 8, (3, 3)), 49, "static: tiny, 28,224 multiply-adds"),
    ],
)
def test_where_no_candidate_can_be_the_placement_says_why(spec, positions, reason):
    method, why = Auto().place(ConvSite("c", spec, positions))
    assert method == Static() and why.startswith(reason)


def test_a_bank_that_is_large_for_its_map_is_no_candidate():
    """1,024 -> 1,024 channels, 3x3 on 7x7 positions: 38 MB per kernel, which takes longer to mix than to use."""
    able, why = auto.candidates(ConvSite("c", ConvSpec(1024, 1024, (3, 3)), positions=49))
    assert [each.method for each in able] == [ATTENTION] and why == ""


def test_every_candidate_is_built_alone_and_is_dynamic():
    assert all(each.method.sharing == "layer" and each.worth > 0 for each in CANDIDATES)
    assert not any(isinstance(each.method, (Static, Auto)) for each in CANDIDATES)


def test_costs_and_layers_are_those_of_the_choice():
    method = Auto().place(SITE)[0]
    assert Auto().macs([SITE]) == method.macs([SITE])
    assert Auto().params([SITE]) == method.params([SITE])
    assert type(Auto().build([SITE])[0]) is type(method.build([SITE])[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": "joules"}, "cost 'joules' is unknown: choose 'macs', 'params' or 'time', or None"),
        ({"cost": 3}, "cost 3 is unknown"),
        ({"rate": 0}, "rate 0 is no positive number"),
        ({"rate": math.inf}, "rate inf is no positive number"),
        ({"rate": True}, "rate True is no positive number"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(DynCompressError, match=message):
        Auto(**options)
