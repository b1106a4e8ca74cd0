"""What is compared: every method with the options that its paper tells apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dyncompress.layers import Method, get_method


@dataclass(frozen=True)
class Form:
    """A method with options.

    Attributes:
        title: What tables and plots call it.
        method: Registered name.
        options: Those that are not the default.
        choose: When to choose it.
    """

    title: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    choose: str = ""

    @property
    def folder(self) -> str:
        """Name of its run's folder."""
        return re.sub(r"[^a-z0-9=]+", "-", self.title)

    def made(self) -> Method:
        """The method."""
        return get_method(self.method, **self.options)


FORMS = {
    form.title: form
    for form in (
        Form("static", "static", choose="where reports find no gain in a bank"),
        Form("c2sp", "c2sp", choose="where 3x3 convolutions are the cost and nothing is to be dynamic"),
        Form("c2sp g=4", "c2sp", {"g": 4}, "as above, with a bank at 4/9 of the price"),
        Form("condconv", "condconv", choose="for the smallest router"),
        Form("dyconv", "dyconv", choose="for coefficients that sum to one, learnt while a temperature falls"),
        Form("dynet", "dynet", choose="for a bank whose output channels adapt on their own, without a schedule"),
        Form("dcd", "dcd", choose="where parameters are scarce"),
        Form("odconv", "odconv", choose="where parameters are scarce"),
        Form("odconv 4x", "odconv", {"kernels": 4}, "as above with a bank: most that can adapt"),
        Form("odconv, no taps", "odconv", {"spatial": False}, "for attention to channels that assembles no kernel"),
        Form("kernelwarehouse", "kernelwarehouse", choose="for many layers of one shape, at the parameters of static"),
        Form("kernelwarehouse 1/2", "kernelwarehouse", {"ratio": 0.5}, "for fewer parameters than static"),
        # By default it leaves every layer of a CIFAR ResNet-20 static.
        Form("drconv", "drconv", {"placement": "all"}, "where regions of a picture differ and time is no matter"),
    )
}
