"""Answers to pictures join and leave the batch freely in models that tell pictures from text."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lorakit.data.batches import Collator
from lorakit.data.conversations import IMAGE
from lorakit.data.masking import TokenizedRow
from lorakit.engine.engine import Engine
from lorakit.engine.picture_prompt import prompt_row
from lorakit.engine.plain_batch import PlainBatch
from lorakit.engine.sampling import Sampling, prompt_text
from lorakit.models.load import load_for_task
from tiny_pictures import save_pictures, save_tiny


@pytest.mark.parametrize("family", ["Qwen3-VL", "Gemma 3"])
def test_answers_are_those_of_generate_while_rows_join_and_leave(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlainBatch, "step", None)  # nothing is computed apart
    base = save_tiny(family, tmp_path / "base")
    red, green, blue, _ = map(str, save_pictures(tmp_path / "shown"))
    loaded = load_for_task("CAUSAL_LM", str(base), "float64", device="cpu")
    tokenizer = loaded.tokenizer
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float64)
    asked = []
    for i, shown in enumerate([[red], [], [green, blue], [blue], [red, red], []]):
        parts = [{"type": IMAGE, IMAGE: one} for one in shown]
        text = f"{i}: which?" * (1 + i % 3)
        content = [*parts, {"type": "text", "text": text}] if shown else text
        messages = [{"role": "user", "content": content}]
        asked.append(prompt_row(prompt_text(messages, tokenizer), messages, tokenizer))
    lengths = [9, 3, 5, 12, 4, 8]
    wanted = []
    for row, length in zip(asked, lengths, strict=True):
        own = [TokenizedRow(row.input_ids, row.input_ids, "", pictures=row.pictures)]
        batch = Collator(0, 1)(own)
        del batch["labels"]
        written = plain.generate(**batch, max_new_tokens=length, do_sample=False)
        wanted.append(written[0, len(row) :].tolist())
    engine = Engine(loaded.model, tokenizer, "base", max_rows=3)
    try:
        tickets = [
            engine.submit(
                row.input_ids, None, Sampling(max_new_tokens=length, logprobs=0), row.pictures
            )
            for row, length in zip(asked, lengths, strict=True)
        ]
        for ticket, tokens in zip(tickets, wanted, strict=True):
            pieces = list(ticket)
            assert not pieces[-1].error
            assert [one.token for piece in pieces for one in piece.logprobs] == tokens
    finally:
        engine.close()
