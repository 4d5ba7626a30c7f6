"""Tiny random classifiers of several kinds, and what transformers and PEFT give to texts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from tiny import letter_tokenizer, make_attentive

ROBERTA = ("<s> $A </s>", "<s> $A </s> </s> $B </s>")

_SMALL: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1, "max_position_embeddings": 65},
    "modernbert": {
        "global_attn_every_n_layers": 2,
        "local_attention": 8,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "type_vocab_size": 2,
        "pooler_hidden_size": 32,
    },
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "longformer": {"attention_window": [4, 4], "max_position_embeddings": 66},
    "fnet": {"type_vocab_size": 2},
    "convbert": {"embedding_size": 32, "conv_kernel_size": 3},
    "albert": {"embedding_size": 32},
    "camembert": {"type_vocab_size": 1, "max_position_embeddings": 65},
    "deberta": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "type_vocab_size": 2,
        "pooler_hidden_size": 32,
    },
    "electra": {"embedding_size": 32},
    "eurobert": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mpnet": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roformer": {"embedding_size": 32, "type_vocab_size": 2},
    "squeezebert": {"embedding_size": 32},
    "xlm-roberta": {"type_vocab_size": 1, "max_position_embeddings": 65},
    "llama": {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3},
}


_TYPED = (
    "bert",
    "albert",
    "convbert",
    "deberta",
    "deberta-v2",
    "electra",
    "fnet",
    "rembert",
    "roformer",
    "squeezebert",
    "xlnet",
)


def classifier_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A token a letter, in BERT's form with token types, or in RoBERTa's without."""
    tokenizer = letter_tokenizer()
    if kind not in _TYPED:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if "roberta" in kind or kind == "camembert":
        single, pair = (text.replace("<s>", "[CLS]").replace("</s>", "[SEP]") for text in ROBERTA)
        ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=ids
        )
    return tokenizer


def small_config(kind: str, **fields: Any) -> Any:
    """A configuration of two layers for `classifier_tokenizer`."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    sizes = {} if kind == "xlnet" else sizes  # which knows no longest text
    own = {"vocab_size": len(letter_tokenizer()), "pad_token_id": 0}
    return AutoConfig.for_model(kind, **(sizes | own | _SMALL[kind] | fields))


def save_classifier(folder: Path, kind: str, **fields: Any) -> Path:
    """Writes a random classifier whose logits depend on every token."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(small_config(kind, **fields))
    make_attentive(model)
    model.save_pretrained(folder)
    tokenizer = classifier_tokenizer(kind)
    if model.config.pad_token_id != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.sep_token
    tokenizer.save_pretrained(folder)
    return folder


def classifier_adapter(
    base: Path,
    folder: Path,
    labels: int,
    seed: int,
    target: Sequence[str] = ("query", "value"),
    **fields: Any,
) -> Path:
    """A random adapter of PEFT's own for SEQ_CLS, with its head."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=labels, ignore_mismatched_sizes=True
    )
    config = peft.LoraConfig(
        r=4, target_modules=[*target], task_type="SEQ_CLS", init_lora_weights=False, **fields
    )
    made = peft.get_peft_model(model, config)
    for name, parameter in made.named_parameters():
        if "modules_to_save" in name and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    made.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(
    base: Path,
    *texts: str,
    adapter: Path | None = None,
    labels: int | None = None,
    side: str = "right",
    **how: Any,
) -> torch.Tensor:
    """The logits (labels,) that transformers, and PEFT, give to a text or a pair, alone."""
    count = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, **count
    )
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base, truncation_side=side)
    given = tokenizer(*texts, return_tensors="pt", **how)
    plain = model if adapter is None else model.get_base_model()
    takes = inspect.signature(plain.forward).parameters
    given = {name: tensor for name, tensor in given.items() if name in takes}
    logits: torch.Tensor = model.eval()(**given).logits[0]
    return logits
