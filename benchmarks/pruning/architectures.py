"""Architectures that nobody here wrote, with random weights: torchvision's, timm's and transformers'.

A list of constructors, sizes and inputs, and nothing else: what is measured on them knows no model by name.
Sizes are as small as each architecture allows, so that the whole list runs on one thread in minutes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

INSTALL = """
The libraries are no dependency of rarefy, and transformers works only where torchvision is absent, so there are two
environments, both made from the root of a checkout:

  python3 -m venv ../sweep
  ../sweep/bin/pip install -e .
  ../sweep/bin/pip install --no-deps torchvision==0.16.2 timm==1.0.31 torch-pruning==1.6.1
  ../sweep/bin/pip install pillow requests huggingface_hub

  python3 -m venv ../sweep-hf
  ../sweep-hf/bin/pip install -e . transformers==5.24.0
"""

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Architecture:
    """A model that can be built with its example inputs."""

    library: str
    family: str
    """What kin models share: the library's module or model type."""
    task: str
    name: str
    make: Callable[[], tuple[nn.Module, Inputs]]


def architectures(library: str) -> list[Architecture]:
    """List the architectures of a library; raise `SystemExit` with the way to install it when it is missing."""
    try:
        return list(LIBRARIES[library]())
    except ImportError as error:
        raise SystemExit(f"{library} cannot be imported here ({error})\n{INSTALL}") from error


def image(size: int, batch: int = 2) -> torch.Tensor:
    """Draw a batch of images `(batch, 3, size, size)`."""
    return torch.randn(batch, 3, size, size)


# --- torchvision ------------------------------------------------------------------------------------------------------

TORCHVISION = {
    "image classification": """alexnet:64 vgg11:32 vgg11_bn:32 resnet18:64 resnet50:64 resnext50_32x4d:64
        wide_resnet50_2:64 densenet121:64 googlenet:64 inception_v3:96 squeezenet1_0:64 squeezenet1_1:64
        mobilenet_v2:64 mobilenet_v3_small:64 mobilenet_v3_large:64 mnasnet0_5:64 mnasnet1_0:64 shufflenet_v2_x0_5:64
        shufflenet_v2_x1_0:64 efficientnet_b0:64 efficientnet_v2_s:64 regnet_x_400mf:64 regnet_y_400mf:64
        convnext_tiny:64 vit_b_16:64 vit_b_32:64 swin_t:64 swin_v2_t:64 maxvit_t:224""",
    "segmentation": """fcn_resnet50:64 deeplabv3_resnet50:64 deeplabv3_mobilenet_v3_large:64
        lraspp_mobilenet_v3_large:64""",
    "detection backbone": """fasterrcnn_resnet50_fpn:64 fasterrcnn_resnet50_fpn_v2:64
        fasterrcnn_mobilenet_v3_large_fpn:64 retinanet_resnet50_fpn:64 retinanet_resnet50_fpn_v2:64
        fcos_resnet50_fpn:64 maskrcnn_resnet50_fpn:64 keypointrcnn_resnet50_fpn:64 ssd300_vgg16:300
        ssdlite320_mobilenet_v3_large:320""",
    "video classification": "r3d_18:32 mc3_18:32 r2plus1d_18:32 s3d:224 mvit_v1_b:224 mvit_v2_s:224 swin3d_t:64",
    "optical flow": "raft_small:128 raft_large:128",
}


def torchvision_models() -> Iterator[Architecture]:
    """List at least one member of each of torchvision's families."""
    from torchvision.models import get_model_builder

    for task, names in TORCHVISION.items():
        for name, size in entries(names):
            family = get_model_builder(name).__module__.removeprefix("torchvision.models.")
            yield Architecture("torchvision", family, task, name, torchvision_make(task, name, size))


def torchvision_make(task: str, name: str, size: int) -> Callable[[], tuple[nn.Module, Inputs]]:
    """Return a function that builds a model of torchvision without weights and draws its inputs."""
    from torchvision.models import get_model

    def make() -> tuple[nn.Module, Inputs]:
        options: dict[str, Any] = {}
        if task in ("segmentation", "detection backbone"):
            options["weights_backbone"] = None
        if name.startswith("vit_"):
            options["image_size"] = size
        if name.startswith("maxvit_"):
            options["input_size"] = (size, size)
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        model = get_model(name, weights=None, **options)
        if task == "detection backbone":
            return model.backbone, (image(size),)
        if task == "video classification":
            return model, (torch.randn(1, 3, 16, size, size),)
        return model, (image(size), image(size)) if task == "optical flow" else (image(size),)

    return make


