"""Long runs: memory stays flat, and nothing of a training is left behind when it ends, however it ends."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dyncompress import DistillConfig, DynCompress
from dyncompress.conversion import plan_of
from dyncompress.distillation import Teacher
from dyncompress.layers import DynamicConv
from dyncompress.patch import Patch
from dyncompress.student import Student
from dyncompress.teaching import TaughtStep
from tests.classifiers import classifier, equal, fit, loader, trainer, weights
from tests.newer import exits

Classifier = classifier()
Classifier.__module__ = __name__  # pickle finds a class by its name
OURS = (Teacher, Student, Patch, TaughtStep, DynCompress)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def alive(*kinds: type) -> int:
    """Live objects of these classes; what waits for the garbage collector doesn't count."""
    gc.collect()
    return sum(issubclass(type(each), kinds) for each in gc.get_objects())


def hooks(module: nn.Module) -> int:
    """Hooks of all kinds on a module and its parts."""
    kinds = [name for name in vars(module) if name.endswith("_hooks")]
    assert len(kinds) >= 8
    return sum(len(getattr(part, name)) for part in module.modules() for name in kinds)


def handles() -> set[str]:
    """Open files, pipes and sockets of this process."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {os.readlink(entry)}")
        except FileNotFoundError:  # the handle that lists the folder
            continue
    return found


def left(before: tuple[set[str], set[int], set[int]]) -> list[str]:
    """What has come since: handles, threads, child processes."""
    return [str(each) for now, then in zip(outside(), before, strict=True) for each in now - then]


def outside() -> tuple[set[str], set[int], set[int]]:
    """Open files, threads of Python and child processes of this process."""
    gc.collect()
    threads = {thread.ident or 0 for thread in threading.enumerate()}
    tasks = {int(task.name) for task in Path("/proc/self/task").iterdir()}
    children = {int(child) for task in tasks for child in _children(task)}
    return handles(), threads, children


def _children(task: int) -> list[str]:
    try:
        return Path(f"/proc/self/task/{task}/children").read_text().split()
    except FileNotFoundError:  # a thread that has ended meanwhile
        return []


class Meter(pl.Callback):
    """Measures the process after some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.seen = steps, {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step in self.steps:
            counts = alive(Tensor), alive(nn.Module), alive(*OURS), hooks(pl_module), threading.active_count()
            self.seen[trainer.global_step] = (resident(), counts)


# ---- one long training ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory(record_property: Callable[..., None]) -> None:
    """Memory is flat over 2,000 training steps: tensors, layers, hooks and patches are no more than after 500."""
    meter = Meter(500, 2000)
    ours = DynCompress("50%", distill=DistillConfig(features={"bn2": 1.0}))
    host = fit(Classifier(), ours, meter, max_epochs=-1, max_steps=2000, limit_val_batches=0, batches=100)
    assert host.global_step == 2000
    (first, counts), (last, later) = (meter.seen[step] for step in meter.steps)
    assert counts[1:] == later[1:] and counts[0] > 40 and counts[2] >= 4
    assert later[0] <= counts[0]  # fewer where a test before this one left some to be freed
    assert last - first < 1 << 20
    record_property("figure", f"{(last - first) / 1024:.0f} KiB more, {counts[0]} tensors and then {later[0]}")


@pytest.mark.slow
def test_objects(record_property: Callable[..., None]) -> None:
    """Tensors, layers, hooks and patches after 40 steps are those after 8, validation and teaching included."""
    meter = Meter(8, 40)
    ours = DynCompress("50%", distill=DistillConfig(features={"bn2": 1.0}))
    fit(Classifier(), ours, meter, max_epochs=-1, max_steps=40, batches=4)
    (_, counts), (_, later) = (meter.seen[step] for step in meter.steps)
    assert counts == later and counts[0] > 40 and counts[2] >= 4
    record_property("figure", f"{later[0]} tensors, {later[1]} layers, {later[3]} hooks at both times")


# ---- many trainings ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_fits(record_property: Callable[..., None]) -> None:
    """Twenty trainings in one process leave nothing behind: no tensor, no layer, no teacher, no handle."""

    def once() -> None:
        fit(Classifier(), DynCompress("50%"), limit_train_batches=2, limit_val_batches=1)

    earlier = alive(*OURS)  # of other tests: a compiler keeps what it compiled
    once()  # what is made once and kept: caches, lazy imports
    before, there = (alive(Tensor), alive(nn.Module), alive(*OURS)), outside()
    for _ in range(19):
        once()
    after = alive(Tensor), alive(nn.Module), alive(*OURS)
    assert after == before
    assert after[2] == earlier
    assert left(there) == []
    record_property("figure", f"{after[0]} tensors and {after[1]} layers after 1 and after 20")


@pytest.mark.slow
def test_fitted_again(record_property: Callable[..., None]) -> None:
    """Training the same module again, with the same or a new Trainer, adds no tensor, no layer, no hook."""
    module, callback = Classifier(), DynCompress("50%")
    counts = []
    for _ in range(4):
        host = fit(module, callback)
        assert host.global_step == 4
        counts.append((alive(Tensor), alive(nn.Module), alive(*OURS), hooks(module)))
    assert counts[1] == counts[2] == counts[3]
    host.fit_loop.max_epochs = 2
    host.fit(module, loader(), loader(1))
    assert host.global_step == 8
    assert (alive(Tensor), alive(nn.Module), alive(*OURS), hooks(module)) == counts[3]
    assert sum(isinstance(m, DynamicConv) for m in module.modules()) == 2
    record_property("figure", f"{counts[3][0]} tensors and {counts[3][1]} layers after every one of 5 trainings")


@pytest.mark.slow
def test_callback_reused(record_property: Callable[..., None]) -> None:
    """One callback compresses one module after the other, each with its own teacher; the earlier ones are let go."""
    earlier = alive(Teacher, Student)
    callback, seen = DynCompress("50%"), []
    for seed in range(3):
        torch.manual_seed(seed)
        module = Classifier()
        fit(module, callback)
        assert plan_of(module) is not None
        seen.append(weakref.ref(module))
        assert alive(Teacher, Student) == earlier + 2
        del module
    gc.collect()
    assert [ref() is None for ref in seen[:-1]] == [True, True]  # Lightning gives every callback its module's `log`
    record_property("figure", "1 teacher alive after each of 3 modules")


def test_callback_dropped(record_property: Callable[..., None]) -> None:
    """Teacher and original are freed with the callback and its Trainer, while the student lives on."""
    module, callback = Classifier(), DynCompress("50%")
    host = fit(module, callback)
    assert callback._teacher is not None and callback._student is not None
    assert callback._student.original is None  # let go at the first step
    gone = [weakref.ref(each) for each in (callback, callback._teacher, callback._teacher.network, callback._student)]
    module.trainer = None
    del host, callback
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4
    assert module(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    record_property("figure", f"{len(gone)} of {len(gone)} objects freed")


# ---- how a training ends -------------------------------------------------------------------------------------------


class Ending(Classifier):
    """Its third step raises."""

    error: type[BaseException] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2 and self.error is not None:
            raise self.error
        return loss


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Lightning switches Ctrl-C off for good when it meets one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


REPLACED = ("squeeze", "router", "temperature")  # parts of dynamic layers


def shape(module: nn.Module) -> dict[str, set[str]]:
    """Names of the attributes of a module and of its parts, but for the layers that compression replaces."""
    return {
        name: set(vars(part))
        for name, part in module.named_modules()
        if not isinstance(part, (nn.Conv2d, DynamicConv)) and not any(word in name for word in REPLACED)
    }


ENDINGS = {"success": None, "an exception": ZeroDivisionError, "Ctrl-C": KeyboardInterrupt}
ENDS = ["success", "an exception", pytest.param("Ctrl-C", marks=exits)]


def ended(module: Any, error: type[BaseException] | None, *callbacks: Any) -> None:
    """Train; Lightning makes an exit of Ctrl-C."""
    module.error = error
    if error is None:
        fit(module, *callbacks)
        return
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(module, *callbacks)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("end", ENDS)
def test_ends_clean(end: str, record_property: Callable[..., None]) -> None:
    """After success, an exception or Ctrl-C no hook, patch, thread, process or file is left, and the module copies."""
    plain, module = Ending(), Ending()
    ended(plain, ENDINGS[end])
    ended(Ending(), ENDINGS[end], DynCompress("50%"))  # what is made once and kept
    before = outside()
    ended(module, ENDINGS[end], DynCompress("50%"))
    assert left(before) == []
    assert plan_of(module) is not None

    ours, theirs = shape(module), shape(plain)
    assert theirs.keys() <= ours.keys() and all(ours[name] == theirs[name] for name in theirs)
    assert len(ours.keys() - theirs.keys()) == 1  # the plan
    assert hooks(module) == hooks(plain) == 0
    assert module.training_step.__func__ is Ending.training_step
    assert not any(isinstance(value, (Patch, TaughtStep)) for m in module.modules() for value in vars(m).values())

    module.trainer = None
    for twin in (deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert equal(twin, weights(module))
    record_property("figure", f"{end}: attributes of {len(theirs)} of {len(theirs)} modules as without compression")


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("end", ENDS)
def test_goes_on(end: str, record_property: Callable[..., None]) -> None:
    """After success, an exception or Ctrl-C the same module and callback train on."""
    module, callback = Ending(), DynCompress("50%")
    ended(module, ENDINGS[end], callback)
    plan, before = plan_of(module), weights(module)
    module.error = None
    host = fit(module, callback)
    assert host.global_step == 4 and host.callback_metrics["distill/loss"] > 0
    assert plan_of(module) == plan and not equal(module, before)
    record_property("figure", f"{end}: 4 of 4 steps more")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["success", "an exception"])
def test_workers(end: str, record_property: Callable[..., None]) -> None:
    """Worker processes of the data loaders end with the training, persistent ones too."""
    before = outside()
    module, data = Ending(), loader()
    module.error = ENDINGS[end]
    options: Any = {"num_workers": 1, "multiprocessing_context": "fork"}
    for persistent in (False, True):
        loaders = DataLoader(data.dataset, 4, persistent_workers=persistent, **options)
        host = trainer(callbacks=[DynCompress("50%")])
        raised = None
        try:
            host.fit(module, loaders, loader(1))
        except ZeroDivisionError as error:
            raised = type(error)
        assert raised is module.error
        assert host.global_step == (4 if raised is None else 2)  # none is lost to a look at the data before
        del host, loaders
        module = Ending()
        module.error = ENDINGS[end]
        gc.collect()
        assert multiprocessing.active_children() == []
    # pytest holds the frames of what was raised until the test is over, and they the batch, which is shared memory.
    assert [handle for handle in left(before) if "/dev/shm/" not in handle] == []
    record_property("figure", f"{end}: no worker, no pipe left")


SCRIPT = """
import signal, sys, threading
from tests.classifiers import classifier, fit
from dyncompress import DynCompress
import lightning.pytorch as pl

class Ready(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == 5:
            print("ready", flush=True)

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
module = classifier()()
try:
    fit(module, DynCompress("50%"), Ready(), max_epochs=-1, limit_val_batches=0)
finally:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    patched = "training_step" in vars(module)
    print("ended", hooks, patched, threading.active_count(), flush=True)
"""


@exits
@pytest.mark.slow
def test_interrupted(record_property: Callable[..., None]) -> None:
    """A real Ctrl-C in the middle of training ends the process as Lightning ends it, and the module is clean."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        seen = []
        for line in process.stdout:
            seen.append(line.split())
            if seen[-1] == ["ready"]:
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert seen.count(["ready"]) == 1
    assert seen[-1] == ["ended", "0", "False", "1"]
    record_property("figure", "exit code 1, no hook, no patch, one thread")
