"""Numerics: broken, extreme, empty and oddly laid out inputs do to a student what they do to a static network."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import prod
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from dyncompress import DynCompress, evaluate, fold, make_plan
from dyncompress.conversion import convert, plan_of, recalibrate
from dyncompress.errors import DistillationError, DynCompressError
from dyncompress.layers import ConvSite, ConvSpec, get_method, list_methods, load_static
from dyncompress.layers.router import RouterLinear
from tests.classifiers import Net, classifier, equal, fit, weights

Classifier = classifier()
METHODS = list_methods()
# ODConv doubles its input at most; DCD and DyCo3D multiply two numbers that grow with it, and two layers do so twice.
LARGEST = {"odconv": 1e30, "dcd": 1e10, "dyco3d": 1e4}
# A block of two layers each, with the size of its input and a batch: every way in which a dynamic convolution runs.
BLOCKS: dict[str, tuple[list[ConvSpec], tuple[int, ...], int]] = {
    "1-d": ([ConvSpec(4, 6, (3,), padding=(1,)), ConvSpec(6, 4, (3,), stride=(2,))], (9,), 3),
    "2-d": ([ConvSpec(4, 6, (3, 3), padding=(1, 1)), ConvSpec(6, 4, (3, 3), padding=(1, 1), groups=2)], (6, 5), 3),
    "3-d": ([ConvSpec(2, 4, (3, 3, 3), padding=(1, 1, 1)), ConvSpec(4, 2, (1, 3, 3))], (4, 4, 4), 3),
    "pointwise": ([ConvSpec(6, 8, (1, 1)), ConvSpec(8, 6, (1, 1))], (4, 4), 3),
    "wide": ([ConvSpec(128, 128, (3, 3), padding=(1, 1)), ConvSpec(128, 128, (3, 3), padding=(1, 1))], (5, 5), 16),
}
# How a wide layer runs is no matter of the method: three show it.
EVERY = [
    pytest.param(method, block, id=f"{method} {block}")
    for method, block in product(METHODS, BLOCKS)
    if block != "wide" or method in ("condconv", "dynet", "static")
]
QUICK = [case for case in EVERY if "wide" not in str(case.id)]
SAME = [case for case in QUICK if "c2sp" not in str(case.id)]  # even kernels are other kernels


def pair(method: str, block: str) -> tuple[nn.Sequential, nn.Sequential]:
    """A trained dynamic block and a static one of the same shapes, with weights of the same size."""
    torch.manual_seed(0)
    specs, size, _ = BLOCKS[block]
    sites = []
    for index, spec in enumerate(specs):
        size = spec.output_size(size)
        sites.append(ConvSite(str(index), spec, positions=prod(size)))
    dynamic, static = (nn.Sequential(*get_method(name).build(sites)).eval() for name in (method, "static"))
    for parameter in [*dynamic.parameters(), *static.parameters()]:
        nn.init.normal_(parameter, std=0.1)
    return dynamic, static


def images(block: str, batch: int | None = None) -> Tensor:
    specs, size, usual = BLOCKS[block]
    return torch.randn(usual if batch is None else batch, specs[0].in_channels, *size)


def student(method: str = "dynet", target: str = "45%") -> nn.Module:
    """A converted classifier whose coefficients depend on its input."""
    torch.manual_seed(0)
    net = convert(Net(), make_plan(Net(), torch.zeros(1, 3, 8, 8), target, method))
    for router in (m for m in net.modules() if isinstance(m, RouterLinear)):
        nn.init.normal_(router.weight)
    return net


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and expected.isfinite().all()
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---- NaN and infinity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("method", "block"), EVERY)
def test_broken_image(method: str, block: str, value: float, record_property: Callable[..., None]) -> None:
    """NaN or infinity in one image leaves the outputs of the other images of its batch bit by bit what they were."""
    net, _ = pair(method, block)
    x = images(block)
    broken = x.index_fill(0, torch.tensor(1), value)
    with torch.no_grad():
        expected, found = net(x), net(broken)
    others = [index for index in range(len(x)) if index != 1]
    assert torch.equal(found[others], expected[others])
    assert not found[1].isfinite().any()  # and it's not hidden where it is
    record_property("figure", f"{method} {block}, {value}: {len(others)} of {len(others)} other images equal")


@pytest.mark.parametrize("method", METHODS)
def test_broken_image_in_a_network(method: str, record_property: Callable[..., None]) -> None:
    """The same in a whole network: one broken image of a batch, and the answers to the others are equal."""
    net, x = student(method).eval(), torch.randn(8, 3, 8, 8)
    broken = x.clone()
    broken[5, 0, 0, 0] = float("nan")
    with torch.no_grad():
        expected, found = net(x), net(broken)
    others = [index for index in range(8) if index != 5]
    assert torch.equal(found[others], expected[others])
    assert found[5].isnan().all()
    record_property("figure", f"{method}: 7 of 7 other answers equal")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("method", "block"), SAME)
def test_broken_pixel(method: str, block: str, value: float, record_property: Callable[..., None]) -> None:
    """One broken pixel spoils the outputs that a static convolution would spoil, and no other."""
    net, static = pair(method, block)
    x = images(block)
    x[(1, 0) + (0,) * (x.ndim - 2)] = value
    with torch.no_grad():
        fine, expected = net[0](x).isfinite(), static[0](x).isfinite()
    assert torch.equal(fine, expected)
    assert 0 < expected.sum() < expected.numel()
    record_property("figure", f"{method} {block}, {value}: the same {int((~fine).sum())} of {fine.numel()} outputs")


class Broken(Classifier):
    """Its batches have a NaN in one image from some step on."""

    first = 2

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        if self.trainer.training and self.trainer.global_step >= self.first:
            x = x.clone()
            x[1, 0, 0, 0] = float("nan")
        return x, y


class Last(pl.Callback):
    """Parameters after every batch."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.parameters = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.steps = trainer.global_step


