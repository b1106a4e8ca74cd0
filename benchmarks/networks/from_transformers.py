"""The convolutional backbones of transformers, from small configs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Settings = dict[str, Any]


def _stages(first: int, *widths: int, **settings: Any) -> Settings:
    """Four stages of two blocks behind a stem."""
    return {"embedding_size": first, "hidden_sizes": list(widths), "depths": [2, 2, 2, 2], **settings}


_SMALL: Settings = {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]}
_IMAGE_MODELS: dict[str, tuple[str, int, Settings]] = {
    "resnet": ("ResNetForImageClassification", 64, _stages(32, 32, 64, 96, 128, layer_type="basic")),
    "resnet-bottleneck": ("ResNetModel", 64, _stages(32, 64, 128, 192, 256)),
    "regnet": ("RegNetForImageClassification", 64, _stages(32, 32, 64, 128, 256, groups_width=16)),
    "convnext": ("ConvNextForImageClassification", 64, _SMALL),
    "convnextv2": ("ConvNextV2ForImageClassification", 64, _SMALL),
    "bit": ("BitForImageClassification", 64, _stages(32, 64, 128, 192, 256, num_groups=8)),
    "mobilenet_v1": ("MobileNetV1ForImageClassification", 128, {}),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", 128, {}),
    "mobilenet_v2-segmentation": ("MobileNetV2ForSemanticSegmentation", 128, {}),
    "efficientnet": (
        "EfficientNetForImageClassification",
        128,
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    ),
    "levit": ("LevitForImageClassification", 224, {}),
    "poolformer": ("PoolFormerForImageClassification", 64, _SMALL),
    "cvt": ("CvtForImageClassification", 64, {"depth": [1, 2, 4]}),
    "mobilevit": ("MobileViTForImageClassification", 128, {}),
    "mobilevitv2": ("MobileViTV2ForImageClassification", 128, {}),
    "segformer": ("SegformerForSemanticSegmentation", 128, {}),
    "focalnet": ("FocalNetForImageClassification", 64, {"image_size": 64, "embed_dim": 32, "depths": [1, 1, 2, 1]}),
    "swiftformer": ("SwiftFormerForImageClassification", 128, {}),
    "pvt_v2": ("PvtV2ForImageClassification", 64, {"image_size": 64}),
    "hgnet_v2": ("HGNetV2ForImageClassification", 128, {}),
    "textnet": ("TextNetForImageClassification", 64, {}),
    "dinov3_convnext": ("DINOv3ConvNextModel", 64, _SMALL),
    "pp_lcnet": ("PPLCNetForImageClassification", 128, {}),
}


def _model(kind: str, name: str, settings: Settings) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.for_model(kind.partition("-")[0], **settings)
    return getattr(transformers, name)(config)


def _image_net(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    name, size, settings = _IMAGE_MODELS[kind]
    return _model(kind, name, settings), {"pixel_values": torch.randn(2, 3, size, size)}


_SMALL_SPEECH: Settings = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "conv_dim": [48] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 16,
}  # fmt: skip


def _speech(kind: str, name: str, settings: Settings) -> tuple[nn.Module, dict[str, Tensor]]:
    return _model(kind, name, _SMALL_SPEECH | settings), {"input_values": torch.randn(2, 4000)}


def _whisper_encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, num_mel_bins=40,
        max_source_positions=50,
    )  # fmt: skip
    return WhisperEncoder(config), {"input_features": torch.randn(2, 40, 100)}


class Codec(nn.Module):
    """Encoder and decoder of a neural audio codec, without the quantiser between them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = net.encoder, net.decoder

    def forward(self, audio: Tensor) -> Tensor:
        """audio: (B, 1, T) -> (B, 1, T)."""
        return self.decoder(self.encoder(audio))


def _codec(kind: str, name: str, settings: Settings) -> tuple[nn.Module, Tensor]:
    return Codec(_model(kind, name, settings)), torch.randn(2, 1, 3200)


def _univnet() -> tuple[nn.Module, dict[str, Tensor]]:
    net = _model("univnet", "UnivNetModel", {"model_hidden_channels": 16})
    return net, {"input_features": torch.randn(2, 20, 100), "noise_sequence": torch.randn(2, 20, 64)}


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{f"transformers/{kind}": partial(_image_net, kind) for kind in _IMAGE_MODELS},
    "transformers/wav2vec2": partial(_speech, "wav2vec2", "Wav2Vec2ForCTC", {}),
    "transformers/wav2vec2-layernorm": partial(
        _speech, "wav2vec2", "Wav2Vec2ForCTC", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    ),
    "transformers/hubert": partial(_speech, "hubert", "HubertForCTC", {}),
    "transformers/sew": partial(_speech, "sew", "SEWForCTC", {"squeeze_factor": 2, "conv_dim": [32] * 13}),
    "transformers/whisper-encoder": _whisper_encoder,
    "transformers/encodec": partial(_codec, "encodec", "EncodecModel", {"num_filters": 16, "hidden_size": 64}),
    "transformers/dac": partial(
        _codec, "dac", "DacModel", {"encoder_hidden_size": 16, "decoder_hidden_size": 256, "hidden_size": 64}
    ),
    "transformers/univnet": _univnet,
}
