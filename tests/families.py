"""Small models of three families, in float64, and how PEFT gets the same weights."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lorakit import LoraConfig, LoraModel, get_peft_model

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}


def make_llama() -> nn.Module:
    """Every linear layer has a bias, so that biases are put to the test too."""
    config = LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True
    )
    return LlamaForCausalLM(config)


def make_gpt2() -> nn.Module:
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=4, vocab_size=40, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def make_bert() -> nn.Module:
    return BertModel(BertConfig(**SIZES, num_attention_heads=4))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": make_llama,
    "gpt2": make_gpt2,
    "bert": make_bert,
}


def output(model: nn.Module, ids: torch.Tensor, **options: object) -> torch.Tensor:
    """Logits, or hidden states where there is no head."""
    return model(input_ids=ids, **options)[0]


def wrap(model: nn.Module, seed: int = 3, **fields: object) -> LoraModel:
    """`model` with an adapter whose factors are both random."""
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**{"init_lora_weights": False, **fields}))


def to_peft(ours: LoraModel, base: nn.Module, folder: Path, trainable: bool = False) -> nn.Module:
    """PEFT's own model on `base` with the adapters of `ours`, through files."""
    ours.save_pretrained(folder)
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=trainable)
    for name in ours.adapters:
        if name != "default":
            wrapped.load_adapter(folder / name, name)
    return wrapped.double().eval()
