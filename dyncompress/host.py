"""What there is in a LightningModule and its Trainer: the network, and what stands in the way of converting it.

Nothing here imports Lightning. Two packages ship it under different names, and a class of one is none of the other;
so modules and callbacks are known by what they have, not by what they are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd

from dyncompress.errors import DynCompressError, PlanError, TraceError
from dyncompress.layers import DynamicConv

T = TypeVar("T")

CONVOLUTIONS = (_ConvNd, DynamicConv)
_FRAMEWORK = ("torch", "lightning", "pytorch_lightning", "lightning_fabric")


class NotYetError(TraceError):
    """The LightningModule has no network yet, or no data to see its input in; a later hook may bring them."""


def overrides(owner: object, name: str) -> bool:
    """Whether a class above the framework's defines this method.

    Example:
        >>> overrides(nn.ReLU(), "forward")
        False
    """
    home = next((c for c in type(owner).__mro__ if name in vars(c)), object)
    return home is not object and home.__module__.partition(".")[0] not in _FRAMEWORK


def find_network(module: nn.Module, path: str | None = None) -> tuple[str, nn.Module]:
    """The network to compress in a LightningModule.

    It is the module at ``path``, where one is given. Else the only child that contains convolutions; or the
    LightningModule itself (``""``), when it owns convolutions directly, or when the layers of its ``forward`` are
    spread over several children of which one has the convolutions (a backbone with a head beside it: the backbone's
    features are no class scores).

    Returns:
        Path and network. The network may be the wrapper that `torch.compile` returned: what the user calls.

    Raises:
        TraceError: If there is no such module, or there are several candidates.
        NotYetError: If there is no convolution, yet.
    """
    if path is not None:
        return path, _at(module, path)
    if any(isinstance(child, CONVOLUTIONS) for child in module.children()):
        return "", module
    children = {name: child for name, child in module.named_children() if not _is_metric(child)}
    found = {name: child for name, child in children.items() if has_convolutions(child)}
    if not found:
        raise NotYetError(
            f"{type(module).__name__} has no convolution; dyncompress compresses convolutional networks: name another"
            " module, or build the network in __init__, setup or configure_model"
        )
    if len(found) > 1:
        raise TraceError(
            f"{type(module).__name__} has several networks with convolutions: {', '.join(found)}; name the one to"
            f" compress, module='{next(iter(found))}' say, or module='' for all, where training_step calls self(x)"
        )
    name, child = next(iter(found.items()))
    beside = any(True for other in children.values() if other is not child for _ in other.parameters())
    if not overrides(child, "forward") and type(child).__name__ in ("ModuleList", "ModuleDict"):
        return "", module
    if beside and overrides(module, "forward"):
        return "", module
    return name, child


def _at(module: nn.Module, path: str) -> nn.Module:
    try:
        network = module.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in module.named_modules() if name]
        near = difflib.get_close_matches(path, names, n=3) or [name for name, _ in module.named_children()]
        raise TraceError(
            f"module='{path}' does not exist in {type(module).__name__}; near: {', '.join(near) or 'it has no modules'}"
        ) from None
    if not has_convolutions(network):
        raise TraceError(f"module='{path}' ({type(network).__name__}) has no convolution; name a convolutional network")
    return network


def has_convolutions(network: nn.Module) -> bool:
    """Whether there is a convolution in it, static or dynamic."""
    return any(isinstance(m, CONVOLUTIONS) for m in network.modules())


def _is_metric(module: nn.Module) -> bool:
    """Torchmetrics' metrics may hold networks (FID, LPIPS), which are not the user's."""
    return any(c.__module__.startswith("torchmetrics.") for c in type(module).__mro__)


# ---- guards ------------------------------------------------------------------------------------------------------


def refuse_spawned(trainer: Any) -> None:
    """Raise in a process that was spawned or forked from the user's: its module is a copy.

    Raises:
        DynCompressError: Names the strategy and the way out.
    """
    if starts_processes(trainer):
        raise DynCompressError(
            f"{type(trainer.strategy).__name__} trains in processes that it starts from this one, and loads their"
            " weights into the module here, which would still have its original shapes; call"
            " callback.attach(model, example) before trainer.fit, or choose strategy='ddp'"
        )


def starts_processes(trainer: Any) -> bool:
    """Whether the Trainer trains a copy of the module, in processes that were spawned or forked from the user's."""
    launcher = type(getattr(trainer.strategy, "launcher", None)).__name__
    return launcher in ("_MultiProcessingLauncher", "_XLALauncher")


