"""DRConv: every position of an image belongs to a region, and every region has a kernel of its own.

Paper: Chen, Wang, Guo, Zhang, Sun, "Dynamic Region-Aware Convolution", CVPR 2021, arXiv 2003.12243. With m
regions and K kernels, for image b and output position p::

    region[b, p] = argmax_r (G conv x[b])[r, p]                                 guide G, m channels
    c[b] = 2 sigmoid(R GAP(x[b]) + r) / K                                       [m, K]
    y[b, p] = ((sum_i c[b, region[b, p], i] * W_i) conv x[b])[p] + bias

Backward the argmax is a softmax: the guide learns from what each region's kernel would have returned.

The authors' operator is written for CUDA only. Two portable ways of computing the same are used here:

* By region: the positions of a region are gathered, and are one matrix product with its kernel. Every position is
  multiplied once, as in the authors' operator. That is how torch runs it, in training, too.
* By kernel: a convolution is linear in its kernel, so that all K kernels on the whole image, mixed position by
  position, are the same, at K times the multiply-adds. Its shapes do not depend on the mask: it is what a traced or
  exported graph holds, and what backward runs (the softmax needs the outputs of all regions anyway).

Deviations from the paper:

* Every layer has a guide; in the authors' ShuffleNet the two pointwise convolutions of a block share one (1x1).
* Coefficients are those of the authors' code. (The paper has two 1x1 convolutions on the input pooled to the kernel's
  size, which make kernels without a bank.)
* Training starts from a static convolution (``load_static``); the paper trains from scratch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompress.layers.channels import per_channel
from dyncompress.layers.execution import convolve
from dyncompress.layers.method import Method, PerLayer, register_method
from dyncompress.layers.mixing import assemble, autocasts, full_precision
from dyncompress.layers.options import check_count
from dyncompress.layers.placement import better_static, check_placement
from dyncompress.layers.router import RouterLinear, Squeeze
from dyncompress.layers.sharedbank import SharedBank
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs
from dyncompress.layers.static import Static

__all__ = ["DRConv", "DRConvLayer"]

_MOST = 64  # regions or kernels; of more than a few the paper finds no gain
_ROUNDED = "where two regions are close, a rounded input can belong to the other one, whose kernel is another"


@register_method("drconv")
@dataclass(frozen=True)
class DRConv(PerLayer):
    """Options of DRConv.

    Args:
        regions: m, kernels per image, at least 2.
        kernels: K, kernels of the bank that they are mixed from, at least 2.
        placement: ``"auto"``: leave layers static where guide and kernels cost more than half of the convolution;
            ``"all"``: all dynamic.

    Raises:
        DynCompressError: If an option has no such value.

    Source:
        arXiv 2003.12243; the authors' networks have 8 regions and 8 kernels.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = "Dynamic Region-Aware Convolution, CVPR 2021, arXiv 2003.12243"
    adapts: ClassVar[str] = "a kernel per region"
    exceptions: ClassVar[dict[str, str]] = {"moves_between_dtypes": _ROUNDED, "runs_under_autocast": _ROUNDED}

    regions: int = 8
    kernels: int = 8
    placement: Literal["auto", "all"] = "auto"

    def __post_init__(self) -> None:
        for option in ("regions", "kernels"):
            check_count(option, getattr(self, option), option, 2, _MOST, f"2 to {_MOST}")
        check_placement(self.placement)

    def place(self, site: ConvSite) -> tuple[Method, str]:
        """DRConv, or static where a convolution is too small for it: m * K / S + m * groups / out is above 1/2.

        Example:
            >>> print(DRConv().place(ConvSite("c", ConvSpec(64, 64, (3, 3)), positions=49))[1])
            static: guide and kernels of 8 regions take 143 % of the conv, above 50 %
        """
        if self.placement == "all":
            return self, ""
        if reason := better_static(site):
            return Static(), reason
        (cost,) = self.macs([site])
        extra = cost.kernels + cost.router
        if 2 * extra > cost.conv:
            share = f"{100 * extra / cost.conv:.0f} % of the conv, above 50 %"
            return Static(), f"static: guide and kernels of {self.regions} regions take {share}"
        return self, ""

    def macs(self, sites: Sequence[ConvSite]) -> list[Macs]:
        """Multiply-adds per image, by region: conv = P * S, kernels = m * K * P, router = m * in * (taps * S + K).

        S are output positions, P weights of one static kernel, and taps positions in it. A traced or exported graph
        runs by kernel: conv = K * P * S, and m * K * S for the coefficients of the positions.

        Example:
            >>> DRConv().macs([ConvSite("c", ConvSpec(16, 32, (3, 3)), positions=784)])
            [Macs(conv=3612672, kernels=294912, router=904192)]
        """
        return [
            Macs(
                conv=site.spec.kernel_params * site.positions,
                kernels=self.regions * self.kernels * site.spec.kernel_params,
                router=self.regions
                * site.spec.in_channels
                * (math.prod(site.spec.kernel_size) * site.positions + self.kernels),
            )
            for site in sites
        ]

    def params(self, sites: Sequence[ConvSite]) -> list[int]:
        """Parameters: bank K * P, bias, guide m * in * taps, router (in + 1) * m * K."""
        counts = []
        for site in sites:
            spec = site.spec
            guide = self.regions * spec.in_channels * math.prod(spec.kernel_size)
            router = (spec.in_channels + 1) * self.regions * self.kernels
            counts.append(self.kernels * spec.kernel_params + spec.out_channels * spec.bias + guide + router)
        return counts

    def build(self, sites: Sequence[ConvSite]) -> list[nn.Module]:
        """One layer per site."""
        return [DRConvLayer(site.spec, self.regions, self.kernels) for site in sites]


