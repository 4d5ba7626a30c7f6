"""One training run, from a recipe to an adapter's folder, in the order in which it happens."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from lorakit import atomic
from lorakit.adapters.manifest import Manifest, read_manifest, write_manifest
from lorakit.adapters.open import TEMPLATE_NAME
from lorakit.data.batches import LabelCollator
from lorakit.data.dataset import PreparedData
from lorakit.data.templates import template_sha256
from lorakit.errors import InputError, LorakitError
from lorakit.lora import LoraModel
from lorakit.models.attention import take_lines
from lorakit.models.fingerprint import fingerprint
from lorakit.models.fused import fused
from lorakit.models.loss import SupervisedLoss
from lorakit.training.batching import Batching
from lorakit.training.compiling import choose, compile_blocks
from lorakit.training.machine import is_main_process, settle_in
from lorakit.training.output import check_output, claim_output
from lorakit.training.progress import ProgressBar
from lorakit.training.recipe import Recipe, load_recipe
from lorakit.training.recorder import Recorder
from lorakit.training.tasks import begin
from lorakit.training.trainer import LoraTrainer, last_checkpoint


@dataclass(frozen=True)
class TrainResult:
    """A finished run: the adapter's folder, and the record beside it."""

    output_dir: Path
    manifest: Manifest

    @property
    def eval_loss(self) -> float | None:
        """Nats per supervised token on the held-out rows, None when none were held out."""
        return self.manifest.eval_loss


def train(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *overrides: str,
    resume: bool = False,
    quiet: bool = False,
) -> TrainResult:
    """Trains an adapter as `recipe` says and leaves it in `output_dir`.

    Args:
        recipe: a recipe's file, or its keys as a mapping.
        overrides: `dotted.key=value`, as on the command line.
        resume: go on from the last checkpoint in `output_dir`, when there is one.
        quiet: show nothing.

    Raises:
        InputError: the recipe, the data or the folder cannot be used; nothing is written then.
        LorakitError: training failed (a full disk, a loss that is no number).
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        recipe = load_recipe(recipe.to_dict(), overrides)
    main = is_main_process()
    console = Console(stderr=True, quiet=quiet or not main, highlight=False, soft_wrap=True)
    folder = Path(recipe.output_dir)
    if main:
        check_output(folder, resume=resume)

    settle_in()
    begun = begin(recipe)
    model, tokenizer, data = begun.model, begun.tokenizer, begun.data
    _say(console, [*data.notices, *(found.line for found in data.findings if found.count)])
    base = fingerprint(model, without=begun.new_modules)
    set_seed(recipe.training.seed)
    adapted = LoraModel(model, begun.lora_config(recipe))
    arguments = _training_arguments(recipe, data)
    batching, notices = _batching(recipe, adapted, tokenizer.pad_token_id, begun.collator)
    compiled, notice = choose(recipe.compile, adapted, _tokens_to_train(data, batching, arguments))
    if main:
        claim_output(folder, recipe.to_dict(), [asdict(fact) for fact in data.facts])
    if resume and (finished := read_manifest(folder)):
        _say(console, [f"{folder} is finished already: nothing is left to do"])
        return TrainResult(folder, finished)

    checkpoint = last_checkpoint(folder) if resume else None
    if resume:
        start = f"going on from {checkpoint.name}" if checkpoint else "no checkpoint yet: starting"
        _say(console, [start])
    _describe(console, recipe, adapted, data)
    if torch.cuda.device_count() > arguments.world_size:
        many = f"torchrun --nproc-per-node {torch.cuda.device_count()} -m lorakit train …"
        notices.append(f"{arguments.world_size} of {torch.cuda.device_count()} GPUs used; {many}")
    _say(console, [*notices, *([notice] if notice else [])])
    with _named_failures(folder):
        trainer = LoraTrainer(
            adapted, arguments, data.train, data.eval, batching, begun.loss, begun.scorer
        )
        own_loss = trainer.supervised_loss
        if isinstance(own_loss, SupervisedLoss) and own_loss.output is None:
            _say(console, ["the loss is taken of the model's own logits, at learned tokens alone"])
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Recorder(folder, trainer.counts))
        bar = ProgressBar(trainer.counts, console)
        trainer.add_callback(bar)
        if compiled:
            compile_blocks(adapted)
        try:
            with nullcontext() if compiled else fused(adapted):
                base_scores, scores = _fit(trainer, adapted, data, checkpoint)
        finally:
            bar.close()  # an interrupted bar would leave the terminal without its cursor
        counts = trainer.counts
        manifest = Manifest(
            base_model=recipe.model,
            recipe=recipe.to_dict(),
            data=[asdict(fact) for fact in data.facts],
            template_sha256=template_sha256(tokenizer),
            base_fingerprint=base,
            steps=trainer.state.global_step,
            train_seconds=round(counts.seconds, 2),
            train_tokens=counts.train_tokens,
            supervised_tokens=counts.supervised_tokens,
            tokens_per_second=round(counts.train_tokens / max(counts.seconds, 1e-9), 1),
            peak_memory_mb=_peak_memory_mb(),
            padding_free=batching.pad_token_id is None,
            compiled=compiled,
            eval_loss=scores.get("loss"),
            base_eval_loss=base_scores.get("loss"),
            eval_scores={k: v for k, v in scores.items() if k != "loss"} or None,
            base_eval_scores={k: v for k, v in base_scores.items() if k != "loss"} or None,
            labels=begun.labels.to_dict() if begun.labels else None,
            versions=_versions(),
            seed=recipe.training.seed,
        )
        if main:
            if not begun.had_template:  # so that chat and serve use the same
                atomic.write_file(folder / TEMPLATE_NAME, str(tokenizer.chat_template))
            adapted.save_pretrained(folder)
            write_manifest(folder, manifest)  # last: its presence says that the run is finished
    return TrainResult(folder, manifest)


def _batching(
    recipe: Recipe, model: LoraModel, pad_token_id: int, collator: LabelCollator | None
) -> tuple[Batching, list[str]]:
    """How rows become batches, with what to say where that is not as the recipe has it."""
    if collator:
        return Batching(pad_token_id, own_collator=collator), []
    pack_length = recipe.data.max_length if recipe.data.packing else None
    if not recipe.data.padding_free:
        return Batching(pad_token_id, pack_length), []
    if reason := take_lines(model):
        notice = f"rows are padded, those of like length together: {reason}"
        return Batching(pad_token_id, pack_length), [notice]
    return Batching(None, pack_length), []


def _tokens_to_train(data: PreparedData, batching: Batching, arguments: TrainingArguments) -> float:
    """The tokens of all epochs, or of the steps that `max_steps` stops after."""
    epochs = arguments.num_train_epochs
    if arguments.max_steps > 0:
        batches = arguments.max_steps * arguments.gradient_accumulation_steps
        batches *= arguments.world_size
        epochs = batches / len(batching.train_batches(data.train, arguments, epoch=0))
    return epochs * sum(len(row) for row in data.train)


def _training_arguments(recipe: Recipe, data: PreparedData) -> TrainingArguments:
    """Trainer's arguments: the recipe's, over what this trainer wants otherwise than Trainer."""
    values = {
        "output_dir": recipe.output_dir,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # it would hide a loss that is no number
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Unless told so, accelerate would start no process group without a GPU.
        "use_cpu": not torch.accelerator.is_available(),
        **recipe.training.model_dump(),
    }
    if not data.eval:
        values["eval_strategy"] = "no"
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training: {' '.join(str(error).split())}") from error
    if arguments.n_gpu > 1:
        # Trainer would use nn.DataParallel, which cuts a line of rows anywhere.
        arguments._n_gpu = 1
    return arguments


def _fit(
    trainer: LoraTrainer, model: LoraModel, data: PreparedData, checkpoint: Path | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Trains; returns the held-out loss and scores of the bare base, and of the adapter."""
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if not data.eval:
        return {}, {}
    last: dict[str, float] = next(
        (e for e in reversed(trainer.state.log_history) if "eval_loss" in e), {}
    )
    if last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        tuned = last
    else:
        tuned = trainer.evaluate()
    with model.disable_adapter():
        base = trainer.held_out_scores()
    return base, {name: tuned[f"eval_{name}"] for name in base}


