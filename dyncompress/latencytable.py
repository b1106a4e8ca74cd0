"""A latency lookup table: how long a layer takes on this device, measured once, kept on disk, added up by predictions.

A machine drifts by a factor of two within minutes, so an entry is no time but a ratio: to a reference convolution that
ran in the same round. What a ratio is in seconds tells the reference's own time, whenever it was last measured.

Layers are measured as they run in deployment (`in_inference_form`), in the order and company in which their network
runs them: so caches hold what they hold there. Layers that share a router are one entry.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dyncompress import __version__, files
from dyncompress.errors import PlanError, shown
from dyncompress.layers import ConvSite, ConvSpec, DynamicConv, Method
from dyncompress.provenance import Environment
from dyncompress.typed import MistypedError, typed

SCHEMA = 2
"""Raise it when layers come to run in another way: a table of before is then no table, and the cache begins another."""
SECONDS = 1.5
"""Time that one measurement takes, where its least number of rounds doesn't take longer."""
_LEAST, _MOST = 25, 200  # rounds
_QUIET, _TRIES = 0.9, 3  # a process that has its cores to itself runs all the time; bursts of other work end
_REFERENCE = (ConvSpec(64, 64, (3, 3), padding=(1, 1)), (28, 28))  # a third of a millisecond on one core


@dataclass(frozen=True)
class Device:
    """What a time depends on beside the layer.

    Attributes:
        hardware: Processor, and the GPU where one is in use.
        device: Type of torch device.
        threads: Threads of torch.
        dtype: Of weights and inputs.
        batch: Images per pass.
        allocator: Settings of the memory allocator.
        torch_version: Of torch.
        version: Of dyncompress.
    """

    hardware: str
    device: str
    threads: int
    dtype: str
    batch: int
    allocator: str
    torch_version: str
    version: str

    @classmethod
    def here(cls, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, batch: int = 1) -> Device:
        """This process, now."""
        found = Environment.here(())
        kind, name = torch.device(device).type, str(dtype).removeprefix("torch.")
        return cls(found.hardware, kind, found.threads, name, batch, found.allocator, torch.__version__, __version__)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return (
            f"{self.hardware}, {self.device}, {threads}, {self.dtype}, batch {self.batch}, torch {self.torch_version}"
        )


@dataclass(frozen=True)
class Run:
    """One convolution, and the input that it gets.

    Args:
        spec: The convolution.
        size: Spatial size of its input.
        images: Its images per image of the network: more than 1 where the network cuts images into windows.
    """

    spec: ConvSpec
    size: tuple[int, ...]
    images: int = 1

    def __str__(self) -> str:
        several = f"{self.images} of " if self.images > 1 else ""
        return f"{self.spec} at {several}{'x'.join(map(str, self.size))}"


@dataclass(frozen=True)
class Layers:
    """An entry of the table: convolutions that a method builds together, in the order in which they run."""

    method: Method
    runs: tuple[Run, ...]

    def __str__(self) -> str:
        options = dataclasses.asdict(self.method)  # type: ignore[call-overload]
        told = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"{self.method.name}({told}): {' + '.join(map(str, self.runs))}"


def in_inference_form(layers: Layers) -> list[nn.Module]:
    """The modules of an entry as they run after `fold`: shipped, in eval mode, the shift of a BatchNorm in the bias.

    What `fold` comes to do to a layer beside this belongs here, too: this function alone decides what is measured.
    """
    sites = [ConvSite(str(i), run.spec, math.prod(run.spec.output_size(run.size))) for i, run in enumerate(layers.runs)]
    built = layers.method.build(sites)
    first = built[0]
    return [module.eval() for module in (first.shipped(built) if isinstance(first, DynamicConv) else built)]


def callables(layers: Sequence[Layers], device: Device) -> list[Callable[[], object]]:
    """Each runs the layers of one entry, with weights of its own.

    All read one piece of memory: so an input is in the cache, where the operation before it has left it in a network.
    """
    shapes = [(device.batch * r.images, r.spec.in_channels, *r.size) for each in layers for r in each.runs]
    memory = torch.rand(max(map(math.prod, shapes), default=0)).to(device.device, getattr(torch, device.dtype))
    inputs = (memory[: math.prod(shape)].view(shape) for shape in shapes)

    def runs(each: Layers) -> Callable[[], object]:
        modules = [module.to(memory.device, memory.dtype) for module in in_inference_form(each)]
        pairs = [(module, next(inputs)) for module in modules]

        def run() -> None:
            for module, x in pairs:
                module(x)

        return run

    with torch.random.fork_rng(devices=[]):  # modules are initialised
        return [runs(each) for each in layers]


