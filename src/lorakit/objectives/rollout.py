"""What is asked of the model in training, and what it has written.

An objective that learns from sampled completions yields `AskedPrompt`s and is sent a `Rollout` for
each (`Objective.sampled_rows`). Who writes them is the business of `lorakit.rl`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lorakit.data.conversations import Message
    from lorakit.data.masking import TokenizedRow
    from lorakit.data.samples import Sample

REFERENCE = "rollout.reference"
"""Of a batch: the log-probabilities (n,) of its supervised tokens under the bare base."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt that the model in training answers, and how.

    Args:
        tokens: of the prompt.
        max_new_tokens: at most so many tokens, at least 1.
        temperature, seed: of sampling.
        top_p, top_k, min_p, repetition_penalty: as in `engine.sampling.Sampling`.
        logprobs: whether the log-probabilities of the sampled tokens are needed.
        sample: the row that the prompt is of, with its messages, tools and columns.
        generation: which completion of its prompt it is, from 0.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    temperature: float
    seed: int
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: bool = False
    sample: Sample | None = None
    generation: int = 0


@dataclass(frozen=True)
class Rollout:
    """A completion of a prompt, or all turns behind it with an environment's between them.

    Args:
        tokens: those behind the prompt, with the token that ended it.
        logprobs: of each token in nats, of logits / temperature as it was sampled; 0 for tokens
            that were not; empty where none were asked for.
        finish_reason: `length` where it was cut off by its limit of tokens.
        text: the completion without special tokens.
        messages: the turns behind the prompt; one of the assistant where there are no others.
        sampled: which tokens the model has sampled, the others being an environment's; None for
            all of them.
        reward: an environment's own, None where there is none.
        metrics: numbers of an environment, averaged and logged by name.
        prompt: the tokens before, where they are others than those that were asked.
        failure: why an environment gave no reward.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float] = ()
    finish_reason: FinishReason = "stop"
    text: str = ""
    messages: Sequence[Message] = ()
    sampled: Sequence[bool] | None = None
    reward: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    prompt: Sequence[int] | None = None
    failure: str = ""

    @property
    def learned(self) -> Sequence[bool]:
        """Which tokens the model has sampled."""
        return [True] * len(self.tokens) if self.sampled is None else self.sampled


RowsOfBatches = list["Sequence[TokenizedRow] | None"]
"""The rows to learn in the place of each batch; None for a batch that is learned as it is."""

Sampling = Generator[Sequence[AskedPrompt], Sequence[Rollout], RowsOfBatches]
"""Yields prompts, is sent their rollouts in the same order, and returns the rows to learn."""
