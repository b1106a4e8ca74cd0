from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import networks
from dyncompress import exporting, formats
from dyncompress.conversion import convert
from dyncompress.errors import ExportError
from dyncompress.exporting import export, export_times
from dyncompress.formats import images_like, reopen
from dyncompress.latency import Latency
from dyncompress.planning import make_plan
from tests.newer import compiles, writes_onnx


@pytest.fixture
def student():
    net, x = networks.make(networks.ZeroPad)
    student = convert(net, make_plan(net, x, "50%", "dynet"))
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "router" in name:
                p.add_(0.1 * torch.randn_like(p))  # really dynamic
    return student.eval(), x


class Fixed(nn.Module):
    """Takes two images and no other number of them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).reshape(2, 64)


def operators(path):
    onnx = pytest.importorskip("onnx")
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def assert_same(path, net, x, *sizes):
    exported = reopen(path)
    for size in sizes:
        images = torch.randn(size, *x.shape[1:])
        with torch.no_grad():
            expected = net(images)
            error = (exported(images) - expected).abs().max() / expected.abs().max()
        assert error <= 1e-5, size


@writes_onnx
def test_one_onnx_file_takes_any_batch(student, tmp_path):
    pytest.importorskip("onnxruntime")
    net, x = student
    path = export(net, tmp_path / "s.onnx", x)
    assert_same(path, net, x, 1, 3, 5, 8)
    assert operators(path) == ["Scan"]
    assert [p.name for p in tmp_path.iterdir()] == ["s.onnx"]


@writes_onnx
def test_a_static_network_keeps_plain_convolutions(tmp_path):
    net, x = networks.make(networks.ZeroPad)
    path = export(net, tmp_path / "s.onnx", x)
    assert_same(path, net.eval(), x, 1, 3, 5)
    assert operators(path).count("Conv") == 3 and "Scan" not in operators(path)


@writes_onnx
@pytest.mark.parametrize("size", [1, 4])
def test_onnx_for_one_batch_size_has_no_loop(student, size, tmp_path):
    net, x = student
    path = export(net, tmp_path / "s.onnx", x, batch=size)
    assert_same(path, net, x, size)
    assert "Scan" not in operators(path)
    with pytest.raises(Exception, match="Got: 2 Expected: "):
        reopen(path)(torch.randn(2, *x.shape[1:]))


@writes_onnx
def test_where_images_mix_only_the_convolutions_are_looped_over(student, tmp_path):
    net, x = student
    net.register_forward_pre_hook(lambda net, args: args[0] - args[0].mean(0, keepdim=True))
    path = export(net, tmp_path / "s.onnx", x)
    assert_same(path, net, x, 3, 5)
    assert {"Scan", "ReduceMean"} <= set(operators(path))  # the mean over the batch is outside the loops


def test_exported_programs_take_any_batch(student, tmp_path):
    net, x = student
    assert_same(export(net, tmp_path / "s.pt2", x), net, x, 1, 3, 5, 8)


@pytest.mark.slow
@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in inductor itself
@pytest.mark.parametrize(("batch", "sizes"), [(None, (1, 3, 5, 8)), (1, (1,))])
def test_compiled_ahead_of_time(student, batch, sizes, tmp_path):
    net, x = student
    path = export(net, tmp_path / "s.pt2", x, compiled=True, batch=batch)
    assert_same(path, net, x, *sizes)


@compiles
def test_compiling_without_a_compiler_says_so(student, tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(ExportError, match=r"needs a C\+\+ compiler, and there is none .* install g\+\+ or clang"):
        export(student[0], tmp_path / "s.pt2", student[1], compiled=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [pytest.param("onnx", marks=writes_onnx), "pt2"])
def test_a_wrong_fold_does_not_pass(student, ending, tmp_path, monkeypatch):
    net, x = student
    fold = exporting.fold

    def wrong(student):
        folded = fold(student)
        with torch.no_grad():
            folded.head.linear.bias.add_(0.01)
        return folded

    monkeypatch.setattr(exporting, "fold", wrong)
    with pytest.raises(ExportError, match=r"batch 1 differs from the student by .*nothing was written"):
        export(net, tmp_path / f"s.{ending}", x)
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_right_for_one_image_only_does_not_pass(student, tmp_path, monkeypatch):
    net, x = student
    swapped = formats._Reopened(lambda x: net(x.flip(0)))
    monkeypatch.setattr(exporting, "reopen", lambda path: swapped)
    with pytest.raises(ExportError, match=r"batch 3 differs from the student"):
        export(net, tmp_path / "s.pt2", x)
    assert not any(tmp_path.iterdir())


def test_images_of_a_check_differ_even_behind_a_norm_or_a_pool():
    images = images_like(torch.randn(2, 3, 4, 4), 8)
    normed = nn.functional.normalize(images.flatten(1))
    assert torch.cdist(normed, normed).fill_diagonal_(1).min() > 0.1
    pooled = images.mean((2, 3))
    assert torch.cdist(pooled, pooled).fill_diagonal_(1).min() > 1e-3
    assert images_like(torch.tensor([[0, 1, 2]]), 3).tolist() == [[0, 1, 2], [2, 0, 1], [1, 2, 0]]


@pytest.mark.parametrize("ending", [pytest.param("onnx", marks=writes_onnx), "pt2"])
def test_a_network_whose_batch_is_fixed_is_exported_for_that_size(ending, tmp_path):
    net, x, path = Fixed().eval(), torch.randn(2, 3, 6, 6), tmp_path / f"f.{ending}"
    with pytest.raises(ExportError, match=r"Fixed doesn't run at batch 1.* pass batch=1, or the size that its code"):
        export(net, path, x)
    assert not any(tmp_path.iterdir())
    assert_same(export(net, path, x, batch=2), net, x, 2)


def test_arguments_are_checked(student, tmp_path):
    net, x = student
    with pytest.raises(ExportError, match=r"ends in '.tflite'; name the format by the ending: .onnx or .pt2"):
        export(net, tmp_path / "s.tflite", x)
    with pytest.raises(ExportError, match=r"batch 0 is no batch size; give one from 1"):
        export(net, tmp_path / "s.pt2", x, batch=0)
    with pytest.raises(ExportError, match=r"s.onnx' can't be compiled"):
        export(net, tmp_path / "s.onnx", x, compiled=True)
    assert not any(tmp_path.iterdir())


def test_an_earlier_onnx_exporter_is_refused(student, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, f, dynamo=False: None)
    with pytest.raises(
        ExportError, match=r"earlier ONNX exporter .* upgrade to torch 2\.6 or newer, or export to \*\.pt2"
    ):
        export(student[0], tmp_path / "s.onnx", student[1])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ratio", "level", "words"), [(0.5, "INFO", "0.50x the original's"), (1.2, "WARNING", "fewer MACs, no less time")]
)
def test_a_student_that_is_not_faster_is_told(student, ratio, level, words, tmp_path, monkeypatch, caplog):
    net, x = student
    found = {"original": {1: Latency(2.0, 1.0, 0.1)}, "student": {1: Latency(2.0 * ratio, ratio, 0.1)}}
    monkeypatch.setattr(exporting, "export_times", lambda *args, **kwargs: found)
    with caplog.at_level(logging.INFO, logger="dyncompress.exporting"):
        export(net, tmp_path / "s.pt2", x, original=networks.make(networks.ZeroPad)[0])
    (record,) = caplog.records
    assert record.levelname == level and words in record.getMessage()


def test_times_of_files_are_taken_in_pairs(tmp_path):
    x = torch.randn(1, 8, 48, 48)
    small, large = nn.Conv2d(8, 4, 1), nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(12)))
    paths = {name: export(net, tmp_path / f"{name}.pt2", x) for name, net in (("large", large), ("small", small))}
    times = export_times(paths, x, batch_sizes=(1, 2), rounds=5)
    assert times["large"][2].ratio == 1 and times["small"][1].ratio < 1 and times["small"][2].ratio < 1
