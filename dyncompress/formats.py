"""The files that a student is deployed as: how each is written, and how it is run again."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dyncompress import files
from dyncompress.errors import ExportError, shown
from dyncompress.graph import as_call
from dyncompress.layers import DynamicConv
from dyncompress.layers.execution import run_as

Writer = Callable[[nn.Module, Path, Any, "int | None"], None]
"""Writes a folded network to a path, given an example and the only batch size, or None for any."""


def ways_to_write(student: nn.Module, path: Path, batch: Any, compiled: bool) -> list[Writer]:
    """The ways to write this format, the best one first: the next is for networks that it is wrong for."""
    if path.suffix not in (".onnx", ".pt2"):
        raise ExportError(f"'{path}' ends in '{path.suffix}'; name the format by the ending: .onnx or .pt2")
    if batch is not None and (type(batch) is not int or batch < 1):
        raise ExportError(f"batch {shown(batch)} is no batch size; give one from 1, or None for a file that takes any")
    if path.suffix == ".pt2":
        return [_write_compiled if compiled else _write_program]
    if compiled:
        raise ExportError(f"'{path}' can't be compiled: onnxruntime does that when it loads; give compiled to *.pt2")
    _check_exporter()
    if batch is not None:
        return [_write_onnx]
    if any(isinstance(module, DynamicConv) for module in student.modules()):
        return [_write_onnx_loop, _write_onnx]
    return [_write_onnx, _write_onnx_loop]


def reopen(path: str | Path, threads: int | None = None) -> nn.Module:
    """An exported file as a network: called as the student is, on the CPU. For checks and timing.

    Args:
        path: What `export` wrote.
        threads: Threads of onnxruntime; by default its own choice. The other formats have torch's.

    Returns:
        A module without parameters. An ONNX file returns a list of its outputs where there are several.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        return _Reopened(_onnx_call(path, threads))
    with zipfile.ZipFile(path) as archive:
        compiled = any("/aotinductor/" in name for name in archive.namelist())
    if compiled:
        from torch import _inductor  # slow to import

        return _Reopened(_inductor.aoti_load_package(str(path)))
    return _Reopened(torch.export.load(path).module().forward)  # which itself refuses eval()


