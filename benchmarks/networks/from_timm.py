"""One or two small members of every family of timm that has convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

_BY_SIZE = {
    224: """
        resnet50
        convit_tiny csatv2 crossvit_tiny_240:240 mvitv2_tiny volo_d1_224 coat_lite_tiny efficientformer_l1
        efficientformerv2_s0 gcvit_xxtiny levit_128s levit_conv_128s nest_tiny pit_ti_224 tiny_vit_5m_224
        tnt_s_patch16_224 visformer_tiny vit_tiny_r_s16_p8_224 vitamin_small_224 coatnet_nano_rw_224
        coatnext_nano_rw_224 maxvit_tiny_rw_224 botnet26t_256:256 halonet26t:256 lambda_resnet26t:256
        maxxvit_rmlp_nano_rw_256:256 maxvit_pico_rw_256:256 efficientvit_m0 efficientvit_m1 davit_tiny
        swiftformer_xs sequencer2d_s
    """,
    128: """
        resnet10t resnet18 resnet18d resnet26t resnet34 resnetblur18 resnetaa34d resnetrs50 resnext50_32x4d
        resnet50_gn seresnet18 seresnext26d_32x4d ecaresnet26t ecaresnext26t_32x4d wide_resnet50_2 test_resnet
        legacy_seresnet18 legacy_seresnext26_32x4d skresnet18 skresnext50_32x4d
        resnetv2_18 resnetv2_50 resnetv2_50x1_bit resnetv2_50d_gn resnetv2_50d_evos resnetv2_50d_frn
        nf_resnet26 nf_regnet_b0 nf_seresnet26 nf_ecaresnet26 eca_nfnet_l0 dm_nfnet_f0 test_nfnet
        regnetx_002 regnetx_008 regnety_002 regnety_008 regnetz_005 regnetv_040
        regnetz_b16 gernet_s mobileone_s0 repvgg_a0 repvgg_b1g4 resnet33ts eca_resnet33ts gcresnet33ts seresnext26ts
        gcresnext26ts bat_resnext26ts:256 resnet51q resnet50_clip_gap test_byobnet
        mobilenetv1_100 mobilenetv2_035 mobilenetv2_100 mobilenetv3_small_050 mobilenetv3_large_100
        tf_mobilenetv3_small_100
        tf_mobilenetv3_small_minimal_100 mobilenetv4_conv_small mobilenetv4_conv_blur_medium
        mobilenetv4_hybrid_medium_075
        mobilenet_edgetpu_v2_xs mobilenetv5_base
        efficientnet_b0 efficientnet_b0_gn efficientnet_b0_g8_gn efficientnet_b0_g16_evos efficientnet_blur_b0
        efficientnet_cc_b0_4e efficientnet_es efficientnet_lite0 efficientnetv2_rw_t gc_efficientnetv2_rw_t
        tf_efficientnet_b0 tf_efficientnetv2_b0 tf_efficientnet_es test_efficientnet test_efficientnet_ln
        mixnet_s tf_mixnet_s mnasnet_small mnasnet_050 semnasnet_050 spnasnet_100 fbnetc_100 fbnetv3_b
        tinynet_a tinynet_e
        hardcorenas_a lcnet_050 lcnet_100 lcnetv2_small
        ghostnet_050 ghostnet_100 ghostnetv2_100 ghostnetv3_050 repghostnet_050 rexnet_100 rexnetr_100
        densenet121 densenetblur121d dla34 dla46_c dla60x_c dla60_res2net dla60_res2next dpn48b dpn68
        cspresnet50 cspresnext50 cspdarknet53 darknet17 darknet53 sedarknet21 darknetaa53 cs3darknet_focus_s
        cs3darknet_s cs3sedarknet_l
        cspnext_tiny
        hrnet_w18_small res2net50_14w_8s res2net50d res2next50 resnest14d resnest26d selecsls42b
        ese_vovnet19b_slim ese_vovnet19b_dw eca_vovnet39b vovnet39a vgg11_bn xception41 xception41p
        inception_next_atto hgnet_tiny hgnetv2_b0 fasternet_t0 shvit_s1 starnet_s1 starnet_s050 rdnet_tiny
        repvit_m0_9 repvit_m1 nextvit_small
        convnext_atto convnext_atto_ols convnext_atto_rms convnextv2_atto convnext_tiny_hnf test_convnext2
        test_convnext3
        convmixer_768_32 poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18 mambaout_femto
        edgenext_xx_small fastvit_t8 fastvit_sa12 fastvit_mci0 focalnet_tiny_srf mobilevit_xxs mobilevitv2_050
        pvt_v2_b0 pvt_v2_b2_li twins_pcpvt_small twins_svt_small xcit_nano_12_p16_224
        efficientvit_b0 efficientvit_l1 efficientvim_m1 iformer_t lowformer_b0 cpubone_nano tresnet_m
    """,
    160: "inception_v3 inception_v4 inception_resnet_v2 legacy_xception nasnetalarge pnasnet5large",
}


def _image_net(name: str, size: int) -> tuple[nn.Module, Tensor]:
    import timm

    return timm.create_model(name), torch.randn(2, 3, size, size)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    f"timm/{name}": partial(_image_net, name, int(own or size))
    for size, names in _BY_SIZE.items()
    for name, _, own in (entry.partition(":") for entry in names.split())
}
