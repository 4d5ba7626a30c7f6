"""What the base model and the adapter answer to a few rows: `samples.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorakit import atomic
from lorakit.data.formats import Sample
from lorakit.evaluation.answers import generate_answers
from lorakit.evaluation.seq2seq import generate_targets
from lorakit.training.setup import Setup

SAMPLES_NAME = "samples.json"
LONGEST = 96  # tokens of an answer: enough to see its form


def write_samples(folder: Path, setup: Setup) -> None:
    """Writes `recipe.samples` prompts with the wanted answer, the base's and the adapter's.

    Held-out rows where there are some, else rows that were learned; plain text has no prompt.
    """
    rows = setup.data.eval_samples or setup.data.train_samples
    asking = [sample for sample in rows if isinstance(sample, Sample) and sample.messages]
    chosen = asking[: setup.recipe.samples]
    if not chosen:
        return
    prompts = [sample.prompt for sample in chosen]

    def answers() -> list[str]:
        if setup.recipe.task_type == "SEQ_2_SEQ_LM":
            return generate_targets(setup.model, setup.tokenizer, chosen, max_new_tokens=LONGEST)
        return generate_answers(setup.model, setup.tokenizer, prompts, max_new_tokens=LONGEST)

    tuned = answers()
    with setup.model.disable_adapter():
        base = answers()
    samples: list[dict[str, Any]] = [
        {
            "where": sample.where,
            "prompt": sample.prompt,
            "reference": sample.reference,
            "base": before,
            "tuned": after,
        }
        for sample, before, after in zip(chosen, base, tuned, strict=True)
    ]
    text = json.dumps(samples, indent=2, ensure_ascii=False)
    atomic.write_file(folder / SAMPLES_NAME, text + "\n")
