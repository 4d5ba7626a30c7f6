"""What a finished run leaves beside its adapter: the record, and answers to a few rows."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorakit import atomic
from lorakit.adapters.manifest import HELD_OUT_REWARDS_NAME, SAMPLES_NAME, Manifest
from lorakit.data.thumbnails import recorded
from lorakit.errors import InputError
from lorakit.evaluation.answers import Written, answer_samples
from lorakit.progress import task
from lorakit.training.machine import peak_memory_mb
from lorakit.training.output import read_continued
from lorakit.training.recorder import StepLines
from lorakit.training.setup import Setup
from lorakit.training.trainer import LoraTrainer
from lorakit.version import __version__


@dataclass(frozen=True)
class HeldOutScores:
    """The `loss` and scores of held-out rows; empty where none are held out.

    Attributes:
        base: of the bare base.
        start: of the adapter that the run started from, if it did.
        tuned: of the trained adapter.
        rows: `Objective.taken_held_out` by `base`, `start` and `tuned`; empty where nothing is.
    """

    base: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    tuned: dict[str, float] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)


def manifest_of(
    setup: Setup,
    trainer: LoraTrainer,
    scores: HeldOutScores,
    metrics: StepLines,
    run_seconds: float,
) -> Manifest:
    """The record of a run that has ended."""
    counts, labels = trainer.counts, setup.inputs.objective.labels
    base, tuned, first, start = scores.base, scores.tuned, scores.start, setup.inputs.start
    return Manifest(
        base_model=setup.recipe.model,
        recipe=setup.recipe.to_dict(),
        data=setup.data_facts,
        data_statistics={k: asdict(part) for k, part in setup.data.statistics().items()},
        **setup.inputs.rendering_facts(),
        base_fingerprint=setup.base_fingerprint,
        advice=[asdict(advice) for advice in setup.advice],
        notices=[*setup.notices, *(f.line for f in setup.data.findings if f.count)],
        warnings=[line for line in metrics.read() if "warning" in line],
        continued=read_continued(Path(setup.recipe.output_dir)),
        processes=setup.arguments.world_size,
        steps=trainer.state.global_step,
        train_seconds=round(counts.seconds, 2),
        run_seconds=round(run_seconds, 2),
        train_tokens=counts.train_tokens,
        supervised_tokens=counts.supervised_tokens,
        tokens_per_second=round(counts.train_tokens / max(counts.seconds, 1e-9), 1),
        peak_memory_mb=peak_memory_mb(),
        padding_free=setup.batching.pad_token_id is None,
        compiled=setup.compiled,
        eval_loss=tuned.get("loss"),
        base_eval_loss=base.get("loss"),
        eval_scores={k: v for k, v in tuned.items() if k != "loss"} or None,
        base_eval_scores={k: v for k, v in base.items() if k != "loss"} or None,
        start_eval_loss=first.get("loss"),
        start_eval_scores={k: v for k, v in first.items() if k != "loss"} or None,
        parent=start.record if start else None,
        stands_on=list(start.frozen) if start else [],
        teacher=setup.inputs.teacher,
        rewards=setup.inputs.objective.reward_facts,
        environment=setup.environment_files,
        labels=labels.to_dict() if labels else None,
        versions=versions(),
        seed=setup.recipe.training.seed,
    )


def write_held_out_rewards(folder: Path, scores: HeldOutScores) -> None:
    """Writes the rewards of each held-out prompt before and after, where there are any."""
    states = {name: found["rows"] for name, found in scores.rows.items() if found}
    if "tuned" not in states:
        return
    kept = {
        "rewards": scores.rows["tuned"]["rewards"],
        "where": [row["where"] for row in states["tuned"]],
        "states": {name: [row["values"] for row in rows] for name, rows in states.items()},
    }
    text = json.dumps(kept, ensure_ascii=False)
    atomic.write_file(folder / HELD_OUT_REWARDS_NAME, text + "\n")


def versions() -> dict[str, str]:
    """Those of Python and of the packages that decide the numbers of a run."""
    packages = ("torch", "transformers", "accelerate", "safetensors")
    own = {"python": sys.version.split()[0], "lorakit": __version__}
    return own | {name: version(name) for name in packages}


def write_samples(folder: Path, setup: Setup) -> list[str]:
    """Writes `recipe.samples` prompts with the wanted answer, the base's and the adapter's.

    Held-out rows where there are some, else rows that were learned; plain text has no prompt.

    Returns: what to say where that is not possible; the run is complete without.
    """
    model, tokenizer = setup.model, setup.tokenizer
    rows = setup.data.eval_samples or setup.data.train_samples
    chosen = setup.inputs.objective.prompts(rows)[: setup.recipe.samples]
    if not chosen:
        return []

    most = setup.inputs.objective.sample_tokens

    def answers() -> list[Written]:
        return answer_samples(model, tokenizer, chosen, max_new_tokens=most)

    try:
        # Compiled for training, the blocks would be compiled again for every length.
        with (
            torch.compiler.set_stance("force_eager"),
            task("answering sample rows", 2 * len(chosen)),
        ):
            tuned = answers()
            with model.disable_adapter():
                base = answers()
    except (InputError, torch.OutOfMemoryError) as error:
        return [f"no samples of answers: {error}"]
    samples: list[dict[str, Any]] = [
        {
            "where": sample.where,
            "prompt": recorded(sample.prompt),
            "reference": sample.reference,
            "base": before.text,
            "tuned": after.text,
            "base_tokens": before.tokens,
            "tuned_tokens": after.tokens,
            "most_tokens": most,
        }
        for sample, before, after in zip(chosen, base, tuned, strict=True)
    ]
    text = json.dumps(samples, indent=2, ensure_ascii=False)
    atomic.write_file(folder / SAMPLES_NAME, text + "\n")
    return []