class DRConvLayer(SharedBank):
    """A convolution whose positions choose among the kernels of m regions.

    Args:
        spec: Shapes of the convolution.
        regions: m.
        kernels: K.
    """

    method: ClassVar[str] = "drconv"

    def __init__(self, spec: ConvSpec, regions: int, kernels: int) -> None:
        super().__init__(spec, kernels, share=1 / kernels)
        self.regions = regions
        self.guide = nn.Parameter(torch.empty(regions, spec.in_channels, *spec.kernel_size))
        self.squeeze = Squeeze(spec.in_channels)
        self.router = RouterLinear(spec.in_channels, regions * kernels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from scratch: random regions, coefficients 1/K, a mixed kernel as nn.ConvNd's default."""
        super().reset_parameters()
        nn.init.kaiming_normal_(self.guide, nonlinearity="linear")  # at zero, all positions would be of one region

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, in, *size] -> [B, out, *size']."""
        self.check_input(x)
        logits, mix = self.logits(x), self.coefficients(x)
        if autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with full_precision(x):
            # Where there are no values to sort positions by, or no images, the graph must not depend on the mask.
            traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
            run: Any = _by_kernel if traced or x.is_meta or x.shape[0] == 0 else _ByRegion.apply
            out: Tensor = run(x, self.bank.to(x.dtype), mix, logits, self.spec)
        return out if self.bias is None else out + per_channel(self.bias, out)

    def logits(self, x: Tensor) -> Tensor:
        """Guided feature [B, m, *size'] of x [B, in, *size]; the largest one is the region. fp32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        with full_precision(x):
            return convolve(x, self.guide.to(x.dtype), None, self.spec, 1)

    def coefficients(self, x: Tensor) -> Tensor:
        """Coefficients [B, m, K] in (0, 2 / K) of x [B, in, *size]; fp32 at least."""
        share = 2 / self.kernels * torch.sigmoid(self.router(self.squeeze(x)))
        return share.reshape(-1, self.regions, self.kernels)

    def start(self, weight: Tensor, bias: Tensor, spare: Tensor | None, generator: torch.Generator | None) -> None:
        """See :meth:`SharedBank.start`: the same kernel in all regions, whatever they are."""
        super().start(weight, bias, spare, generator)
        device = None if generator is None else generator.device
        noise = torch.randn(self.guide.shape, generator=generator, device=device)
        self.guide.copy_(noise / math.sqrt(self.guide[0].numel()))

    def extra_repr(self) -> str:
        """Method, shapes, m and K."""
        return f"{super().extra_repr()}, regions={self.regions}, kernels={self.kernels}"


class _ByRegion(torch.autograd.Function):
    """Forward by region, with an argmax; backward by kernel, with a softmax in its place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bank: Tensor, mix: Tensor, logits: Tensor, spec: ConvSpec) -> Tensor:
        """Arguments and result of `_by_kernel`."""
        ctx.save_for_backward(x, bank, mix, logits)
        ctx.spec = spec
        kernels = assemble(bank, mix.flatten(0, 1).unsqueeze(1)).squeeze(1).unflatten(0, mix.shape[:2])
        regions = logits.argmax(1).flatten(1)
        size = logits.shape[2:]
        images = zip(x, kernels, regions, strict=True)
        return torch.stack([_one_by_region(*image, spec).unflatten(1, size) for image in images])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, bank, mix and logits."""
        needed = ctx.needs_input_grad[:4]
        x, bank, mix, logits = (t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=True))
        with torch.enable_grad(), full_precision(grad):
            out = _by_kernel(x, bank, mix, logits, ctx.spec)
        found = iter(torch.autograd.grad(out, [t for t in (x, bank, mix, logits) if t.requires_grad], grad))
        return (*(next(found) if need else None for need in needed), None)


def _one_by_region(x: Tensor, kernels: Tensor, region: Tensor, spec: ConvSpec) -> Tensor:
    """One image x [in, *size], kernels [m, out, in / groups, *kernel], regions [S] of its positions -> [out, S]."""
    patches = _patches(x, spec)
    counts = region.bincount(minlength=len(kernels)).tolist()
    order = region.argsort()
    weights = kernels.unflatten(1, (spec.groups, -1)).flatten(3).transpose(2, 3)  # [m, groups, in / groups * taps, out]
    gathered = patches.index_select(1, order).split(counts, 1)
    products = [torch.bmm(part, weight) for part, weight in zip(gathered, weights, strict=True) if part.shape[1]]
    return torch.cat(products, 1).index_select(1, order.argsort()).transpose(1, 2).reshape(spec.out_channels, -1)


def _patches(x: Tensor, spec: ConvSpec) -> Tensor:
    """What the kernel sees at each output position of an image [in, *size]: [groups, S, in / groups * taps]."""
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    x = F.pad(x.unsqueeze(0), [side for pair in reversed(spec.pads) for side in pair], mode=mode).squeeze(0)
    for dim, (k, d, s) in enumerate(zip(spec.kernel_size, spec.dilation, spec.stride, strict=True), start=1):
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    # [groups, *size', in / groups, *kernel]
    windows: Tensor = x.unflatten(0, (spec.groups, -1)).movedim(1, 1 + spec.ndim)
    return windows.reshape(spec.groups, -1, math.prod(spec.weight_shape[1:]))


def _by_kernel(x: Tensor, bank: Tensor, mix: Tensor, logits: Tensor, spec: ConvSpec) -> Tensor:
    """All kernels on the whole image, mixed position by position.

    Args:
        x: [B, in, *size].
        bank: [1, K, out, in / groups, *kernel], in the dtype of x.
        mix: [B, m, K].
        logits: [B, m, *size'], whose argmax is the region; backward their softmax is.
        spec: Shapes, padding and groups.

    Returns:
        [B, out, *size'].
    """
    names = torch.arange(logits.shape[1], device=logits.device).reshape(-1, *(1,) * spec.ndim)
    mask = (logits.argmax(1, keepdim=True) == names).to(logits.dtype)
    if torch.is_grad_enabled():
        soft = logits.softmax(1)
        mask = mask + (soft - soft.detach())
    own = bank[0].transpose(0, 1).flatten(0, 1)  # the kernels of a group of channels next to each other
    maps = convolve(x, own, None, spec, spec.groups).unflatten(1, (spec.out_channels, -1))
    share = torch.bmm(mix.transpose(1, 2), mask.flatten(2)).unflatten(2, logits.shape[2:])
    mixed: Tensor = (maps * share.unsqueeze(1).to(maps.dtype)).sum(2)
    return mixed
