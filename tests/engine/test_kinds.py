"""Adapters of every kind in one batch: each row answers as its adapter does alone."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from answered import each_alone
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from random_adapters import make_adapter
from tiny import byte_tokenizer, make_attentive

PROMPTS = [[3], list(range(40, 70)), list(range(90, 101)), [9, 8, 7, 6, 5]]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"r": 3, "lora_alpha": 20, "use_rslora": True, "target_modules": ["q_proj"]},
    "patterns": {"r": 2, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"up_proj": 9}},
    "dora": {"use_dora": True, "r": 3},
    "bias": {"lora_bias": True, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "pissa": {"init_lora_weights": "pissa", "r": 2},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "dora embedding": {"target_modules": ["embed_tokens", "k_proj"], "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}
WHOLE: dict[str, dict[str, Any]] = {
    "whole head": {"target_modules": ["down_proj"], "modules_to_save": ["lm_head"]},
    "another head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embedding": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 40, 41, 99, 258]},
}
TIED: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True, "r": 3},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "tied embedding": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "tied tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [3, 40, 41, 99]},
    "tied whole": {
        "target_modules": ["v_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}


def save_base(folder: Path, tied: bool) -> Path:
    tokenizer = byte_tokenizer()
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tied,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    model = AutoModelForCausalLM.from_config(config)
    make_attentive(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("tied", "kinds"),
    [
        pytest.param(False, KINDS | WHOLE, id="untied"),
        pytest.param(
            *(False, dict(reversed((KINDS | WHOLE).items()))),
            id="in reverse",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(True, TIED, id="tied"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_each_row_of_a_mixed_batch_answers_as_its_adapter_alone(
    tied: bool, kinds: dict[str, dict[str, Any]], tmp_path: Path
):
    base = save_base(tmp_path / "base", tied)
    folders = {
        name: make_adapter(base, tmp_path / name.replace(" ", "-"), seed, **kind)
        for seed, (name, kind) in enumerate(kinds.items())
    }
    who: list[str | None] = [*folders, None]
    everyone = [(name, (number + n) % 4) for number, name in enumerate(who) for n in (0, 1)]
    answers = each_alone(base, folders, ((PROMPTS[at], name) for name, at in everyone), 8)
    expected = dict(zip(everyone, answers, strict=True))
    assert len({str(tokens) for tokens in expected.values()}) > len(who)
    sampling = Sampling(max_new_tokens=8, logprobs=0)
    # All at once, and then with adapters that come and go while others answer.
    for max_rows in (len(who), 3):
        engine = open_engine(str(base), folders, dtype="float32", max_rows=max_rows)
        with closing(engine):
            for turn in (0, 1):
                tickets = {
                    (name, (n + turn) % 4): engine.submit(PROMPTS[(n + turn) % 4], name, sampling)
                    for n, name in enumerate(who)
                }
                for asked, ticket in tickets.items():
                    pieces = list(ticket)
                    assert pieces[-1].error == "", asked
                    chosen = [one.token for piece in pieces for one in piece.logprobs]
                    assert chosen == expected[asked], asked