def test_broken_batch(record_property: Callable[..., None]) -> None:
    """NaN in a training batch stops a distilled training with an error that says so, before any weight changes."""
    torch.manual_seed(0)
    module, last = Broken(), Last()
    with pytest.raises(DistillationError, match=r"the loss of training_step is nan in epoch 0, step 2; lower the"):
        fit(module, DynCompress("50%"), last)
    assert last.steps == 2
    now = dict(module.named_parameters())
    assert now.keys() == last.parameters.keys()
    assert all(torch.equal(now[name], value) for name, value in last.parameters.items())
    record_property("figure", f"{len(now)} of {len(now)} parameters as after the last good step")


@pytest.mark.parametrize("batches", [0, 2])
def test_broken_first_batch(batches: int, record_property: Callable[..., None]) -> None:
    """NaN in the very first batch, too: the network is then the original again, statistics included."""
    torch.manual_seed(0)
    module = Broken()
    module.first = 0
    before = weights(module)
    with pytest.raises(DynCompressError, match=r"NaN|is nan in epoch 0, step 0"):
        fit(module, DynCompress("50%", recalibrate=batches))
    assert plan_of(module) is None and equal(module, before)
    record_property("figure", f"{len(before)} of {len(before)} tensors as before, with {batches} batches of statistics")


def test_broken_statistics(record_property: Callable[..., None]) -> None:
    """BatchNorm statistics are never estimated on broken numbers: an error says so and the old ones are put back."""
    net = student()
    before = weights(net)
    good = torch.randn(4, 3, 8, 8)
    bad = good.clone()
    bad[2, 1, 3, 3] = float("nan")
    with pytest.raises(DynCompressError, match=r"BatchNorm 'stem.1'.* not finite"):
        recalibrate(net, [good, bad])
    assert equal(net, before)
    record_property("figure", f"{len(before)} of {len(before)} tensors as before")


def test_broken_score() -> None:
    """Accuracy is never counted on broken answers: an error says for how many inputs the network gives NaN."""
    x = torch.randn(4, 3, 8, 8)
    x[2] = float("nan")
    with pytest.raises(DynCompressError, match="NaN for 1 of 4 inputs of a batch - accuracy needs numbers"):
        evaluate(student(), [(x, torch.zeros(4).long())])


# ---- extreme values ------------------------------------------------------------------------------------------------

