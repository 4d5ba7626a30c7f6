"""A tiny random model of each family of base models that people bring, and inputs for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

Inputs = dict[str, torch.Tensor]

TOKENS = 48
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": TOKENS}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SPARSE = {**LATENT, "mlp_layer_types": ["dense", "sparse"]}
INDEXED = {**SPARSE, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 16}
DELTA_NET = {
    "head_dim": 8,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA_2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_d_conv": 2,
    "mamba_chunk_size": 4,
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


@dataclass(frozen=True)
class BaseModel:
    """A family: how it is called, and how a small model of it is made.

    `kind` is the model's class and `config` its configuration's in transformers, `values` what is
    small in it. `inputs` makes what it is called with, labels included.
    """

    name: str
    kind: str
    config: str
    values: dict[str, Any]
    inputs: Callable[[], Inputs]

    @property
    def is_causal(self) -> bool:
        """Whether it is a causal language model."""
        return self.kind.endswith(("ForCausalLM", "LMHeadModel"))

    @property
    def trained_whole(self) -> dict[str, Any]:
        """The fields of `LoraConfig` for a classifier, whose head is new."""
        if self.kind.endswith("ForSequenceClassification"):
            return {"task_type": "SEQ_CLS"}
        return {"modules_to_save": ["classifier"]} if "Classification" in self.kind else {}

    def build(self, seed: int = 0) -> nn.Module:
        """The model, always with the same weights, in float32."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.values)
        config._experts_implementation = "eager"
        model: nn.Module = getattr(transformers, self.kind)(config)
        return model.eval()


