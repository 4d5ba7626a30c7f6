"""How likely adapters find the tokens of prompts: many prompts a pass, each by its own adapter.

Where the model takes it prompts lie in one line without padding, and what prompts of one adapter
begin with is computed once, such as the context of several continuations; else they are padded on
the right, where no token before the padding sees it. Logits are made of the hidden states whose
next tokens are asked for, a few at a time, as those of whole prompts would take more memory than
all else. A model whose output layer is not a plain one computes one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import torch

from lorakit.data.grouping import AT_ONCE
from lorakit.data.masking import IGNORE, TokenizedRow
from lorakit.data.prefixes import Segment, in_segments
from lorakit.engine.prefix_cache import common
from lorakit.lora.routing import Route, Routing
from lorakit.models.lines import Lines, in_a_line
from lorakit.models.loss import OutputLayer, head_inputs, output_layer
from lorakit.models.row_attention import rows_apart

_LOGITS = 256  # positions whose logits are there in float32 at a time


@dataclass(frozen=True)
class Scored:
    """A prompt to be scored.

    Args:
        adapter: its name in the bank, `BASE` for the base alone.
        top: so many of the likeliest tokens in the place of each.
        goes_on: the logits behind the last token are wanted too.
        begin: the first token that is scored.
        ranked: the rank of each token is wanted too.
    """

    adapter: str
    tokens: Sequence[int]
    top: int = 0
    goes_on: bool = False
    begin: int = 0
    ranked: bool = False

    @property
    def read(self) -> Sequence[int]:
        """The tokens that the model must see."""
        return self.tokens if self.goes_on else self.tokens[:-1]

    @property
    def first(self) -> int:
        """The first position whose hidden state is needed."""
        return max(0, self.begin - 1)


@dataclass
class PromptScores:
    """What a prompt's tokens are given behind those before them, from `Scored.begin` on.

    Attributes:
        logprobs: in nats, NaN for the first token of the prompt.
        rivals: the likeliest tokens in the place of each, with their log-probabilities; none for
            the first token of the prompt.
        next_logits: (V,), behind the last token, where they were wanted.
        ranks: of each token among all, 1 for the likeliest, where they were wanted; 0 for the
            first token of the prompt.
    """

    logprobs: list[float]
    rivals: list[list[tuple[int, float]]]
    next_logits: torch.Tensor | None = None
    ranks: list[int] = field(default_factory=list)


_Asked = tuple[Scored, PromptScores]


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

    @cached_property
    def _lines(self) -> Lines:
        lines = Lines(self._model)
        with self._routing.using(Route()):
            assert lines.prefixes in (True, False)  # it is tried now, under this route
        return lines

    @torch.inference_mode()
    def passes(self, prompts: Sequence[Scored]) -> list[list[int]]:
        """The positions of prompts that are scored together, those that begin alike beside each
        other; as many in a pass as have about `AT_ONCE` tokens that are not computed before.
        """
        if self._output is None:
            return [[i] for i in range(len(prompts))]
        in_line = self._lines.refused is None
        shares = in_line and self._lines.prefixes

        def place(i: int) -> Any:
            tokens = prompts[i].tokens
            return prompts[i].adapter, [*tokens] if shares else len(tokens)

        found: list[list[int]] = []
        filled = 0
        for i in sorted(range(len(prompts)), key=place):
            size = own = len(prompts[i].tokens)
            if (
                found
                and shares
                and prompts[i].adapter == (before := prompts[found[-1][-1]]).adapter
            ):
                own -= common(prompts[i].tokens[: prompts[i].first], before.tokens)
            # Padded to the longest, which is the last one, all of them become as long.
            filled = filled + own if in_line else size * (len(found[-1]) + 1 if found else 1)
            if not found or filled > AT_ONCE:
                found.append([])
                filled = size
            found[-1].append(i)
        return found

    @torch.inference_mode()
    def score(self, prompts: Sequence[Scored]) -> list[PromptScores]:
        """The scores of prompts, in their order, out of one pass."""
        found = [PromptScores([], []) for _ in prompts]
        for prompt, scores in zip(prompts, found, strict=True):
            if not prompt.begin:
                scores.logprobs.append(float("nan"))
                scores.rivals.append([])
                scores.ranks.append(0)
        pairs = [one for one in zip(prompts, found, strict=True) if len(one[0].read) > one[0].first]
        pairs.sort(key=lambda one: one[0].adapter)  # neighbours share
        if self._output is None:
            for one in pairs:
                _add([one], [self._own_logits(one[0])])
        elif pairs:
            in_line = self._lines.refused is None
            states = self._in_line(pairs) if in_line else self._padded(pairs)
            counts = [len(prompt.read) - prompt.first for prompt, _ in pairs]
            self._read(pairs, states.split(counts), self._output)
        return found

    def _read(
        self, pairs: Sequence[_Asked], states: Sequence[torch.Tensor], known: OutputLayer
    ) -> None:
        """Takes in the states (n, d) of each prompt, those of one adapter under its route."""
        # An adapter may have put a layer of its own around it by now.
        head = self._model.get_output_embeddings()
        output = OutputLayer(head, known.scale, known.softcap)
        numbered = groupby(range(len(pairs)), key=lambda i: pairs[i][0].adapter)
        for adapter, own in ((adapter, [*own]) for adapter, own in numbered):
            h = torch.cat([states[i] for i in own])
            with self._routing.using(Route.of_rows([adapter])):
                _add([pairs[i] for i in own], (output.logits(part) for part in h.split(_LOGITS)))

    def _own_logits(self, prompt: Scored) -> torch.Tensor:
        ids = torch.tensor([[*prompt.read]], device=self._model.device)
        with self._routing.using(Route.of_rows([prompt.adapter])):
            return self._model(input_ids=ids, use_cache=False).logits[0, prompt.first :]

    def _padded(self, pairs: Sequence[_Asked]) -> torch.Tensor:
        """The hidden states (n, d) that are needed of all prompts, one behind the other."""
        prompts = [prompt for prompt, _ in pairs]
        width = max(len(prompt.read) for prompt in prompts)
        rows = [[*prompt.read, *[0] * (width - len(prompt.read))] for prompt in prompts]
        ids = torch.tensor(rows, device=self._model.device)
        route = Route.of_rows([prompt.adapter for prompt in prompts], (len(rows), width))
        h = self._states(route, {"input_ids": ids})
        ends = zip(h, prompts, strict=True)
        return torch.cat([own[prompt.first : len(prompt.read)] for own, prompt in ends])

    def _in_line(self, pairs: Sequence[_Asked]) -> torch.Tensor:
        """The same out of one line, in which a beginning that prompts share stands once."""
        parts: list[list[int]] = []
        parents: list[int | None] = []
        ends: list[int] = []  # of each prompt, the part in which it ends
        names: list[str] = []
        sizes: list[int] = []
        for adapter, own in groupby((prompt for prompt, _ in pairs), key=lambda one: one.adapter):
            rows = [_row(prompt) for prompt in own]
            whole = [Segment(i, 0, len(row), None) for i, row in enumerate(rows)]
            segments = in_segments(rows) if self._lines.prefixes else whole
            shared, before = {one.parent for one in segments}, len(parts)
            for number, (row, begin, end, parent) in enumerate(segments):
                parts.append(rows[row].input_ids[begin:end])
                parents.append(None if parent is None else before + parent)
                if number not in shared:
                    ends.append(before + number)
            names.append(adapter)
            sizes.append(sum(map(len, parts[before:])))
        line = in_a_line(parts, parents if any(p is not None for p in parents) else None)
        route = Route.of_rows(names)
        if len(names) > 1:
            route = Route(rows=tuple(names), shape=(1, sum(sizes)), sizes=tuple(sizes))
        h = self._states(route, {k: t.to(self._model.device) for k, t in line.items()})[0]
        stops = [*accumulate(map(len, parts))]
        needed = [
            h[stops[end] - (len(prompt.read) - prompt.first) : stops[end]]
            for end, (prompt, _) in zip(ends, pairs, strict=True)
        ]
        return torch.cat(needed)

    def _states(self, route: Route, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the output layer is given (rows, seq, d)."""
        head = self._model.get_output_embeddings()
        with self._routing.using(route), rows_apart(inputs), head_inputs(head) as reached:
            self._model(**inputs, use_cache=False)
        [h] = reached
        return h