def refuse_split(network: nn.Module, name: str) -> None:
    """Raise when the network's weights are spread over processes already, as FSDP and tensor parallelism do.

    Raises:
        DynCompressError: Names the first such parameter and the way out.
    """
    split = [key for key, parameter in network.named_parameters() if hasattr(parameter, "full_tensor")]
    if split:
        raise DynCompressError(
            f"{len(split)} parameters of the network '{name}' are split over processes already, {split[0]} for one, and"
            " only a whole network can be converted; build it in __init__ or setup, and leave to configure_model only"
            " the splitting (fully_shard)"
        )


def refuse_copies(trainer: Any, module: nn.Module, asking: object) -> None:
    """Raise when a callback copied the module before it was converted, as weight averaging does.

    Raises:
        DynCompressError: Names the callback.
    """
    holder = copy_holder(trainer, module, asking)
    if holder is not None:
        raise DynCompressError(
            f"{holder} copied the module before DynCompress converted it, and would average networks of different"
            " shapes; list DynCompress before it in Trainer(callbacks=[...]), and build the network in __init__"
        )
    holder = layer_holder(trainer, module)
    if holder is not None:
        raise DynCompressError(
            f"{holder} has noted layers of the original network, which the compressed one does not have; list"
            " DynCompress before it in Trainer(callbacks=[...]), and let it find the layers itself"
        )


def copy_holder(trainer: Any, module: nn.Module, asking: object) -> str | None:
    """Name of a callback, other than the one that asks, that holds a copy of the module."""
    for callback in [c for c in trainer.callbacks if c is not asking]:
        for value in vars(callback).values():
            if isinstance(value, nn.Module) and value is not module:
                if any(type(m) is type(module) and m is not module for m in value.modules()):
                    return type(callback).__name__
    return None


def layer_holder(trainer: Any, module: nn.Module) -> str | None:
    """Name of a callback that has a list of (layer of the module, name of its weight), as pruning does."""
    layers = set(module.modules())
    for callback in trainer.callbacks:
        for value in vars(callback).values():
            pairs = [item for item in value if isinstance(item, tuple)] if isinstance(value, (list, tuple)) else []
            if any(isinstance(part, nn.Module) and part in layers for pair in pairs for part in pair[:1]):
                return type(callback).__name__
    return None


def is_split(trainer: Any, network: nn.Module) -> bool:
    """Whether the network's weights are spread over processes, or flattened, so that no tensor can be written whole."""
    return _shards(trainer) or any(hasattr(parameter, "full_tensor") for parameter in network.parameters())


def _shards(trainer: Any) -> bool:
    """Whether the strategy puts flat parameters in the place of the module's."""
    return any(c.__name__ in ("FSDPStrategy", "DeepSpeedStrategy") for c in type(trainer.strategy).__mro__)


def check_optimizers(trainer: Any, network: nn.Module, name: str) -> None:
    """Raise unless the optimizers train every trainable parameter of the converted network.

    Raises:
        PlanError: Names the first parameter that they miss.
    """
    if not trainer.optimizers or _shards(trainer):
        return
    trained = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    missed = [key for key, p in network.named_parameters() if p.requires_grad and id(p) not in trained]
    if missed:
        raise PlanError(
            f"no optimizer trains {len(missed)} parameters of the converted network '{name}', {missed[0]} for one; an"
            " optimizer that was made in __init__ holds the original's: make it in configure_optimizers, and freeze"
            " with requires_grad_(False) what shall not be trained"
        )


def from_rank_zero(trainer: Any, decide: Callable[[], T]) -> T:
    """What rank 0 decides, or the error it meets, on every rank: apart, they could differ, or wait for ever."""
    if trainer is None or trainer.world_size == 1:
        return decide()
    answer: T | None = None
    problem: DynCompressError | None = None
    if trainer.is_global_zero:
        try:
            answer = decide()
        except DynCompressError as error:
            problem = error
        except Exception as error:  # noqa: BLE001 - whatever it is, the others wait for an answer; raised below
            problem = DynCompressError(f"rank 0 failed with {type(error).__name__}: {error}; see its own output")
            problem.__cause__ = error
    answer, problem = trainer.strategy.broadcast((answer, problem))
    if problem is not None:
        raise problem
    return answer
