"""`lorakit eval`: an adapter and its bare base on the same rows."""

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    data: Annotated[str, typer.Option(help="The rows: a file, a folder, or a hub id.")],
    metrics: Annotated[
        str, typer.Option(help="Of exact_match, bleu, rouge and loss, with commas between.")
    ] = "exact_match,bleu,rouge,loss",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write scores and answers here.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="As prompt=mr,completion=ref; default: what the adapter learned from."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, when it is not the recorded one.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most, an answer.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
) -> None:
    """Score an adapter beside its bare base model on the same rows."""
    from lorakit.evaluation.metrics import parse_metrics

    names = parse_metrics(metrics)

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from lorakit import atomic
    from lorakit.adapters.manifest import read_manifest
    from lorakit.adapters.open import open_adapter
    from lorakit.data.dataset import load_samples
    from lorakit.evaluation.evaluate import evaluate as run

    manifest = read_manifest(adapter)
    learned = manifest.recipe["data"] if manifest else {}
    mapping = _mapping(columns) if columns else learned.get("columns")
    samples = load_samples(data, mapping or None, limit)
    opened = open_adapter(adapter, base=base, dtype=dtype)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("evaluating", total=None)
        result = run(
            opened.model,
            opened.tokenizer,
            samples,
            metrics=names,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_length=learned.get("max_length", 1024),
            on_progress=lambda done, whole: progress.update(task, completed=done, total=whole),
        )
    table = Table(title=f"{result.rows} rows, {result.prompts} prompts, {result.seconds:.0f} s")
    for heading in ("metric", "base", "tuned"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for name, score in result.scores.items():
        table.add_row(name, f"{score['base']:.4f}", f"{score['tuned']:.4f}")
    Console().print(table)
    if json_file:
        text = json.dumps(result.to_dict(), indent=2, ensure_ascii=False)
        atomic.write_file(json_file, text + "\n")


def _mapping(columns: str) -> dict[str, str]:
    from lorakit.errors import InputError

    mapping = {}
    for part in columns.split(","):
        ours, equals, theirs = part.partition("=")
        if not equals:
            raise InputError(f"--columns: '{part}' is not NAME=COLUMN (as in prompt=mr)")
        mapping[ours.strip()] = theirs.strip()
    return mapping
