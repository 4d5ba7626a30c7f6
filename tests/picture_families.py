"""Families of vision-language models, and what is small in a tiny random model of each.

A new one is an entry; `tiny_pictures.save_tiny` writes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_GRID = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "image_size": 16,
}
_SQUARE = {"height": 16, "width": 16}


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
    vision: Mapping[str, Any] = field(default_factory=lambda: _VISION)
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


_QWEN = {
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
_QWEN_FIELDS = {f"{name}_id": token for name, token in _QWEN.items()}
_QWEN_WAY: dict[str, Any] = {
    "tokens": _QWEN,
    "shown": "<|vision_start|><|image_pad|><|vision_end|>",
    "images": "Qwen2VLImageProcessor",
    "sizes": {
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 64,
        "max_pixels": 256,
    },
    "fields": _QWEN_FIELDS,
}
_QWEN_3_5 = {
    "head_dim": 8,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
_IDEFICS = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
}
_IDEFICS_WAY: dict[str, Any] = {
    "text": {"model_type": "llama"},
    "tokens": _IDEFICS,
    "fields": {"scale_factor": 2, "image_token_id": "<image>"},
    "sizes": {
        "size": {"longest_edge": 16},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": False,
    },
    "settings": {"image_seq_len": 4},
}
_PIXTRAL = {
    "image_token": "[IMG]",
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
}
_PIXTRAL_WAY: dict[str, Any] = {
    "vision": {**_VISION, "model_type": "pixtral", "head_dim": 8},
    "tokens": _PIXTRAL,
    "shown": "[IMG]",
    "images": "PixtralImageProcessor",
    "processor": "PixtralProcessor",
    "sizes": {"size": {"longest_edge": 24}, "patch_size": {"height": 4, "width": 4}},
}
_GLM = {
    "image_start_token": "<|begin_of_image|>",
    "image_token": "<|image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_token": "<|video|>",
    "video_end_token": "<|end_of_video|>",
}
_GLM_TEXT = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 2],
    },
}
_GLM_WAY: dict[str, Any] = {
    "vision": _GRID,
    "tokens": _GLM,
    "fields": {f"{name}_id": token for name, token in _GLM.items()},
    "shown": "<|begin_of_image|><|image|><|end_of_image|>",
    "images": "Glm4vImageProcessor",
    "processor": "Glm4vProcessor",
    "sizes": {
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 128, "longest_edge": 512},
    },
}
_GEMMA = {
    "boi_token": "<start_of_image>",
    "image_token": "<image_soft_token>",
    "eoi_token": "<end_of_image>",
}
_SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA_4 = {
    **_GEMMA,
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}
_GEMMA_4_WAY: dict[str, Any] = {
    "vision": {
        **{k: v for k, v in _VISION.items() if k != "image_size"},
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    },
    "tokens": _GEMMA_4,
    "fields": {
        "audio_config": None,
        "image_token_id": "<image_soft_token>",
        "boi_token_id": "<start_of_image>",
        "eoi_token_id": "<end_of_image>",
        "video_token_id": "<|video|>",
        "audio_token_id": "<|audio|>",
        "boa_token_id": "<|audio>",
        "eoa_token_index": "<audio|>",
    },
    "shown": "<image_soft_token>",
    "images": "Gemma4ImageProcessor",
    "processor": "Gemma4Processor",
    "sizes": {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2},
    "settings": {"feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}},
}
_MINICPM = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}

_ALL = [
    PictureFamily(
        "Idefics 3, SmolVLM",
        "Idefics3",
        "Idefics3ImageProcessor",
        "Idefics3Processor",
        **_IDEFICS_WAY,
    ),
    PictureFamily(
        "SmolVLM2",
        "SmolVLM",
        "SmolVLMImageProcessor",
        "SmolVLMProcessor",
        **_IDEFICS_WAY,
        needs=("num2words",),
    ),
    PictureFamily(
        "LLaVA",
        "Llava",
        "CLIPImageProcessor",
        "LlavaProcessor",
        text={"model_type": "llama"},
        vision={**_VISION, "model_type": "clip_vision_model"},
        fields={"image_token_index": "<image>"},
        sizes={"size": {"shortest_edge": 16}, "crop_size": _SQUARE},
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
        vision={**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        tokens={"image_token": "<image>", "video_token": "<video>"},
        fields={
            "image_token_index": "<image>",
            "video_token_index": "<video>",
            "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]],
        },
        sizes={"size": _SQUARE, "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]]},
        settings={
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
    ),
    PictureFamily(
        "Pixtral",
        "Llava",
        **_PIXTRAL_WAY,
        text={"model_type": "mistral", "head_dim": 8},
        fields={
            "image_token_index": "[IMG]",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        settings={"patch_size": 4, **_PIXTRAL},
    ),
    PictureFamily(
        "Mistral Small 3, Ministral 3",
        "Mistral3",
        **_PIXTRAL_WAY,
        text={"model_type": "ministral3", "head_dim": 8},
        fields={"image_token_index": "[IMG]", "spatial_merge_size": 2},
        settings={"patch_size": 4, "spatial_merge_size": 2, **_PIXTRAL},
    ),
    PictureFamily(
        "InternVL",
        "InternVL",
        "GotOcr2ImageProcessor",
        "InternVLProcessor",
        text={"model_type": "qwen2"},
        vision={**_VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        fields={"image_token_id": "<IMG_CONTEXT>", "image_seq_length": 4},
        shown="<IMG_CONTEXT>",
        sizes={"size": _SQUARE, "crop_to_patches": False},
        settings={"image_seq_length": 4},
    ),
    PictureFamily(
        "Qwen2.5-VL",
        "Qwen2_5_VL",
        processor="Qwen2_5_VLProcessor",
        **_QWEN_WAY,
        text={"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision={**_GRID, "fullatt_block_indexes": [1], "window_size": 16},
    ),
    PictureFamily(
        "Qwen3-VL",
        "Qwen3VL",
        processor="Qwen3VLProcessor",
        **_QWEN_WAY,
        text={
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        # Features of its first vision layer are added in the first text layer.
        vision={**_GRID, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    PictureFamily(
        "Qwen3.5",
        "Qwen3_5",
        processor="Qwen3VLProcessor",
        **_QWEN_WAY,
        text=_QWEN_3_5,
        vision={**_GRID, "num_position_embeddings": 16},
    ),
    PictureFamily(
        "Qwen3.5 MoE",
        "Qwen3_5Moe",
        processor="Qwen3VLProcessor",
        **_QWEN_WAY,
        text={**_QWEN_3_5, **_EXPERTS},
        vision={**_GRID, "num_position_embeddings": 16},
    ),
    PictureFamily(
        "MiniCPM-V 4.6",
        "MiniCPMV4_6",
        "MiniCPMV4_6ImageProcessor",
        "MiniCPMV4_6Processor",
        text={"model_type": "qwen3_5_text", **_QWEN_3_5},
        tokens=_MINICPM,
        fields={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "insert_layer_id": 0,
            "image_size": 16,
        },
        shown="<|image_pad|>",
        sizes={"scale_resolution": 16, "patch_size": 4, "max_slice_nums": 4},
    ),
    PictureFamily("GLM-4.1V", "Glm4v", **_GLM_WAY, text=_GLM_TEXT),
    PictureFamily(
        "GLM-4.5V",
        "Glm4vMoe",
        **_GLM_WAY,
        text={
            **_GLM_TEXT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
        },
    ),
    PictureFamily(
        "Gemma 3",
        "Gemma3",
        "Gemma3ImageProcessor",
        "Gemma3Processor",
        text={"head_dim": 8, **_SLIDING},
        tokens=_GEMMA,
        fields={
            "mm_tokens_per_image": 4,
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        shown="<start_of_image>",
        sizes={"size": _SQUARE, "do_pan_and_scan": False},
        settings={"image_seq_length": 4},
    ),
    PictureFamily(
        "Gemma 4",
        "Gemma4",
        **_GEMMA_4_WAY,
        text={
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
            **_SLIDING,
        },
    ),
    PictureFamily(
        "Gemma 4 E2B, E4B",
        "Gemma4",
        **_GEMMA_4_WAY,
        text={
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": 300,
            **_SLIDING,
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
            **_VISION,
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
        sizes={"size": _SQUARE, "max_patches": 4},
        settings={"patch_size": 4},
        needs=("torchvision",),
    ),
]
FAMILIES = {family.name: family for family in _ALL}
