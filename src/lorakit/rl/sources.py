"""What writes completions, by name: one line for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from lorakit.errors import InputError, did_you_mean, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.lora.model import LoraModel
    from lorakit.objectives.objective import Objective
    from lorakit.objectives.rollout import AskedPrompt, Rollout


class RolloutSource(Protocol):
    """Writes completions; made with the objective, the tokenizer and the model of a run.

    Attributes:
        notices: lines for the user, before a run.
        files: SHA-256 of users' files that decide what completions are, by name.
    """

    @property
    def notices(self) -> Sequence[str]: ...

    @property
    def files(self) -> Mapping[str, str]: ...

    def require(self) -> None:
        """Raises InputError where something is missing here that a run needs."""

    def write(
        self, asked: Sequence[AskedPrompt], model: LoraModel, step: int | None
    ) -> list[Rollout]:
        """A rollout for each prompt, in their order.

        Args:
            model: the resident model under the route that is in force, with its weights as they
                are now.
            step: optimizer steps so far; None for held-out prompts.

        Raises:
            LorakitError: a completion could not be written.
        """

    def close(self) -> None:
        """Ends what was started for it."""


SOURCES = {
    "engine": "lorakit.rl.engine_rollouts:EngineRollouts",
    "vllm": "lorakit.rl.vllm_rollouts:VllmRollouts",
    "environment": "lorakit.rl.environments:EnvironmentRollouts",
}
"""Where each is defined; loaded when it is first used."""


def open_source(
    name: str,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    model: LoraModel | None = None,
) -> RolloutSource:
    """The source `name`. Raises InputError where there is none, or it cannot be used."""
    if name not in SOURCES:
        near = did_you_mean(name, SOURCES)
        raise InputError(f"rollouts: there is no '{name}'{near}; there are {listed([*SOURCES])}")
    module, _, attribute = SOURCES[name].partition(":")
    kind: Any = getattr(import_module(module), attribute)
    source: RolloutSource = kind(objective, tokenizer, model)
    return source
