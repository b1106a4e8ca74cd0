"""What the command line asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.speed.modes import DEFAULT
from benchmarks.speed.timing import Effort


@dataclass(frozen=True)
class Request:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        threads: Of torch and of onnxruntime.
        rounds: As for `Effort`, and so are ``seconds``.
        seconds: After which no further round of a race starts.
        seed: Of weights and inputs.
        modes: As in `benchmarks.speed.modes`; empty for the device's.
        odconv: A clone of the authors' repository; None to leave ODConv out.
        kernelwarehouse: A clone of the authors' repository; None to leave KernelWarehouse out.
    """

    device: str = "cpu"
    threads: int = 1
    rounds: int = 20
    seconds: float = 8.0
    seed: int = 0
    modes: tuple[str, ...] = ()
    odconv: Path | None = None
    kernelwarehouse: Path | None = None

    @property
    def effort(self) -> Effort:
        """How long, and where."""
        return Effort(self.rounds, self.seconds, torch.device(self.device))

    @property
    def ways(self) -> tuple[str, ...]:
        """The modes to measure in."""
        return self.modes or DEFAULT[self.device]
