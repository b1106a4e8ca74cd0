from __future__ import annotations

import pytest

from dyncompress.budget import Budget, readable
from dyncompress.errors import BudgetError


@pytest.mark.parametrize(
    ("target", "value", "relative", "quantity"),
    [
        (0.33, 0.33, True, "macs"),
        (1, 1.0, True, "macs"),
        ("33%", 0.33, True, "macs"),
        (" 33 % ", 0.33, True, "macs"),
        ("0.5", 0.5, True, "macs"),
        ("1.2G", 1.2e9, False, "macs"),
        ("1.2g FLOPs", 1.2e9, False, "macs"),
        ("350k params", 350e3, False, "params"),
        ("40% params", 0.4, True, "params"),
        ("60% latency", 0.6, True, "latency"),
        ("150% params", 1.5, True, "params"),
        (250_000_000, 250e6, False, "macs"),
        ("1e9", 1e9, False, "macs"),
    ],
)
def test_targets_as_people_write_them(target, value, relative, quantity):
    (limit,) = Budget.parse(target).limits
    assert (limit.value, limit.relative, limit.quantity) == (pytest.approx(value), relative, quantity)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (0, "target 0 must be positive"),
        (-0.5, "target -0.5 must be positive"),
        ("-3%", "must be positive"),
        (1.5, "target 1.5 is above 1 as a fraction"),
        ("150%", "target '150%' is 150% of the original"),
        ("33%, 40%", "limits MACs twice"),
        ("33%, 1.2G", "limits MACs twice"),
        ("33%,", "target '' is unreadable"),
        (["33%", "a third"], "target 'a third' is unreadable"),
        ([], "holds no limit"),
        ([["33%"]], "unreadable"),
        ("a third", "target 'a third' is unreadable"),
        ("", "unreadable"),
        (None, "unreadable"),
        (True, "unreadable"),
        (float("nan"), "unreadable"),
        ("33% joules", "names 'joules', which isn't a cost"),
        ("5M latency", "latency is asked as a fraction"),
    ],
)
def test_what_is_no_target_is_answered_with_what_is(target, said):
    with pytest.raises(BudgetError, match=r"33%|100%|60% latency") as error:
        Budget.parse(target)
    assert said in str(error.value)


@pytest.mark.parametrize("target", ["33%, 350k params", ["33%", "350k params"], ("33%", "350k params")])
def test_several_limits(target):
    budget = Budget.parse(target)
    assert [(limit.quantity, limit.value) for limit in budget.limits] == [("macs", 0.33), ("params", 350e3)]
    assert str(budget) == "33%, 350k params"
    assert Budget.parse(str(budget)) == budget == Budget.parse(budget)
    assert budget.limit("params") == budget.limits[1]
    assert budget.limit("latency") is None


def test_a_count_is_told_to_its_last_digit():
    assert str(Budget.parse(12_345_678)) == "12345678"
    assert str(Budget.parse(0.33)) == "0.33"


def test_a_limit_as_a_number_and_as_a_share():
    (share,), (number,) = Budget.parse("25%").limits, Budget.parse("500k").limits
    assert (share.absolute(2_000_000), number.absolute(2_000_000)) == (500_000, 500_000)
    assert (share.fraction(2_000_000), number.fraction(2_000_000)) == (0.25, 0.25)


def test_readable_counts():
    told = {7: "7", 999: "999", 1000: "1k", 40_813_184: "40.8M", 999_999: "1M", 1.2e9: "1.2G", 3e12: "3T", 999.5: "1k"}
    assert {count: readable(count) for count in told} == told
    assert [readable(n) for n in (10**6, 10**9, 10**12)] == ["1M", "1G", "1T"]
