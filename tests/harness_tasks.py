"""Tasks of lm-evaluation-harness over local files: choices, answers, and texts."""

import json
from pathlib import Path
from typing import Any

_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
_WRITE = {
    "output_type": "generate_until",
    "doc_to_text": "Say {{question}}:",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n", "<|im_end|>"], "max_gen_toks": 10},
    "metric_list": [{"metric": "exact_match"}],
}
_TEXT = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
}
_NAMES = ("red", "green", "a rather long answer", "four words or five", "é", "ok")


def write_tasks(folder: Path, documents: int = 5) -> Path:
    """A folder with `own_choice`, `own_write` and `own_text`, and their rows."""
    folder.mkdir()
    rows = [
        {
            "question": f"what is number {n}{' at all' * (n % 3)}?",
            "choices": [_NAMES[(n + k) % len(_NAMES)] for k in range(4)],
            "answer": n % 4,
            "text": f"A text of some words, number {n}. " * (1 if n else 18),
        }
        for n in range(documents)
    ]
    for split in ("validation", "train"):
        lines = [json.dumps(row) for row in (rows if split == "validation" else rows[::-1])]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    for name, task in (("own_choice", _CHOICE), ("own_write", _WRITE), ("own_text", _TEXT)):
        write_task(folder, name, **task)
    return folder


def write_task(folder: Path, name: str, **fields: Any) -> Path:
    """One task over the rows in a folder."""
    files = {split: str(folder / f"{split}.jsonl") for split in ("validation", "train")}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "validation_split": "validation",
        "fewshot_split": "train",
        **fields,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task))  # which is YAML
    return path
