"""The decoders of segmentation_models_pytorch on small encoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

_MODELS = {
    "Unet": "resnet18 mobilenet_v2 efficientnet-b0 timm-regnetx_002 vgg11_bn",
    "UnetPlusPlus": "resnet18",
    "FPN": "resnet18 mobilenet_v2",
    "PSPNet": "resnet18",
    "DeepLabV3": "resnet18",
    "DeepLabV3Plus": "resnet18 mobilenet_v2",
    "Linknet": "resnet18",
    "MAnet": "resnet18",
    "PAN": "resnet18",
    "UPerNet": "resnet18",
    "Segformer": "resnet18 mit_b0",
}


def _segmenter(decoder: str, encoder: str) -> tuple[nn.Module, Tensor]:
    import segmentation_models_pytorch as smp

    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=4), torch.randn(2, 3, 128, 128)


def _with_a_classifier() -> tuple[nn.Module, Tensor]:
    """Two outputs in a tuple: the mask and a label."""
    import segmentation_models_pytorch as smp

    net = smp.Unet(
        "resnet18", encoder_weights=None, classes=4, decoder_attention_type="scse", aux_params={"classes": 5}
    )
    return net, torch.randn(2, 3, 128, 128)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{
        f"smp/{decoder}-{encoder}": partial(_segmenter, decoder, encoder)
        for decoder, encoders in _MODELS.items()
        for encoder in encoders.split()
    },
    "smp/Unet-scse-aux": _with_a_classifier,
}
