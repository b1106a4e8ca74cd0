"""What a network is fed in somebody else's LightningModule: run the user's own step and stop at its door."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dyncompress.errors import TraceError
from dyncompress.graph import as_call, bare
from dyncompress.host import NotYetError, has_convolutions, overrides
from dyncompress.patch import Patch

_MUTED = ("log", "log_dict", "toggle_optimizer", "untoggle_optimizer", "manual_backward")


class _EnteredError(BaseException):
    """The network was called. A BaseException, so that the user's ``except Exception`` does not hold it up."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call = args, kwargs


def example_of(trainer: Any, module: Any, network: nn.Module) -> Any:
    """An input of the network: from ``example_input_array``, else from the first training batch.

    The state of all random number generators stays as it was, and the network does not run.

    Args:
        trainer: The Trainer, or None outside of it.
        module: The LightningModule.
        network: The network in it, as the user calls it.

    Returns:
        An example as `trace` takes it.

    Raises:
        TraceError: If no step calls the network; says why each failed.
        NotYetError: If the training data can't be had, yet.
    """
    given = getattr(module, "example_input_array", None)
    if given is not None:
        if network is module or not overrides(module, "forward"):
            return placed(given, network)
        args, kwargs = as_call(given)
        return _stopped(module, network, {"forward": lambda: module(*args, **kwargs)})
    if trainer is None:
        raise TraceError(
            f"{type(module).__name__} has no example_input_array, and there is no Trainer to take a batch from; pass"
            " example=, what the network's forward takes"
        )
    with same_randomness():
        batch = _first_batch(trainer, module)
        here = next(network.parameters()).device
        batch = module._on_before_batch_transfer(batch)
        batch = module._apply_batch_transfer_handler(batch, device=here)
        return _stopped(module, network, _steps(module, batch, ("training_step", "validation_step")))


def training_inputs(trainer: Any, module: Any, network: nn.Module, count: int) -> list[Any]:
    """Inputs of the network in the first training batches, on its device, once training is about to start.

    Raises:
        TraceError: If no step calls the network.
    """
    # With manual optimisation a training step may update another network before it calls this one.
    names = ("training_step",) if module.automatic_optimization else ("validation_step",)
    found = []
    with same_randomness():
        for batch in islice(_batches(trainer.train_dataloader), count):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch)
            batch = trainer.strategy.batch_to_device(batch)
            found.append(_stopped(module, network, _steps(module, batch, names)))
    return found


def _first_batch(trainer: Any, module: Any) -> Any:
    try:
        for batch in _batches(trainer.fit_loop._data_source.dataloader()):
            return batch
    except Exception as error:  # the user's own code; chained
        raise NotYetError(
            f"train_dataloader fails before training ({type(error).__name__}: {error}); pass example=, what the"
            f" network's forward takes, or set {type(module).__name__}.example_input_array"
        ) from error
    raise TraceError("train_dataloader has no batch; give it data, or pass example=, what the network's forward takes")


def _batches(loader: Any) -> Iterator[Any]:
    """Batches of a loader, or of a dict or list of loaders as Lightning combines them."""
    if isinstance(loader, Mapping):
        for parts in zip(*map(_batches, loader.values()), strict=False):
            yield dict(zip(loader, parts, strict=True))
    elif isinstance(loader, (list, tuple)):
        yield from (list(parts) for parts in zip(*map(_batches, loader), strict=False))
    elif type(loader).__name__ == "CombinedLoader":
        own = type(loader)(tree_map(_own, loader.iterables), loader._mode)
        yield from (batch for batch, _, _ in own)
    else:
        generator = getattr(loader, "generator", None)
        state = None if generator is None else generator.get_state()
        try:
            yield from _own(loader)
        finally:
            if generator is not None:
                generator.set_state(state)


def _own(loader: Any) -> Any:
    """The loader with an iterator of its own: persistent workers serve one, and asking again rewinds the training's."""
    if getattr(loader, "persistent_workers", False):
        loader = copy(loader)
        loader._iterator = None
    return loader


def _steps(module: Any, batch: Any, names: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    return {name: _step(module, name, batch) for name in names if overrides(module, name)}


def _step(module: Any, name: str, batch: Any) -> Callable[[], Any]:
    """Call a step with what its signature asks for, as Lightning does."""
    _, *parameters = inspect.signature(getattr(type(module), name)).parameters.values()  # the first is self
    step = getattr(module, name)
    if any(p.name == "dataloader_iter" for p in parameters):
        return lambda: step(iter([(batch, 0, 0)]))
    if len(parameters) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return lambda: step(batch, 0)
    return lambda: step(batch)


def _stopped(module: Any, network: nn.Module, steps: Mapping[str, Callable[[], Any]]) -> Any:
    """Run one step after the other until one calls the network; its input."""
    problems = []
    for name, step in steps.items():
        try:
            with torch.no_grad(), _door(network), _muted(module):
                step()
            problems.append(f"{name} does not call it")
        except _EnteredError as entered:
            return placed(_as_example(network, *entered.call), network)
        except Exception as error:  # noqa: BLE001 - the user's own code; told below
            problems.append(f"{name} fails with {type(error).__name__}: {error}")
    raise TraceError(
        f"no input of the network ({type(bare(network)).__name__}) found: {'; '.join(problems) or 'there is no step'};"
        " name the network that the steps call, module='...', or see that they call it, and not its layers; or pass"
        " example=, what its forward takes"
    )


@contextmanager
def _door(network: nn.Module) -> Iterator[None]:
    """Raise `_EnteredError` when the network is called, and an error when one of its parts is called without it."""
    inner = bare(network)

    def enter(entered: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _EnteredError(args, kwargs)

    def bypass(name: str) -> Callable[..., None]:
        def stop(*_: Any) -> None:
            raise TraceError(f"it calls '{name}', a part of the network, and not the network")

        return stop

    with ExitStack() as stack:
        for called in {network, inner}:
            stack.callback(called.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
        for name, part in inner.named_modules():
            if part is not inner and has_convolutions(part):
                stack.callback(part.register_forward_pre_hook(bypass(name)).remove)
        if hasattr(inner, "training_step"):  # a LightningModule's step may say self.forward(x), past the hooks
            stack.callback(Patch(inner, "forward", lambda *args, **kwargs: enter(inner, args, kwargs)).undo)
        yield


@contextmanager
def _muted(module: Any) -> Iterator[None]:
    """The LightningModule without what would log or change optimizers in a step that is only looked at."""
    with ExitStack() as stack:
        for name in _MUTED:
            stack.callback(Patch(module, name, lambda *args, **kwargs: None).undo)
        yield


@contextmanager
def same_randomness() -> Iterator[None]:
    """All random number generators are afterwards what they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _as_example(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call as an example: positional arguments, or keyword arguments where there are any."""
    if not kwargs:
        return args
    names = [p.name for p in inspect.signature(bare(network).forward).parameters.values()]
    return dict(zip(names, args, strict=False)) | kwargs


def placed(example: Any, network: nn.Module) -> Any:
    """The example on the network's device and in its precision."""
    like = next(network.parameters())

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)

    return tree_map(place, example)
