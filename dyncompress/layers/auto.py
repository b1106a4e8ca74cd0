"""Auto: for every layer the method that is worth more than it costs there, or none.

    method(layer) = argmax over candidates of  worth - rate * ln(cost with the candidate / cost of the static layer)

Worth is what a network is expected to gain, in points of accuracy, where all its layers are such; rate says what a
static network loses when its cost falls, so that both are of one unit. Costs are multiply-adds, parameters or measured
time, as the target has it. Being static is worth 0 and costs 0.

It has no layers of its own: a plan that is made with it holds what it chose, and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

from torch import nn

from dyncompress.errors import DynCompressError, shown
from dyncompress.layers.dynet import DyNet
from dyncompress.layers.method import Method, PerLayer, register_method
from dyncompress.layers.odconv import ODConv
from dyncompress.layers.spec import ConvSite, Macs
from dyncompress.layers.static import Static

__all__ = ["CANDIDATES", "RATE", "Auto", "Candidate", "Unit"]

Unit = Literal["macs", "params", "time"]


class Candidate(NamedTuple):
    """A form that a layer may get.

    Attributes:
        label: What reasons call it.
        method: The form; where its own placement would change it, it is no candidate.
        worth: Points of accuracy that a network is expected to gain by it at equal widths.
    """

    label: str
    method: Method
    worth: float


# ---- all constants -----------------------------------------------------------------------------------------------

# Points per unit of ln(cost): CIFAR-10 ResNet-20, static, loses 84.60 - 82.87 = 1.73 from 32.9 to 24.9 % of the MACs (4
# epochs, three seeds, docs/results.md; 1.72 after 12 epochs, one seed): 1.73 / ln(32.9 / 24.9) = 6.2.
RATE = 6.2

# Each worth is the mean of what we measured and of what was published. Ours: CIFAR-10 ResNet-20, distilled for 4
# epochs, over static networks of the same MACs (docs/results.md). Published: ImageNet, at full widths, trained for much
# longer. So ours may be too low, and theirs too high for a network that is distilled briefly.
CANDIDATES = (
    # At 33 % +0.46, at 25 % +0.05, three seeds each; published with attention to taps, ResNet-18, arXiv 2209.07947:
    # 70.25 -> 73.05, +2.80.
    Candidate("attention to channels", ODConv(kernels=1, spatial=False), (0.26 + 2.80) / 2),
    # At 50 % +0.20, at 33 % +0.10, at 25 % +0.04, one seed each; published, Dy-mobile, arXiv 2004.10694: 69.15 with
    # g = 1, 71.31 with g = 4, +2.16.
    Candidate("g=4", DyNet(g=4, router="layer"), (0.11 + 2.16) / 2),
    # Not measured by us: the share of g = 4 that it has there, 70.57 - 69.15 = +1.42 of 2.16.
    Candidate("g=2", DyNet(g=2, router="layer"), (0.11 + 2.16) / 2 * 1.42 / 2.16),
    # ODConv with several kernels is no candidate: four have less than one (with taps, benchmarks/results/methods, two
    # epochs, one seed: 83.01 and 83.34), and multiply parameters.
)


@register_method("auto")
@dataclass(frozen=True)
class Auto(PerLayer):
    """Options of auto.

    Args:
        cost: What a layer's cost is: ``"macs"``, ``"params"``, or ``"time"``: measured on this machine, at the widths
            that a static network would have at the target. None: time where the target limits latency or a latency
            table is passed, else parameters where the target limits them, else MACs; a plan's options say which.
        rate: Points of accuracy that a static network loses per unit of ln(cost).

    Raises:
        DynCompressError: If an option has no such value.

    Source:
        This library; constants and their sources are at the top of the file and in docs/methods/auto.md.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    adapts: ClassVar[str] = "what the chosen method has"
    exceptions: ClassVar[dict[str, str]] = {"repr_names_the_method": "a layer is of the method that was chosen for it"}

    cost: Unit | None = None
    rate: float = RATE

    def __post_init__(self) -> None:
        if self.cost is not None and (not isinstance(self.cost, str) or self.cost not in ("macs", "params", "time")):
            raise DynCompressError(
                f"cost {shown(self.cost)} is unknown: choose 'macs', 'params' or 'time', or None to have the target's"
            )
        number = isinstance(self.rate, (int, float)) and not isinstance(self.rate, bool) and math.isfinite(self.rate)
        if not number or self.rate <= 0:
            raise DynCompressError(
                f"rate {shown(self.rate)} is no positive number: give the points that a static network loses per unit"
                f" of ln(cost), {RATE} unless you know better"
            )

    def settled(self, unit: Unit) -> Auto:
        """The same with a cost: the given one where none was asked for."""
        return self if self.cost else replace(self, cost=unit)

    def place(self, site: ConvSite) -> tuple[Method, str]:
        """The best candidate by MACs or parameters at the given widths; by time static, until it is measured.

        Example:
            >>> from dyncompress.layers import ConvSpec
            >>> method, reason = Auto().place(ConvSite("c", ConvSpec(64, 64, (3, 3), bias=False), positions=64))
            >>> print(method.name, reason)
            odconv attention to channels adds 0.1% to 2,359,296 MACs, worth up to 28%
        """
        if self.cost == "time":
            return Static(), "static: not measured"
        if self.cost == "params":
            return self.choose(site, lambda method: method.params([site])[0], lambda n: f"{n:,.0f} parameters")
        return self.choose(site, lambda method: method.macs([site])[0].total, lambda n: f"{n:,.0f} MACs")

    def choose(
        self, site: ConvSite, cost: Callable[[Method], float], told: Callable[[float], str]
    ) -> tuple[Method, str]:
        """The candidate of the largest worth less price, whatever the unit of cost is; static where none is above 0.

        Args:
            site: The layer at its original width, which decides who is a candidate.
            cost: Of the layer in any form.
            told: A cost as people read it.

        Returns:
            What :meth:`Method.place` does.
        """
        able, why = candidates(site)
        if not able:
            return Static(), why
        static = cost(Static())
        costs = {each: cost(each.method) for each in able}
        best = max(able, key=lambda each: each.worth - self.price(costs[each] / static))
        ratio, most = costs[best] / static, _percent(math.exp(best.worth / self.rate) - 1)
        if best.worth <= self.price(ratio):
            would = f"would add {_percent(ratio - 1)} to {told(static)}"
            return Static(), f"static: {best.label} {would}, worth at most {most}"
        if ratio < 1:
            return best.method, f"{best.label} saves {_percent(1 - ratio)} of {told(static)}"
        return best.method, f"{best.label} adds {_percent(ratio - 1)} to {told(static)}, worth up to {most}"

    def price(self, ratio: float) -> float:
        """Points that a static network would lose if its cost had to fall by as much: rate * ln(ratio).

        Example:
            >>> round(Auto().price(33 / 25), 2)
            1.72
        """
        return self.rate * math.log(ratio)

    def macs(self, sites: Sequence[ConvSite]) -> list[Macs]:
        """Multiply-adds of what it places on each site."""
        return [self.place(site)[0].macs([site])[0] for site in sites]

    def params(self, sites: Sequence[ConvSite]) -> list[int]:
        """Parameters of what it places on each site."""
        return [self.place(site)[0].params([site])[0] for site in sites]

    def build(self, sites: Sequence[ConvSite]) -> list[nn.Module]:
        """What it places on each site."""
        return [self.place(site)[0].build([site])[0] for site in sites]


def candidates(site: ConvSite) -> tuple[list[Candidate], str]:
    """Those whose own placement leaves them as they are on a site, and why there are none.

    Depthwise and tiny convolutions have none; a bank that is large for its map is none either.
    """
    placed = [each.method.place(site) for each in CANDIDATES]
    able = [each for each, (method, _) in zip(CANDIDATES, placed, strict=True) if method == each.method]
    return able, "" if able else placed[0][1]


def _percent(share: float) -> str:
    """A share with about two digits."""
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" if share >= 0.001 else "under 0.1%"
