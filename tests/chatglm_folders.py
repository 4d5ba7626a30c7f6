"""Small random checkpoints in the layout in which ChatGLM2, ChatGLM3 and GLM-4 were published."""

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import tiktoken._educational
import torch
from safetensors.torch import save_file

SIZES = {
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_layers": 2,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "kv_channels": 8,
    "padded_vocab_size": 768,
    "seq_length": 256,
}
TEXT = Path(__file__).parents[1] / "README.md", Path(__file__).parents[1] / "README.zh-CN.md"


def config(**changed: Any) -> dict[str, Any]:
    """A small `config.json` with every field of THUDM/chatglm3-6b's."""
    return {
        "_name_or_path": "THUDM/chatglm3-6b",
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "layernorm_epsilon": 1e-05,
        "multi_query_attention": True,
        "original_rope": True,
        "post_layer_norm": True,
        "rmsnorm": True,
        "use_cache": True,
        "torch_dtype": "float16",
        "transformers_version": "4.30.2",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **SIZES,
        **changed,
    }


def tensors(values: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights, large enough for attention and rotation to matter."""
    torch.manual_seed(0)
    h, d, f = values["hidden_size"], values["kv_channels"], values["ffn_hidden_size"]
    heads, groups = values["num_attention_heads"], values["multi_query_group_num"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (values["padded_vocab_size"], h),
        "transformer.encoder.final_layernorm.weight": (h,),
        "transformer.output_layer.weight": (values["padded_vocab_size"], h),
    }
    for layer in range(values["num_layers"]):
        path = f"transformer.encoder.layers.{layer}"
        shapes |= {
            f"{path}.input_layernorm.weight": (h,),
            f"{path}.self_attention.query_key_value.weight": ((heads + 2 * groups) * d, h),
            f"{path}.self_attention.dense.weight": (h, heads * d),
            f"{path}.post_attention_layernorm.weight": (h,),
            f"{path}.mlp.dense_h_to_4h.weight": (2 * f, h),
            f"{path}.mlp.dense_4h_to_h.weight": (h, f),
        }
        if values["add_qkv_bias"]:
            shapes[f"{path}.self_attention.query_key_value.bias"] = ((heads + 2 * groups) * d,)
    found = {name: torch.randn(shape) * 0.3 + ("norm" in name) for name, shape in shapes.items()}
    found["transformer.rotary_pos_emb.inv_freq"] = torch.randn(d // 4)
    return {name: tensor.to(dtype) for name, tensor in found.items()}


@cache
def sentencepiece_model(extra: str = "", **changed: Any) -> bytes:
    """A model of English and Chinese text with the settings of ChatGLM's, as a file's content."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*corpus(), extra] if extra else corpus()),
        model_writer=written,
        **{
            "vocab_size": 700,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "character_coverage": 0.98,
            "minloglevel": 2,
            **changed,
        },
    )
    return written.getvalue()


def corpus() -> list[str]:
    """Lines of the project's own English and Chinese texts."""
    return [line for path in TEXT for line in path.read_text(encoding="utf-8").splitlines() if line]


@cache
def ranks_file() -> bytes:
    """A vocabulary of 400 tokens in tiktoken's form, as GLM-4 has."""
    pattern = r"\p{L}+|\p{N}{1,3}|[^\s\p{L}\p{N}]+|\s+"
    text = "\n".join(corpus())[:6000]
    ranks = tiktoken._educational.bpe_train(text, 400, pattern, visualise=None)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    return ("\n".join(lines) + "\n").encode()


def write_original(
    folder: Path,
    form: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    values: dict[str, Any] | None = None,
    tokenizer: bytes | None = None,
    shards: int = 2,
) -> Path:
    """Writes a checkpoint whose weights are in `shards` files of `form`, safetensors or bin."""
    folder.mkdir(parents=True)
    values = config() if values is None else values
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    (folder / "tokenizer.model").write_bytes(tokenizer or sentencepiece_model())
    settings = {"tokenizer_class": "ChatGLMTokenizer", "padding_side": "left"}
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}  # type: ignore[assignment]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    stem = {"safetensors": "model", "bin": "pytorch_model"}[form]
    where, all_tensors = {}, tensors(values, dtype)
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{form}"
        part = dict(list(all_tensors.items())[number::shards])
        where |= dict.fromkeys(part, file)
        if form == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps(index))
    return folder
