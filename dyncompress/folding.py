"""Fold BatchNorm into the convolution before it, for deployment."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dyncompress.conversion import TAG, plan_of
from dyncompress.errors import PlanError
from dyncompress.layers import DynamicConv, TokenConv
from dyncompress.layers.router import RouterLinear


def fold(student: nn.Module) -> nn.Module:
    """A copy in eval mode whose BatchNorms are part of the convolutions before them: same outputs, less work.

    With the statistics fixed a BatchNorm is an affine map of each channel, and a convolution is linear in its kernel:
    ``bank[t, i] *= gamma[t] / sigma[t]``, ``bias[t] = beta[t] + (bias[t] - mu[t]) * gamma[t] / sigma[t]``. The shift
    stays outside the mix of kernels, so the fold is exact whatever the coefficients are.

    Args:
        student: A converted network.

    Returns:
        A folded copy. It can be run and exported, not trained further.

    Raises:
        PlanError: If the network was not converted (its plan tells which BatchNorm belongs to which convolution).
    """
    plan = plan_of(student)
    if plan is None:
        raise PlanError(f"{type(student).__name__} carries no plan; fold what dyncompress converted")
    folded = deepcopy(student).eval()
    delattr(folded.get_submodule(plan.graph.anchor), TAG)  # its weights are no longer those of the plan
    for op in plan.graph.convs:
        norm = folded.get_submodule(op.norm) if op.norm else None
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
            continue
        rest = _rest(norm)
        if rest is None:
            continue
        if not _absorb(folded.get_submodule(op.module), norm):
            continue
        parent, _, child = op.norm.rpartition(".")
        setattr(folded.get_submodule(parent), child, rest)
    for module in folded.modules():
        if isinstance(module, RouterLinear):
            module.settle()
    for members in plan.costs.sets:
        paths = [_path(folded, op.module) for op in members]
        layers = [folded.get_submodule(path) for path in paths]
        if isinstance(layers[0], DynamicConv):
            for path, layer in zip(paths, layers[0].shipped(layers), strict=True):
                parent, _, child = path.rpartition(".")
                setattr(folded.get_submodule(parent), child, layer.eval())
    return folded


def _path(net: nn.Module, name: str) -> str:
    """Of a layer's convolution, which is inside what takes the place of a linear layer."""
    return f"{name}.conv" if isinstance(net.get_submodule(name), TokenConv) else name


def _absorb(conv: nn.Module, norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the norm is part of the convolution now."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None
    if isinstance(conv, DynamicConv):
        scale = torch.rsqrt(var + norm.eps)
        scale = scale if norm.weight is None else norm.weight.detach() * scale
        return conv.absorb(scale, (0 if norm.bias is None else norm.bias.detach()) - mean * scale)
    weight: Any = conv.weight
    own: Any = conv.bias
    fused, bias = fuse_conv_bn_weights(weight, own, mean, var, norm.eps, norm.weight, norm.bias)
    with torch.no_grad():
        weight.data = fused.data
    conv.bias = bias
    return True


def _rest(norm: nn.modules.batchnorm._BatchNorm) -> nn.Module | None:
    """What a norm does after normalising, as a module; None where that can't be told.

    Subclasses exist that go on with an activation (timm's BatchNormAct2d). Their children, in order, are taken for the
    rest where that gives the same numbers.
    """
    rest = nn.Sequential(*(child for child in norm.children() if not isinstance(child, nn.Identity)))
    if not len(rest):
        rest = nn.Identity()  # type: ignore[assignment]
    if type(norm).forward is nn.modules.batchnorm._BatchNorm.forward and isinstance(rest, nn.Identity):
        return rest
    assert norm.running_mean is not None
    dims = next((d for d, kind in _NORMS.items() if isinstance(norm, kind)), 2)
    x = torch.randn(2, norm.num_features, *(3,) * dims, generator=torch.Generator().manual_seed(0)).to(
        norm.running_mean
    )
    args = (norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    with torch.no_grad():
        expected, found = norm(x), rest(nn.functional.batch_norm(x, *args))
    same = isinstance(expected, Tensor) and expected.shape == found.shape
    return rest if same and torch.allclose(expected, found, rtol=1e-4, atol=1e-5) else None


_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
