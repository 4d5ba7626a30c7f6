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
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lorakit import LoraConfig, LoraModel, get_peft_model

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}


def make_llama() -> nn.Module:
    """Every linear layer has a bias, so that biases are put to the test too."""
    config = LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True
    )
    return LlamaForCausalLM(config)


def make_tied() -> nn.Module:
    """The head is the embedding; its scale makes more than rounding of what the head does."""
    return LlamaForCausalLM(
        LlamaConfig(**SIZES, num_attention_heads=4, tie_word_embeddings=True, initializer_range=0.2)
    )


def make_mixtral() -> nn.Module:
    """Experts stored (experts, out, in); the eager form, as the grouped one takes no float64."""
    config = MixtralConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4
    )
    config._experts_implementation = "eager"
    return MixtralForCausalLM(config)


def make_gpt_oss() -> nn.Module:
    """Experts stored (experts, in, out)."""
    config = GptOssConfig(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=4,
        layer_types=["full_attention"] * 2,
    )
    config._experts_implementation = "eager"
    return GptOssForCausalLM(config)


def make_gpt2() -> nn.Module:
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=4, vocab_size=40, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def make_t5() -> nn.Module:
    """An encoder and a decoder with an embedding each, both and the head tied to a third one."""
    config = T5Config(
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        vocab_size=40,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config)


def make_bert() -> nn.Module:
    return BertModel(BertConfig(**SIZES, num_attention_heads=4))


class Attention(nn.Module):
    """PyTorch's own attention, with queries, keys and values of different inputs."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.look_up = nn.Embedding(40, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.look_up(input_ids)
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        y, _ = self.attention(x, x.flip(-1), 2 * x)
        return (self.head(y if self.attention.batch_first else y.transpose(0, 1)),)


class Convolutions(nn.Module):
    """Takes token numbers as the others do, so that the tests of all families are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.look_up = nn.Embedding(40, 8)
        self.one = nn.Conv1d(8, 12, kernel_size=3, padding=1)
        self.two = nn.Conv2d(1, 6, kernel_size=(3, 2), stride=2, padding=1)
        self.three = nn.Conv3d(1, 4, kernel_size=2, bias=False)
        self.head = nn.Linear(4, 5)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.one(self.look_up(input_ids).mT)  # (batch, 12, n)
        x = self.two(x[:, None].relu())  # (batch, 6, h, w)
        x = self.three(x[:, None])  # (batch, 4, d, h, w)
        return (self.head(x.flatten(2).mean(2)),)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": make_llama,
    "tied": make_tied,
    "mixtral": make_mixtral,
    "gpt-oss": make_gpt_oss,
    "gpt2": make_gpt2,
    "bert": make_bert,
    "t5": make_t5,
    "conv": Convolutions,
    "attention": Attention,
}


def output(model: nn.Module, ids: torch.Tensor, **options: object) -> torch.Tensor:
    """Logits, or hidden states where there is no head."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        options = {"decoder_input_ids": ids.flip(1), **options}
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