def _row(prompt: Scored) -> TokenizedRow:
    """A prompt as a row of which what is scored is supervised."""
    scored = [IGNORE] * (prompt.first + 1) + [*prompt.read[prompt.first + 1 :]]
    return TokenizedRow([*prompt.read], scored, "a prompt")


def _add(pairs: Sequence[_Asked], parts: Iterable[torch.Tensor]) -> None:
    """Adds what the logits say that follow on each position of these prompts.

    Args:
        parts: logits (some, V), which are all of them together.
    """
    places: list[tuple[PromptScores, int | None, Scored]] = []
    for prompt, scores in pairs:
        following = [*prompt.tokens[prompt.first + 1 :], *([None] if prompt.goes_on else [])]
        places += [(scores, token, prompt) for token in following]
    at = 0
    for logits in parts:
        here = places[at : at + len(logits)]
        at += len(logits)
        logs = (logits.float() if logits.element_size() < 4 else logits).log_softmax(-1)
        own = torch.tensor([token or 0 for _, token, _ in here], device=logits.device)
        chosen = logs.gather(1, own[:, None])
        values = chosen[:, 0].tolist()
        ranked = any(prompt.ranked for *_, prompt in here)
        ranks = ((logs > chosen).sum(-1) + 1).tolist() if ranked else []
        best = logs.topk(min(max(prompt.top for *_, prompt in here), logs.shape[-1]))
        rivals = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for i, ((scores, token, prompt), (tokens, of_tokens)) in enumerate(
            zip(here, rivals, strict=True)
        ):
            if token is None:
                scores.next_logits = logits[i].clone()
                continue
            scores.logprobs.append(values[i])
            scores.rivals.append([*zip(tokens, of_tokens, strict=True)][: prompt.top])
            if prompt.ranked:
                scores.ranks.append(ranks[i])