def words() -> Inputs:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(4, TOKENS, (2, 9), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def classes() -> Inputs:
    return {"input_ids": words()["input_ids"], "labels": torch.tensor([0, 1])}


def pictures() -> Inputs:
    generator = torch.Generator().manual_seed(7)
    return {
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
        "labels": torch.tensor([0, 1]),
    }


def speech() -> Inputs:
    generator = torch.Generator().manual_seed(7)
    return {
        "input_features": torch.randn(2, 8, 20, generator=generator),
        "labels": words()["labels"],
    }


def _causal(name: str, stem: str, **values: Any) -> BaseModel:
    return BaseModel(name, f"{stem}ForCausalLM", f"{stem}Config", {**IDS, **values}, words)


def _decoder(name: str, stem: str, **values: Any) -> BaseModel:
    return _causal(name, stem, **{**SIZES, **HEADS, **values})


def _text(name: str, stem: str, **values: Any) -> BaseModel:
    """The language part of a family that has pictures too, with its own configuration."""
    kind, config = f"{stem}ForCausalLM", f"{stem}TextConfig"
    return BaseModel(name, kind, config, {**SIZES, **HEADS, **IDS, **values}, words)


def _with_pictures(name: str, stem: str, text: dict[str, Any], **values: Any) -> BaseModel:
    kind, config = f"{stem}ForConditionalGeneration", f"{stem}Config"
    return BaseModel(name, kind, config, {"text_config": {**LLAMA, **text}, **values}, words)


def _encoder(name: str, stem: str, **values: Any) -> BaseModel:
    return BaseModel(
        name,
        f"{stem}ForSequenceClassification",
        f"{stem}Config",
        {**SIZES, "num_attention_heads": 4, **IDS, **values},
        classes,
    )


LLAMA = {**SIZES, **HEADS, **IDS}

BASE_MODELS = [
    _decoder("Llama", "Llama"),
    _decoder("Llama, embedding and head tied", "Llama", tie_word_embeddings=True),
    _decoder("Mistral", "Mistral"),
    _decoder("Mixtral", "Mixtral", num_local_experts=4),
    _decoder("Qwen 2", "Qwen2"),
    _decoder("Qwen 3", "Qwen3", head_dim=4),
    _decoder("Qwen 2 MoE", "Qwen2Moe", num_experts=4, shared_expert_intermediate_size=8, **EXPERTS),
    _decoder("Qwen 3 MoE", "Qwen3Moe", head_dim=4, num_experts=4, **EXPERTS),
    _decoder("Gemma 2", "Gemma2", head_dim=4),
    BaseModel(
        "Gemma 3 (text)",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**LLAMA, "head_dim": 4},
        words,
    ),
    _text(
        "Gemma 3n",
        "Gemma3n",
        head_dim=4,
        num_hidden_layers=4,
        vocab_size_per_layer_input=TOKENS,
        hidden_size_per_layer_input=4,
        num_kv_shared_layers=2,
        laurel_rank=4,
        altup_correct_scale=False,  # its scale is zero at first: layers behind it would not learn
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    _text(
        "Gemma 4",
        "Gemma4",
        head_dim=4,
        global_head_dim=8,
        num_hidden_layers=4,
        vocab_size_per_layer_input=TOKENS,
        hidden_size_per_layer_input=4,
        num_kv_shared_layers=2,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    _text(
        "Gemma 4 MoE",
        "Gemma4",
        head_dim=4,
        global_head_dim=8,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=8,
        **SLIDING,
    ),
    _text(
        "Gemma 4 12B (unified)",
        "Gemma4Unified",
        head_dim=4,
        global_head_dim=8,
        hidden_size_per_layer_input=0,
        **SLIDING,
    ),
    _text("Qwen 3.5", "Qwen3_5", **DELTA_NET),
    _text(
        "Qwen 3.5 MoE",
        "Qwen3_5Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        **DELTA_NET,
    ),
    _decoder(
        "Qwen3-Next",
        "Qwen3Next",
        num_experts=4,
        shared_expert_intermediate_size=8,
        **EXPERTS,
        **DELTA_NET,
    ),
    _decoder(
        "gpt-oss", "GptOss", head_dim=4, num_local_experts=4, num_experts_per_tok=2, **SLIDING
    ),
    _text(
        "Llama 4",
        "Llama4",
        head_dim=4,
        intermediate_size_mlp=24,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=4,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    _decoder("Ministral", "Ministral", head_dim=4, **SLIDING),
    _decoder("Ministral 3", "Ministral3", head_dim=4),
    _decoder("Phi 3, Phi 4", "Phi3"),
    _decoder("Phi 3.5 MoE", "Phimoe", num_local_experts=4),
    _decoder("Phi 2", "Phi"),
    _decoder("GLM-4-9B, ChatGLM 2 and 3", "Glm", head_dim=4),
    _decoder("GLM-4-0414", "Glm4", head_dim=4),
    _decoder(
        "GLM-4.5, GLM-4.6",
        "Glm4Moe",
        head_dim=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        use_qk_norm=True,
    ),
    _decoder("GLM-4.7-Flash", "Glm4MoeLite", **SPARSE),
    _decoder("GLM-5", "GlmMoeDsa", **INDEXED),
    _decoder("DeepSeek V2", "DeepseekV2", **LATENT),
    _decoder("DeepSeek V3, Kimi K2", "DeepseekV3", **LATENT),
    _decoder("DeepSeek V3.2", "DeepseekV32", **INDEXED),
    _decoder(
        "DeepSeek V4",
        "DeepseekV4",
        head_dim=8,
        q_lora_rank=12,
        num_experts_per_tok=2,
        n_routed_experts=4,
        moe_intermediate_size=8,
        hc_mult=2,
        sliding_window=4,
        o_groups=2,
        o_lora_rank=4,
        index_n_heads=16,
        index_head_dim=8,
        index_topk=4,
        layer_types=["compressed_sparse_attention", "sliding_attention"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    ),
    _decoder(
        "Kimi Linear",
        "KimiLinear",
        **{
            **LATENT,
            "q_lora_rank": None,
            "num_local_experts": 4,
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["linear_attention", "full_attention"],
            "linear_head_dim": 4,
            "linear_num_heads": 4,
            "linear_conv_kernel_dim": 2,
        },
    ),
    _decoder(
        "MiniMax",
        "MiniMax",
        head_dim=4,
        num_local_experts=4,
        layer_types=["linear_attention", "full_attention"],
        block_size=4,
    ),
    _decoder("MiniMax M2", "MiniMaxM2", head_dim=4, num_local_experts=4, num_experts_per_tok=2),
    _decoder("Granite 3", "Granite"),
    _decoder(
        "Granite 4",
        "GraniteMoeHybrid",
        num_local_experts=0,
        shared_intermediate_size=24,
        layer_types=["mamba", "attention"],
        **MAMBA_2,
    ),
    _decoder(
        "Granite 4 MoE",
        "GraniteMoeHybrid",
        num_local_experts=4,
        shared_intermediate_size=8,
        layer_types=["mamba", "attention"],
        **MAMBA_2,
    ),
    _decoder("Falcon-H1", "FalconH1", head_dim=4, mamba_d_ssm=32, **MAMBA_2),
    _decoder("SmolLM3", "SmolLM3", no_rope_layers=[1, 0]),
    _decoder("OLMo 2", "Olmo2"),
    _decoder("OLMo 3", "Olmo3", **SLIDING),
    _decoder("Hunyuan", "HunYuanDenseV1", head_dim=4),
    _decoder("Hunyuan MoE", "HunYuanMoEV1", head_dim=4, num_experts=4, moe_topk=2),
    _decoder("ERNIE 4.5", "Ernie4_5", head_dim=4),
    _decoder(
        "ERNIE 4.5 MoE",
        "Ernie4_5_Moe",
        moe_intermediate_size=8,
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=1,
    ),
    _decoder("Seed-OSS", "SeedOss", head_dim=4, attention_dropout=0.0, residual_dropout=0.0),
    _decoder("LFM2", "Lfm2", layer_types=["conv", "full_attention"]),
    _decoder(
        "LFM2 MoE",
        "Lfm2Moe",
        layer_types=["conv", "full_attention"],
        num_dense_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    ),
    BaseModel(
        "GPT-2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": TOKENS, **IDS},
        words,
    ),
    _causal("GPT-NeoX, Pythia", "GPTNeoX", **{**SIZES, "num_attention_heads": 4}),
    _causal(
        "Falcon",
        "Falcon",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=TOKENS,
    ),
    _causal("BLOOM", "Bloom", hidden_size=16, n_layer=2, n_head=4, vocab_size=TOKENS),
    _causal(
        "OPT",
        "OPT",
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=TOKENS,
        word_embed_proj_dim=16,
    ),
    _causal("Mamba", "Mamba", hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=TOKENS),
    _encoder("BERT", "Bert"),
    _encoder("RoBERTa", "Roberta"),
    _encoder(
        "DeBERTa v2, v3",
        "DebertaV2",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
    ),
    _encoder("ModernBERT", "ModernBert", cls_token_id=1, sep_token_id=2),
    BaseModel(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": TOKENS,
            "decoder_start_token_id": 0,
        },
        words,
    ),
    BaseModel(
        "ViT",
        "ViTForImageClassification",
        "ViTConfig",
        VISION,
        pictures,
    ),
    BaseModel(
        "Whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "num_mel_bins": 8,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_source_positions": 10,
            "vocab_size": TOKENS,
            "decoder_start_token_id": 3,
            **IDS,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
        speech,
    ),
    BaseModel(
        "Gemma 3 (with vision)",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**LLAMA, "head_dim": 4},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 3,
        },
        words,
    ),
    _with_pictures(
        "Mistral Small 3.1, Ministral 3 (with vision)",
        "Mistral3",
        {"model_type": "ministral3", "head_dim": 4},
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 8},
        image_token_index=3,
    ),
    _with_pictures(
        "Mistral Small 4 (with vision)",
        "Mistral3",
        {"model_type": "mistral4", **LATENT},
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 8},
        image_token_index=3,
    ),
    BaseModel(
        "Llava",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": 3,
        },
        words,
    ),
    BaseModel(
        "Qwen 2.5 VL",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {
                **LLAMA,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [1, 1, 0],
                    "rope_theta": 1e4,
                },
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 16,
            },
        },
        words,
    ),
]
