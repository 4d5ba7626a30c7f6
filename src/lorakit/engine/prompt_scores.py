"""How likely adapters find the tokens of prompts: several prompts a pass, each by its own adapter.

Prompts are padded on the right, where no token before the padding sees it. Logits are made of
hidden states a few positions at a time, as those of whole prompts would take more memory than all
else; a model whose output layer is not a plain one computes one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from lorakit.lora.routing import Route, Routing
from lorakit.models.loss import OutputLayer, head_inputs, output_layer

_AT_ONCE = 256  # positions whose logits are there in float32 at a time


@dataclass(frozen=True)
class Scored:
    """A prompt to be scored.

    Args:
        adapter: its name in the bank, `BASE` for the base alone.
        top: so many of the likeliest tokens in the place of each.
        goes_on: the logits behind the last token are wanted too.
        ranked: the rank of each token is wanted too.
    """

    adapter: str
    tokens: Sequence[int]
    top: int = 0
    goes_on: bool = False
    ranked: bool = False


@dataclass
class PromptScores:
    """What a prompt's tokens are given behind those before them.

    Attributes:
        logprobs: in nats, NaN for the first token.
        rivals: the likeliest tokens in the place of each, with their log-probabilities; none for
            the first.
        next_logits: (V,), behind the last token, where they were wanted.
        ranks: of each token among all, 1 for the likeliest, where they were wanted; 0 for the
            first.
    """

    logprobs: list[float]
    rivals: list[list[tuple[int, float]]]
    next_logits: torch.Tensor | None = None
    ranks: list[int] = field(default_factory=lambda: [0])


class Scorer:
    """Scores prompts by a model with a bank's layers in it.

    Args:
        model: the causal language model, without adapters yet.
        routing: of its adapters.
    """

    def __init__(self, model: Any, routing: Routing) -> None:
        self._model, self._routing = model, routing

    @cached_property
    def _output(self) -> OutputLayer | None:
        with self._routing.using(Route()):
            return output_layer(self._model)

    @torch.inference_mode()
    def score(self, prompts: Sequence[Scored]) -> list[PromptScores]:
        """The scores of prompts, in their order."""
        if self._output is None:
            return [one for prompt in prompts for one in self._score([prompt])]
        order = sorted(range(len(prompts)), key=lambda i: prompts[i].adapter)  # neighbours share
        found = self._score([prompts[i] for i in order])
        return [one for _, one in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]

    def _score(self, prompts: Sequence[Scored]) -> list[PromptScores]:
        width = max(len(prompt.tokens) for prompt in prompts)
        rows = [[*prompt.tokens, *[0] * (width - len(prompt.tokens))] for prompt in prompts]
        ids = torch.tensor(rows, device=self._model.device)
        names = [prompt.adapter for prompt in prompts]
        scores = [PromptScores([float("nan")], [[]]) for _ in prompts]
        with self._routing.using(Route.of_rows(names, (len(rows), width))):
            for begin, logits in self._logits(ids):
                logs = (logits.float() if logits.element_size() < 4 else logits).log_softmax(-1)
                for i, (prompt, one, own) in enumerate(zip(prompts, scores, logs, strict=True)):
                    following = prompt.tokens[begin + 1 : begin + 1 + len(own)]
                    _add(one, own[: len(following)], following, prompt)
                    last = len(prompt.tokens) - 1 - begin
                    if prompt.goes_on and 0 <= last < len(own):
                        one.next_logits = logits[i, last].clone()
        return scores

    def _logits(self, ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Logits (rows, some, V) of neighbouring positions (rows, seq), and which is the first."""
        if self._output is None:
            logits = self._model(input_ids=ids, use_cache=False).logits
            yield from ((i * _AT_ONCE, p) for i, p in enumerate(logits.split(_AT_ONCE, dim=1)))
            return
        # An adapter may have put a layer of its own around it by now.
        output = OutputLayer(
            self._model.get_output_embeddings(), self._output.scale, self._output.softcap
        )
        with head_inputs(output.linear) as reached:
            self._model(input_ids=ids, use_cache=False)
        [h] = reached
        step = max(1, _AT_ONCE // len(ids))
        for begin in range(0, h.shape[1], step):
            yield begin, output.logits(h[:, begin : begin + step].contiguous())


def _add(
    scores: PromptScores, logs: torch.Tensor, following: Sequence[int], prompt: Scored
) -> None:
    """Adds log-probabilities (n, V) of the n tokens that follow."""
    own = torch.tensor([*following], dtype=torch.long, device=logs.device)
    chosen = logs.gather(1, own[:, None])
    scores.logprobs.extend(chosen[:, 0].tolist())
    if prompt.ranked:
        scores.ranks.extend(((logs > chosen).sum(-1) + 1).tolist())
    best = logs.topk(min(prompt.top, logs.shape[-1]))
    for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        scores.rivals.append([*zip(tokens, values, strict=True)])