# --- timm -------------------------------------------------------------------------------------------------------------

TIMM = """
    beit_base_patch16_224:64 halonet_h1:256 eca_botnext26ts_256:64 lambda_resnet26t:64 haloregnetz_b:224
    botnet26t_256:64 sehalonet33ts:256 sebotnet33ts_256:64 lamhalobotnet50ts_256:128 halo2botnet50ts_256:128
    mobileone_s1:64 gernet_s:64 repvgg_a0:64 regnetz_b16:64 resnext26ts:64 eca_resnext26ts:64 seresnext26ts:64
    gcresnext26ts:64 bat_resnext26ts:256 resnet32ts:64 seresnet33ts:64 gcresnet33ts:64 cait_xxs24_224:64 coat_tiny:64
    convit_tiny:64 convmixer_768_32:64 convnext_zepto_rms:64 convnextv2_atto:64 cpubone_nano:64 crossvit_tiny_240:240
    csatv2:64 cs3darknet_focus_s:64 darknet17:64 cspresnext50:64 sedarknet21:64 cspresnet50:64 cspdarknet53:64
    darknetaa53:64 cspnext_tiny:64 davit_tiny:64 deepseek_vit_412m:224 deit_tiny_patch16_224:64 densenet121:64
    densenetblur121d:64 dla46x_c:64 dpn48b:64 edgenext_xx_small:64 efficientformer_l1:224 efficientformerv2_s0:224
    mobilenetv2_035:64 mnasnet_small:64 tinynet_e:64 semnasnet_050:64 mobilenet_edgetpu_100:64 mixnet_s:64
    spnasnet_100:64 efficientnet_lite0:64 fbnetc_100:64 efficientnetv2_rw_t:64 gc_efficientnetv2_rw_t:64
    efficientvim_m1:64 efficientvit_b0:64 efficientvit_m0:64 vit_tiny_patch16_dinov3_qkvb:64 eva02_tiny_patch14_224:64
    fasternet_t0:64 fastvit_t8:64 focalnet_tiny_srf:64 gcvit_xxtiny:64 gemma4_vit_167m:64 ghostnet_050:64
    ghostnetv3_050:64 hardcorenas_b:64 hgnetv2_b0:64 hgnet_tiny:64 hiera_tiny_224:64 sam2_hiera_tiny:64
    hieradet_small:64 hrnet_w18_small:64 iformer_t:64 inception_next_atto:64 inception_resnet_v2:96 inception_v3:96
    inception_v4:96 lcnetv2_small:64 levit_128s:64 lowformer_b0:64 mambaout_femto:64 maxvit_pico_rw_256:64
    coatnet_pico_rw_224:64 coatnext_nano_rw_224:64 maxxvit_rmlp_nano_rw_256:64 maxxvitv2_nano_rw_256:64
    poolformerv2_s12:64 poolformer_s12:64 caformer_s18:64 convformer_s18:64 gmlp_ti16_224:64 gmixer_12_224:64
    resmlp_12_224:64 mixer_s16_224:64 mobilenetv3_small_050:64 lcnet_035:64 fbnetv3_b:64 mobilenetv5_base:64
    mobilevit_xxs:64 mobilevitv2_050:64 mvitv2_tiny:64 naflexvit_base_patch16_parfac_gap:64 nest_tiny:64
    nextvit_small:64 nf_regnet_b0:64 eca_nfnet_l0:64 nfnet_l0:64 pit_ti_224:64 pvt_v2_b0:64 qwen3_vit_88m:64
    rdnet_tiny:64 regnetx_002:64 regnety_002:64 regnetz_005:64 regnetv_040:64 repghostnet_050:64 repvit_m1:64
    res2next50:64 resnest14d:64 resnet10t:64 resnetblur18:64 seresnet18:64 ecaresnext26t_32x4d:64 ecaresnet26t:64
    seresnext26t_32x4d:64 resnetaa34d:64 resnext50_32x4d:64 seresnetaa50d:64 ecaresnetlight:64 resnetrs50:64
    resnetv2_18:64 rexnet_100:64 rexnetr_100:64 selecsls42:64 legacy_seresnet18:64 sequencer2d_s:64 shvit_s1:64
    skresnet18:64 skresnext50_32x4d:64 starnet_s050:64 swiftformer_xs:64 swin_tiny_patch4_window7_224:64
    swinv2_tiny_window8_256:64 swinv2_cr_tiny_224:64 tiny_vit_5m_224:64 tnt_s_legacy_patch16_224:64 tresnet_m:64
    twins_svt_small:64 vgg11:64 visformer_tiny:64 vit_tiny_patch16_224:64 flexivit_small:64 vit_tiny_r_s16_p8_224:64
    vit_srelpos_small_patch16_224:64 samvit_base_patch16_224:64 vitamin_small_224:64 volo_d1_224:64
    nasnetalarge:96 pnasnet5large:96 ese_vovnet19b_slim_dw:64 vovnet39a:64 eca_vovnet39b:64 legacy_xception:64
    xception41p:64 xcit_nano_12_p8_224:64
"""


