"""Tiny random models in place of the hub's that PEFT's tests ask for, in the hub's cache layout.

The tests load `peft-internal-testing/tiny-random-OPTForCausalLM` and the like. Here each is made
from its architecture's configuration, so that the suite runs without a network; the library that
reads them, transformers, notices no difference.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 1024  # PEFT's tests use token numbers up to 999
REVISION = "0" * 40

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 32}
_TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def _opt(layers: int = 5) -> transformers.OPTConfig:
    return transformers.OPTConfig(
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        vocab_size=VOCABULARY,
        **_TOKENS,
    )


def _gpt2() -> transformers.GPT2Config:
    return transformers.GPT2Config(
        n_embd=32, n_layer=5, n_head=4, n_positions=512, vocab_size=VOCABULARY, **_TOKENS
    )


def _like_llama(kind: str, **fields: Any) -> Any:
    """A configuration of Llama's family; `kind` as in `transformers.LlamaConfig`."""
    make = getattr(transformers, f"{kind}Config")
    return make(**{**_LLAMA, "vocab_size": VOCABULARY, **_TOKENS, **fields})


def _like_bert(kind: str, **fields: Any) -> Any:
    """A configuration of BERT's family."""
    make = getattr(transformers, f"{kind}Config")
    return make(**_SIZES, intermediate_size=32, vocab_size=VOCABULARY, type_vocab_size=2, **fields)


def _t5() -> transformers.T5Config:
    return transformers.T5Config(
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )


def _bart() -> transformers.BartConfig:
    return transformers.BartConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=512,
        vocab_size=VOCABULARY,
        **_TOKENS,
        decoder_start_token_id=257,
        forced_eos_token_id=257,
    )


_CAUSAL = "AutoModelForCausalLM"
_PLAIN = "AutoModel"
_CLASSES = "AutoModelForSequenceClassification"
_SEQ2SEQ = "AutoModelForSeq2SeqLM"

MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (_CAUSAL, _opt),
    "peft-internal-testing/opt-125m": (_CAUSAL, lambda: _opt(12)),
    "facebook/opt-125m": (_CAUSAL, lambda: _opt(12)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (_CAUSAL, _gpt2),
    "hf-internal-testing/tiny-random-gpt2": (_CAUSAL, _gpt2),
    "peft-internal-testing/tiny-random-gpt2": (_CAUSAL, _gpt2),
    "gpt2": (_CAUSAL, _gpt2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        _CAUSAL,
        lambda: transformers.GPTJConfig(
            n_embd=32,
            n_layer=5,
            n_head=4,
            rotary_dim=4,
            n_positions=512,
            vocab_size=VOCABULARY,
            **_TOKENS,
        ),
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        _CAUSAL,
        lambda: transformers.BloomConfig(
            hidden_size=32, n_layer=5, n_head=4, vocab_size=VOCABULARY, **_TOKENS
        ),
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (
        _CAUSAL,
        lambda: transformers.GPTNeoXConfig(
            **_SIZES, intermediate_size=32, vocab_size=VOCABULARY, **_TOKENS
        ),
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (_CAUSAL, lambda: _like_llama("Llama")),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": (_CAUSAL, lambda: _like_llama("Llama")),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": (_CAUSAL, lambda: _like_llama("Llama")),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (
        _CAUSAL,
        lambda: _like_llama("Mistral"),
    ),
    "peft-internal-testing/tiny-dummy-qwen2": (_CAUSAL, lambda: _like_llama("Qwen2")),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": (
        _CAUSAL,
        lambda: _like_llama("Qwen3", head_dim=4),
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        _CAUSAL,
        lambda: _like_llama("Gemma3Text", head_dim=4, query_pre_attn_scalar=4),
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        _CAUSAL,
        lambda: _like_llama(
            "GptOss",
            hidden_size=8,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        _CAUSAL,
        lambda: _like_llama(
            "Llama4Text",
            head_dim=4,
            num_local_experts=4,
            intermediate_size_mlp=32,
            hidden_size=8,
        ),
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        _CLASSES,
        lambda: _like_llama("Llama"),
    ),
    "peft-internal-testing/tiny-random-BertModel": (_PLAIN, lambda: _like_bert("Bert")),
    "peft-internal-testing/tiny-random-RobertaModel": (
        _PLAIN,
        lambda: _like_bert("Roberta", max_position_embeddings=514),
    ),
    "peft-internal-testing/tiny-random-DebertaModel": (_PLAIN, lambda: _like_bert("Deberta")),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        _PLAIN,
        lambda: _like_bert("DebertaV2"),
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        _CLASSES,
        lambda: _like_bert("Bert"),
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        _CLASSES,
        lambda: _like_bert("Roberta", max_position_embeddings=514),
    ),
    "peft-internal-testing/tiny-random-t5": (_SEQ2SEQ, _t5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": (_SEQ2SEQ, _t5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (_SEQ2SEQ, _t5),
    "google/flan-t5-small": (_SEQ2SEQ, _t5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (_SEQ2SEQ, _bart),
}

ADAPTERS = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM"
    ),
    "peft-internal-testing/gpt2-lora-random": "gpt2",
}


def build(home: Path) -> None:
    """Writes all models and adapters into `home`, what the hub's cache would hold."""
    from tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    for name, (auto, make) in MODELS.items():
        torch.manual_seed(0)
        folder = _folder(home, name)
        model = getattr(transformers, auto).from_config(make())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _build_adapters(home)


def _build_adapters(home: Path) -> None:
    import peft

    for name, base in ADAPTERS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(_folder(home, base))
        wrapped = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False))
        wrapped.peft_config["default"].base_model_name_or_path = base
        wrapped.save_pretrained(_folder(home, name))


def _folder(home: Path, name: str) -> Path:
    repository = home / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(REVISION)
    return repository / "snapshots" / REVISION


if __name__ == "__main__":
    build(Path(sys.argv[1]))
