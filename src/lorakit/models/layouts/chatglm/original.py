"""The original `config.json`, and what it says in transformers' words.

Which of three generations a folder is decides its rotary embedding, tokenizer and chat format.
The three share `model_type: chatglm`, so other files are looked at where the values are silent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError, listed

if TYPE_CHECKING:
    from transformers import GlmConfig

MODEL_TYPE = "chatglm"
TOKENIZER_NAME = "tokenizer.model"
_CODE, _TOKENIZER_CODE = "modeling_chatglm.py", "tokenization_chatglm.py"
_BASE = 10000.0  # of the rotary embedding

# What transformers' GLM does; the value is the original code's default.
_FIXED: dict[str, tuple[Any, Any]] = {
    "original_rope": (True, True),
    "rmsnorm": (True, True),
    "post_layer_norm": (True, True),
    "multi_query_attention": (True, False),
    "add_bias_linear": (False, False),
    "apply_residual_connection_post_layernorm": (False, False),
}
# Sizes by transformers' names.
_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "vocab_size": "padded_vocab_size",
    "max_position_embeddings": "seq_length",
}


class Generation(Enum):
    """Which of the published models a folder is one of."""

    CHATGLM2 = "ChatGLM2"
    CHATGLM3 = "ChatGLM3"
    GLM4 = "GLM-4"


@dataclass(frozen=True)
class Original:
    """An original folder's configuration, checked.

    `values` are those of `config.json`, `sizes` the numbers that shape the tensors.
    """

    path: Path
    values: dict[str, Any]
    sizes: dict[str, int]
    generation: Generation


def read_original(path: Path) -> Original:
    """The configuration of the original folder at `path`.

    Raises:
        InputError: it is damaged, or of a model that transformers' GLM is not.
    """
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"model: {path / 'config.json'} is not readable JSON: {error}") from error
    _require_known(path, values)
    sizes = {name: _size(path, name, values) for name in _SIZES.values()}
    for one, unit, why in (
        ("num_attention_heads", sizes["multi_query_group_num"], "the number of groups"),
        ("kv_channels", 4, "as half of every head is turned, in pairs"),
    ):
        if sizes[one] % unit:
            raise InputError(
                f"model: {path / 'config.json'}: {one} {sizes[one]} is not "
                f"a multiple of {unit}, {why}"
            )
    epsilon, ratio = values.get("layernorm_epsilon"), values.get("rope_ratio", 1.0)
    for name, number in (("layernorm_epsilon", epsilon), ("rope_ratio", ratio)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
            raise InputError(
                f"model: {path / 'config.json'}: {name} must be a number above 0, not {number!r}"
            )
    return Original(path, values, sizes, _generation(path, values))


def native_config(original: Original, **options: Any) -> GlmConfig:
    """The same as transformers' configuration of GLM, with `options` in place of its own values."""
    from transformers import GlmConfig

    values = original.values
    own: dict[str, Any] = {
        **{name: original.sizes[theirs] for name, theirs in _SIZES.items()},
        "rms_norm_eps": values["layernorm_epsilon"],
        "attention_bias": bool(values.get("add_qkv_bias", False)),
        "attention_dropout": values.get("attention_dropout", 0.0),
        "rope_parameters": _rope(original),
        "use_cache": values.get("use_cache", True),
        "tie_word_embeddings": False,  # the original code never ties them, whatever is said there
        "bos_token_id": None,
        "eos_token_id": values.get("eos_token_id"),
        "pad_token_id": values.get("pad_token_id"),
        "dtype": values.get("torch_dtype", values.get("dtype", "float16")),
    }
    return GlmConfig(**own | options)


def _rope(original: Original) -> dict[str, Any]:
    """Half of every head is turned; a ratio stretches the base, and in ChatGLM2 the positions."""
    ratio = float(original.values.get("rope_ratio", 1.0))
    half = {"partial_rotary_factor": 0.5}
    if ratio != 1.0 and _stretches_positions(original):
        return {"rope_type": "linear", "rope_theta": _BASE, "factor": ratio, **half}
    return {"rope_type": "default", "rope_theta": _BASE * ratio, **half}


def _stretches_positions(original: Original) -> bool:
    """Whether a `rope_ratio` divides positions, as only chatglm2-6b-32k's code does."""
    code = _text(original.path / _CODE)
    if "/ self.rope_ratio" in code:
        return True
    return "rope_ratio" not in code and original.generation is Generation.CHATGLM2


def _require_known(path: Path, values: Any) -> None:
    """Raises InputError for a model that transformers' GLM does not compute."""
    if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
        raise InputError(f"model: {path} is not a model in ChatGLM's original layout")
    if "inner_hidden_size" in values or "position_encoding_2d" in values:
        raise InputError(
            f"model: {path} is the first ChatGLM-6B, another architecture that transformers does "
            "not have: use ChatGLM2, ChatGLM3 or GLM-4"
        )
    if "vision_config" in values:
        raise InputError(f"model: {path} is GLM-4V: only the text models of ChatGLM are read")
    if values.get("quantization_bit"):
        raise InputError(
            f"model: {path} is quantised by its own code (quantization_bit "
            f"{values['quantization_bit']}): give the model before quantisation"
        )
    if values.get("pre_seq_len"):
        raise InputError(
            f"model: {path} has a trained prefix (pre_seq_len {values['pre_seq_len']}), which "
            "transformers' GLM has no place for: give the model without P-tuning"
        )
    missing = [name for name in (*_SIZES.values(), "layernorm_epsilon") if name not in values]
    if missing:
        raise InputError(f"model: {path / 'config.json'} does not say {listed(missing, 4)}")
    for name, (needed, default) in _FIXED.items():
        if (there := values.get(name, default)) != needed:
            raise InputError(
                f"model: {path / 'config.json'} has {name} {there!r}, which transformers' GLM "
                f"cannot do: only {needed!r} is read"
            )


def _size(path: Path, name: str, values: dict[str, Any]) -> int:
    number = values[name]
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise InputError(
            f"model: {path / 'config.json'}: {name} must be a whole number above 0, not {number!r}"
        )
    return number


def _generation(path: Path, values: dict[str, Any]) -> Generation:
    """GLM-4's vocabulary is a text file; ChatGLM3's code knows roles, and ChatGLM2's does not."""
    if is_tiktoken(path / TOKENIZER_NAME):
        return Generation.GLM4
    code = _text(path / _TOKENIZER_CODE)
    name = str(values.get("_name_or_path", "")).lower()
    if "chatglm2" in name or "codegeex2" in name or (code and "<|user|>" not in code):
        return Generation.CHATGLM2
    return Generation.CHATGLM3


def is_tiktoken(path: Path) -> bool:
    """Whether the vocabulary at `path` has tiktoken's form: a token in base64 and its rank."""
    try:
        with path.open("rb") as file:
            first = file.readline(1000).split()
    except OSError:
        return False
    return len(first) == 2 and first[1].isdigit()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
