"""A `transformers.Trainer` whose checkpoints are whole, and resume to the bytes.

A checkpoint appears in one step, sealed, and holds the adapter, its optimizer and schedule, the
random numbers, counts, and the place in the rows. Nothing here knows a loss or a batch.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import rotate_checkpoints, set_seed
from transformers.training_args import TrainingArguments

from lorakit.adapters.lineage import name_frozen, write_stage
from lorakit.adapters.manifest import FrozenRecord
from lorakit.errors import LorakitError
from lorakit.lora.checkpoint import adapter_parameters, load_tensors, read_adapter
from lorakit.lora.model import LoraModel
from lorakit.lora.vocabulary import split_frozen, trains_new_rows
from lorakit.models.template_files import Templates, write_templates
from lorakit.rl.rollouts import Rollouts
from lorakit.training.batching import (
    EpochSampler,
    StreamDataset,
    read_place,
    write_places,
)
from lorakit.training.checkpoints import checkpoints, damage, seal, step_of
from lorakit.training.position import Position, place_at, planned_steps
from lorakit.training.recorder import Counts, read_counts, write_counts
from lorakit.training.restoring import facts_of_optimisation, restore, whole_state

_STAGING = ".saving"


class CheckpointedTrainer(Trainer):
    """Writes checkpoints of the active adapter of a `LoraModel`, and goes on from them.

    Args:
        sampler: the batches of an epoch, in their order.
        options: Trainer's own.

    Attributes:
        counts: the tokens that have been learned.
        forget_evaluations: evaluations of the run so far cannot be compared with those to come.
        say: shows a line to the user.
        templates: chat templates that are saved with every checkpoint.
        own_tokenizer: one with more tokens than the base's, which is saved too.
        stands_on: what the adapter is added to.
        rollouts: samples completions, of which some may still be to be learned.
    """

    control: TrainerControl
    lr_scheduler: Any
    rollouts: Rollouts | None = None
    _is_saving = False

    def __init__(self, sampler: EpochSampler, **options: Any) -> None:
        self.sampler = sampler
        self.counts = Counts()
        self.forget_evaluations = False
        self.say: Callable[[str], None] = lambda line: None
        self.templates: Templates | None = None
        self.own_tokenizer: Any = None
        self.stands_on: Sequence[FrozenRecord] = ()
        self._resumed_from: Path | None = None
        super().__init__(**options, callbacks=[sampler])

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Trainer's; resumes at the place in the rows at which the checkpoint was written."""
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    @property
    def streams(self) -> bool:
        """Whether rows are read as they come."""
        return isinstance(self.train_dataset, StreamDataset)

    def _averaged(self) -> None:
        """Lets an optimiser that has other weights to evaluate (schedule-free) put them in place.

        Trainer calls its `train` before each step.
        """
        average = getattr(self.optimizer, "eval", None)
        if callable(average):
            average()

    def _get_output_dir(self, trial: Any) -> str:
        """Trainer's place for checkpoints; while one is being written, the staging folder."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / _STAGING) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint aside and renames it, so a kill never leaves half of one."""
        folder = Path(super()._get_output_dir(trial))
        if self.args.should_save:
            shutil.rmtree(folder / _STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        self._averaged()
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(folder / _STAGING, ignore_errors=True)
            raise
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._publish(folder)
        self.accelerator.wait_for_everyone()
        self._point_to_best()  # in every process, as all load it in the end
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        self.accelerator.wait_for_everyone()

    def _publish(self, folder: Path) -> None:
        """Seals the checkpoint in the staging folder and gives it its name.

        Its state names the best step and no path, so that a run's folder can be moved. Those of
        later steps are of a run that went on from before them, and go.
        """
        [finished] = (folder / _STAGING).iterdir()
        replace(self.state, best_model_checkpoint=None).save_to_json(
            str(finished / TRAINER_STATE_NAME)
        )
        seal(finished, facts_of_optimisation(self.args))
        shutil.rmtree(folder / finished.name, ignore_errors=True)
        finished.rename(folder / finished.name)
        (folder / _STAGING).rmdir()
        for checkpoint in checkpoints(folder):
            if step_of(checkpoint) > self.state.global_step:
                shutil.rmtree(checkpoint, ignore_errors=True)

    def _point_to_best(self) -> None:
        """Lets the state name the best checkpoint in this run's own folder, if it is there."""
        best = self.state.best_global_step
        path = Path(self.args.output_dir) / f"checkpoint-{best}"
        self.state.best_model_checkpoint = str(path) if best and path.is_dir() else None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer's; where the best weights are to be left, a new best is saved at once."""
        better = super()._determine_best_metric(metrics, trial)
        if better and self.args.load_best_model_at_end:
            self.control.should_save = True
        return better

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter, and nothing of the base model; all processes must call it."""
        folder = Path(output_dir or self.args.output_dir)
        self.save_adapter(folder)
        if self.args.should_save:
            if self.templates is not None:
                write_templates(folder, self.templates)
            if self.stands_on:
                write_stage(folder, self.stands_on)
            write_counts(folder, self.counts)
        if self.rollouts is not None and self._is_saving:
            self.rollouts.save(folder, self.args.process_index)
        if self.streams:
            done = self.state.global_step * self.args.gradient_accumulation_steps
            places = gather_object([self.train_dataset.place_of(done)])
            if self.args.should_save:
                write_places(folder, places)

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter in training, and no frozen one beside it, into `folder`.

        Where the model has more tokens than its base, the tokenizer is written too, and the whole
        embedding unless the adapter trains the rows of all new tokens.
        """
        model = self._lora_model()
        options: dict[str, Any] = {"is_main_process": self.args.should_save}
        name, base = model.active_adapter, model.get_base_model()
        if self.own_tokenizer is not None and trains_new_rows(base, name):
            options["save_embedding_layers"] = False
        if len(getattr(model, "adapters", ())) > 1:
            options["selected_adapters"] = [name]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the base had .* tokens")
            model.save_pretrained(folder, **options)
        if self.stands_on and self.args.should_save:
            name_frozen(folder, self.stands_on)
        if self.own_tokenizer is not None and self.args.should_save:
            self.own_tokenizer.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's; sharded states are gathered to the files that one process would write."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def ends_at(self, checkpoint: Path) -> bool:
        """Whether no step is left behind a checkpoint."""
        place = self._place_at(checkpoint)
        return step_of(checkpoint) >= planned_steps(self.args, len(self.sampler), place)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> Any:
        """Trainer's; steps that were made with other batches count as they were."""
        found = super().set_initial_training_values(args, dataloader)
        if self._resumed_from is None:
            return found
        place = self._place_at(self._resumed_from)
        _, per_epoch, examples, samples, size, in_epoch, _ = found
        steps = planned_steps(args, len(self.sampler), place)
        epochs = math.ceil((steps - place.ahead) / per_epoch)
        return epochs, per_epoch, examples, samples, size, in_epoch, steps

    def _init_training_state(self, max_steps: int, *rest: Any) -> tuple[int, int]:
        """Trainer's; what the recipe says of logging, saving and evaluating holds from here on."""
        begun = super()._init_training_state(max_steps, *rest)
        if self._resumed_from is None:
            return begun
        self.state.compute_steps(self.args, max_steps)
        self._take_best()
        if self.rollouts is not None:
            self.rollouts.resume(self._resumed_from, self.args.process_index)
        place = self._place_at(self._resumed_from)
        if self.streams:
            args = self.args
            begin = read_place(self._resumed_from, args.process_index, args.world_size)
            if begin is not None:
                self.train_dataset.resume(place.batches, begin)
        return place.epoch, place.batches

    def _place_at(self, checkpoint: Path) -> Position:
        """Where a checkpoint was written; a stream is one epoch of `max_steps`."""
        if self.streams:
            return Position(0, step_of(checkpoint) * self.args.gradient_accumulation_steps)
        return place_at(checkpoint, self.args, len(self.sampler))

    def _take_best(self) -> None:
        """Finds the best checkpoint of a state that was loaded in this run's own folder."""
        state = self.state
        if self.forget_evaluations:
            state.best_metric = state.best_global_step = None
            state.log_history = [e for e in state.log_history if "eval_loss" not in e]
        self._point_to_best()
        if state.best_global_step is None or not self.args.load_best_model_at_end:
            return
        best = Path(self.args.output_dir) / f"checkpoint-{state.best_global_step}"
        reason = damage(best) if best.is_dir() else "it is missing"
        if reason is not None:
            self.say(
                f"{best.name}, the best so far, cannot be used: {reason}. The best from here on "
                "is kept"
            )
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Takes over what a checkpoint holds beside the weights, the counts too."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        # In place: the callbacks hold the same counts.
        vars(self.counts).update(vars(read_counts(folder)))
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        step = self.state.global_step
        if notice := restore(self.optimizer, self.lr_scheduler, folder, self.args, step):
            self.say(notice)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's; where the checkpoint has none for this process, seeded by the step."""
        several = self.args.world_size > 1
        name = f"rng_state_{self.args.process_index}.pth" if several else "rng_state.pth"
        if checkpoint is not None and not (Path(checkpoint) / name).is_file():
            set_seed(self.args.seed + self.state.global_step)
            return
        super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder, wrapped = Path(resume_from_checkpoint), self._lora_model()
        config, tensors = read_adapter(folder)
        base, name = wrapped.get_base_model(), wrapped.active_adapter
        own = adapter_parameters(base, name, config.bias)
        load_tensors(own, split_frozen(base, tensors, own)[0], folder)

    def take_up(self, checkpoint: Path) -> None:
        """State, counts and weights of a run that had stopped when `checkpoint` was written.

        Where the best weights are kept, it is those.
        """
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        vars(self.counts).update(vars(read_counts(checkpoint)))
        self._take_best()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(checkpoint))

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if reason := damage(best):
            raise LorakitError(
                f"{best}, the best of the run, cannot be used: {reason}. Remove it, and the same "
                "command with --resume leaves the last weights"
            )
        self._load_from_checkpoint(str(best))

    def _lora_model(self) -> LoraModel:
        return self.accelerator.unwrap_model(self.model)
