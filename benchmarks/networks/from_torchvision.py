"""torchvision: classification, segmentation, video, and the bodies of its detectors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_CLASSIFIERS = """
    alexnet vgg11 vgg11_bn squeezenet1_0 squeezenet1_1 shufflenet_v2_x0_5 shufflenet_v2_x1_0 googlenet inception_v3:160
    mnasnet0_5 densenet121 efficientnet_b0 efficientnet_v2_s convnext_tiny regnet_x_400mf regnet_y_400mf
    mobilenet_v2 mobilenet_v3_small mobilenet_v3_large resnet18 resnet50 resnext50_32x4d maxvit_t:224
"""
_SEGMENTERS = "deeplabv3_resnet50 deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large"
_VIDEO = "r3d_18:64 mc3_18:64 r2plus1d_18:64 s3d:224"


def _classifier(name: str, size: int) -> tuple[nn.Module, Tensor]:
    from torchvision import models

    aux = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # its scipy-like init takes a minute
    return models.get_model(name, weights=None, **aux), torch.randn(2, 3, size, size)


def _segmenter(name: str) -> tuple[nn.Module, Tensor]:
    from torchvision.models import segmentation

    return segmentation.__dict__[name](weights=None, weights_backbone=None, num_classes=21), torch.randn(2, 3, 96, 96)


def _video(name: str, size: int) -> tuple[nn.Module, Tensor]:
    from torchvision.models import video

    frames = 16 if name == "s3d" else 8
    return video.__dict__[name](weights=None), torch.randn(2, 3, frames, size, size)


def _resnet_fpn() -> tuple[nn.Module, Tensor]:
    """Its BatchNorms are frozen: buffers only."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None), torch.randn(2, 3, 128, 128)


def _mobilenet_fpn() -> tuple[nn.Module, Tensor]:
    from torchvision.models.detection.backbone_utils import mobilenet_backbone

    net = mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True)
    return net, torch.randn(2, 3, 128, 128)


class Detector(nn.Module):
    """Backbone and heads of a detector: what it computes before boxes are decoded and suppressed."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> Any:
        """images: (B, 3, H, W) -> {name: tensor}."""
        features = self.backbone(images)
        return self.head([features] if isinstance(features, Tensor) else list(features.values()))


def _detector(name: str, size: int) -> tuple[nn.Module, Tensor]:
    from torchvision.models import detection

    net = detection.__dict__[name](weights=None, weights_backbone=None, num_classes=5)
    return Detector(net), torch.randn(2, 3, size, size)


def _rpn() -> tuple[nn.Module, Tensor]:
    from torchvision.models.detection.rpn import RPNHead

    class Proposals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = _resnet_fpn()[0], RPNHead(256, 3)

        def forward(self, images: Tensor) -> Any:
            return self.head(list(self.backbone(images).values()))

    return Proposals(), torch.randn(2, 3, 128, 128)


def _raft() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    from torchvision.models.optical_flow import raft_small

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = raft_small(weights=None)

        def forward(self, first: Tensor, second: Tensor) -> Any:
            return self.net(first, second, num_flow_updates=2)

    return Flow(), (torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{
        f"torchvision/{name}": partial(_classifier, name, int(size or 128))
        for name, _, size in (entry.partition(":") for entry in _CLASSIFIERS.split())
    },
    **{f"torchvision/{name}": partial(_segmenter, name) for name in _SEGMENTERS.split()},
    **{
        f"torchvision/{name}": partial(_video, name, int(size))
        for name, _, size in (entry.partition(":") for entry in _VIDEO.split())
    },
    "torchvision/resnet18_fpn": _resnet_fpn,
    "torchvision/mobilenet_v3_fpn": _mobilenet_fpn,
    "torchvision/resnet18_fpn_rpn": _rpn,
    "torchvision/retinanet_resnet50_fpn": partial(_detector, "retinanet_resnet50_fpn", 128),
    "torchvision/fcos_resnet50_fpn": partial(_detector, "fcos_resnet50_fpn", 128),
    "torchvision/ssd300_vgg16": partial(_detector, "ssd300_vgg16", 300),
    "torchvision/ssdlite320_mobilenet_v3_large": partial(_detector, "ssdlite320_mobilenet_v3_large", 160),
    "torchvision/raft_small": _raft,
}
