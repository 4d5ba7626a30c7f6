"""`lorakit eval`: an adapter on rows that it has not seen, beside what it has to beat; or several
on tasks of lm-evaluation-harness.

For a language model that is its bare base, for a classifier the most frequent label.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.eval_rewards import evaluate_by_rewards, recorded_rewards, show_rewards
from lorakit.cli.eval_tasks import evaluate_on_tasks, show_tasks
from lorakit.cli.shared_options import (
    BaseOption,
    DtypeOption,
    FetchImagesOption,
    QuantizationOption,
    WeightsOption,
    column_names,
    reward_specs,
)
from lorakit.cli.tables import print_table
from lorakit.console import say_all
from lorakit.errors import listed
from lorakit.progress import task

if TYPE_CHECKING:
    from lorakit.evaluation.evaluate import Evaluation
    from lorakit.evaluation.label_evaluation import LabelEvaluation
    from lorakit.evaluation.reward_evaluation import RewardEvaluation


def evaluate(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADAPTER | NAME=PATH]...", help="The adapter's folder; several with --tasks."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The rows: a file, a folder, or a hub id.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated tasks of lm-evaluation-harness: names, patterns, YAML files, "
            "folders. Needs pip install 'lorakit[lm-eval]'."
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: exact_match, bleu, rouge and loss; for classifiers "
            "accuracy, f1, entity_f1 (BIO tags) and loss. Default: all."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first rows, or documents of each task.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="A JSON file for the scores and answers.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="Column names, as prompt=mr,completion=ref. Default: those of the training data."
        ),
    ] = None,
    base: BaseOption = None,
    rewards: Annotated[
        list[str] | None,
        typer.Option(
            help="Score completions by a reward: rewards.py:NAME (which is run), or a built-in "
            "one; repeatable. Default for an adapter of objective grpo: its built-in ones."
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="With rewards: another adapter, in place of the base.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="With rewards: completions of each prompt.")
    ] = 1,
    temperature: Annotated[
        float, typer.Option(min=0, help="With rewards: sampling temperature; 0 is greedy.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for sampling.")] = 42,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 256,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows at once. Default: 16, and answers as many as fit into memory, at most 64.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="With tasks: worked examples in the prompt.")
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="With tasks: prompts are conversations."),
    ] = False,
    include_path: Annotated[
        Path | None, typer.Option(help="With tasks: a folder with more of them.")
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="With tasks: --json has documents and answers.")
    ] = False,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code", help="With tasks: run code that the model writes."
        ),
    ] = False,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    weights: WeightsOption = None,
    fetch_images: FetchImagesOption = False,
) -> None:
    """Score adapters on rows or benchmark tasks, beside their base model.

    Final answers are compared: reasoning and end tokens are removed first, from answers and
    references. A classifier is compared with always predicting the most frequent label. A reward
    model scores pairs, beside the rule that the longer answer wins, or conversations alone. With
    rewards, mean rewards of completions are compared, with intervals. With tasks, the base and all
    adapters answer them, and what an adapter does better or worse is told from chance.
    """
    from lorakit.adapters.manifest import read_manifest
    from lorakit.adapters.open import open_adapter
    from lorakit.data.formats import SUPERVISED
    from lorakit.data.mixing import Mixture, mix
    from lorakit.data.pictures import pictures_in
    from lorakit.data.splits import MEASURED
    from lorakit.engine.adapter_names import named_adapters
    from lorakit.errors import InputError
    from lorakit.evaluation.harness import HarnessSettings
    from lorakit.evaluation.metrics import parse_metrics
    from lorakit.lora.checkpoint import read_config
    from lorakit.models.forms import CLASSIFICATION
    from lorakit.objectives.registry import make_objective
    from lorakit.objectives.reward import Reward

    options: dict[str, Any] = {
        "base": base,
        "dtype": dtype,
        "quantization": quantization,
        "weights": weights,
    }
    of_rows = {
        "--data": data, "--metrics": metrics, "--columns": columns, "--rewards": rewards,
        "--against": against,
    }  # fmt: skip
    of_tasks = {
        "--num-fewshot": num_fewshot is not None, "--include-path": include_path,
        "--apply-chat-template": apply_chat_template, "--log-samples": log_samples,
        "--confirm-run-unsafe-code": confirm_run_unsafe_code,
    }  # fmt: skip
    if unread := [name for name, value in (of_rows if tasks else of_tasks).items() if value]:
        does = "not read with" if tasks else "read only with"
        raise InputError(f"{listed(unread)}: {does} --tasks")
    if tasks:
        if log_samples and json_file is None:
            raise InputError("--log-samples writes into the file of --json, which is not given")
        settings = HarnessSettings(
            [name.strip() for name in tasks.split(",") if name.strip()],
            num_fewshot,
            limit,
            include_path,
            apply_chat_template,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
        named = named_adapters(adapters or [])
        answered = evaluate_on_tasks(named, settings, options, batch_size)
        show_tasks(answered)
        if json_file:
            _write(json_file, answered.to_dict(log_samples))
        return
    if data is None or adapters is None or len(adapters) != 1:
        raise InputError("give one adapter and its rows with --data, or adapters and --tasks")
    adapter = Path(adapters[0])
    task_type = read_config(adapter).task_type
    manifest = read_manifest(adapter)
    learned = manifest.recipe["data"] if manifest else {}
    mapping = (column_names(columns) if columns else learned.get("columns")) or None
    most = learned.get("max_length", 1024)
    allowed = fetch_images or learned.get("fetch_images", False)

    def rows_of(kinds: Sequence[str], **more: Any) -> Mixture:
        with pictures_in(learned.get("media_dir"), allowed):
            found = mix(data, mapping, limit, key="--data", wanted=MEASURED, kinds=kinds, **more)
        say_all(found.notices)
        return found

    result: Evaluation | LabelEvaluation | RewardEvaluation
    recorded = manifest.recipe.get("objective") if manifest else None
    objective = make_objective(recorded) if recorded else None
    specs, shares, unread = recorded_rewards(recorded)
    if rewards:
        specs, shares, unread = reward_specs(rewards), None, []
    if specs or against:
        if not specs:
            raise InputError("--against compares by rewards: name them with --rewards")
        say_all(unread)
        mixture = rows_of(("conversation", "prompt"), keeps_columns=True)
        compared = evaluate_by_rewards(
            adapter,
            against,
            mixture.samples,
            specs,
            shares,
            options,
            number=samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        show_rewards(compared)
        if json_file:
            _write(json_file, compared.to_dict())
        return
    say_all(unread)
    if objective is not None and objective.samples_held_out:
        objective = None  # its answers are compared with those of the rows, as others are
    if isinstance(objective, Reward):
        from lorakit.evaluation.reward_evaluation import evaluate_rewards

        mixture = rows_of((*objective.row_kinds, *SUPERVISED))
        names = parse_metrics(metrics, (*objective.score_names, "loss")) if metrics else []
        opened = open_adapter(adapter, **options)
        with task("evaluating", len(mixture.samples)):
            result = evaluate_rewards(
                opened, objective, mixture.samples, batch_size=batch_size or 16, max_length=most
            )
        _show_rewards(result, names)
    elif task_type in CLASSIFICATION:
        from lorakit.data.labelled import read_labelled
        from lorakit.data.scores import LabelScorer
        from lorakit.data.sources import read_source
        from lorakit.evaluation.label_evaluation import evaluate_labels

        contents = read_source(data, wanted=MEASURED)
        say_all(contents.notices)
        labelled = read_labelled(contents.rows, task_type, mapping, limit)
        opened = open_adapter(adapter, **options)
        scorer = LabelScorer(tuple(opened.labels), words=task_type == "TOKEN_CLS")
        names = parse_metrics(metrics, (*scorer.metrics, "loss")) if metrics else []
        with task("evaluating", len(labelled)):
            result = evaluate_labels(opened, labelled, batch_size=batch_size or 16, max_length=most)
        _show_labels(result, names)
    else:
        from lorakit.evaluation.evaluate import evaluate as run
        from lorakit.objectives.registry import default_objective
        from lorakit.training.stages import compare_with_start

        known = task_type if task_type == "SEQ_2_SEQ_LM" else "CAUSAL_LM"
        learned_by = objective or default_objective(known)
        kinds = objective.row_kinds if objective else SUPERVISED
        usual = "loss" if {*kinds} <= {"text", "document"} else "exact_match,bleu,rouge,loss"
        chosen = parse_metrics(usual if metrics is None else metrics)
        rows = rows_of(
            kinds, sample_by=learned_by.sample_by, as_learned=learned_by.as_learned
        ).samples
        opened = open_adapter(adapter, **options)
        if objective and (notice := compare_with_start(opened.model, adapter, objective)):
            say_all([notice])
        with task("evaluating") as work:
            result = run(
                opened.model,
                opened.tokenizer,
                rows,
                metrics=chosen,
                objective=objective,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                max_length=most,
                on_progress=work.update,
            )
        _show(result)
    if json_file:
        _write(json_file, result.to_dict())


def _write(file: Path, result: dict[str, Any]) -> None:
    from lorakit import atomic

    atomic.write_file(file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _show(result: "Evaluation") -> None:
    say_all(result.notices)
    title = f"{result.rows} rows, {result.prompts} prompts, {result.seconds:.0f} s"
    scores = [
        (name, f"{score['base']:.4f}", f"{score['tuned']:.4f}")
        for name, score in result.scores.items()
    ]
    print_table(title, ("metric", "base", "tuned"), scores)


def _show_scores(
    result: "LabelEvaluation | RewardEvaluation", metrics: list[str], peer: str, heading: str
) -> None:
    """The notices, and the scores beside those of `peer`, which has no loss."""
    say_all(result.notices)
    scores = [
        (name, f"{score[peer]:.4f}" if peer in score else "", f"{score['tuned']:.4f}")
        for name, score in result.scores.items()
        if not metrics or name in metrics
    ]
    print_table(f"{result.rows} rows, {result.seconds:.0f} s", ("metric", heading, "tuned"), scores)


def _show_labels(result: "LabelEvaluation", metrics: list[str]) -> None:
    _show_scores(result, metrics, "base", f"always {result.most_frequent}")
    classes = [
        (c.label, str(c.rows), f"{c.precision:.4f}", f"{c.recall:.4f}", f"{c.f1:.4f}")
        for c in result.classes
    ]
    print_table("", ("label", "number", "precision", "recall", "f1"), classes)


def _show_rewards(result: "RewardEvaluation", metrics: list[str]) -> None:
    _show_scores(result, metrics, "longer", "longer answer")
    if result.interval:
        low, high = result.interval
        say_all([f"accuracy: 95% interval {low:.4f} to {high:.4f}; 0.5 is chance"])
