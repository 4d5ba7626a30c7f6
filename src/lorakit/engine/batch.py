"""Answers that are written together, a token each a step; they join and leave at any step.

A step reads prompts of rows that have come, short ones together and long ones in parts; then all
rows whose prompts are read write one token. The route says which adapter serves which row. Rows
with the same prompt and adapter read it once, and what prompts begin with may be known from before
(`prefix_cache.py`). Where a forward fails, its rows are computed one by one, so that only those end
that fail alone too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lorakit.engine.cache import row_cache
from lorakit.engine.next_tokens import choose_next
from lorakit.engine.picture_prompt import picture_inputs, place_pictures
from lorakit.engine.prefix_cache import LEAST, LEAST_ALONE, Prefix, PrefixCache, common
from lorakit.engine.rows import AnswerRow, reason
from lorakit.errors import LorakitError
from lorakit.lora.routing import Route, Routing
from lorakit.models.loaded import copied_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorakit.engine.decode_step import DecodeStep
    from lorakit.engine.picture_features import PictureFeatures
    from lorakit.engine.speculation import Drafts
    from lorakit.lora.packed import PackedFactors

_Inputs = Callable[[int, Sequence[AnswerRow]], dict[str, Any]]

PackedNow = Callable[[], "PackedFactors | None"]
"""Gives the factors that the model's adapters have packed now, if any are."""

CHUNK = 512
"""Tokens of prompts that are read in one step, so that no answer waits long for its next token."""

FORWARD = 32
"""As so many tokens counts a forward that reads fewer, since it reads all weights too."""


class Batch(Protocol):
    """Rows that are computed together, in the two forms that there are."""

    @property
    def rows(self) -> Sequence[AnswerRow]:
        """Those that are not finished."""

    def has_room(self) -> bool:
        """Whether another row may join now."""

    def add(self, row: AnswerRow) -> None:
        """Takes a row in; its adapter is in the bank."""

    def step(self) -> None:
        """Computes something, and lets go of the rows that are finished."""


