"""int8 for the static part of a student, by onnxruntime's own tools: what it saves, and what it costs.

    python -m benchmarks.quantise [--widths 32 32 64 64] [--epochs 30]

Trains the digits recipe's network and a student of it for a minute, exports the student for batch 1, quantises every
convolution whose weights are constants, and the head, with images of the training set for calibration. Kernels that are
mixed per image are computed in fp32 and stay there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from torch import Tensor, nn

import dyncompress as dc
from dyncompress.exporting import export_times
from dyncompress.formats import reopen

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
CALIBRATION = 100  # images


class Images(CalibrationDataReader):  # type: ignore[misc]
    """Calibration data: images of the training set, one at a time."""

    def __init__(self, name: str, images: Tensor) -> None:
        self.feeds = ({name: image[None].numpy()} for image in images)

    def get_next(self) -> Any:
        """The next image as onnxruntime takes it, None at the end."""
        return next(self.feeds, None)


def static_part(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes to quantise: their weights are constants, and no kernel is made of what they return."""
    constants = {i.name for i in model.graph.initializer}
    to_sigmoid = {n.input[0] for n in model.graph.node if n.op_type == "Sigmoid"}  # routers
    return [
        n.name
        for n in model.graph.node
        if n.op_type in ("Conv", "Gemm") and n.input[1] in constants and not to_sigmoid & set(n.output)
    ]


def quantise(path: Path, out: Path, images: Tensor) -> Path:
    """An int8 version of a batch-1 export."""
    ready = out.with_suffix(".ready.onnx")
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
    model = onnx.load(str(ready))
    reader = Images(model.graph.input[0].name, images)
    names = static_part(model)
    quantize_static(str(ready), str(out), reader, QuantFormat.QDQ, nodes_to_quantize=names, per_channel=True)
    return out


def train(net: nn.Module, data: Any, epochs: int, lr: float) -> nn.Module:
    """A few epochs of SGD."""
    steps = epochs * len(data.train_dataloader())
    sgd = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, lr, total_steps=steps)
    net.train()
    for _ in range(epochs):
        for x, y in data.train_dataloader():
            sgd.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            sgd.step()
            schedule.step()
    return net.eval()


def accuracy(path: Path, data: Any) -> float:
    """Share of the test images that a batch-1 file gets right."""
    net = reopen(path, threads=1)
    right = [
        int(net(image[None]).argmax()) == int(label)
        for x, y in data.test_dataloader()
        for image, label in zip(x, y, strict=True)
    ]
    return sum(right) / len(right)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantise", description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--widths", type=int, nargs=4, default=[32, 32, 64, 64])
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args(argv)
    from digits import DigitsData, DigitsNet

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = DigitsData()
    images = torch.cat([x for x, _ in data.train_dataloader()])[:CALIBRATION]
    original = train(DigitsNet(options.widths), data, options.epochs, 0.1)
    plan = dc.make_plan(original, images[:2], "33%", "dynet")
    student = train(dc.convert(original, plan), data, options.epochs, 0.05)
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name, net in {"original": original, "student": student}.items():
            paths[name] = dc.export(net, Path(folder) / f"{name}.onnx", images[:2], batch=1)
            paths[f"{name}, int8"] = quantise(paths[name], Path(folder) / f"{name}8.onnx", images)
        times = export_times(paths, images[:1], rounds=200)
        for name, path in paths.items():
            took = times[name][1]
            Console().print(
                f"{name:15s} {path.stat().st_size / 1e3:6.0f} kB  {100 * accuracy(path, data):.2f} % right "
                f" {took.median_ms:.3f} ms, {took.ratio:.2f}x"
            )


if __name__ == "__main__":
    main()
