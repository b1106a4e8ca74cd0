"""One or two small members of every family of timm that has convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

_BY_SIZE = {
    224: """
        resnet50 convit_tiny csatv2 crossvit_tiny_240:240 mvitv2_tiny volo_d1_224 coat_lite_tiny
        efficientformer_l1 efficientformerv2_s0 gcvit_xxtiny levit_128s nest_tiny pit_ti_224 tiny_vit_5m_224
        tnt_s_patch16_224 visformer_tiny vit_tiny_r_s16_p8_224 vitamin_small_224 coatnet_nano_rw_224
        maxvit_tiny_rw_224 botnet26t_256:256 halonet26t:256 lambda_resnet26t:256 maxxvit_rmlp_nano_rw_256:256
        efficientvit_m0 davit_tiny swiftformer_xs sequencer2d_s
    """,
    128: """
        resnet10t resnet18d resnetblur18 resnext50_32x4d resnet50_gn seresnet18 ecaresnet26t ecaresnext26t_32x4d
        legacy_seresnext26_32x4d skresnet18 resnetv2_18 resnetv2_50x1_bit resnetv2_50d_gn resnetv2_50d_evos
        nf_resnet26 nf_regnet_b0 eca_nfnet_l0 regnetx_002 regnety_002 regnetz_005 gernet_s mobileone_s0
        repvgg_a0 gcresnet33ts bat_resnext26ts:256 resnet50_clip_gap mobilenetv1_100 mobilenetv2_100
        mobilenetv3_small_050 mobilenetv3_large_100 tf_mobilenetv3_small_100 mobilenetv4_conv_small
        mobilenetv4_hybrid_medium_075 mobilenet_edgetpu_v2_xs efficientnet_b0 efficientnet_b0_gn
        efficientnet_b0_g16_evos efficientnet_blur_b0 efficientnet_cc_b0_4e efficientnet_es efficientnet_lite0
        efficientnetv2_rw_t tf_efficientnet_b0 mixnet_s mnasnet_small semnasnet_050 spnasnet_100 fbnetc_100
        tinynet_e hardcorenas_a lcnet_050 lcnetv2_small ghostnet_100 ghostnetv2_100 ghostnetv3_050
        repghostnet_050 rexnet_100 densenet121 densenetblur121d dla34 dla60_res2net dla60_res2next dpn48b dpn68
        cspresnet50 darknet17 sedarknet21 cs3darknet_focus_s cs3darknet_s cspnext_tiny hrnet_w18_small
        res2net50_14w_8s res2next50 resnest14d selecsls42b ese_vovnet19b_slim ese_vovnet19b_dw vgg11_bn
        xception41 inception_next_atto hgnet_tiny hgnetv2_b0 fasternet_t0 shvit_s1 starnet_s1 rdnet_tiny
        repvit_m1 nextvit_small convnext_atto convnext_atto_rms convnextv2_atto convmixer_768_32 poolformer_s12
        convformer_s18 mambaout_femto edgenext_xx_small fastvit_sa12 focalnet_tiny_srf mobilevit_xxs
        mobilevitv2_050 pvt_v2_b0 twins_pcpvt_small xcit_nano_12_p16_224 efficientvit_b0 efficientvim_m1
        iformer_t lowformer_b0 cpubone_nano tresnet_m
        test_resnet test_byobnet test_nfnet test_convnext2 test_efficientnet_ln mobilenetv2_035 ghostnet_050 dla46_c
    """,
    160: "inception_v3 inception_resnet_v2 legacy_xception nasnetalarge pnasnet5large",
}


def _image_net(name: str, size: int) -> tuple[nn.Module, Tensor]:
    import timm

    return timm.create_model(name), torch.randn(2, 3, size, size)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    f"timm/{name}": partial(_image_net, name, int(own or size))
    for size, names in _BY_SIZE.items()
    for name, _, own in (entry.partition(":") for entry in names.split())
}