def timm_models() -> Iterator[Architecture]:
    """List the smallest member of each of timm's modules, and of each kin line within a module."""
    from timm.models import model_entrypoint

    for name, size in entries(TIMM):
        family = model_entrypoint(name).__module__.removeprefix("timm.models.")
        yield Architecture("timm", family, "image classification", name, timm_make(name, size))


def timm_make(name: str, size: int) -> Callable[[], tuple[nn.Module, Inputs]]:
    """Return a function that builds a model of timm without weights and draws its inputs."""
    import timm

    def make() -> tuple[nn.Module, Inputs]:
        fixed = timm.get_pretrained_cfg(name).fixed_input_size
        model = timm.create_model(name, pretrained=False, **({"img_size": size} if fixed else {}))
        return model, (image(size),)

    return make


# --- transformers -----------------------------------------------------------------------------------------------------

SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "embedding_size", "word_embed_proj_dim", "dim", "emb_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 8),
    **dict.fromkeys(("num_heads", "n_heads"), 8),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 6),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim"), 192),
    **dict.fromkeys(("ffn_hidden_size", "d_inner"), 192),
    **dict.fromkeys(("head_dim", "d_kv"), 16),
    **{"num_key_value_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 80, "projection_dim": 40},
    **{"vocab_size": 99, "max_position_embeddings": 64},
    **{"image_size": 32, "patch_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False},
}
LATENT = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 12, "v_head_dim": 20, "kv_lora_rank": 44, "q_lora_rank": 36}
LATENT |= {"num_key_value_heads": 8}
ROUTED = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2}
STAGES = {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "num_hidden_layers": None, "image_size": 64}
WINDOWS = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64, "patch_size": 4}


def plain(names: str) -> dict[str, dict[str, Any]]:
    """List names of models whose shrunk config needs no change."""
    return {name: {} for name in names.split()}


