"""What a network is worth and what it takes: top-1 accuracy, latency (:mod:`dyncompress.latency`), bytes.

Measuring changes nothing: every submodule gets its own training flag back, the random generator its state,
the network its device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dyncompress.errors import DynCompressError
from dyncompress.latency import Latency, device_of, evaluating, measure_latency, move, run
from dyncompress.layers import DynamicConv

__all__ = ["Latency", "bank_bytes", "evaluate", "measure_latency", "param_bytes"]

LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def evaluate(net: nn.Module, loader: Iterable[Any], *, device: torch.device | str | None = None) -> float:
    """Top-1 accuracy of a classifier: correct predictions / predictions (micro average).

    Args:
        net: Gives logits, (B, classes) or (B, classes, ...) for dense labels, as a tensor or as ``.logits``.
        loader: Yields ``(inputs, labels)``, where inputs is a tensor or a tuple or dict of arguments of
            ``net``; or a dict with the labels (B, ...) under one of "labels", "label", "targets", "target",
            "y", beside the inputs.
        device: Where to run; the network is moved back afterwards. Default: where its parameters are.

    Returns:
        Accuracy in [0, 1]. Training flags, device and random generators are left as they were.

    Raises:
        DynCompressError: If the loader is empty or yields something else, logits and labels do not fit, or a logit
            is NaN.

    Example:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.eye(2))
        >>> evaluate(net, [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))])
        0.5
    """
    from torchmetrics.classification import MulticlassAccuracy  # here: it imports matplotlib, half a second

    home = device_of(net)
    place = home if device is None else torch.device(device)
    metric: MulticlassAccuracy | None = None
    try:
        net.to(place)
        # An epoch of a DataLoader draws from the global generator; training that follows must not notice.
        with evaluating(net), torch.random.fork_rng(devices=()), torch.inference_mode():
            for batch in loader:
                inputs, labels = move(labelled(batch), place)
                logits = logits_of(run(net, inputs))
                if metric is None:
                    metric = MulticlassAccuracy(logits.shape[1], average="micro").to(place)
                _check_fit(logits, labels)
                metric.update(logits, labels)
    finally:
        net.to(home)
    if metric is None:
        raise DynCompressError("the loader yielded no batch - accuracy needs at least one image - check the data set")
    return float(metric.compute())


def bank_bytes(net: nn.Module) -> int:
    """Bytes of the kernel banks: what the dynamic convolutions store in place of one kernel each.

    Args:
        net: Any network; one without dynamic convolutions has 0.
    """
    banks = (getattr(layer, "bank", None) for layer in net.modules() if isinstance(layer, DynamicConv))
    return _bytes(bank for bank in banks if isinstance(bank, Tensor))


def param_bytes(net: nn.Module) -> int:
    """Bytes of all parameters; a shared one counts once.

    Example:
        >>> param_bytes(nn.Linear(3, 2))
        32
    """
    return _bytes(net.parameters())


def labelled(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and labels of what a loader yields; see `evaluate`.

    Raises:
        DynCompressError: If it is no labelled batch.
    """
    inputs: Any
    if isinstance(batch, Mapping):
        named = {str(key): value for key, value in batch.items()}
        key = next((key for key in LABEL_KEYS if key in named), None)
        labels = named.pop(key) if key else None
        # A lone input goes in by position: its key names a column of the data, not an argument.
        inputs = next(iter(named.values())) if len(named) == 1 else named
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
        named = {"inputs": inputs}
    else:
        named, labels = {}, None
    if not named or not isinstance(labels, Tensor):
        keys = f" with keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise DynCompressError(
            f"the loader yields {type(batch).__name__}{keys} - allowed: (inputs, labels) with a tensor of "
            f"labels, or a dict with one of {', '.join(LABEL_KEYS)} beside the inputs - wrap the loader"
        )
    return inputs, labels


def logits_of(output: Any) -> Tensor:
    """Logits (B, classes, ...) in what a network gives.

    Raises:
        DynCompressError: If there are none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.ndim < 2 or found.shape[1] < 2:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise DynCompressError(
            f"the network gives {type(output).__name__}{shape} - accuracy needs logits (B, classes, ...) "
            "with two classes or more, as a tensor or as .logits - wrap the network to return them"
        )
    return found


def _check_fit(logits: Tensor, labels: Tensor) -> None:
    expected = (logits.shape[0], *logits.shape[2:])
    if labels.shape != expected or labels.is_floating_point():
        raise DynCompressError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)} - logits {tuple(logits.shape)} need "
            f"integer class numbers of shape {tuple(expected)} - check the data set"
        )
    if logits.isnan().any():  # argmax would take it for the largest, and so for an answer
        broken = int(logits.isnan().flatten(1).any(dim=1).sum())
        raise DynCompressError(
            f"the network gives NaN for {broken} of {logits.shape[0]} inputs of a batch - accuracy needs numbers - "
            "look for NaN in the data and in the weights, or evaluate in a precision with a wider range"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise DynCompressError(
            f"labels run from {int(labels.min())} to {int(labels.max())} - the network tells classes 0 to "
            f"{logits.shape[1] - 1} apart - check the data set or the network's last layer"
        )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
