"""A model whose answers change behind padding is found, and gets rows of one length."""

import pytest
import torch
from transformers import PreTrainedModel

from base_models import BASE_MODELS
from lorakit.evaluation.answers import write_answers
from lorakit.models.padding import takes_left_padding
from matrix import few
from tiny import byte_tokenizer, make_attentive

BY_NAME = {base.name: base for base in BASE_MODELS}
CHANGED = ("DeepSeek V4", "MiniMax")


def build(name: str) -> PreTrainedModel:
    model = BY_NAME[name].build()
    make_attentive(model)
    return model  # type: ignore[return-value]


@pytest.mark.parametrize(
    "name",
    few([base.name for base in BASE_MODELS if base.is_causal], "Llama", "Qwen 3.5", "MiniMax"),
)
def test_it_is_tried_what_padding_changes(name: str):
    assert takes_left_padding(build(name)) == (name not in CHANGED)


@pytest.mark.parametrize("name", ["MiniMax"])
def test_answers_that_padding_would_change_are_those_of_each_prompt_alone(name: str):
    torch.manual_seed(0)
    base = BY_NAME[name]
    model = type(base.build())(type(base.build().config)(**{**base.values, "vocab_size": 259}))
    make_attentive(model)
    prompts = [[{"role": "user", "content": text}] for text in ("a", "bcd", "efghijklmn", "xyz")]
    tokenizer = byte_tokenizer()
    together = write_answers(model.eval(), tokenizer, prompts, max_new_tokens=6)
    alone = [write_answers(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
    assert together == alone