class ContinuousBatch:
    """Rows with a cache of their own, for models that it carries (`carried.py`).

    Args:
        model: the causal language model with the bank's layers in it.
        routing: the bank's.
        most: how many rows there may be.
        length: how many tokens a row may have.
        route: of all rows; None where each has the adapter that it names.
        in_parts: whether a long prompt is read in parts, so that others go on meanwhile.
        padded: whether short prompts are read together.
        features: those of pictures; None computes them for each prompt.
        prefixes: beginnings of prompts that are known; None keeps none.
        step: computes newest tokens in the model's place, of rows that it serves.
        packed: for that.
        drafts: what answers may go on with, verified several tokens a step; None drafts nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        routing: Routing,
        most: int,
        length: int,
        route: Route | None = None,
        in_parts: bool = True,
        padded: bool = True,
        features: PictureFeatures | None = None,
        prefixes: PrefixCache | None = None,
        step: DecodeStep | None = None,
        packed: PackedNow = lambda: None,
        drafts: Drafts | None = None,
    ) -> None:
        self.rows: list[AnswerRow] = []
        self._model: Any = model
        self._features, self._prefixes = features, prefixes
        self._step, self._packed = step, packed
        self._routing, self._most, self._route = routing, most, route
        self._in_parts, self._padded = in_parts, padded
        self._writing = 0  # the first so many rows have read their prompts
        self._cache = row_cache(model, most, length)
        self._least = LEAST if self._cache.reads_rests else LEAST_ALONE
        # The beginning of a prompt is the same in another one, and the rest can be read behind it.
        self._shares_parts = in_parts and not self._cache.turns_with_length
        reads_drafts = self._cache.reads_rests and not self._cache.turns_with_length
        self.drafts = drafts if reads_drafts else None
        self._keeps_answers = prefixes is not None and prefixes.keeps_answers
        self._last: dict[AnswerRow, torch.Tensor] = {}  # logits of prompts that were just read

    def has_room(self) -> bool:
        return len(self.rows) < self._most

    def add(self, row: AnswerRow) -> None:
        self.rows.append(row)

    def step(self) -> None:
        self._leave()
        self._read_prompts()
        self._leave()
        self._write()
        self._leave()

    # --- prompts ----------------------------------------------------------------------------

    def _read_prompts(self) -> None:
        for at in range(self._writing + 1, len(self.rows)):
            if self.rows[at].read and not self.rows[self._writing].read:  # it was begun before
                self._swap(at, self._writing)
        budget = CHUNK
        while budget > 0 and self._writing < len(self.rows):
            first = self._writing
            budget -= self._read_next(budget)
            for at in range(first, self._writing):
                logits = self._last.pop(self.rows[at], None)
                if logits is not None and not self.rows[at].failed:
                    self._keep(at, logits)
                    self._share(at, logits)
            if any(row.finished for row in self.rows[first:]):  # at once, or as it failed
                self._leave()

    def _read_next(self, budget: int) -> int:
        """Reads the next prompts, or a part of one; returns how much of the budget that takes."""
        first, rows = self._writing, self._next_prompts(budget)
        row = rows[0]
        if row.read == len(row.prompt):  # all of it was known
            self._writing += 1
            return 0
        starts = {row: row.read for row in rows}
        width = max(len(row.prompt) - row.read for row in rows)
        inputs: Callable[..., dict[str, Any]] = self._whole
        if row.pictures is not None:
            inputs = self._with_pictures
        elif len(rows) == 1 and (row.read or row.branch or (self._in_parts and width > budget)):
            width = min(width, budget, (row.branch or len(row.prompt)) - row.read)
            inputs = partial(self._part, starts=starts)
        elif row.read:
            inputs = partial(self._rests, starts=starts)
        for one in rows:
            one.read = min(one.read + width, len(one.prompt))
        self._forward(first, rows, inputs)
        self._writing += sum(one.read == len(one.prompt) for one in rows)
        if row.read == row.branch and not row.failed:
            self._keep(first)
            row.branch = 0
        return max(FORWARD, sum(one.read - starts[one] for one in rows))

    def _next_prompts(self, budget: int) -> list[AnswerRow]:
        """The rows that are read next, which have the first places behind those that write.

        What is known of their prompts is in these places then.
        """
        first = self._writing
        lead = self.rows[first]
        if lead.read:
            return [lead]
        known = self._known(lead)
        lead.branch = self._branch(lead, known)
        rows, prefixes = [lead], [known]
        longest = total = len(lead.prompt) - known.length
        is_step = self._is_step(lead, longest)
        alone = lead.pictures is not None or known.logits is not None or lead.branch
        for row in () if alone else self.rows[first + 1 :]:
            if row.read or row.pictures is not None or any(_alike(row, one) for one in rows):
                continue
            known = self._known(row)
            if known.logits is not None or bool(known.length) != bool(prefixes[0].length):
                continue
            if known.length and not self._cache.reads_rests:
                continue
            if not known.length and any(self._begins_as(row, one) for one in rows):
                continue  # what they have in common is known in the next forward
            own = len(row.prompt) - known.length
            if self._is_step(row, own) != is_step:  # it is computed as it would be alone
                continue
            width = max(longest, own)
            if not is_step and width * (len(rows) + 1) - longest * len(rows) > own + FORWARD:
                continue  # another forward takes less than so much padding
            positions = 0, *(len(one.prompt) for one in (*rows, row))
            fits = self._padded and self._cache.are_alike(*positions)
            if (total + own if is_step else width * (len(rows) + 1)) > budget or not fits:
                break
            longest, total = width, total + own
            rows.append(row)
            prefixes.append(known)
        for at, (row, known) in enumerate(zip(rows, prefixes, strict=True), first):
            self._swap(self.rows.index(row), at)
            self._begin(at, known)
        return rows

    def _is_step(self, row: AnswerRow, tokens: int) -> bool:
        """Whether `DecodeStep` reads so many tokens of a row's prompt: it computes no padding."""
        if self._step is None or tokens > self._step.longest_prompt:
            return False
        return self._step.serves(self._route or Route.of_rows([row.adapter]), self._packed())

    def _known(self, row: AnswerRow) -> Prefix:
        """What is known of a row's prompt."""
        if self._prefixes is None or row.pictures is not None:
            return Prefix()
        snapshots = self._cache.needs_snapshots
        found = self._prefixes.find(row.past, row.prompt, self._least, snapshots)
        return found if self._shares_parts or found.logits is not None else Prefix()

    def _begins_as(self, row: AnswerRow, other: AnswerRow) -> bool:
        """Whether one of two rows need not compute what their prompts begin with."""
        if self._prefixes is None or not self._shares_parts or row.past != other.past:
            return False
        alike = common(row.prompt, other.prompt)
        return alike >= self._least and (self._cache.reads_rests or alike == len(other.prompt))

    def _branch(self, row: AnswerRow, known: Prefix) -> int:
        """Where the beginning ends that most rows which wait have in common with this one.

        0 where there is none, or where no snapshot is needed to go on from there.
        """
        if self._prefixes is None or row.pictures is not None or known.logits is not None:
            return 0
        if not (self._cache.needs_snapshots and self._shares_parts):
            return 0
        found = [known.branch] if known.branch else []
        for other in self.rows[self._writing :]:
            if other is not row and other.past == row.past and not other.pictures:
                alike = common(row.prompt, other.prompt)
                if known.length + self._least <= alike < len(row.prompt):
                    found.append(alike)
        return max(found, key=lambda at: at * sum(other >= at for other in found), default=0)

    def _begin(self, at: int, known: Prefix) -> None:
        """Gives the row in a place what is known of its prompt."""
        row = self.rows[at]
        if self._prefixes is None or row.pictures is not None:
            return
        self._prefixes.count(len(row.prompt), known.length)
        if known.length:
            self._prefixes.restore(known, self._cache, at)
            row.read = row.ticket.cached_tokens = known.length
        if known.logits is not None:
            self._last[row] = known.logits
            choose_next([row], known.logits[None].clone())

    def _keep(self, at: int, logits: torch.Tensor | None = None) -> None:
        """Keeps what the row in a place has read, for prompts that begin with it."""
        row = self.rows[at]
        if self._prefixes is not None and row.pictures is None:
            self._prefixes.add(row.past, row.seen, self._cache, at, logits)

    def _share(self, at: int, logits: torch.Tensor) -> None:
        """Has rows that wait with the same prompt go on from what the row in a place has read.

        Args:
            logits: (vocabulary,) of the prompt's last token.
        """
        row = self.rows[at]
        for place in range(self._writing, len(self.rows)):
            other = self.rows[place]
            if other.read or not _alike(row, other):
                continue
            self._swap(place, self._writing)
            self._cache.move(at, self._writing, len(row.prompt))
            self._writing += 1
            other.read, other.moved = len(row.prompt), row.moved
            other.ticket.prepared = None
            other.ticket.cached_tokens = len(row.prompt)
            if self._prefixes is not None:
                self._prefixes.count(len(row.prompt), len(row.prompt))
            choose_next([other], logits[None].clone())

    def _swap(self, one: int, other: int) -> None:
        """Exchanges two rows, of which one has read nothing."""
        if one == other:
            return
        for source, target in ((one, other), (other, one)):
            if self.rows[source].read:
                self._cache.move(source, target, self.rows[source].read)
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]

    # --- answers ----------------------------------------------------------------------------

    def _write(self) -> None:
        rows = self.rows[: self._writing]
        if self.drafts is not None and rows and self._verify(rows, self.drafts):
            return
        if self._cache.are_alike(*(row.length for row in rows)):
            if rows:
                self._forward(0, rows, self._newest)
            return
        for at, row in enumerate(rows):
            self._forward(at, [row], self._newest)

    def _verify(self, rows: Sequence[AnswerRow], drafts: Drafts) -> bool:
        """Has rows choose tokens as far as their drafts are right, out of one forward.

        Returns: whether it was done; else they are to write one token each.
        """
        drafted = [] if any(row.moved for row in rows) else drafts.of(rows, FORWARD)
        if not any(drafted):
            return False
        rests = [[row.last, *draft] for row, draft in zip(rows, drafted, strict=True)]
        starts, device = [row.length for row in rows], self._model.device
        try:
            given = self._cache.rests_of_prompts(0, rests, starts, device)
            shape = tuple(given["input_ids"].shape)
            self._routing.route = self._route or Route.of_rows([r.adapter for r in rows], shape)
            logits = self._logits(given, every=True)
        except Exception:  # tried without drafts, which tells whose failure it is
            return False
        counts = [len(rest) for rest in rests]
        for row, draft, own in zip(rows, drafted, logits.split(counts), strict=True):
            accepted = 0
            for expected, logits_of in zip([*draft, None], own, strict=True):
                choose_next([row], logits_of[None])
                accepted += row.last == expected and not row.failed
                if row.finished or row.last != expected:
                    break
            drafts.judge(row, len(draft), accepted)
        return True

    def _forward(self, first: int, rows: Sequence[AnswerRow], inputs: _Inputs) -> None:
        """Computes the rows in the places from `first` on; those with whole prompts write a token.

        Args:
            inputs: the model's arguments for such rows, also for one of them.
        """
        try:
            given = inputs(first, rows)
            names = [row.adapter for row in rows]
            shape = tuple(given["input_ids"].shape)
            self._routing.route = self._route or Route.of_rows(names, shape)
            logits = self._logits(given)
        except Exception as error:
            failure = reason(error)
        else:
            for row, own in zip(rows, logits, strict=True):
                if not row.tokens and row.read == len(row.prompt):
                    self._last[row] = own.clone()  # as choosing may change them
            choose_next(rows, logits)
            return
        if len(rows) == 1:
            rows[0].fail(f"the model failed while answering: {failure}")
            return
        for at, row in enumerate(rows, first):
            self._forward(at, [row], inputs)

    def _logits(self, given: dict[str, Any], every: bool = False) -> torch.Tensor:
        """The logits (rows, vocabulary) of the rows' last tokens.

        Args:
            every: of all tokens (tokens, vocabulary), row after row, of `rests_of_prompts`.
        """
        # Where adapters are off, all rows have the base.
        route = self._routing.route if self._routing.enabled else Route()
        place = self._cache.layers[0].place
        if self._step is not None and self._step.serves(route, packed := self._packed()):
            if place.lengths is not None:
                return self._step(self._cache, given, route, packed)
            if given.keys() == self._cache.arguments:  # there are no pictures
                found = self._step.of_prompts(self._cache, given, route, packed, every=every)
                if found is not None:
                    return found
        with copied_once(self._model):
            kept = max(place.prompts) if every else 1
            logits: torch.Tensor = self._model(**given, logits_to_keep=kept).logits
        if every:
            return torch.cat([own[-n:] for own, n in zip(logits, place.prompts, strict=True)])
        return logits[:, -1]

    def _whole(self, first: int, rows: Sequence[AnswerRow]) -> dict[str, Any]:
        prompts = [row.prompt for row in rows]
        return self._cache.whole_prompts(first, prompts, self._model.device)

    def _with_pictures(self, first: int, rows: Sequence[AnswerRow]) -> dict[str, Any]:
        """Prompts with pictures are read whole and alone, as no picture may be divided."""
        [row] = rows
        given, width = self._whole(first, rows), len(row.prompt)
        if self._features is not None:
            given |= self._features.inputs(rows, width)
        else:
            given |= picture_inputs([row.asked()], width, self._model.device)
        positions, row.moved = place_pictures(row.asked(), given)
        return given | positions

    def _part(
        self, at: int, rows: Sequence[AnswerRow], starts: Mapping[AnswerRow, int]
    ) -> dict[str, Any]:
        [row] = rows
        tokens = row.prompt[starts[row] : row.read]
        return self._cache.part_of_row(at, tokens, starts[row], self._model.device)

    def _rests(
        self, first: int, rows: Sequence[AnswerRow], starts: Mapping[AnswerRow, int]
    ) -> dict[str, Any]:
        rests = [row.prompt[starts[row] :] for row in rows]
        begins = [starts[row] for row in rows]
        return self._cache.rests_of_prompts(first, rests, begins, self._model.device)

    def _newest(self, first: int, rows: Sequence[AnswerRow]) -> dict[str, Any]:
        device = self._model.device
        if len(rows) < self._writing:
            [row] = rows
            if self._cache.keeps_states:  # a forward of all failed, which may have changed them
                if row.pictures:
                    raise LorakitError("another row's step failed, and its pictures are not reread")
                return self._cache.part_of_row(first, [*row.prompt, *row.tokens], 0, device)
            return self._cache.part_of_row(first, [row.last], row.length, device, row.moved)
        tokens, lengths = [row.last for row in rows], [row.length for row in rows]
        moved = [row.moved for row in rows]
        return self._cache.newest_tokens(tokens, lengths, device, moved)

    def _leave(self) -> None:
        """Lets go of rows that are finished; those that stay close the gaps."""
        for at in reversed(range(len(self.rows))):
            row = self.rows[at]
            if row.ticket.cancelled.is_set():
                row.finish("cancelled")
            if row.failed:  # what it computed may be NaN or Inf
                self._cache.clear(at, row.length + 1 + (0 if self.drafts is None else FORWARD))
            elif row.finished and self._keeps_answers and row.tokens:
                self._keep(at)
            if row.finished:
                self._remove(at)

    def _remove(self, gap: int) -> None:
        # The last row that writes fills the gap, and the last of all fills that one's, so that
        # the rows that write stay the first ones.
        if gap < self._writing:
            self._writing -= 1
            self._move(self._writing, gap)
            gap = self._writing
        self._move(len(self.rows) - 1, gap)
        self.rows.pop()

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._cache.move(source, target, self.rows[source].length)
            self.rows[target] = self.rows[source]


def _alike(row: AnswerRow, other: AnswerRow) -> bool:
    """Whether two rows have the same prompt, and may share what they have read of it."""
    same = row.past == other.past and row.pictures is other.pictures
    return same and row.prompt == other.prompt