def _describe(console: Console, recipe: Recipe, model: LoraModel, data: PreparedData) -> None:
    trained, total = model.get_nb_trainable_parameters()
    tokens = sum(len(row) for row in data.train)
    learned = sum(row.supervised for row in data.train)
    base, own = (
        str(next(iter(tensors)).dtype).removeprefix("torch.")
        for tensors in (
            model.get_base_model().parameters(),
            model.adapter_tensors(model.active_adapter).values(),
        )
    )
    _say(
        console,
        [
            f"{recipe.model} in {base}, adapter in {own}: {trained:,} of {total:,} "
            f"parameters are trained ({trained / total:.2%})",
            f"{len(data.train)} rows to learn from ({tokens:,} tokens, {learned:,} supervised), "
            f"{len(data.eval)} held out",
        ],
    )


def _say(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, markup=False)


@contextmanager
def _named_failures(folder: Path) -> Iterator[None]:
    """Turns a full disk, however a library reports it, into one line."""
    cure = "The last checkpoint is whole: make room and go on with --resume"
    try:
        yield
    except OSError as error:
        raise LorakitError(f"cannot write {folder}: {error.strerror or error}. {cure}") from error
    except RuntimeError as error:
        if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):
            raise LorakitError(f"cannot write {folder}: is the disk full? {cure}") from error
        raise


def _peak_memory_mb() -> float:
    """The process's peak resident memory, or the GPU's when there is one; in MB of 10**6 bytes."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def _versions() -> dict[str, str]:
    packages = ("lorakit", "torch", "transformers", "accelerate", "safetensors")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
