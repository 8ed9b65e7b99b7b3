"""One small network of each of timm's modules, and of variants that are built differently."""

from __future__ import annotations

#: in the order of timm's modules
REPRESENTATIVES = (
    *("beit_base_patch16_224", "halonet26t", "mobileone_s0", "cait_xxs24_224", "coat_tiny", "coat_lite_tiny"),
    *(
        "convit_tiny",
        "convmixer_768_32",
        "convnext_atto",
        "cpubone_nano",
        "crossvit_tiny_240",
        "csatv2",
        "cspresnet50",
    ),
    *("cspnext_tiny", "davit_tiny", "deepseek_vit_412m", "deit_tiny_distilled_patch16_224", "densenet121"),
    *("dla34", "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0"),
    *("efficientnet_b0", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_224"),
    *("fasternet_t0", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "gemma4_vit_167m", "ghostnet_050"),
    *("hardcorenas_a", "hgnetv2_b0", "hiera_tiny_224", "sam2_hiera_tiny", "hrnet_w18_small", "iformer_t"),
    *("inception_next_atto", "inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2_small"),
    *(
        "levit_128s",
        "lowformer_b0",
        "test_mambaout",
        "coatnet_nano_cc_224",
        "poolformerv2_s12",
        "gmlp_ti16_224",
    ),
    *("mobilenetv3_small_050", "mobilenetv5_base", "mobilevit_xxs", "mvitv2_tiny"),
    *(
        "naflexvit_base_patch16_gap",
        "nasnetalarge",
        "nest_tiny",
        "nextvit_small",
        "nf_resnet26",
        "pit_ti_224",
    ),
    *("pnasnet5large", "pvt_v2_b0", "qwen3_vit_88m", "rdnet_tiny", "regnetx_002", "repghostnet_050"),
    *("repvit_m1", "res2net50_26w_4s", "resnest14d", "resnet10t", "resnetv2_18", "rexnet_100", "selecsls42"),
    *("legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050", "swiftformer_xs"),
    *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224", "tiny_vit_5m_224"),
    *("tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "vgg11", "visformer_tiny"),
    *("vit_tiny_patch16_224", "vit_small_r26_s32_224", "vit_relpos_small_patch16_224"),
    *(
        "samvit_base_patch16_224",
        "vitamin_small_224",
        "volo_d1_224",
        "ese_vovnet19b_slim_dw",
        "legacy_xception",
    ),
    *("xception41p", "xcit_nano_12_p16_224"),
    # variants
    *("resnet50d", "seresnet50", "ecaresnet26t", "resnetv2_50x1_bit", "dm_nfnet_f0", "convnextv2_atto"),
    *("vit_little_patch16_reg4_gap_256", "vit_base_patch16_siglip_gap_224", "maxvit_rmlp_pico_rw_256"),
    *("mobilenetv4_conv_small", "mobilevitv2_050", "mixer_s32_224", "vit_srelpos_small_patch16_224"),
    *("tf_efficientnetv2_b0", "mixnet_s", "poolformer_s12", "gcresnet33ts", "regnety_002", "nf_regnet_b0"),
    *("resnet32", "presnet50", "shufflenetv2_50", "deit3_small_patch16_224", "cs3darknet_focus_s"),
)