TRANSFORMERS: dict[str, dict[str, dict[str, Any]]] = {
    "masked language model": {
        **plain(
            """BertForMaskedLM BertForSequenceClassification RobertaForMaskedLM DistilBertForMaskedLM AlbertForMaskedLM
            ElectraForMaskedLM DebertaForMaskedLM DebertaV2ForMaskedLM ConvBertForMaskedLM LongformerForMaskedLM
            MPNetForMaskedLM SqueezeBertForMaskedLM MobileBertForMaskedLM FNetForMaskedLM NystromformerForMaskedLM
            RoFormerForMaskedLM ModernBertForMaskedLM IBertForMaskedLM CanineForSequenceClassification
            RemBertForMaskedLM BigBirdForMaskedLM FlaubertWithLMHeadModel XLMWithLMHeadModel MegatronBertForMaskedLM
            NomicBertForMaskedLM EuroBertForMaskedLM RoCBertForMaskedLM CLIPTextModelWithProjection"""
        ),
        "XLNetLMHeadModel": {"d_head": 16, "d_inner": 192, "max_position_embeddings": None},
        "FunnelForMaskedLM": {"num_hidden_layers": None, "block_sizes": [1, 1], "d_head": 16},
        "EsmForMaskedLM": {"vocab_size": 99, "pad_token_id": 1},
    },
    "causal language model": {
        **plain(
            """GPT2LMHeadModel GPTNeoXForCausalLM GPTBigCodeForCausalLM OpenAIGPTLMHeadModel CTRLLMHeadModel
            LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM GemmaForCausalLM Gemma2ForCausalLM
            Gemma3ForCausalLM PhiForCausalLM Phi3ForCausalLM OPTForCausalLM BloomForCausalLM MptForCausalLM
            StableLmForCausalLM Starcoder2ForCausalLM CohereForCausalLM OlmoForCausalLM Olmo2ForCausalLM
            GraniteForCausalLM PersimmonForCausalLM BioGptForCausalLM XGLMForCausalLM SmolLM3ForCausalLM
            Glm4ForCausalLM HeliumForCausalLM"""
        ),
        "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
        "GPTJForCausalLM": {"rotary_dim": 8},
        "CodeGenForCausalLM": {"rotary_dim": 8},
        "FalconForCausalLM": {"head_dim": None},
        "NemotronForCausalLM": {"num_key_value_heads": 4},
        "MiniCPM3ForCausalLM": LATENT,
    },
    "mixture of experts": {
        **plain(
            """MixtralForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM OlmoeForCausalLM GraniteMoeForCausalLM
            PhimoeForCausalLM GptOssForCausalLM JetMoeForCausalLM """
        ),
        "DeepseekV2ForCausalLM": LATENT | ROUTED,
        "DeepseekV3ForCausalLM": LATENT | ROUTED,
    },
    "state space or recurrent": {
        **plain(
            """MambaForCausalLM FalconMambaForCausalLM RwkvForCausalLM RecurrentGemmaForCausalLM Qwen3NextForCausalLM
            Lfm2ForCausalLM"""
        ),
        "xLSTMForCausalLM": {"num_heads": 4, "qk_dim_factor": 0.75},
        "Mamba2ForCausalLM": {"num_heads": 16, "head_dim": 16, "n_groups": 4, "state_size": 24},
        "JambaForCausalLM": {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
        },
        "Zamba2ForCausalLM": {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 24,
            "mamba_headdim": 16,
            "n_mamba_heads": 16,
            "mamba_ngroups": 4,
            "attention_head_dim": 32,
        },
        "BambaForCausalLM": {
            "attn_layer_indices": [1],
            "mamba_n_heads": 16,
            "mamba_d_head": 16,
            "mamba_n_groups": 4,
            "mamba_d_state": 24,
        },
    },
    "text to text": {
        **plain(
            """SwitchTransformersForConditionalGeneration T5ForConditionalGeneration UMT5ForConditionalGeneration
            BartForConditionalGeneration PegasusForConditionalGeneration MarianMTModel MBartForConditionalGeneration
            LEDForConditionalGeneration M2M100ForConditionalGeneration BlenderbotForConditionalGeneration
            LongT5ForConditionalGeneration FSMTForConditionalGeneration"""
        ),
        "ProphetNetForConditionalGeneration": {"num_hidden_layers": None, "num_encoder_layers": 2},
    },
    "image classification": {
        **plain(
            """ViTForImageClassification DeiTForImageClassification BeitForImageClassification
            Dinov2ForImageClassification ResNetForImageClassification RegNetForImageClassification
            MobileNetV1ForImageClassification MobileNetV2ForImageClassification MobileViTForImageClassification
            PoolFormerForImageClassification PvtV2ForImageClassification CvtForImageClassification
             FocalNetForImageClassification BitForImageClassification
            SwiftFormerForImageClassification HGNetV2ForImageClassification DINOv3ViTModel IJepaForImageClassification
            TextNetForImageClassification CLIPVisionModelWithProjection"""
        ),
        "SwinForImageClassification": WINDOWS,
        "Swinv2ForImageClassification": WINDOWS,
        "ConvNextForImageClassification": STAGES,
        "ConvNextV2ForImageClassification": STAGES,
        "LevitForImageClassification": {"patch_size": None, "image_size": 64},
        "MobileViTV2ForImageClassification": {"patch_size": None, "image_size": 64},
        "PvtForImageClassification": {"image_size": 64},
        "HieraForImageClassification": {"image_size": [64, 64], "embed_dim": 24, "depths": [1, 1, 2, 1]},
        "DonutSwinForImageClassification": WINDOWS,
    },
    "dense prediction": {
        **plain("SegformerForSemanticSegmentation GLPNForDepthEstimation"),
        "DPTForDepthEstimation": {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "image_size": 64,
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 16,
        },
        "Swin2SRForImageSuperResolution": WINDOWS | {"image_size": 32, "patch_size": 1},
        "YolosForObjectDetection": {"image_size": [64, 64]},
    },
    "image and text": {
        **plain(
            "CLIPModel SiglipModel BlipModel AltCLIPModel ChineseCLIPModel GroupViTModel OwlViTModel GitForCausalLM"
        ),
    },
    "speech recognition": {
        **plain("Wav2Vec2ForCTC HubertForCTC WavLMForCTC UniSpeechForCTC SEWForCTC SEWDForCTC Data2VecAudioForCTC"),
        "Wav2Vec2ConformerForCTC": {"vocab_size": 99},
    },
    "audio codec": {
        **plain("EncodecModel DacModel"),
    },
    "speech to text": {
        "WhisperForConditionalGeneration": {"max_source_positions": 100},
    },
    "speech features to text": {
        **plain("Speech2TextForConditionalGeneration"),
    },
}