def reference(device: Device) -> Callable[[], object]:
    """The convolution whose time is the unit of the table."""
    spec, size = _REFERENCE
    conv = nn.Conv2d(spec.in_channels, spec.out_channels, spec.kernel_size[0], padding=1).eval()
    kind = getattr(torch, device.dtype)
    conv, x = conv.to(device.device, kind), torch.rand(device.batch, spec.in_channels, *size).to(device.device, kind)
    return lambda: conv(x)


@dataclass(frozen=True)
class Timed:
    """Times of one measurement.

    Attributes:
        ratios: Per callable, its time over the reference's: the first quartile of either over the rounds.
        reference: The reference's time, in seconds.
        rounds: Ratios to the reference of the same round, one list per round.
        stretch: Time of a round over the sum of the callables' times. The first quartile of a sum is more than the sum
            of first quartiles: short passes have luckier rounds than long ones.
        running: Part of the time in which this thread ran, where times could tell of anything else; 1 elsewhere.
    """

    ratios: list[float]
    reference: float
    stretch: float = 1.0
    rounds: Sequence[Sequence[float]] = ()
    running: float = 1.0


def against_reference(runs: Sequence[Callable[[], object]], device: Device, seconds: float = SECONDS) -> Timed:
    """Time callables in turns, with the reference before and after each turn.

    ``ratio[i] = first quartile of the seconds of i / first quartile of the seconds of the reference``, over the rounds.

    Args:
        runs: What is timed; one pass each per round, in this order.
        device: Where they run.
        seconds: After which no further round starts; at least 25 rounds run, at most 200.

    Returns:
        The ratios, and what one is in seconds.
    """
    synchronize: Callable[[], None] = getattr(torch, device.device).synchronize  # does nothing on the CPU
    # One thread's own time stands still while another process has its core: a pass of 100 ms always meets one, a pass
    # of 0.1 ms hardly ever, and the sum of such is to tell the former.
    alone = device.device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    yardstick = reference(device)

    def timed(run: Callable[[], object]) -> float:
        synchronize()
        start = clock()
        run()
        synchronize()
        return clock() - start

    def one_unit() -> float:
        yardstick()  # untimed: the pass after it finds its weights in the cache, whatever ran before
        return timed(yardstick)

    def one_round() -> tuple[list[float], float]:
        before = one_unit()
        found = [timed(run) for run in runs]
        return found, (before + one_unit()) / 2

    gc.collect()  # a collection in mid-round would be charged to whatever runs then
    rows: list[tuple[list[float], float]] = []  # seconds of every callable, and of the reference
    with torch.inference_mode():
        one_round()
        began, ran = time.perf_counter(), time.thread_time()
        while len(rows) < _LEAST or (len(rows) < _MOST and time.perf_counter() < began + seconds):
            rows.append(one_round())
        running = (time.thread_time() - ran) / (time.perf_counter() - began)
    relative = [[seconds / unit for seconds in row] for row, unit in rows]
    unit = _fast([unit for _, unit in rows])
    found = [_fast(column) for column in zip(*(row for row, _ in rows), strict=True)]
    stretch = _fast([sum(row) for row, _ in rows]) / sum(found)
    # One thread's clock doesn't see other work, and a thread that waits for a GPU needn't run.
    waits = alone or device.device != "cpu"
    return Timed([seconds / unit for seconds in found], unit, stretch, relative, 1.0 if waits else running)


def _fast(seconds: Sequence[float]) -> float:
    """The first quartile: what lengthens a pass is other work on the machine, which comes in bursts."""
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


Timer = Callable[[Sequence[Callable[[], object]], Device], Timed]


@dataclass(frozen=True)
class _Document:
    """What a table's file holds."""

    schema: int
    device: Device
    reference: float
    layers: Mapping[str, float]


