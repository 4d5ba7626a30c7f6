"""Families of vision-language models: tiny random ones learn and answer as with PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

from lorakit import LoraConfig, get_peft_model
from lorakit.data.batches import Collator, LineCollator
from lorakit.data.conversations import IMAGE
from lorakit.data.masking import TokenizedRow, tokenize
from lorakit.data.samples import Sample
from lorakit.engine.engine import Engine
from lorakit.engine.picture_prompt import prompt_row
from lorakit.engine.sampling import Sampling, prompt_text
from lorakit.models.lines import Lines
from lorakit.models.load import load_for_task
from lorakit.objectives.registry import make_objective
from lorakit.training.picture_lines import why_padded
from matrix import few
from tiny_pictures import (
    save_pictures,
    save_tiny_gemma3,
    save_tiny_internvl,
    save_tiny_llava,
    save_tiny_qwen2_5_vl,
    save_tiny_qwen3_vl,
    save_tiny_smolvlm,
)

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "Qwen2.5-VL": save_tiny_qwen2_5_vl,
    "SmolVLM": save_tiny_smolvlm,
    "LLaVA": save_tiny_llava,
    "Qwen3-VL": save_tiny_qwen3_vl,
    "Gemma 3": save_tiny_gemma3,
    "InternVL": save_tiny_internvl,
}
IN_LINES = {"SmolVLM", "LLaVA", "InternVL"}
"""Those whose rows with pictures lie in one line."""


def samples(folder: Path) -> list[Sample]:
    """Rows with one picture, with two, and without."""
    red, green, blue, _ = map(str, save_pictures(folder / "shown", 1))

    def row(number: int, *shown: str) -> Sample:
        parts: list[dict[str, Any]] = [{"type": IMAGE, IMAGE: one} for one in shown]
        text = f"{number}: which?"
        content: Any = [*parts, {"type": "text", "text": text}] if shown else text
        messages = ({"role": "user", "content": content}, {"role": "assistant", "content": "red"})
        return Sample(messages, None, f"rows:{number}")

    return [row(1, red), row(2, green, blue), row(3), row(4, blue)]


@pytest.mark.parametrize("family", few(list(FAMILIES), "Qwen2.5-VL", "LLaVA"))
def test_a_family_is_learned_and_answers_as_with_transformers_and_peft(
    family: str, tmp_path: Path
) -> None:
    base = FAMILIES[family](tmp_path / "base")
    loaded = load_for_task("CAUSAL_LM", str(base), "float64", device="cpu")
    targets = "all-linear[language,projector,vision]"
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(loaded.model, config).train()
    model.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True)
    asked = samples(tmp_path)
    rows = [tokenize(sample, loaded.tokenizer, 512) for sample in asked]
    batch = Collator(0)(rows)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits, labels = theirs(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    wanted = {
        n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if "lora" in n
    }
    takes_lines = Lines(model).refused is None and why_padded(model, rows) is None
    assert takes_lines == (family in IN_LINES)
    objective = make_objective("sft")
    for collate in (Collator(0), *([LineCollator()] if takes_lines else [])):
        model.zero_grad()
        loss = objective.loss(objective.forward(model), objective.to_batch(rows, collate))
        (loss.total / loss.count).backward()
        for name, p in model.named_parameters():
            if "lora" not in name:
                continue
            gradient = wanted[name.replace(".default", "")]
            if gradient is None or p.grad is None:  # a last layer of the tower that nothing reads
                assert p.grad is None or not p.grad.any()
                continue
            allowed = 1e-10 * float(gradient.abs().max()) + 1e-18
            assert float((p.grad - gradient).abs().max()) <= allowed, name

    answers = {}
    for i, sample in enumerate(asked):
        row = prompt_row(
            prompt_text(sample.prompt, loaded.tokenizer), sample.prompt, loaded.tokenizer
        )
        own = Collator(0, 1)(
            [TokenizedRow(row.input_ids, row.input_ids, "", pictures=row.pictures)]
        )
        del own["labels"]
        written = theirs.eval().generate(
            **own, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        answers[i] = row, written[0, len(row) :].tolist()
    fresh = load_for_task("CAUSAL_LM", str(base), "float64", device="cpu")
    engine = Engine(fresh.model, fresh.tokenizer, "base", max_rows=4)
    try:
        engine.pool.register("adapter", tmp_path / "adapter")
        sampling = Sampling(max_new_tokens=6, logprobs=0)
        tickets = [
            engine.submit(row.input_ids, "adapter", sampling, row.pictures)
            for row, _ in answers.values()
        ]
        for ticket, (_, tokens) in zip(tickets, answers.values(), strict=True):
            pieces = list(ticket)
            assert not pieces[-1].error
            found = [one.token for piece in pieces for one in piece.logprobs]
            assert found == tokens[: len(found)]
            assert found
    finally:
        engine.close()