BATCH = 3
"""Not two: two rows of eight heads would be as many as a head has places, and the axes not be told apart."""


def text(length: int = 12) -> torch.Tensor:
    """Draw rows of token numbers."""
    return torch.randint(3, 90, (BATCH, length))


TASK_INPUTS: dict[str, Callable[[int], dict[str, torch.Tensor]]] = {
    "masked language model": lambda size: {"input_ids": text()},
    "causal language model": lambda size: {"input_ids": text()},
    "mixture of experts": lambda size: {"input_ids": text()},
    "state space or recurrent": lambda size: {"input_ids": text()},
    "text to text": lambda size: {"input_ids": text(), "decoder_input_ids": text(7)},
    "image classification": lambda size: {"pixel_values": image(size, BATCH)},
    "dense prediction": lambda size: {"pixel_values": image(size, BATCH)},
    "image and text": lambda size: {"input_ids": text(), "pixel_values": image(size, BATCH)},
    "speech recognition": lambda size: {"input_values": torch.randn(BATCH, 4000)},
    "audio codec": lambda size: {"input_values": torch.randn(BATCH, 1, 4000)},
    "speech to text": lambda size: {"input_features": torch.randn(BATCH, 80, 200), "decoder_input_ids": text(7)},
    "speech features to text": lambda size: {
        "input_features": torch.randn(BATCH, 100, 80),
        "decoder_input_ids": text(7),
    },
}


def transformers_models() -> Iterator[Architecture]:
    """List models of transformers made from small configs."""
    import transformers

    transformers.logging.set_verbosity_error()
    for task, models in TRANSFORMERS.items():
        for name, changes in models.items():
            family = getattr(transformers, name).config_class.model_type
            yield Architecture("transformers", family, task, name, transformers_make(task, name, changes))


def transformers_make(task: str, name: str, changes: Mapping[str, Any]) -> Callable[[], tuple[nn.Module, Inputs]]:
    """Return a function that builds a model of transformers from a small config and draws its inputs."""
    import transformers

    def make() -> tuple[nn.Module, Inputs]:
        config_class = getattr(transformers, name).config_class
        model = getattr(transformers, name)(config_class(**small(config_class, changes)))
        size = getattr(getattr(model.config, "vision_config", model.config), "image_size", 64)
        return model, positional(model, TASK_INPUTS[task](size if isinstance(size, int) else 64))

    return make


def small(config_class: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Shrink every size that a config has under one of the usual names; None in `changes` leaves one as it is."""
    default = config_class()
    shrunk = {key: value for key, value in SMALL.items() if type(known(default, key)) is type(value)}
    for part in getattr(config_class, "sub_configs", {}):
        if (inner := type(known(default, part))) not in (dict, type(None)):
            shrunk[part] = inner(**small(inner, {})).to_dict()
    return {key: value for key, value in {**shrunk, **changes}.items() if value is not None}


def known(config: Any, key: str) -> Any:
    """Return a value of a config, or None where it has none or refuses to tell."""
    try:
        return getattr(config, key, None)
    except NotImplementedError:
        return None


def positional(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Inputs:
    """Order named inputs as `forward` takes them, with None for those in between."""
    names = list(inspect.signature(model.forward).parameters)
    last = max(names.index(name) for name in inputs)
    return tuple(inputs.get(name) for name in names[: last + 1])


# --- all --------------------------------------------------------------------------------------------------------------


def entries(text: str) -> list[tuple[str, int]]:
    """Read `name:size name:size ...`."""
    return [(name, int(size)) for name, size in (entry.split(":") for entry in text.split())]


LIBRARIES: dict[str, Callable[[], Iterator[Architecture]]] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
}
