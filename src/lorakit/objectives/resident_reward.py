"""An adapter of objective reward as a reward of a run, scored on the base that the run trains on.

Its factors lie beside the adapter in training, on a route of their own; the head, which a language
model lacks, is kept here. The score of a sequence is `head · h`, with h the hidden state at its
last token, as `models.sequence_scores` reads it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter_files import read_files
from lorakit.adapters.lineage import digest, require_complete
from lorakit.data.batches import Collator
from lorakit.data.masking import IGNORE, TokenizedRow
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.lora.checkpoint import write_adapter
from lorakit.lora.routing import Route
from lorakit.models.load import most_tokens
from lorakit.models.loaded import in_evaluation
from lorakit.models.loss import SupervisedLoss

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from lorakit.lora.model import LoraModel
    from lorakit.rewards.reward_table import RewardInput

_HEAD = "score.weight"
_AT_ONCE = 16  # sequences


class ResidentReward:
    """Scores completions; it knows its model only after `attach`.

    Args:
        folder: of the adapter.
        name: that it gets in the model's bank.

    Attributes:
        files: the SHA-256 of the adapter, for the record of the run.

    Raises:
        InputError: it is no reward adapter, or has more than factors and a head.
    """

    def __init__(self, folder: str, name: str) -> None:
        from lorakit.objectives.registry import make_objective

        self.folder, self.name = folder, name
        try:
            files = read_files(folder)
            require_complete(folder, verb="used as a reward")
        except InputError as error:
            raise InputError(f"rewards: {error}") from error
        recorded = files.manifest.recipe.get("objective") if files.manifest else None
        heads = [key for key in files.tensors if key.endswith(_HEAD) and "lora_" not in key]
        if not isinstance(recorded, dict) or recorded.get("type") != "reward" or len(heads) != 1:
            raise InputError(
                f"rewards: {folder} is no reward adapter: give the folder of a run with "
                "objective: reward on a model that writes text"
            )
        others = [m for m in files.config.modules_to_save or () if m != "score"]
        if others or files.config.bias != "none":
            changed = others[0] if others else "biases"
            raise InputError(
                f"rewards: {folder} changes {changed} of the base itself, which the adapter in "
                "training needs as it is"
            )
        assert files.manifest is not None
        self.files = {"adapter": digest(folder)}
        self._objective = make_objective(recorded)
        self._length = int(files.manifest.recipe["data"].get("max_length", 1024))
        self._head = files.tensors.pop(heads[0])
        self._tensors = files.tensors
        self._config = dataclasses.replace(
            files.config, task_type="CAUSAL_LM", modules_to_save=None, lora_dropout=0.0
        )
        self._model: LoraModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def attach(self, model: LoraModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Puts the factors beside the adapters of `model`, inactive.

        Raises:
            InputError: they do not fit, or the head of the language model cannot be left out.
        """
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(folder, self._config, self._tensors)
            try:
                model.load_adapter(folder, self.name, config=self._config)
            except InputError as error:
                said = str(error).replace(folder, self.folder)
                raise InputError(f"rewards: {self.folder} does not fit: {said}") from error
        self._tensors = {}
        self._reader = SupervisedLoss(model)
        if self._reader.output is None:
            raise InputError(
                f"rewards: {self.folder}: this base computes its logits in a way of its own, so "
                "that no hidden state can be scored: write a function that loads the reward model"
            )
        self._model, self._tokenizer = model, tokenizer

    def __call__(self, asked: Sequence[RewardInput]) -> list[float]:
        """The score of each prompt with its completion."""
        import torch

        model, tokenizer = self._model, self._tokenizer
        assert model is not None, "the run has not attached it to a model"
        assert tokenizer is not None
        length = most_tokens(model, self._length)
        samples = [Sample(tuple(one.conversation), None, one.where) for one in asked]
        rows = [self._row(self._objective.tokenize(s, tokenizer, length)) for s in samples]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found = [0.0] * len(rows)
        route = Route(shared=(self.name,))
        with in_evaluation(model), torch.no_grad(), model.routing.using(route):
            for at in range(0, len(order), _AT_ONCE):
                chosen = order[at : at + _AT_ONCE]
                scores = self._scores([rows[i] for i in chosen])
                for i, score in zip(chosen, scores, strict=True):
                    found[i] = score
        return found

    def _row(self, row: TokenizedRow) -> TokenizedRow:
        """The row with a token behind the one that is scored, which asks for its hidden state."""
        assert self._tokenizer is not None
        ids, pad = [*row.input_ids], self._tokenizer.pad_token_id
        while len(ids) > 1 and ids[-1] == pad:  # as transformers knows padding
            ids.pop()
        return TokenizedRow([*ids, ids[-1]], [IGNORE] * len(ids) + [ids[-1]], row.where)

    def _scores(self, rows: Sequence[TokenizedRow]) -> list[float]:
        assert self._model is not None
        assert self._tokenizer is not None
        device: Any = self._model.get_base_model().device
        batch = Collator(int(self._tokenizer.pad_token_id or 0))(rows)
        states, _ = self._reader.states(self._model, {k: t.to(device) for k, t in batch.items()})
        head: torch.Tensor = self._head.to(states)
        scores: list[float] = (states @ head.T).squeeze(-1).float().tolist()
        return scores
