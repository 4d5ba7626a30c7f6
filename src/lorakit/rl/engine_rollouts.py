"""Completions by the resident model itself: the very weights that are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorakit.engine.sampler import Sampler, answering
from lorakit.engine.sampling import Sampling
from lorakit.errors import LorakitError
from lorakit.objectives.rollout import AskedPrompt, FinishReason, Rollout
from lorakit.progress import task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.engine.rows import AnswerRow
    from lorakit.engine.sampling import Ending
    from lorakit.lora.model import LoraModel
    from lorakit.objectives.objective import Objective


class EngineRollouts:
    """Samples on the engine, all prompts together; a `RolloutSource`.

    Args:
        tokenizer: says what ends a completion.
    """

    notices: Sequence[str] = ()
    files: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase,
        model: LoraModel | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._sampler: Sampler | None = None

    def write(
        self, asked: Sequence[AskedPrompt], model: LoraModel, step: int | None
    ) -> list[Rollout]:
        """As in `RolloutSource`."""
        return self.write_each(asked, (), model)

    def write_each(
        self, asked: Sequence[AskedPrompt], adapters: Sequence[str], model: LoraModel
    ) -> list[Rollout]:
        """The same in one batch with adapters of several runs.

        Args:
            adapters: of each prompt, `BASE` for none; empty where the route in force is that of
                all of them.
        """
        if self._sampler is None:
            self._sampler = Sampler(model, self._tokenizer)
        with answering(model) as route, task("sampling completions", len(asked)) as work:
            tokens: list[Any] = [one.tokens for one in asked]
            sampling = [sampling_of(one) for one in asked]
            rows = self._sampler.write(tokens, sampling, route, work, adapters=adapters)
        return [self._rollout(written_of(row)) for row in rows]

    def _rollout(self, written: Written) -> Rollout:
        assert self._sampler is not None
        tokens, ending = written.tokens, self._sampler.ending
        text = str(self._tokenizer.decode(written.before(ending), skip_special_tokens=True))
        if ending.text:
            text = text.partition(ending.text)[0]
        reason: FinishReason = "length" if written.cut else "stop"
        return Rollout(tokens, written.logprobs, reason, text)

    def require(self) -> None:
        """As in `RolloutSource`: nothing is missing."""

    def close(self) -> None:
        """As in `RolloutSource`: nothing was started."""


@dataclass(frozen=True)
class Written:
    """What the model has written at once.

    Attributes:
        tokens: with the one that ended it.
        logprobs: of each, where they were asked for.
        cut: it was ended by its limit of tokens.
    """

    tokens: list[int]
    logprobs: list[float]
    cut: bool

    def before(self, ending: Ending) -> list[int]:
        """The tokens before the one that ended it."""
        ended = not self.cut and self.tokens and self.tokens[-1] in ending.tokens
        return self.tokens[:-1] if ended else self.tokens


def written_of(row: AnswerRow) -> Written:
    """What a finished row has. Raises LorakitError where it has failed."""
    pieces = [*row.ticket]
    if row.failed:
        raise LorakitError(pieces[-1].error)
    logprobs = [chosen.logprob for piece in pieces for chosen in piece.logprobs]
    return Written(list(row.tokens), logprobs, pieces[-1].finish_reason == "length")


def sampling_of(one: AskedPrompt) -> Sampling:
    """How the engine samples what is asked."""
    return Sampling(
        temperature=one.temperature,
        top_p=one.top_p,
        max_new_tokens=one.max_new_tokens,
        seed=one.seed,
        top_k=one.top_k,
        min_p=one.min_p,
        repetition_penalty=one.repetition_penalty,
        logprobs=0 if one.logprobs else None,
        scaled_logprobs=one.logprobs,
    )
