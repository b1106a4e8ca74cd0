"""What the student may cost: a target as a person writes it, turned into a number.

``0.33``, ``"33%"`` (of the original's MACs), ``"1.2G"`` (MACs), ``"40% params"``, ``"350k params"``,
``"60% latency"``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from dyncompress.errors import BudgetError

QUANTITIES = {
    "macs": "macs",
    "flops": "macs",
    "params": "params",
    "parameters": "params",
    "latency": "latency",
}
_SCALE = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_PATTERN = re.compile(
    r"\s*(?P<number>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)\s*(?P<unit>%|[kmgbt])?\s*(?P<quantity>[a-z]+)?\s*",
    re.IGNORECASE,
)
_ALLOWED = (
    "write a fraction of the original (0.33 or '33%') or an absolute cost ('1.2G', '350M', '900k'), of MACs by default,"
    " of 'params' or 'latency' when named ('40% params', '60% latency')"
)


@dataclass(frozen=True)
class Budget:
    """A target.

    Attributes:
        value: A fraction of the original in (0, 1], or an absolute number of MACs or parameters.
        relative: Whether it is a fraction.
        quantity: ``macs``, ``params`` or ``latency``.
        text: What was asked, as a person reads it.
    """

    value: float
    relative: bool
    quantity: str
    text: str

    @classmethod
    def parse(cls, target: str | float | Budget) -> Budget:
        """Read a target.

        Args:
            target: ``0.33``, ``"33%"``, ``"1.2G"``, ``"350k params"``, ``"60% latency"``.

        Returns:
            The budget.

        Raises:
            BudgetError: If the target is unreadable, not positive, or above 1 as a fraction.

        Example:
            >>> Budget.parse("33%")
            Budget(value=0.33, relative=True, quantity='macs', text='33%')
            >>> Budget.parse("350k params").value
            350000.0
        """
        if isinstance(target, Budget):
            return target
        text = str(target).strip()
        match = _PATTERN.fullmatch(text)
        if isinstance(target, bool) or not isinstance(target, (str, int, float)) or match is None:
            raise BudgetError(f"target {target!r} is unreadable; {_ALLOWED}")
        number, unit = float(match["number"]), (match["unit"] or "").lower()
        quantity = QUANTITIES.get((match["quantity"] or "macs").lower())
        if quantity is None:
            raise BudgetError(f"target {target!r} names '{match['quantity']}', which isn't a cost; {_ALLOWED}")
        relative = unit == "%" or (unit == "" and number <= 1)
        value = number / 100 if unit == "%" else number * _SCALE[unit]
        if not math.isfinite(value) or value <= 0:
            raise BudgetError(f"target {target!r} must be positive; {_ALLOWED}")
        if relative and value > 1:
            raise BudgetError(f"target {target!r} is {value:.0%} of the original; a fraction is at most 1 (100%)")
        if not relative and unit == "" and value < 1000:
            raise BudgetError(f"target {target!r} is above 1 as a fraction and has no unit; {_ALLOWED}")
        if quantity == "latency" and not relative:
            raise BudgetError(
                f"target {target!r}: latency is asked as a fraction of the original's, such as '60% latency'"
            )
        return cls(value, relative, quantity, text if isinstance(target, str) else f"{number:g}")

    def absolute(self, original: int) -> float:
        """The target in MACs or parameters, given the original's."""
        return self.value * original if self.relative else self.value


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
