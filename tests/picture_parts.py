"""What families of vision-language models have in common, small, for `picture_families`."""

from typing import Any

from base_models import DELTA_NET

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
GRID = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "image_size": 16,
}
SQUARE = {"height": 16, "width": 16}
QWEN = {
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
QWEN_FIELDS = {f"{name}_id": token for name, token in QWEN.items()}
QWEN_WAY: dict[str, Any] = {
    "tokens": QWEN,
    "shown": "<|vision_start|><|image_pad|><|vision_end|>",
    "images": "Qwen2VLImageProcessor",
    "sizes": {
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 64,
        "max_pixels": 256,
    },
    "fields": QWEN_FIELDS,
}
QWEN_3_5 = {
    **DELTA_NET,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
IDEFICS = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
}
IDEFICS_WAY: dict[str, Any] = {
    "text": {"model_type": "llama"},
    "tokens": IDEFICS,
    "fields": {"scale_factor": 2, "image_token_id": "<image>"},
    "sizes": {
        "size": {"longest_edge": 16},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": False,
    },
    "settings": {"image_seq_len": 4},
}
PIXTRAL = {
    "image_token": "[IMG]",
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
}
PIXTRAL_WAY: dict[str, Any] = {
    "vision": {**VISION, "model_type": "pixtral", "head_dim": 8},
    "tokens": PIXTRAL,
    "shown": "[IMG]",
    "images": "PixtralImageProcessor",
    "processor": "PixtralProcessor",
    "sizes": {"size": {"longest_edge": 24}, "patch_size": {"height": 4, "width": 4}},
}
GLM = {
    "image_start_token": "<|begin_of_image|>",
    "image_token": "<|image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_token": "<|video|>",
    "video_end_token": "<|end_of_video|>",
}
GLM_TEXT = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 2],
    },
}
GLM_WAY: dict[str, Any] = {
    "vision": GRID,
    "tokens": GLM,
    "fields": {f"{name}_id": token for name, token in GLM.items()},
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
GEMMA = {
    "boi_token": "<start_of_image>",
    "image_token": "<image_soft_token>",
    "eoi_token": "<end_of_image>",
}
SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA_4 = {
    **GEMMA,
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}
GEMMA_4_WAY: dict[str, Any] = {
    "vision": {
        **{k: v for k, v in VISION.items() if k != "image_size"},
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    },
    "tokens": GEMMA_4,
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
MINICPM = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
