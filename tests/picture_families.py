"""Families of vision-language models, and what is small in a tiny random model of each.

A new one is an entry; `tiny_pictures.save_tiny` writes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from picture_parts import (
    EXPERTS,
    GEMMA,
    GEMMA_4,
    GEMMA_4_WAY,
    GLM_TEXT,
    GLM_WAY,
    GRID,
    IDEFICS_WAY,
    MINICPM,
    PIXTRAL,
    PIXTRAL_WAY,
    QWEN_3_5,
    QWEN_WAY,
    SLIDING,
    SQUARE,
    VISION,
)


@dataclass(frozen=True)
class PictureFamily:
    """A family, and what is small in a tiny random model of it.

    Attributes:
        name: as documents call it.
        stem: of its classes in transformers.
        text, vision: fields of the configurations of these parts.
        fields: others of its configuration; a token in `tokens` stands for its number.
        tokens: its special tokens, by their names in the tokenizer's configuration.
        shown: what a chat template writes for a picture.
        images: the class of its image processor in transformers.
        sizes: settings of that.
        processor: its processor's class.
        settings: of that.
        needs: modules beside lorakit's own.
    """

    name: str
    stem: str
    images: str
    processor: str
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=lambda: VISION)
    fields: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=lambda: {"image_token": "<image>"})
    shown: str = "<image>"
    sizes: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """The class of the whole model."""
        return f"{self.stem}ForConditionalGeneration"


_ALL = [
    PictureFamily(
        "Idefics 3, SmolVLM",
        "Idefics3",
        "Idefics3ImageProcessor",
        "Idefics3Processor",
        **IDEFICS_WAY,
    ),
    PictureFamily(
        "SmolVLM2",
        "SmolVLM",
        "SmolVLMImageProcessor",
        "SmolVLMProcessor",
        **IDEFICS_WAY,
        needs=("num2words",),
    ),
    PictureFamily(
        "LLaVA",
        "Llava",
        "CLIPImageProcessor",
        "LlavaProcessor",
        text={"model_type": "llama"},
        vision={**VISION, "model_type": "clip_vision_model"},
        fields={"image_token_index": "<image>"},
        sizes={"size": {"shortest_edge": 16}, "crop_size": SQUARE},
        settings={
            "patch_size": 4,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    ),
    PictureFamily(
        "LLaVA-NeXT",
        "LlavaNext",
        "LlavaNextImageProcessor",
        "LlavaNextProcessor",
        text={"model_type": "llama"},
        vision={**VISION, "model_type": "clip_vision_model"},
        fields={"image_token_index": "<image>", "image_grid_pinpoints": [[16, 32], [32, 16]]},
        sizes={
            "size": {"shortest_edge": 16},
            "crop_size": SQUARE,
            "image_grid_pinpoints": [[16, 32], [32, 16]],
        },
        settings={
            "patch_size": 4,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    ),
    PictureFamily(
        "LLaVA-OneVision",
        "LlavaOnevision",
        "LlavaOnevisionImageProcessor",
        "LlavaOnevisionProcessor",
        text={"model_type": "qwen2"},
        vision={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        tokens={"image_token": "<image>", "video_token": "<video>"},
        fields={
            "image_token_index": "<image>",
            "video_token_index": "<video>",
            "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]],
        },
        sizes={"size": SQUARE, "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]]},
        settings={
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
    ),
    PictureFamily(
        "Pixtral",
        "Llava",
        **PIXTRAL_WAY,
        text={"model_type": "mistral", "head_dim": 8},
        fields={
            "image_token_index": "[IMG]",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        settings={"patch_size": 4, **PIXTRAL},
    ),
    PictureFamily(
        "Mistral Small 3, Ministral 3",
        "Mistral3",
        **PIXTRAL_WAY,
        text={"model_type": "ministral3", "head_dim": 8},
        fields={"image_token_index": "[IMG]", "spatial_merge_size": 2},
        settings={"patch_size": 4, "spatial_merge_size": 2, **PIXTRAL},
    ),
    PictureFamily(
        "InternVL",
        "InternVL",
        "GotOcr2ImageProcessor",
        "InternVLProcessor",
        text={"model_type": "qwen2"},
        vision={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        fields={"image_token_id": "<IMG_CONTEXT>", "image_seq_length": 4},
        shown="<IMG_CONTEXT>",
        sizes={"size": SQUARE, "crop_to_patches": False},
        settings={"image_seq_length": 4},
    ),
    PictureFamily(
        "Qwen2-VL",
        "Qwen2VL",
        processor="Qwen2VLProcessor",
        **QWEN_WAY,
        text={"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
    ),
    PictureFamily(
        "Qwen2.5-VL",
        "Qwen2_5_VL",
        processor="Qwen2_5_VLProcessor",
        **QWEN_WAY,
        text={"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision={**GRID, "fullatt_block_indexes": [1], "window_size": 16},
    ),
    PictureFamily(
        "Qwen3-VL",
        "Qwen3VL",
        processor="Qwen3VLProcessor",
        **QWEN_WAY,
        text={
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        # Features of its first vision layer are added in the first text layer.
        vision={**GRID, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    PictureFamily(
        "Qwen3-VL MoE",
        "Qwen3VLMoe",
        processor="Qwen3VLProcessor",
        **QWEN_WAY,
        text={
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
        },
        vision={**GRID, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    PictureFamily(
        "Qwen3.5",
        "Qwen3_5",
        processor="Qwen3VLProcessor",
        **QWEN_WAY,
        text=QWEN_3_5,
        vision={**GRID, "num_position_embeddings": 16},
    ),
    PictureFamily(
        "Qwen3.5 MoE",
        "Qwen3_5Moe",
        processor="Qwen3VLProcessor",
        **QWEN_WAY,
        text={**QWEN_3_5, **EXPERTS},
        vision={**GRID, "num_position_embeddings": 16},
    ),
    PictureFamily(
        "MiniCPM-V 4.6",
        "MiniCPMV4_6",
        "MiniCPMV4_6ImageProcessor",
        "MiniCPMV4_6Processor",
        text={"model_type": "qwen3_5_text", **QWEN_3_5},
        tokens=MINICPM,
        fields={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "insert_layer_id": 0,
            "image_size": 16,
        },
        shown="<|image_pad|>",
        sizes={"scale_resolution": 16, "patch_size": 4, "max_slice_nums": 4},
    ),
    PictureFamily("GLM-4.1V", "Glm4v", **GLM_WAY, text=GLM_TEXT),
    PictureFamily(
        "GLM-4.5V",
        "Glm4vMoe",
        **GLM_WAY,
        text={
            **GLM_TEXT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
        },
    ),
    PictureFamily(
        "GLM-4.6V",
        "Glm46V",
        **{**GLM_WAY, "images": "Glm46VImageProcessor", "processor": "Glm46VProcessor"},
        text={"model_type": "glm4v_text", **GLM_TEXT},
    ),
    PictureFamily(
        "Gemma 3",
        "Gemma3",
        "Gemma3ImageProcessor",
        "Gemma3Processor",
        text={"head_dim": 8, **SLIDING},
        tokens=GEMMA,
        fields={
            "mm_tokens_per_image": 4,
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        shown="<start_of_image>",
        sizes={"size": SQUARE, "do_pan_and_scan": False},
        settings={"image_seq_length": 4},
    ),
    PictureFamily(
        "Gemma 3n",
        "Gemma3n",
        "SiglipImageProcessor",
        "Gemma3nProcessor",
        text={
            "head_dim": 8,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": 300,
            "laurel_rank": 4,
            "altup_correct_scale": False,  # its scale is zero at first: nothing would be learned
            "num_kv_shared_layers": 0,
            **SLIDING,
        },
        vision={"architecture": "test_convnext", "hidden_size": 64, "vocab_size": 4},
        tokens={k: v for k, v in GEMMA_4.items() if k != "video_token"},
        fields={
            "audio_config": {
                "hidden_size": 16,
                "conf_num_hidden_layers": 1,
                "conf_num_attention_heads": 2,
                "vocab_size": 4,
            },
            "vision_soft_tokens_per_image": 4,
            "image_token_id": "<image_soft_token>",
            "boi_token_id": "<start_of_image>",
            "eoi_token_id": "<end_of_image>",
            "audio_token_id": "<|audio|>",
            "boa_token_id": "<|audio>",
            "eoa_token_id": "<audio|>",
        },
        shown="<image_soft_token>",
        sizes={"size": {"height": 64, "width": 64}},
        settings={
            "image_seq_length": 4,
            "feature_extractor": {"feature_extractor_type": "Gemma3nAudioFeatureExtractor"},
        },
        needs=("timm", "torchvision"),
    ),
    PictureFamily(
        "Gemma 4",
        "Gemma4",
        **GEMMA_4_WAY,
        text={
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
            **SLIDING,
        },
    ),
    PictureFamily(
        "Gemma 4 E2B, E4B",
        "Gemma4",
        **GEMMA_4_WAY,
        text={
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": 300,
            **SLIDING,
        },
    ),
    PictureFamily(
        "Llama 4",
        "Llama4",
        "Llama4ImageProcessor",
        "Llama4Processor",
        text={
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
        vision={
            **VISION,
            "intermediate_size": 64,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
            "vision_output_dim": 24,
        },
        tokens={
            "image_token": "<|image|>",
            "patch_token": "<|patch|>",
            "boi_token": "<|image_start|>",
            "eoi_token": "<|image_end|>",
            "tile_x_separator_token": "<|tile_x_separator|>",
            "tile_y_separator_token": "<|tile_y_separator|>",
        },
        fields={
            "image_token_index": "<|patch|>",
            "boi_token_index": "<|image_start|>",
            "eoi_token_index": "<|image_end|>",
        },
        shown="<|image|>",
        sizes={"size": SQUARE, "max_patches": 4},
        settings={"patch_size": 4},
        needs=("torchvision",),
    ),
]
FAMILIES = {family.name: family for family in _ALL}
