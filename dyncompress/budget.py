"""What the student may cost: a target as a person writes it, turned into numbers.

``0.33``, ``"33%"`` (of the original's MACs), ``"1.2G"`` (MACs), ``"40% params"``, ``"350k params"``,
``"60% latency"``; several at once as ``"33%, 50% params"`` or ``("33%", "350k params")``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dyncompress.errors import BudgetError, shown

Target = str | float | Sequence[str | float]
"""A target as a person writes it: one limit, or several."""

QUANTITIES = {
    "macs": "macs",
    "flops": "macs",
    "params": "params",
    "parameters": "params",
    "latency": "latency",
}
UNITS = {"macs": "MACs", "params": "parameters", "latency": "batch-1 latency"}
_MOST = 1e18  # MACs or parameters, or times the original: beyond what is counted exactly
_SCALE = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_PATTERN = re.compile(
    r"\s*(?P<number>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)\s*(?P<unit>%|[kmgbt])?\s*(?P<quantity>[a-z]+)?\s*",
    re.IGNORECASE | re.ASCII,  # float() reads digits of every script; a person who reads the plan may not
)
_LONGEST = 60  # characters of one limit; beyond it the pattern takes its time
_ALLOWED = (
    "write a fraction of the original (0.33 or '33%') or an absolute cost ('1.2G', '350M', '900k'), of MACs by default,"
    " of 'params' or 'latency' when named ('40% params', '60% latency'); several as '33%, 50% params'"
)


@dataclass(frozen=True)
class Limit:
    """One number that a student may not exceed.

    Attributes:
        value: A fraction of the original, or an absolute number of MACs or parameters.
        relative: Whether it is a fraction.
        quantity: ``macs``, ``params`` or ``latency``.
        text: What was asked, as a person reads it.
    """

    value: float
    relative: bool
    quantity: str
    text: str

    @classmethod
    def parse(cls, target: str | float) -> Limit:
        """Read one limit; see `Budget.parse`."""
        match, text, asked = None, "", shown(target)
        huge = isinstance(target, int) and abs(target) > 2 * _MOST
        if (
            isinstance(target, (str, int, float))
            and not isinstance(target, bool)
            and len(asked) <= _LONGEST
            and not huge
        ):
            text = str(target).strip()
            match = _PATTERN.fullmatch(text)
        if match is None:
            raise BudgetError(f"target {asked} is unreadable; {_ALLOWED}")
        number, unit = float(match["number"]), (match["unit"] or "").lower()
        quantity = QUANTITIES.get((match["quantity"] or "macs").lower())
        if quantity is None:
            raise BudgetError(f"target {asked} names '{match['quantity']}', which isn't a cost; {_ALLOWED}")
        relative = unit == "%" or (unit == "" and number <= 1)
        value = number / 100 if unit == "%" else number * _SCALE[unit]
        if not 0 < value <= _MOST:
            raise BudgetError(f"target {asked} must be positive, and at most {_MOST:.0e}; {_ALLOWED}")
        if relative and value > 1 and quantity == "macs":
            raise BudgetError(
                f"target {asked} is {value:.0%} of the original; a fraction of the MACs is at most 1 (100%)"
            )
        if not relative and unit == "" and value < 1000:
            raise BudgetError(f"target {asked} is above 1 as a fraction and has no unit; {_ALLOWED}")
        if quantity == "latency" and not relative:
            raise BudgetError(
                f"target {asked}: latency is asked as a fraction of the original's, such as '60% latency'"
            )
        return cls(value, relative, quantity, text if isinstance(target, str) else f"{number:.15g}")

    def absolute(self, original: int) -> float:
        """The limit in MACs or parameters, given the original's."""
        return self.value * original if self.relative else self.value

    def fraction(self, original: int) -> float:
        """The limit as a fraction of the original."""
        return self.value if self.relative else self.value / original


@dataclass(frozen=True)
class Budget:
    """A target: one limit, or several that hold at once, each on a quantity of its own.

    Example:
        >>> budget = Budget.parse("33%, 350k params")
        >>> [(limit.quantity, limit.value) for limit in budget.limits]
        [('macs', 0.33), ('params', 350000.0)]
    """

    limits: tuple[Limit, ...]

    @classmethod
    def parse(cls, target: Target | Budget) -> Budget:
        """Read a target.

        Args:
            target: ``0.33``, ``"33%"``, ``"1.2G"``, ``"350k params"``, ``"60% latency"``; several in one text with
                commas between them, or in a list or tuple. Parameters and latency may exceed the original's
                (``"150% params"``): dynamic convolutions save MACs at their expense.

        Returns:
            The budget.

        Raises:
            BudgetError: If a limit is unreadable, not positive, or above 1 as a fraction of the MACs; or if there
                are two on one quantity, or none.

        Example:
            >>> Budget.parse("33%").limits[0]
            Limit(value=0.33, relative=True, quantity='macs', text='33%')
            >>> str(Budget.parse(["33%", "350k params"]))
            '33%, 350k params'
        """
        if isinstance(target, Budget):
            return target
        parts = target.split(",") if isinstance(target, str) else target
        limits = tuple(map(Limit.parse, parts)) if isinstance(parts, (list, tuple)) else (Limit.parse(parts),)  # type: ignore[arg-type]
        named = [limit.quantity for limit in limits]
        if not limits:
            raise BudgetError(f"target {shown(target)} holds no limit; {_ALLOWED}")
        for quantity in named:
            if named.count(quantity) > 1:
                raise BudgetError(f"target {shown(target)} limits {UNITS[quantity]} twice; give one limit per quantity")
        return cls(limits)

    def limit(self, quantity: str) -> Limit | None:
        """The limit on a quantity, if there is one."""
        return next((limit for limit in self.limits if limit.quantity == quantity), None)

    def __str__(self) -> str:
        return ", ".join(limit.text for limit in self.limits)


def readable(count: float) -> str:
    """A count with three digits and k, M or G.

    Example:
        >>> readable(40813184)
        '40.8M'
    """
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= scale * 0.9995:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.0f}"


@dataclass(frozen=True)
class Reach:
    """What a network can be brought to: cost of the original, and of the narrowest and widest student."""

    quantity: str
    original: int
    lowest: int
    highest: int

    def __str__(self) -> str:
        low, high = self.lowest / self.original, self.highest / self.original
        return (
            f"{readable(self.lowest)} to {readable(self.highest)} {UNITS[self.quantity]}"
            f" ({low:.1%} to {high:.1%} of {readable(self.original)})"
        )
