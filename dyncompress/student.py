"""The network in somebody else's module: converted where it stands, and able to go back until it is trained."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyncompress.compensation import WarmStart
from dyncompress.conversion import convert, convert_, plan_of, resolve
from dyncompress.graph import bare
from dyncompress.plan import Plan


class Student:
    """A network inside a LightningModule.

    Args:
        path: Its name there; ``""`` for the LightningModule itself.
        network: The network, as the user calls it: possibly the wrapper that `torch.compile` returned.

    Attributes:
        original: A copy from before the conversion, until `settle`.
    """

    def __init__(self, path: str, network: nn.Module) -> None:
        self.path = path
        self.network = network
        self.original: nn.Module | None = None

    @property
    def inner(self) -> nn.Module:
        """The network without a compiler's wrapper: what is converted."""
        return bare(self.network)

    @property
    def plan(self) -> Plan | None:
        """The plan that the network was converted by."""
        return plan_of(self.inner)

    @property
    def has_norms(self) -> bool:
        """Whether it has BatchNorms, whose statistics conversion leaves to be estimated."""
        return any(isinstance(m, _BatchNorm) for m in self.inner.modules())

    def convert(self, plan: Plan, seed: int) -> None:
        """Carry a plan out, from the original; on an error the network is what it was.

        Raises:
            PlanError: If the plan doesn't fit the network.
        """
        if self.original is not None:  # a checkpoint's plan takes the place of ours
            fresh = convert_(deepcopy(self.original), plan, seed=seed)
            _adopt(self.inner, fresh)
            return
        plan = resolve(self.inner, plan)
        self.original = deepcopy(self.inner)
        try:
            convert_(self.inner, plan, seed=seed)  # in place: what it does not replace keeps its identity
        except BaseException:
            self.revert()
            raise

    def started(self, batches: Iterable[Any], start: WarmStart, seed: int) -> dict[str, Any]:
        """What a warm start makes of the untrained network: its state dict, on the CPU.

        Args:
            batches: Inputs of the original, on its device.
            start: How.
            seed: Of the conversion.
        """
        assert self.original is not None and self.plan is not None
        fresh = convert(self.original, self.plan, seed=seed, calibrate=batches, warm_start=start)
        return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in fresh.state_dict().items()}

    def revert(self) -> None:
        """Be the original again."""
        if self.original is not None:
            _adopt(self.inner, self.original)
            self.original = None

    def settle(self) -> None:
        """Training has begun: there is no way back."""
        self.original = None


def _adopt(network: nn.Module, source: nn.Module) -> None:
    """Give a network the contents of a copy of it; the object stays the one that the user holds."""
    for contents in ("_parameters", "_buffers", "_modules"):
        setattr(network, contents, getattr(source, contents))
    counts = {k: v for k, v in vars(source).items() if isinstance(v, (int, tuple)) and k != "training"}
    vars(network).update(counts)