SCALES = [1e-40, 1e-30, 1e-10, 1e4, 1e10, 1e20, 1e30, 3e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("method", "block"), QUICK)
def test_extreme_inputs(method: str, block: str, dtype: torch.dtype, record_property: Callable[..., None]) -> None:
    """From 1e-40 to 3e38 (or where a method squares inputs), outputs are finite where the static network's are."""
    net, static = started(method, block, 1e-4)
    for router in (m for m in net.modules() if isinstance(m, RouterLinear)):
        nn.init.normal_(router.weight)
    net, static = net.to(dtype), static.to(dtype)
    scales = [scale for scale in SCALES if scale <= LARGEST.get(method, 3e38)]
    for scale in scales:
        for x in (images(block).clamp(-1, 1), torch.ones_like(images(block))):
            x = (x * scale).to(dtype).requires_grad_()
            for part in (net, static):
                part.zero_grad()
                out = part(x)
                assert out.isfinite().all(), scale
                if scale <= 1e10:  # beyond, gradients are as large as that, and their sums larger
                    out.sum().backward()
                    assert all(p.grad.isfinite().all() for p in part.parameters())
    record_property("figure", f"{method} {block}: all of {2 * len(scales)} inputs up to {scales[-1]:g} finite")


def started(method: str, block: str, scale: float) -> tuple[nn.Sequential, nn.Sequential]:
    """A dynamic block that was warm-started from a static one with weights of that size."""
    net, static = pair(method, block)
    for layer, conv in zip(net, static, strict=True):
        nn.init.normal_(conv.weight)
        nn.init.normal_(conv.bias)
        with torch.no_grad():
            conv.weight.mul_(scale)
            conv.bias.mul_(scale)
        load_static(layer, conv.weight, conv.bias, spare=scale * torch.randn(5, *conv.weight.shape[1:]))
    return net, static


@pytest.mark.parametrize("scale", [0.0, 1e-36, 1e-20, 1e20, 1e36])
@pytest.mark.parametrize(("method", "block"), SAME)
def test_warm_start(method: str, block: str, scale: float, record_property: Callable[..., None]) -> None:
    """The student starts as the static convolution for weights of any size, for zeros too."""
    net, static = started(method, block, scale)
    x = images(block)
    with torch.no_grad():
        out, expected = net[0](x), static[0](x)
    found = relative(out, expected) if scale else out.abs().max().item()
    assert found < (1e-6 if scale == 0 else 1e-5)
    record_property("figure", f"{method} {block}, weights {scale:g}: {found:.1e}")


@pytest.mark.parametrize("value", [0.0, 1.0, -1e4])
@pytest.mark.parametrize("method", METHODS)
def test_constant_inputs(method: str, value: float, record_property: Callable[..., None]) -> None:
    """A batch of one and the same constant trains as any other: finite outputs, gradients and statistics."""
    net, x = student(method).train(), torch.full((4, 3, 8, 8), value)
    out = net(x)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(b.isfinite().all() for b in net.buffers() if b.is_floating_point())
    record_property("figure", f"{method}, all {value:g}: {sum(1 for _ in net.parameters())} finite gradients")


WEIGHTS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("dtype", "autocast"), [*product(WEIGHTS, [False]), *product(WEIGHTS[:2], [True])])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("auto", "static", "c2sp")])
def test_coefficients(method: str, dtype: torch.dtype, autocast: bool, record_property: Callable[..., None]) -> None:
    """Coefficients are computed in 32 bits at least, in 64 for 64, whatever autocast and the weights are."""
    net, seen = pair(method, "pointwise")[0].to(dtype), []
    for router in (m for m in net.modules() if isinstance(m, RouterLinear)):
        router.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert net(images("pointwise").to(dtype)).isfinite().all()
    expected = torch.promote_types(dtype, torch.float32)
    assert seen and set(seen) == {expected}
    how = " under bf16 autocast" if autocast else ""
    record_property("figure", f"{method}, {str(dtype)[6:]}{how}: coefficients {str(expected)[6:]}")


