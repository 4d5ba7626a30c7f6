"""Which token comes next: one row's settings on one row's logits.

The steps are transformers' own logits processors, in the order of `generate`; the two penalties
that it lacks are OpenAI's. Every row has its own random numbers, so that its answer does not
depend on which others it is computed with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorakit.engine.sampling import Sampling

_COLDEST = 1e-5
"""The temperature below which only the likeliest token is left; logits over less overflow."""
_LARGEST = 1e30
"""Where logits end that a tiny repetition penalty made large: over `_COLDEST` it is finite."""


class Chooser:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], device: torch.device) -> None:
        self._sampling, self._prompt, self._device = sampling, list(prompt), device
        self._counts: Counter[int] = Counter()
        self._penalised = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._repetition = (
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
            if sampling.repetition_penalty != 1
            else None
        )
        self._warpers = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if sampling.temperature >= _COLDEST:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))
            if sampling.min_p > 0:
                self._warpers.append(MinPLogitsWarper(float(sampling.min_p)))
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed % 2**63)

    @property
    def is_plain(self) -> bool:
        """Whether the token is the likeliest, whatever came before."""
        return self._generator is None and not self._penalised and self._repetition is None

    def choose(self, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            logits: (vocabulary,), in float32; they are changed.
        """
        if self._repetition is not None:
            seen = torch.tensor([[*self._prompt, *self._counts]], device=self._device)
            logits = self._repetition(seen, logits[None])[0].clamp_(-_LARGEST, _LARGEST)
        if self._penalised and self._counts:
            ids = torch.tensor(list(self._counts), device=self._device)
            times = torch.tensor(list(self._counts.values()), device=self._device)
            frequency, presence = (
                self._sampling.frequency_penalty,
                self._sampling.presence_penalty,
            )
            logits[ids] -= (times * frequency + presence).to(logits.dtype)
        if self._generator is None:
            return int(logits.argmax())
        # No warper looks at the tokens so far.
        scores = self._warpers(torch.empty(1, 0, dtype=torch.long), logits[None])[0]
        return int(scores.softmax(-1).multinomial(1, generator=self._generator))

    def took(self, token: int) -> None:
        """Counts a token of the answer."""
        if self._penalised or self._repetition is not None:
            self._counts[token] += 1
