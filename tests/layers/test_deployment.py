"""Compiled, exported and distributed, a block computes what it computes in plain torch."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyncompress.layers import ConvSite, ConvSpec, DyNet, execution
from dyncompress.layers.execution import Strategy, run_as
from tests.newer import writes_onnx

# A grouped and a pointwise convolution beside a plain one, so that all strategies run.
SPECS = [
    ConvSpec(6, 8, (3, 3), padding=(1, 1)),
    ConvSpec(8, 8, (3, 3), padding=(1, 1), groups=2, padding_mode="reflect"),
    ConvSpec(8, 4, (1, 1)),
]


def block(**options: Any) -> nn.Sequential:
    net = nn.Sequential(*DyNet(**options).build([ConvSite("conv", spec, positions=64) for spec in SPECS]))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def images(batch: int) -> Tensor:
    return torch.randn(batch, 6, 8, 8)


def step(net: Any, x: Tensor) -> list[Tensor]:
    """Output and all gradients of one training step."""
    x = x.clone().requires_grad_()
    output = net(x)
    output.square().mean().backward()
    gradients = [x.grad, *(p.grad for p in net.parameters())]
    net.zero_grad()
    assert all(gradient is not None for gradient in gradients)
    return [output.detach(), *gradients]


def test_compiles_whole_for_any_batch() -> None:
    torch._dynamo.reset()
    net = block(reduction=2)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for batch in (4, 3, 1, 7):  # one compilation for 4, one for any other but 1, and one for 1
        x = images(batch)
        torch.testing.assert_close(step(compiled, x), step(net, x))


# Dynamo looks at .grad of what it is given, and torch warns of that on tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("first", [1, 2, 3])
def test_compiles_layer_by_layer(first: int) -> None:
    torch._dynamo.reset()
    net, x = block(), images(3)
    compiled = copy.deepcopy(net)
    for layer in compiled[:first]:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, x), step(net, x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # in inductor itself
def test_compiles_to_machine_code() -> None:
    torch._dynamo.reset()
    net, x = block(), images(3)
    torch.testing.assert_close(step(torch.compile(net, fullgraph=True), x), step(net, x))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")  # of the handover
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("router", ["block", "layer"])
def test_exports_with_any_batch(strict: bool, router: Any) -> None:
    net = block(router=router).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(net, (images(4),), dynamic_shapes=shapes, strict=strict)
    for batch in (1, 3, 4, 7):
        x = images(batch)
        torch.testing.assert_close(program.module()(x), net(x))
    assert net[1].handover is None or net(images(2)).shape == (2, 4, 8, 8)  # exporting left nothing behind


def test_what_is_fast_for_one_batch_is_not_exported_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    # In plain torch these send one batch of 20 through chunks of one image, or through all kernels at once.
    for large_kernel in (0, 1 << 20):
        monkeypatch.setattr(execution, "_CHUNK_BYTES", 1)
        monkeypatch.setattr(execution, "_SMALL_MAP", 1000)
        monkeypatch.setattr(execution, "_LARGE_KERNEL_BYTES", large_kernel)
        net = block().eval()
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        program = torch.export.export(net, (images(20),), dynamic_shapes=shapes)
        for batch in (1, 3, 20):
            x = images(batch)
            torch.testing.assert_close(program.module()(x), net(x), atol=1e-5, rtol=1e-5)


def onnx_session(net: nn.Module, example: Tensor, file: Path, **options: Any) -> tuple[Any, list[str]]:
    """The exported network in onnxruntime, and its operators in order."""
    pytest.importorskip("onnxscript")
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    torch.onnx.export(net, (example,), str(file), dynamo=True, verbose=False, **options)
    return runtime.InferenceSession(str(file)), [node.op_type for node in onnx.load(str(file)).graph.node]


def assert_runs(session: Any, net: nn.Module, batch: int) -> None:
    x = images(batch)
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), net(x), atol=1e-5, rtol=1e-5)


@writes_onnx
@pytest.mark.parametrize(("batch", "convolutions"), [(1, 3), (4, 2)])  # 1x1 is a matrix product for several images
def test_onnx_with_one_batch_size(batch: int, convolutions: int, tmp_path: Path) -> None:
    net = block().eval()
    session, operators = onnx_session(net, images(batch), tmp_path / "block.onnx")
    assert operators.count("Conv") == convolutions
    assert_runs(session, net, batch)


@writes_onnx
@pytest.mark.parametrize(("strategy", "operator", "count"), [("features", "Conv", 3), ("scan", "Scan", 2)])
def test_onnx_with_any_batch_size(strategy: Strategy, operator: str, count: int, tmp_path: Path) -> None:
    if strategy == "scan":
        pytest.importorskip("torch._higher_order_ops.scan")
    net, shapes = block().eval(), ({0: torch.export.Dim("batch")},)
    with torch.no_grad(), run_as(strategy):
        session, operators = onnx_session(net, images(4), tmp_path / "block.onnx", dynamic_shapes=shapes)
    assert operators.count(operator) == count
    for batch in (1, 3, 4, 7):
        assert_runs(session, net, batch)


WORKERS = """
import sys
import torch
from torch import nn
from dyncompress.layers import ConvSite, ConvSpec, DyNet

def work(rank, file):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    specs = [ConvSpec(6, 8, (3, 3), padding=(1, 1)), ConvSpec(8, 4, (1, 1))]
    net = nn.Sequential(*DyNet(reduction=2).build([ConvSite("conv", spec, positions=64) for spec in specs]))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.randn(4, 6, 8, 8)
    net(images).square().mean().backward()  # alone, on the images of both
    expected = [p.grad.clone() for p in net.parameters()]
    parallel = nn.parallel.DistributedDataParallel(net)
    for _ in range(2):  # a parameter that took no part in the first step would stop the second
        net.zero_grad()
        parallel(images[2 * rank : 2 * rank + 2]).square().mean().backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    torch.distributed.destroy_process_group()

torch.set_num_threads(1)
torch.multiprocessing.start_processes(work, args=sys.argv[1:], nprocs=2, start_method="fork")
"""


def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKERS, str(tmp_path / "store")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
