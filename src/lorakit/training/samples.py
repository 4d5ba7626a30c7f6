"""What the base model and the adapter answer to a few rows: `samples.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lorakit import atomic
from lorakit.adapters.manifest import SAMPLES_NAME
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.evaluation.answers import generate_answers, generate_targets
from lorakit.progress import task
from lorakit.training.setup import Setup

LONGEST = 96  # tokens of an answer: enough to see its form


def write_samples(folder: Path, setup: Setup) -> list[str]:
    """Writes `recipe.samples` prompts with the wanted answer, the base's and the adapter's.

    Held-out rows where there are some, else rows that were learned; plain text has no prompt.

    Returns: what to say where that is not possible; the run is complete without.
    """
    rows = setup.data.eval_samples or setup.data.train_samples
    asking = [sample for sample in rows if isinstance(sample, Sample) and sample.messages]
    chosen = asking[: setup.recipe.samples]
    if not chosen:
        return []
    prompts = [sample.prompt for sample in chosen]

    def answers() -> list[str]:
        if setup.recipe.task_type == "SEQ_2_SEQ_LM":
            return generate_targets(setup.model, setup.tokenizer, chosen, max_new_tokens=LONGEST)
        tools = [sample.tools for sample in chosen]
        return generate_answers(
            setup.model, setup.tokenizer, prompts, tools=tools, max_new_tokens=LONGEST
        )

    try:
        with task("answering sample rows", 2 * len(chosen)):
            tuned = answers()
            with setup.model.disable_adapter():
                base = answers()
    except (InputError, torch.OutOfMemoryError) as error:
        return [f"no samples of answers: {error}"]
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
    return []