class _Reopened(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _onnx_call(path: Path, threads: int | None) -> Callable[..., Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [t.numpy() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        found = [torch.as_tensor(t) for t in session.run(None, dict(zip(names, tensors, strict=True)))]
        return found[0] if len(found) == 1 else found

    return call


def images_like(example: Any, size: int) -> Any:
    """``size`` images made from an example: its first one, each time moved on and scaled, so that no two are equal.

    Scaled alone they would be equal behind a norm, moved alone behind a pool.
    """

    def grow(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0:
            return t
        first = t[0].flatten()
        moved = [first.roll(i * max(1, len(first) // size)) for i in range(size)]
        t = torch.stack(moved).view(size, *t.shape[1:])
        if t.is_floating_point():
            t = t * torch.linspace(1.0, 1.5, size, dtype=t.dtype).view([-1] + [1] * (t.dim() - 1))
        return t

    return tree_map(grow, example)


@contextmanager
def _exporting(net: nn.Module, batch: int | None) -> Iterator[None]:
    try:
        with torch.no_grad():
            yield
    except (ExportError, OSError):
        raise
    except Exception as error:  # whatever torch's tracers meet in the network's own code; chained
        where, way = ("for any batch", "pass batch=1") if batch is None else (f"at batch {batch}", "simplify its code")
        raise ExportError(
            f"torch can't export {type(net).__name__} {where} ({files.reason(error)}); {way}, or try the other format"
        ) from error


def _check_exporter() -> None:
    try:
        import onnx  # noqa: F401 - what torch's exporter needs, with the next
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"ONNX export needs '{error.name}'; pip install 'dyncompress[export]'") from None
    if not {"kwargs", "optimize"} <= signature(torch.onnx.export).parameters.keys():
        raise ExportError(
            f"torch {torch.__version__} has an earlier ONNX exporter than this is written for; upgrade to torch 2.6 or"
            " newer, or export to *.pt2"
        )


def _write_onnx(net: nn.Module, path: Path, example: Any, batch: int | None) -> None:
    """One graph for the batch; where it may be any, dynamic convolutions are loops in it."""
    with _exporting(net, batch), run_as("scan") if batch is None else nullcontext():
        _onnx_program(net, example, batch).save(str(path))


def _write_onnx_loop(net: nn.Module, path: Path, example: Any, batch: int | None) -> None:
    """The graph of one image, in a loop over the batch.

    In it every dynamic convolution is a plain one, which onnxruntime fuses with what follows; one by one in loops of
    their own they would not be. At batch 8 on one thread it is no slower, either: convolutions on a CPU gain nothing
    from a batch.
    """
    with _exporting(net, batch):
        program = _onnx_program(net, example, 1)
        program.model.graph = _loop(program.model.graph)
        program.save(str(path))


def _onnx_program(net: nn.Module, example: Any, batch: int | None) -> Any:
    args, kwargs = as_call(images_like(example, batch or 2))
    shapes = None if batch else _any_batch(args, kwargs)
    return torch.onnx.export(net, args, kwargs=kwargs, dynamo=True, verbose=False, optimize=True, dynamic_shapes=shapes)


def _loop(body: Any) -> Any:
    """A graph that runs ``body``, a graph for batch 1, on each image of a batch: one Scan."""
    from onnxscript import ir

    def like(value: Any, name: str, *shape: Any) -> Any:
        return ir.Value(name=name, type=value.type, shape=ir.Shape(shape))

    axis = ir.node("Constant", [], {"value_ints": [0]})
    batches, images, constants, outputs, before, after = [], [], [], [], [axis], []
    for value in list(body.inputs):
        if not value.shape:  # no batch in it: every image sees the same
            constants.append(value)
            continue
        name, (_, *shape) = value.name, value.shape
        batches.append(like(value, name, "batch", *shape))
        images.append(like(value, f"{name}.image", *shape))
        single = ir.node("Unsqueeze", [images[-1], axis.outputs[0]], outputs=[like(value, f"{name}.single", 1, *shape)])
        ir.convenience.replace_all_uses_with(value, single.outputs[0])
        before.append(single)
    for value in body.outputs:
        if not value.shape or value.shape[0] != 1:
            raise ExportError(
                f"output '{value.name}' has shape {value.shape} for one image, and no leading batch in it"
            )
        name, (_, *shape) = value.name, value.shape
        outputs.append(like(value, name, "batch", *shape))
        value.name = f"{name}.single"
        after.append(ir.node("Squeeze", [value, axis.outputs[0]], outputs=[like(value, f"{name}.image", *shape)]))
    body.inputs[:], body.outputs[:] = images, [node.outputs[0] for node in after]
    body.insert_before(body[0], before)
    body.extend(after)
    axis.outputs[0].name = "batch.axis"
    scan = ir.node("Scan", batches, {"num_scan_inputs": len(batches), "body": body}, outputs=outputs)
    imports = dict(body.opset_imports)
    return ir.Graph([*batches, *constants], outputs, nodes=[scan], opset_imports=imports, name="any_batch")


def _any_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """``dynamic_shapes`` with one name for the leading dimension of all tensors."""
    batch = torch.export.Dim("batch", max=1 << 16)  # torch 2.4 wants a bound
    shapes = tree_map(lambda t: {0: batch} if isinstance(t, Tensor) and t.dim() else None, (args, dict(kwargs)))
    return (*shapes[0], *shapes[1].values())


def _program(net: nn.Module, example: Any, batch: int | None) -> Any:
    args, kwargs = as_call(images_like(example, batch or 2))
    return torch.export.export(net, args, kwargs, dynamic_shapes=None if batch else _any_batch(args, kwargs))


def _write_program(net: nn.Module, path: Path, example: Any, batch: int | None) -> None:
    with _exporting(net, batch):
        archive = io.BytesIO()  # written to a full disk, torch's own archive ends the process
        torch.export.save(_program(net, example, batch), archive)
    path.write_bytes(archive.getbuffer())


def _write_compiled(net: nn.Module, path: Path, example: Any, batch: int | None) -> None:
    from torch import _inductor  # slow to import

    build = getattr(_inductor, "aoti_compile_and_package", None)
    if build is None or "args" in signature(build).parameters:
        raise ExportError(f"torch {torch.__version__} can't package a compiled program; upgrade to torch 2.6 or newer")
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ExportError(
            f"compiled=True needs a C++ compiler, and there is none ({files.reason(error)}); install g++ or clang, or"
            " name yours in CXX; without compiled=True, *.pt2 needs none"
        ) from None
    # Compiled, groups per image are those of the example, whatever the batch; a loop does not compile at all.
    with _exporting(net, batch), run_as("features") if batch is None else nullcontext():
        build(_program(net, example, batch), package_path=str(path))
