"""A model that answers as its template taught it is right, whatever the template writes around."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from answered import generate_answers
from lorakit.data.masking import tokenize
from lorakit.data.prompts import Prompt
from lorakit.data.samples import Sample
from lorakit.engine.answer_all import answer_all
from lorakit.engine.engine import Engine
from lorakit.engine.sampling import Sampling
from lorakit.evaluation.evaluate import evaluate
from lorakit.lora import LoraConfig, LoraModel

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
ANSWER = "K|0> b"  # with characters that end marks are made of, too


@pytest.fixture
def sample() -> Sample:
    question = {"role": "user", "content": "Shelf 0?"}
    return Sample((question, {"role": "assistant", "content": ANSWER}), None, "rows.jsonl:1")


def taught(folder: Path, tokenizer: Any, sample: Sample) -> LoraModel:
    """The tiny model, sure of every token that the template writes for `sample`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    row = tokenize(sample, tokenizer, 512)
    ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        losses = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[0, :-1], labels[0, 1:], reduction="none"
        )
        if losses.max() < 0.3:
            return LoraModel(model, LoraConfig(r=2))
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError("the model did not learn its answer")


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen3_thinking"])
def test_an_answer_is_right_that_follows_the_template(
    name: str, tiny_model: Path, tokenizer: Any, sample: Sample
):
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    model = taught(tiny_model, tokenizer, sample)

    result = evaluate(model, tokenizer, [sample], max_new_tokens=64)
    assert result.scores["exact_match"] == {"base": 1.0, "tuned": 1.0}
    assert result.scores["rouge"]["tuned"] == 1.0
    [example] = result.examples
    assert (example.references, example.base, example.tuned) == ([ANSWER], ANSWER, ANSWER)
    assert generate_answers(model, tokenizer, [sample.prompt], max_new_tokens=64) == [ANSWER]

    engine = Engine(model.unload(), tokenizer, "taught")
    try:
        prompt = Prompt(tuple(sample.prompt), (), "prompts")
        [answered] = answer_all(engine, [prompt], [None], Sampling(max_new_tokens=64))
    finally:
        engine.close()
    assert (answered.answer, answered.finish_reason) == (ANSWER, "stop")