# ---- shapes and layouts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("method", "block"), EVERY)
def test_empty_batch(method: str, block: str, training: bool, record_property: Callable[..., None]) -> None:
    """A batch of no image gives no output, of the shape that a static network gives, and gradients of zero."""
    results = []
    for net in pair(method, block):
        x = images(block, batch=0).requires_grad_()
        out = net.train(training)(x)
        out.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        assert all(p.grad is None or not p.grad.any() for p in net.parameters())
        assert all(p.grad is not None for name, p in net.named_parameters() if "router" not in name)
        results.append(out)
    assert results[0].shape == results[1].shape and results[0].shape[0] == 0
    record_property("figure", f"{method} {block}: output {tuple(results[0].shape)}")


def outcome(net: nn.Module, x: Tensor) -> str:
    """Shape of the answer, or torch's error up to the number of channels."""
    try:
        out = net(x)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).partition('torch.Size')[0]}"
    out.sum().backward()
    assert out.isfinite().all()
    return f"{tuple(out.shape)}"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 3, 1, 1), (2, 3, 1, 1), (0, 3, 8, 8), (1, 3, 3, 8)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_odd_batches(method: str, shape: tuple[int, ...], training: bool, record_property: Callable[..., None]) -> None:
    """A batch of one or none, and images of one pixel: a network does what the static one does, errors included."""
    found, expected = (outcome(net.train(training), torch.randn(shape)) for net in (student(method), Net()))
    assert found == expected
    record_property("figure", f"{method}, {'train' if training else 'eval'} {shape}: {found[:60]}")


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other pixel": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda x: x[:1, :, :1, :1].expand(4, -1, 8, 8),
    "a slice of channels": lambda x: torch.cat([x, x], dim=1)[:, 3:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_layouts(method: str, layout: str, record_property: Callable[..., None]) -> None:
    """Inputs in any memory layout give the same outputs and gradients."""
    net = student(method).eval()
    given = LAYOUTS[layout](torch.randn(4, 3, 8, 8))
    plain = given.clone(memory_format=torch.contiguous_format)
    assert torch.equal(given, plain) and given.stride() != plain.stride()
    gradients, outputs = [], []
    for x in (given, plain):
        net.zero_grad()
        outputs.append(net(x))
        outputs[-1].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    found = max(relative(outputs[0].detach(), outputs[1].detach()), relative(gradients[0], gradients[1]))
    assert found < 1e-5
    record_property("figure", f"{method}, {layout}: {found:.1e}")


@pytest.mark.parametrize("method", METHODS)
def test_frozen(method: str, record_property: Callable[..., None]) -> None:
    """Frozen weights get no gradient and the input gets its own; without gradients nothing is recorded."""
    net, x = student(method).eval(), torch.randn(2, 3, 8, 8, requires_grad=True)
    net(x).square().sum().backward()
    assert x.grad is not None
    expected, x.grad = x.grad, None
    net.zero_grad()
    net.requires_grad_(False)
    net(x).square().sum().backward()
    assert x.grad is not None and all(p.grad is None for p in net.parameters())
    found = relative(x.grad, expected)
    assert found < 1e-6
    assert not net(x.detach()).requires_grad
    record_property("figure", f"{method}: gradient of the input {found:.1e} from that of a network in training")


# ---- folding -------------------------------------------------------------------------------------------------------


def zero_variance(norm: Any) -> None:
    norm.running_var.zero_()


def without_affine(norm: Any) -> None:
    norm.weight = norm.bias = None
    norm.affine = False


def without_momentum(norm: Any) -> None:
    norm.momentum = None


def without_statistics(norm: Any) -> None:
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False


@pytest.mark.parametrize("change", [zero_variance, without_affine, without_momentum, without_statistics])
@pytest.mark.parametrize("method", METHODS)
def test_folding(method: str, change: Callable[[Any], None], record_property: Callable[..., None]) -> None:
    """BatchNorm with zero variance, without weights, momentum or statistics is folded, or left, exactly."""
    net = student(method)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        change(norm)
    folded, x = fold(net), torch.randn(4, 3, 8, 8)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert left == (len(norms) if change is without_statistics else 0)
    with torch.no_grad():
        found = relative(folded(x), net.eval()(x))
    assert found < 1e-5
    record_property("figure", f"{method}, {change.__name__.replace('_', ' ')}: {found:.1e}")
