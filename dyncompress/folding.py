"""Fold BatchNorm into the convolution before it, for deployment."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dyncompress.conversion import plan_of
from dyncompress.errors import PlanError
from dyncompress.layers import DynamicConv


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
    for op in plan.graph.convs:
        if not op.norm:
            continue
        norm, conv = folded.get_submodule(op.norm), folded.get_submodule(op.module)
        if (
            not isinstance(norm, nn.modules.batchnorm._BatchNorm)
            or norm.running_mean is None
            or norm.running_var is None
        ):
            continue
        weight: Any = conv.bank if isinstance(conv, DynamicConv) else conv.weight
        own: Any = conv.bias
        mean, var = norm.running_mean, norm.running_var
        fused, bias = fuse_conv_bn_weights(weight, own, mean, var, norm.eps, norm.weight, norm.bias)
        with torch.no_grad():
            weight.data = fused.data
        conv.bias = bias
        parent, _, child = op.norm.rpartition(".")
        setattr(folded.get_submodule(parent), child, nn.Identity())
    return folded
