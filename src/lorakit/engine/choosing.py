"""Which token comes next: one row's settings on one row's logits.

The steps are transformers' own logits processors, in the order of `generate`; the two penalties
that it lacks are OpenAI's. Every row has its own random numbers, so that its answer does not
depend on which others it is computed with. Rows that have a temperature and nothing else are drawn
together (`choose_together`).
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
_BLOCK = 64
"""Tokens whose probabilities are added up before one of them is looked for."""
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
            # A single number is drawn where the temperature is all, the same on every device.
            self._generator = torch.Generator("cpu" if self.is_simple else device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed % 2**63)

    @property
    def is_plain(self) -> bool:
        """Whether the token is the likeliest, whatever came before."""
        return self._generator is None and not self._penalised and self._repetition is None

    @property
    def is_simple(self) -> bool:
        """Whether the token is drawn by its probability at a temperature, or the likeliest."""
        return len(self._warpers) < 2 and not self._penalised and self._repetition is None

    @property
    def temperature(self) -> float:
        """What logits are divided by; 0 takes the likeliest token."""
        return 0.0 if self._generator is None else self._sampling.temperature

    @property
    def asks_logs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return self._sampling.logprobs is not None

    @property
    def logs_unscaled(self) -> bool:
        """Whether log-probabilities are asked for, and are not those at the temperature."""
        sampling = self._sampling
        asked = sampling.logprobs is not None and not sampling.scaled_logprobs
        return asked and self.temperature not in (0, 1)

    def uniform(self) -> float:
        """The next random number of a simple row that draws, in [0, 1)."""
        assert self._generator is not None
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    def choose(self, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            logits: (vocabulary,), in float32; they are changed.
        """
        if self.is_simple:
            return choose_together(logits[None], [self])[0][0]
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
            return int(logits.max(-1).indices)
        # No warper looks at the tokens so far.
        scores = self._warpers(torch.empty(1, 0, dtype=torch.long), logits[None])[0]
        return int(scores.softmax(-1).multinomial(1, generator=self._generator))

    def took(self, token: int) -> None:
        """Counts a token of the answer."""
        if self._penalised or self._repetition is not None:
            self._counts[token] += 1


def choose_together(
    logits: torch.Tensor, choosers: Sequence[Chooser]
) -> tuple[list[int], list[float]]:
    """The next tokens of rows that are simple, and the log-probabilities that these ask for.

    A row takes the first token up to which probabilities add up to more than its random number.
    Blocks are added up first, as adding up a whole vocabulary takes longer; over them sums are in
    float64.

    Args:
        logits: (rows, vocabulary), in float32 or float64.
    """
    if not any(chooser.temperature or chooser.asks_logs for chooser in choosers):
        return logits.max(-1).indices.tolist(), [0.0] * len(choosers)  # `argmax` takes longer
    own_logits = logits
    divisors = [chooser.temperature or 1.0 for chooser in choosers]
    if any(divisor != 1 for divisor in divisors):
        logits = logits / torch.tensor(divisors, dtype=logits.dtype, device=logits.device)[:, None]
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest).exp_()
    if rest := -weights.shape[1] % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, rest))
    blocks = weights.unflatten(1, (-1, _BLOCK))
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    total = ends[:, -1:]
    tokens = torch.empty(len(choosers), 1, dtype=torch.int64, device=logits.device)
    if coldest := [i for i, chooser in enumerate(choosers) if not chooser.temperature]:
        own = torch.tensor(coldest, device=logits.device)
        tokens[own] = logits[own].max(-1, keepdim=True).indices
    if drawing := [i for i, chooser in enumerate(choosers) if chooser.temperature]:
        numbers = [choosers[i].uniform() for i in drawing]
        own = torch.tensor(drawing, device=logits.device)
        aim = total[own] * torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None]
        aim = torch.minimum(aim, torch.nextafter(total[own], torch.zeros_like(aim)))
        block = torch.searchsorted(ends[own], aim, right=True)
        inside = blocks[own, block[:, 0]].double().cumsum(-1)
        aim = (aim - ends[own].gather(1, block) + inside[:, -1:]).clamp_(min=0)
        # Rounding may leave it behind the last token that has any probability.
        last = (inside < inside[:, -1:]).sum(-1, keepdim=True)
        place = torch.minimum(torch.searchsorted(inside, aim, right=True), last)
        tokens[own] = block * _BLOCK + place
    logs = logits.gather(1, tokens) - largest - total.log().to(logits.dtype)
    if other := [i for i, chooser in enumerate(choosers) if chooser.logs_unscaled]:
        own = torch.tensor(other, device=logits.device)
        logs[own] = own_logits[own].log_softmax(-1).gather(1, tokens[own])
    return tokens[:, 0].tolist(), logs[:, 0].tolist()
