"""Classes of ``transformers`` for ``benchmarks/classes.py``: a line each, small sizes, random weights.

An entry names the class, its inputs and the settings of its configuration that differ from the default, which is that of the class
(``config_class``). Models are kept small in depth and width, not in kind: every kind of layer that the class has is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Make = Callable[[torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """A model and what it is called with.

    Attributes:
        model: class of ``transformers``.
        inputs: keyword -> how its tensor is drawn.
        settings: of the configuration.
        part: the submodule that is called in the model's place, as ``vision_encoder``; empty for the model.
    """

    model: str
    inputs: Mapping[str, Make]
    settings: Mapping[str, Any]
    part: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}.{self.part}" if self.part else self.model

    def make(self) -> nn.Module:
        """The model with its library weights, in evaluation mode, caches off."""
        import transformers

        cls = getattr(transformers, self.model)
        config = cls.config_class(**self.settings)
        config.use_cache = False
        model: nn.Module = cls(config).eval()
        return model.get_submodule(self.part)

    def draw(self) -> dict[str, torch.Tensor]:
        """The inputs; the same each time."""
        generator = torch.Generator().manual_seed(1)
        return {name: make(generator) for name, make in self.inputs.items()}


def entry(model: str, inputs: Mapping[str, Make], part: str = "", **settings: Any) -> Entry:
    return Entry(model, inputs, settings, part)


def tokens(length: int = 128, vocabulary: int = 1000) -> Make:
    """i64[1, length], from 3 on: lower ids are often special."""
    return lambda g: torch.randint(3, vocabulary, (1, length), generator=g)


def normal(*shape: int) -> Make:
    return lambda g: torch.randn(shape, generator=g)


def image(size: int = 224, channels: int = 3) -> Make:
    return normal(1, channels, size, size)


def given(values: Callable[[], torch.Tensor]) -> Make:
    """Not drawn, but made: positions, masks, sizes of grids."""
    return lambda g: values()


def boxes(length: int) -> Make:
    """i64[1, length, 4]: left, top, right, bottom in 0 .. 999, in order."""
    return lambda g: torch.randint(0, 1000, (1, length, 2, 2), generator=g).sort(dim=2).values.flatten(2)


def text(length: int = 128, **more: Make) -> dict[str, Make]:
    return {"input_ids": tokens(length), **more}


def pair(length: int = 128, target: int = 20) -> dict[str, Make]:
    return text(length, decoder_input_ids=tokens(target))


def pixels(size: int = 224) -> dict[str, Make]:
    return {"pixel_values": image(size)}


def sound(samples: int = 16000) -> dict[str, Make]:
    return {"input_values": normal(1, samples)}


def series(length: int, ahead: int, lags: int, values: int = 1, features: int = 2) -> dict[str, Make]:
    """A time series and what is known of the future; the past is longer by the largest lag."""
    shape = (1, length + lags) if values == 1 else (1, length + lags, values)
    future = (1, ahead) if values == 1 else (1, ahead, values)
    return {"past_values": normal(*shape), "past_time_features": normal(1, length + lags, features),
            "past_observed_mask": given(lambda: torch.ones(shape)), "future_values": normal(*future),
            "future_time_features": normal(1, ahead, features)}  # fmt: skip


V = {"vocab_size": 1000}
W = {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}  # without a vocabulary
T = {**W, **V}
G = {**T, "num_key_value_heads": 2}  # decoders whose heads share keys
MOE = {**G, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
PAIR = {"d_model": 256, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}  # fmt: skip
GPT = {"n_embd": 256, "n_layer": 2, "n_head": 4, **V}
SMALL = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "num_hidden_layers": 2}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNET = {"model_type": "resnet", "depths": [1, 1, 1, 1], "layer_type": "bottleneck"}
CONVNEXT = {"model_type": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [96, 192, 384, 768], "out_features": STAGES}
DINO = {"model_type": "dinov2", "num_hidden_layers": 4, "hidden_size": 192, "num_attention_heads": 3, "image_size": 112, "patch_size": 14,
        "out_features": STAGES, "reshape_hidden_states": False}  # fmt: skip
CLIP = {"text_config": {**T, "eos_token_id": 2}, "vision_config": SMALL}

TEXT_MODELS = (
    entry("DistilBertModel", text(), n_layers=3, **V),
    entry("AlbertModel", text(), num_hidden_layers=3, hidden_size=768, num_attention_heads=12, intermediate_size=3072, **V),
    entry("RobertaModel", text(), num_hidden_layers=3, **V),
    entry("DebertaModel", text(), relative_attention=True, pos_att_type=["c2p", "p2c"], **T),
    entry("DebertaV2Model", text(), relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=64, **T),
    entry("ElectraModel", text(), num_hidden_layers=4, **V),
    entry("MPNetModel", text(), num_hidden_layers=3, **V),
    entry("ConvBertModel", text(), **T),
    entry("SqueezeBertModel", text(), embedding_size=256, **T),
    entry("MobileBertModel", text(), num_hidden_layers=2, **V),
    entry("CanineModel", text(256), **W),
    entry("LongformerModel", text(), attention_window=32, **T),
    entry("BigBirdModel", text(), **T),
    entry("NystromformerModel", text(), **T),
    entry("ModernBertModel", text(), pad_token_id=0, **T),
    entry("FNetModel", text(), num_hidden_layers=2, **V),
    entry("FunnelModel", text(), block_sizes=[1, 1], **V),
    entry("XLNetModel", text(), d_model=256, n_layer=2, n_head=4, d_inner=512, **V),
    entry("EsmModel", text(), position_embedding_type="rotary", pad_token_id=1, mask_token_id=2, **T),
    entry("RoFormerModel", text(), **T),
    entry("SplinterModel", text(), **T),
    entry("YosoModel", text(), **T),
    entry("MraModel", text(256), max_position_embeddings=256, **T),
    entry("ReformerModel", text(64), axial_pos_shape=[8, 8], axial_pos_embds_dim=[64, 192], attn_layers=["local", "lsh"], num_hashes=1,
          num_buckets=4, local_attn_chunk_length=16, lsh_attn_chunk_length=16, feed_forward_size=512, hash_seed=0,
          **{k: v for k, v in T.items() if k not in ("num_hidden_layers", "intermediate_size")}),
    entry("RemBertModel", text(), input_embedding_size=64, output_embedding_size=64, **T),
    entry("XmodModel", text(), languages=["en", "de"], default_language="en", **T),
    entry("LukeModel", text(), entity_vocab_size=100, entity_emb_size=64, **T),
    entry("IBertModel", text(), **T),
    entry("XLMModel", text(), emb_dim=256, n_layers=2, n_heads=4, n_words=1000),
    entry("LayoutLMModel", text(bbox=boxes(128)), **T),
    entry("LayoutLMv3Model", text(bbox=boxes(128), pixel_values=image(64)), input_size=64, coordinate_size=40, shape_size=48, **T),
    entry("LiltModel", text(bbox=boxes(128)), **{**T, "hidden_size": 192}),
    entry("BrosModel", text(bbox=lambda g: torch.rand(1, 128, 8, generator=g)), **T),
    entry("MarkupLMModel", text(64), **T),
    entry("TapasModel", text(token_type_ids=given(lambda: torch.zeros(1, 128, 7, dtype=torch.int64))), **T),
)

DECODERS = (
    entry("OPTForCausalLM", text(), num_hidden_layers=3, **V),
    entry("BloomModel", text(), n_layer=3, hidden_size=512, n_head=8, **V),
    entry("GPTNeoXModel", text(), **T),
    entry("GPTNeoModel", text(), hidden_size=256, num_layers=2, num_heads=4, window_size=32, attention_types=[[["global", "local"], 1]],
          **V),
    entry("GPTJModel", text(), rotary_dim=32, **GPT),
    entry("CodeGenModel", text(), rotary_dim=32, **GPT),
    entry("GPTBigCodeModel", text(), **GPT),
    entry("CTRLModel", text(), n_embd=256, n_layer=2, n_head=4, dff=512, **V),
    entry("MptModel", text(), d_model=256, n_heads=4, n_layers=2, **V),
    entry("XGLMModel", text(), d_model=256, num_layers=2, attention_heads=4, ffn_dim=512, **V),
    entry("BioGptModel", text(), **T),
    entry("FalconModel", text(), hidden_size=256, num_hidden_layers=2, num_attention_heads=4, **V),
    entry("PhiModel", text(), **T),
    entry("Phi3Model", text(), pad_token_id=0, **G),
    entry("PersimmonModel", text(), **T),
    entry("NemotronModel", text(), **G),
    entry("Gemma2Model", text(), head_dim=64, **G),
    entry("Gemma3TextModel", text(), head_dim=64, sliding_window=32, **G),
    entry("Gemma3nTextModel", text(32), head_dim=64, sliding_window=16, vocab_size_per_layer_input=1000, hidden_size_per_layer_input=32,
          layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, laurel_rank=16, activation_sparsity_pattern=[0.95,
          0.0],
          altup_num_inputs=2, pad_token_id=0, **{**G, "intermediate_size": [512, 512]}),
    entry("Qwen3Model", text(), head_dim=64, **G),
    entry("Qwen3NextModel", text(64), head_dim=64, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32,
          linear_value_head_dim=32, layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=128, **MOE),
    entry("StableLmModel", text(), **G),
    entry("Starcoder2Model", text(), **G),
    entry("Olmo2Model", text(), **G),
    entry("CohereModel", text(), **G),
    entry("Cohere2Model", text(), sliding_window=32, **G),
    entry("GlmModel", text(), head_dim=64, pad_token_id=0, **G),
    entry("Glm4Model", text(), head_dim=64, pad_token_id=0, **G),
    entry("GraniteModel", text(), **G),
    entry("SmolLM3Model", text(), pad_token_id=0, **G),
    entry("HeliumModel", text(), head_dim=64, **G),
    entry("DiffLlamaModel", text(), **G),
    entry("BitNetModel", text(), **G),
    entry("DeepseekV3Model", text(32), first_k_dense_replace=2, q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=32, qk_nope_head_dim=32,
          v_head_dim=32, **{**G, "num_key_value_heads": 4}),
    entry("Llama4TextModel", text(64), head_dim=64, intermediate_size_mlp=512, num_local_experts=2, attention_chunk_size=32, **G),
    entry("MixtralModel", text(64), num_local_experts=4, **G),
    entry("Qwen2MoeModel", text(32), shared_expert_intermediate_size=256, **MOE),
    entry("OlmoeModel", text(32), num_experts=4, num_experts_per_tok=2, **G),
    entry("GraniteMoeModel", text(32), num_local_experts=4, num_experts_per_tok=2, **G),
    entry("JetMoeModel", text(32), num_local_experts=4, num_experts_per_tok=2, kv_channels=64, **{k: v for k, v in G.items()
          if k != "num_attention_heads"}),
    entry("GptOssModel", text(64), head_dim=64, sliding_window=32, num_local_experts=4, num_experts_per_tok=2, **G),
    entry("Lfm2Model", text(64), layer_types=["conv", "full_attention"], **G),
    entry("MambaModel", text(64), num_hidden_layers=2, hidden_size=256, state_size=16, **V),
    entry("Mamba2Model", text(64), num_hidden_layers=2, hidden_size=256, num_heads=8, head_dim=64, state_size=32, n_groups=1,
          chunk_size=32, **V),
    entry("FalconMambaModel", text(32), num_hidden_layers=2, hidden_size=128, **V),
    entry("JambaModel", text(32), attn_layer_period=2, attn_layer_offset=1, expert_layer_period=4, expert_layer_offset=3, mamba_d_state=16,
          **G),
    entry("BambaModel", text(64), attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=64, mamba_d_state=32, mamba_chunk_size=32, **G),
    entry("RwkvModel", text(32), num_hidden_layers=2, hidden_size=256, **V),
    entry("RecurrentGemmaModel", text(32), lru_width=256, **{**G, "num_hidden_layers": 3, "num_key_value_heads": 1}),
    entry("xLSTMModel", text(64), hidden_size=128, num_hidden_layers=2, num_heads=2, chunk_size=32, **V),
    entry("DecisionTransformerModel", {"states": normal(1, 20, 17), "actions": normal(1, 20, 4), "rewards": normal(1, 20, 1),
          "returns_to_go": normal(1, 20, 1), "timesteps": given(lambda: torch.arange(20)[None]),
          "attention_mask": given(lambda: torch.ones(1, 20))}, state_dim=17, act_dim=4, hidden_size=128, n_layer=2, n_head=2),
)

ENCODER_DECODERS = (
    entry("BartModel", pair(128, 64), **PAIR, **V),
    entry("PegasusModel", pair(), **PAIR, **V),
    entry("PegasusXModel", pair(), block_size=32, num_global_tokens=8, **PAIR, **V),
    entry("BigBirdPegasusModel", pair(), **PAIR, **V),
    entry("M2M100Model", pair(), **PAIR, **V),
    entry("MarianModel", pair(), pad_token_id=0, decoder_start_token_id=0, **PAIR, **V),
    entry("FSMTModel", pair(), langs=["en", "de"], src_vocab_size=1000, tgt_vocab_size=1000, **PAIR),
    entry("LEDModel", pair(), attention_window=32, **PAIR, **V),
    entry("ProphetNetModel", pair(64), hidden_size=256, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
          num_decoder_attention_heads=4, encoder_ffn_dim=512, decoder_ffn_dim=512, **V),
    entry("T5Model", pair(), d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", **V),
    entry("LongT5Model", pair(), d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, local_radius=31,
          encoder_attention_type="transient-global", **V),
    entry("UMT5Model", pair(), d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, **V),
    entry("SwitchTransformersModel", pair(32), d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, num_experts=4, **V),
    entry("TrOCRForCausalLM", text(32), d_model=256, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=512, **V),
)

IMAGE_MODELS = (
    entry("DeiTModel", pixels(), num_hidden_layers=3),
    entry("BeitModel", pixels(), num_hidden_layers=3),
    entry("Data2VecVisionModel", pixels(), **SMALL),
    entry("Dinov2Model", pixels(), num_hidden_layers=3, image_size=224, patch_size=14, hidden_size=384, num_attention_heads=6),
    entry("DINOv3ViTModel", pixels(), **SMALL),
    entry("Swinv2Model", pixels(), depths=[2, 2, 2, 2]),
    entry("Swin2SRForImageSuperResolution", pixels(64), depths=[2, 2], num_heads=[6, 6], embed_dim=96),
    entry("DonutSwinModel", pixels(), depths=[1, 1, 1, 1], image_size=[224, 224]),
    entry("SegformerForSemanticSegmentation", pixels(256), num_labels=21),
    entry("MobileViTModel", pixels(256)),
    entry("MobileViTV2Model", pixels(256)),
    entry("MobileNetV1Model", pixels()),
    entry("EfficientNetModel", pixels(), width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280),
    entry("RegNetModel", pixels(), hidden_sizes=[64, 144, 320, 784], depths=[1, 3, 8, 2], groups_width=16),
    entry("ResNetModel", pixels(128), layer_type="bottleneck", depths=[1, 1, 1, 1], downsample_in_bottleneck=True),
    entry("BitModel", pixels(128), depths=[1, 1, 1, 1]),
    entry("HGNetV2Backbone", pixels(128)),
    entry("TextNetModel", pixels(128)),
    entry("RTDetrResNetBackbone", pixels(128), depths=[1, 1, 1, 1]),
    entry("ConvNextV2Model", pixels(), depths=[2, 2, 4, 2]),
    entry("PoolFormerModel", pixels()),
    entry("LevitModel", pixels()),
    entry("CvtModel", pixels(), depth=[1, 2, 3]),
    entry("PvtModel", pixels()),
    entry("PvtV2Model", pixels(128), depths=[1, 1, 1, 1]),
    entry("SwiftFormerModel", pixels(128)),
    entry("FocalNetModel", pixels(), depths=[2, 2, 2, 2]),
    entry("HieraModel", pixels(), depths=[1, 1, 2, 1]),
    entry("ViTMAEModel", {**pixels(), "noise": lambda g: torch.rand(1, 196, generator=g)}, num_hidden_layers=2),
    entry("VitDetModel", pixels(), window_block_indices=[0], window_size=7, residual_block_indices=[1],
          use_relative_position_embeddings=True, hidden_size=192, num_hidden_layers=2, num_attention_heads=3),
    entry("DPTForDepthEstimation", pixels(), num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], hidden_size=384,
          num_attention_heads=6, intermediate_size=1536, image_size=224),
    entry("DepthAnythingForDepthEstimation", pixels(112), backbone_config=DINO, reassemble_hidden_size=192,
          neck_hidden_sizes=[48, 96, 192, 384], fusion_hidden_size=64),
    entry("ZoeDepthForDepthEstimation", pixels(128), backbone_config={"model_type": "beit", "image_size": 128, "patch_size": 16,
          "num_hidden_layers": 4, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 384,
          "use_relative_position_bias": True,
          "out_features": STAGES, "reshape_hidden_states": False}, neck_hidden_sizes=[48, 96, 192, 384], fusion_hidden_size=64,
          backbone_hidden_size=192, bottleneck_features=64),
    entry("GLPNForDepthEstimation", pixels(128)),
    entry("UperNetForSemanticSegmentation", pixels(128), backbone_config=CONVNEXT, hidden_size=128, num_labels=21, auxiliary_channels=64,
          auxiliary_in_channels=384),
    entry("SamModel", pixels(256), part="vision_encoder", vision_config={"num_hidden_layers": 2, "image_size": 256, "hidden_size": 192,
          "num_attention_heads": 3, "mlp_dim": 768, "global_attn_indexes": [1]}, prompt_encoder_config={"image_size": 256,
          "image_embedding_size": 16}),
    entry("Sam2VisionModel", pixels(256), backbone_config={"model_type": "sam2_hiera_det_model", "image_size": [256, 256],
          "blocks_per_stage": [1, 1, 2, 1], "global_attention_blocks": [3]}),
    entry("SuperPointForKeypointDetection", pixels(64)),
    entry("EfficientLoFTRModel", {"pixel_values": normal(1, 2, 1, 64, 64)}, stage_num_blocks=[1, 1, 1, 1], num_attention_layers=1),
    entry("YolosModel", pixels(), image_size=[224, 224], **SMALL),
    entry("DetrModel", pixels(128), backbone_config={**RESNET, "out_features": ["stage4"]}, use_timm_backbone=False,
          use_pretrained_backbone=False,
          num_queries=20, **PAIR),
    entry("ConditionalDetrModel", pixels(128), backbone_config={**RESNET, "out_features": ["stage4"]}, use_timm_backbone=False,
          use_pretrained_backbone=False, num_queries=20, **PAIR),
    entry("DeformableDetrModel", pixels(128), backbone_config={**RESNET, "out_features": STAGES[1:]}, use_timm_backbone=False,
          use_pretrained_backbone=False, num_queries=20, **PAIR),
    entry("RTDetrModel", pixels(128), backbone_config={"model_type": "rt_detr_resnet", "depths": [1, 1, 1, 1], "out_features": STAGES[1:]},
          anchor_image_size=[128, 128], num_queries=20, encoder_ffn_dim=256, decoder_layers=2, decoder_ffn_dim=256),
    entry("DFineModel", pixels(128), num_queries=20, encoder_ffn_dim=256, decoder_layers=2, decoder_ffn_dim=256),
    entry("MaskFormerSwinModel", pixels(128), depths=[1, 1, 1, 1], image_size=128),
    entry("Mask2FormerModel", pixels(128), backbone_config={"model_type": "swin", "depths": [1, 1, 1, 1], "out_features": STAGES,
          "image_size":
          128}, encoder_layers=1, decoder_layers=2, encoder_feedforward_dim=256, dim_feedforward=256, num_queries=20),
    entry("VitPoseForPoseEstimation", {"pixel_values": normal(1, 3, 256, 192)}, backbone_config={"model_type": "vitpose_backbone",
          "num_hidden_layers": 2, "hidden_size": 192, "num_attention_heads": 3, "out_indices": [2]}, use_simple_decoder=False),
    entry("VitMatteForImageMatting", {"pixel_values": image(64, 4)}, backbone_config={"model_type": "vitdet", "num_channels": 4,
          "image_size": 64, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "out_features": ["stage2"]},
          hidden_size=96, fusion_hidden_sizes=[256, 128, 64, 32]),
    entry("SegGptModel", {"pixel_values": image(64), "prompt_pixel_values": image(64), "prompt_masks": image(64)}, image_size=[128, 64],
          hidden_size=192, num_hidden_layers=4, num_attention_heads=3, merge_index=1, intermediate_hidden_state_indices=[1, 2, 3],
          pretrain_image_size=64, decoder_hidden_size=32),
    entry("PerceiverModel", {"inputs": normal(1, 196, 256)}, num_latents=128, d_latents=256, d_model=256, num_self_attends_per_block=2,
          num_cross_attention_heads=8),
    entry("TimesformerModel", {"pixel_values": normal(1, 2, 3, 224, 224)}, num_hidden_layers=1, num_frames=2),
    entry("VideoMAEModel", {"pixel_values": normal(1, 4, 3, 112, 112)}, num_hidden_layers=2, num_frames=4, image_size=112),
    entry("VivitModel", {"pixel_values": normal(1, 4, 3, 112, 112)}, num_hidden_layers=1, num_frames=4, image_size=112),
    entry("VJEPA2Model", {"pixel_values_videos": normal(1, 4, 3, 64, 64)}, crop_size=64, frames_per_clip=4, hidden_size=192,
          num_attention_heads=3, num_hidden_layers=2, pred_hidden_size=96, pred_num_attention_heads=3, pred_num_hidden_layers=2),
)

BOTH = (
    entry("CLIPModel", text(77, **pixels()), text_config={"num_hidden_layers": 2, **V}, vision_config={"num_hidden_layers": 2}),
    entry("SiglipVisionModel", pixels(), num_hidden_layers=2),
    entry("AltCLIPModel", text(32, **pixels()), text_config={**T, "project_dim": 128}, vision_config=SMALL, projection_dim=128),
    entry("BlipModel", text(32, **pixels()), text_config={**T, "encoder_hidden_size": 256}, vision_config={**SMALL, "image_size": 224}),
    entry("OwlViTModel", text(16, **pixels(96)), text_config=T, vision_config={**SMALL, "image_size": 96, "patch_size": 16}),
    entry("GroupViTModel", text(77, **pixels()), text_config=T, vision_config={"hidden_size": 192, "depths": [1, 1, 1],
          "num_attention_heads": 3,
          "intermediate_size": 384, "num_group_tokens": [64, 8, 0], "num_output_groups": [64, 8, 8]}),
    entry("CLIPSegModel", text(77, **pixels()), **CLIP),
    entry("XCLIPModel", text(32, pixel_values=normal(1, 4, 3, 64, 64)), text_config=T, vision_config={**SMALL, "image_size": 64,
          "num_frames": 4, "mit_num_attention_heads": 4, "mit_intermediate_size": 256, "mit_hidden_size": 128}, projection_dim=128),
    entry("VisualBertModel", text(64, visual_embeds=normal(1, 10, 128)), visual_embedding_dim=128, **T),
    entry("LxmertModel", text(64, visual_feats=normal(1, 10, 128), visual_pos=normal(1, 10, 4)), l_layers=2, x_layers=1, r_layers=1,
          visual_feat_dim=128, hidden_size=256, num_attention_heads=4, intermediate_size=512, **V),
    entry("ViltModel", text(32, **pixels(96), pixel_mask=given(lambda: torch.ones(1, 96, 96, dtype=torch.int64))), image_size=96,
          max_image_length=-1, **T),
    entry("FlavaModel", text(32, **pixels(64)), text_config=T, image_config={**SMALL, "image_size": 64}, multimodal_config=SMALL,
          hidden_size=256, projection_dim=64),
    entry("GroundingDinoModel", text(16, **pixels(128)), backbone_config={"model_type": "swin", "depths": [1, 1, 1, 1], "image_size": 128,
          "out_features": STAGES[1:]}, text_config={"model_type": "bert", **T}, num_queries=20, d_model=64, encoder_layers=1,
          decoder_layers=1,
          encoder_ffn_dim=128, decoder_ffn_dim=128),
    entry("Qwen2_5_VisionTransformerPretrainedModel", {"hidden_states": normal(64, 1176), "grid_thw": given(lambda: torch.tensor([[1, 8,
          8]]))},
          depth=2, hidden_size=256, num_heads=4, intermediate_size=512, out_hidden_size=256, fullatt_block_indexes=[1]),
    entry("PixtralVisionModel", pixels(64), image_size=64, **SMALL),
    entry("Idefics3VisionTransformer", pixels(64), image_size=64, patch_size=16, **SMALL),
    entry("InternVLVisionModel", pixels(64), image_size=[64, 64], **SMALL),
    entry("Pix2StructVisionModel", {"flattened_patches": lambda g: torch.cat([torch.arange(64).view(1, 64, 1).expand(1, 64, 2).float(),
          torch.randn(1, 64, 768, generator=g)], 2)}, d_ff=512, d_kv=64, **{**SMALL, "seq_len": 64}),
    entry("Blip2QFormerModel", {"query_embeds": normal(1, 16, 256), "encoder_hidden_states": normal(1, 49, 128)}, encoder_hidden_size=128,
          **T),
)

SOUND_AND_SERIES = (
    entry("WhisperModel", {"input_features": normal(1, 80, 3000), "decoder_input_ids": tokens(32)}, pad_token_id=0, bos_token_id=1,
          eos_token_id=2, decoder_start_token_id=1, **PAIR, **V),
    entry("MoonshineModel", {**sound(), "decoder_input_ids": tokens(10)}, hidden_size=128, intermediate_size=256,
          encoder_num_hidden_layers=2,
          decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4, decoder_start_token_id=1, **V),
    entry("Wav2Vec2Model", sound(), num_hidden_layers=2),
    entry("Wav2Vec2ConformerModel", sound(), position_embeddings_type="relative", **W),
    entry("Wav2Vec2BertModel", {"input_features": normal(1, 50, 160)}, **W),
    entry("HubertModel", sound(), num_hidden_layers=2),
    entry("WavLMModel", sound(), **W),
    entry("UniSpeechSatModel", sound(), **W),
    entry("Data2VecAudioModel", sound(), **W),
    entry("SEWDModel", sound(), **W),
    entry("SEWModel", sound(), **W),
    entry("ASTModel", {"input_values": normal(1, 256, 128)}, num_hidden_layers=2, max_length=256),
    entry("ClapAudioModel", {"input_features": normal(1, 1, 1001, 64)}, depths=[1, 1, 1, 1]),
    entry("Speech2TextModel", {"input_features": normal(1, 100, 80), "decoder_input_ids": tokens(20)}, **PAIR, **V),
    entry("SeamlessM4TModel", {"input_features": normal(1, 50, 160)}, part="speech_encoder", hidden_size=256, speech_encoder_layers=2,
          speech_encoder_attention_heads=4, speech_encoder_intermediate_size=512, encoder_layers=1, decoder_layers=1, t2u_encoder_layers=1,
          t2u_decoder_layers=1, **V),
    entry("FastSpeech2ConformerModel", {"input_ids": tokens(20, 70)}, encoder_layers=1, decoder_layers=1),
    entry("SpeechT5HifiGan", {"spectrogram": normal(50, 80)}, upsample_initial_channel=64),
    entry("UnivNetModel", {"input_features": normal(1, 40, 100), "noise_sequence": normal(1, 40, 64)}, model_hidden_channels=16),
    entry("VitsModel", {"input_ids": tokens(30, 38)}, use_stochastic_duration_prediction=False, noise_scale=0.0),
    entry("EncodecModel", {"input_values": normal(1, 1, 8000)}),
    entry("DacModel", {"input_values": normal(1, 1, 8192)}, encoder_hidden_size=16, decoder_hidden_size=256, hidden_size=128),
    entry("MimiModel", {"input_values": normal(1, 1, 9600)}, num_hidden_layers=1, hidden_size=128, num_attention_heads=4,
          num_key_value_heads=4, intermediate_size=256, head_dim=32, num_filters=16, codebook_dim=64,
          vector_quantization_hidden_dimension=64,
          num_quantizers=4, upsample_groups=128),
    entry("BarkSemanticModel", text(64), input_vocab_size=1000, output_vocab_size=1000, hidden_size=256, num_layers=2, num_heads=4),
    entry("MusicgenForCausalLM", {"input_ids": lambda g: torch.randint(3, 1000, (4, 32), generator=g)}, hidden_size=256,
          num_hidden_layers=2,
          num_attention_heads=4, ffn_dim=512, **V),
    entry("ParakeetEncoder", {"input_features": normal(1, 100, 80)}, **W),
    entry("PatchTSTModel", {"past_values": normal(1, 512, 7)}, num_input_channels=7, context_length=512),
    entry("PatchTSMixerModel", {"past_values": normal(1, 512, 7)}, num_input_channels=7, context_length=512),
    entry("TimesFmModel", {"past_values": normal(1, 128), "past_values_padding": given(lambda: torch.zeros(1, 128, dtype=torch.int64)),
          "freq": given(lambda: torch.zeros(1, 1, dtype=torch.int64))}, head_dim=64, **W),
    entry("InformerModel", series(48, 24, 7), prediction_length=24, context_length=48, num_time_features=2, d_model=64, encoder_layers=2,
          decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128),
    entry("AutoformerModel", series(48, 24, 7), prediction_length=24, context_length=48, num_time_features=2, d_model=64, encoder_layers=2,
          decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128),
    entry("TimeSeriesTransformerModel", series(48, 24, 7), prediction_length=24, context_length=48, num_time_features=2, d_model=64,
          encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128),
)

ENTRIES = (*TEXT_MODELS, *DECODERS, *ENCODER_DECODERS, *IMAGE_MODELS, *BOTH, *SOUND_AND_SERIES)
