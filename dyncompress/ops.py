"""Kinds of aten ops, by name."""

from __future__ import annotations

from typing import Any

import torch

FACTORIES = frozenset("zeros ones empty full new_zeros new_ones new_empty new_full".split())
"""Ops that make a tensor of a written-down size."""

PRODUCTS = frozenset(
    "convolution mm bmm addmm baddbmm mv mkldnn_rnn_layer _scaled_dot_product_flash_attention_for_cpu".split()
)


def undecomposed(func: Any) -> bool:
    """Whether an op is made of others that nobody has seen yet: in inference mode they arrive whole."""
    return torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


def is_product(func: Any) -> bool:
    """Whether an op multiplies channels with weights, or with each other."""
    return func._schema.name.removeprefix("aten::") in PRODUCTS