class LatencyTable:
    """Measured times of layers on one device, as multiples of a reference convolution.

    Args:
        device: The device; default: this process, on the CPU, at batch 1.
        folder: Folder of the table, one JSON file per device; default: ``dyncompress`` in ``$XDG_CACHE_HOME``, or in
            ``~/.cache``.
        timed: How callables are timed.

    Raises:
        PlanError: If the table's file is damaged or another device's.

    Example:
        >>> import tempfile
        >>> from dyncompress.layers import Static
        >>> conv = Layers(Static(), (Run(ConvSpec(8, 8, (3, 3)), (16, 16)),))
        >>> table = LatencyTable(folder=tempfile.mkdtemp(), timed=lambda runs, device: Timed([0.5] * len(runs), 4e-4))
        >>> table.times([conv, conv])
        [0.5, 0.5]
        >>> table.reference, list(table.ratios)
        (0.0004, ['static(): 8 -> 8, 3x3 at 16x16'])
    """

    def __init__(
        self, device: Device | None = None, folder: str | Path | None = None, timed: Timer = against_reference
    ) -> None:
        self.device = device or Device.here()
        self.path = Path(folder or cache_folder(), f"latency-{_digest(self.device)}.json")
        self.timed = timed
        self.reference, self.ratios = math.nan, {}  # type: float, dict[str, float]
        found = self._read()
        if found is not None:
            self.reference, self.ratios = found.reference, dict(found.layers)

    def times(self, layers: Sequence[Layers]) -> list[float]:
        """Times of entries, as multiples of the reference's; those that are not there are measured, and written.

        Args:
            layers: Entries in the order in which a network runs them, repeated where it repeats them: all of them run
                while the new ones are measured.

        Raises:
            PlanError: If some are missing, and the table is of another device than this, or the machine is busy.
        """
        missing = {str(each) for each in layers} - self.ratios.keys()
        if missing:
            here = Device.here(self.device.device, getattr(torch, self.device.dtype), self.device.batch)
            if here != self.device:
                raise PlanError(
                    f"the latency table is of {self.device}, and lacks {len(missing)} layers, {shown(min(missing))}"
                    f" among them; this is {here}: measure them there, or use a table of this device"
                )
            timed = self.measure(callables(layers, self.device))
            found: dict[str, list[float]] = {}
            for each, ratio in zip(layers, timed.ratios, strict=True):
                found.setdefault(str(each), []).append(ratio * timed.stretch)  # so that they add up to a network
            self.reference = timed.reference
            self.ratios |= {key: statistics.fmean(found[key]) for key in sorted(missing)}
            self._write()
        return [self.ratios[str(each)] for each in layers]

    def measure(self, runs: Sequence[Callable[[], object]]) -> Timed:
        """Time callables on this device, up to three times while other work keeps a core from this process.

        Where several threads wait for one that has no core, a layer takes a time slice of the scheduler, however small
        it is.

        Raises:
            PlanError: If the machine is busy each time.
        """
        for _ in range(_TRIES):
            timed = self.timed(runs, self.device)
            if timed.running >= _QUIET:
                return timed
        raise PlanError(
            f"the machine is busy: with {self.device.threads} threads this process ran {timed.running:.0%} of the time"
            " in which layers were measured, and such times say nothing; what was measured before is kept: wait until"
            " other work is done, or plan for one thread (torch.set_num_threads(1); --threads 1), whose times other"
            " work changes little"
        )

    # ---- the file ------------------------------------------------------------------------------------------------

    def _read(self) -> _Document | None:
        if not self.path.exists():
            return None
        try:
            document: _Document = typed(_Document, json.loads(self.path.read_text("utf-8")))
            if document.schema != SCHEMA:
                raise ValueError(f"its schema is {document.schema}, this version writes {SCHEMA}")
            if document.device != self.device:
                raise ValueError(f"it is of {document.device}, and this is {self.device}")
            for key, value in {"reference": document.reference, **document.layers}.items():
                if not (math.isfinite(value) and value > 0):
                    raise ValueError(f"the time of {shown(key)} is {value}; a time is positive")
        except (MistypedError, ValueError, RecursionError, OSError) as error:
            raise PlanError(
                f"the latency table at '{self.path}' can't be read ({error}); delete it to measure anew"
            ) from None
        return document

    def _write(self) -> None:
        """The file with these entries added: what other processes have measured meanwhile stays."""
        found = self._read()
        if found is not None:
            self.ratios = {**found.layers, **self.ratios}
        document = _Document(SCHEMA, self.device, self.reference, dict(sorted(self.ratios.items())))
        files.write_text(self.path, json.dumps(dataclasses.asdict(document), indent=1) + "\n")


def cache_folder() -> Path:
    """Where tables are kept unless told otherwise, as the XDG base directory specification has it."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return Path(root if os.path.isabs(root) else Path.home() / ".cache", "dyncompress")


def _digest(device: Device) -> str:
    return hashlib.sha256(json.dumps([SCHEMA, dataclasses.asdict(device)]).encode()).hexdigest()[:16]
