"""Ways to run a network: number format, memory layout, compiler, CUDA graph. A mode is some of these words, by "+"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
WORDS = ("fp32", "tf32", "bf16", "channels_last", "compiled", "graphed")
"""fp32 is exact; tf32 lets a GPU round what it multiplies; bf16 is the weights' format in inference and autocast's in
training; graphed replays a captured CUDA graph. Without tf32 or bf16 a mode is in fp32."""
DEFAULT = {
    "cpu": ("fp32",),
    "cuda": (
        "fp32",
        "tf32",
        "bf16",
        "bf16+channels_last",
        "bf16+channels_last+compiled",
        "bf16+channels_last+graphed",
    ),
}


def words(mode: str) -> set[str]:
    """The words of a mode.

    Raises:
        ValueError: If there is no such word.
    """
    found = set(mode.split("+"))
    if found - set(WORDS):
        raise ValueError(f"mode {mode!r} is unknown; join words of {', '.join(WORDS)} by '+'")
    return found


@contextmanager
def conditions(mode: str) -> Iterator[None]:
    """What a mode asks of the process, while the context lasts."""
    said = words(mode)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = "tf32" in said
    if "compiled" in said:
        torch._dynamo.reset()  # it gives a class up after a few instances, without a word
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def inference(net: nn.Module, x: Tensor, mode: str) -> Callable[[], Tensor]:
    """A forward pass in eval mode, of a copy of the network. Call what it returns under `torch.inference_mode`."""
    said = words(mode)
    net, x = _laid_out(deepcopy(net).eval().requires_grad_(False), x, said)
    if "bf16" in said:
        net, x = net.to(torch.bfloat16), x.to(torch.bfloat16)
    forward = _compiled(net, said)
    if "graphed" in said:
        with torch.inference_mode():
            return _graphed(lambda: forward(x))
    return lambda: forward(x)


def training(
    net: nn.Module,
    x: Tensor,
    mode: str,
    backward: Callable[[Tensor], None],
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
) -> Callable[[], None]:
    """A forward and backward pass in train mode, of a copy of the network, and a step of the optimizer.

    Args:
        net: The network.
        x: Its input; where it requires a gradient, it gets one.
        mode: The mode.
        backward: Takes the output, and sends a gradient back from it.
        optimizer: Makes one from parameters; None to leave them as they are.
    """
    said = words(mode)
    net, x = _laid_out(deepcopy(net).train(), x, said)
    forward = _compiled(net, said)
    stepper = None if optimizer is None else optimizer(net.parameters())

    def step() -> None:
        net.zero_grad(set_to_none=True)
        x.grad = None
        cast = torch.autocast(
            x.device.type, torch.bfloat16, enabled="bf16" in said, cache_enabled="graphed" not in said
        )
        with cast:
            output = forward(x)
        backward(output)
        if stepper is not None:
            stepper.step()

    return _graphed(step) if "graphed" in said else step


def _laid_out(net: nn.Module, x: Tensor, said: set[str]) -> tuple[nn.Module, Tensor]:
    net = net.to(x.device)
    if "channels_last" not in said:
        return net, x
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.ndim == 4:  # banks have more dimensions, and no such layout
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return net, x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(x.requires_grad)


def _compiled(net: nn.Module, said: set[str]) -> Callable[[Tensor], Tensor]:
    return torch.compile(net, dynamic=False) if "compiled" in said else net


def _graphed(call: Callable[[], T]) -> Callable[[], T]:
    """The call as a CUDA graph: what it launched once is launched again, without Python.

    Raises:
        RuntimeError: If there is no CUDA device, or the call can't be captured.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA graph takes a CUDA device; leave 'graphed' out of the mode")
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # capturing asks for workspaces that are there, and for a stream of its own
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> T:
        graph.replay()
        return output

    return replay
