"""Answers that are written: requests that wait, the rows of the batch, and whose adapters they are.

All of it is for the thread that computes, but for what is called with the engine's lock held.
"""

from __future__ import annotations

from collections.abc import Collection
from threading import Condition
from typing import TYPE_CHECKING, Any

from lorakit.engine.adapter_reader import Loaded
from lorakit.engine.batch import Batch
from lorakit.engine.fair_share import FairQueue
from lorakit.engine.joined_adapters import JoinedAdapters
from lorakit.engine.picture_features import PictureFeatures
from lorakit.engine.pool import Version
from lorakit.engine.pooled import Pooler, scored
from lorakit.engine.prefix_cache import PrefixCache
from lorakit.engine.preparing import Asked, Preparing
from lorakit.engine.requests import AnswerPiece, Ticket
from lorakit.engine.resident import ResidentModel
from lorakit.engine.rows import AnswerRow, reason
from lorakit.engine.rows_at_once import FEW_ROWS, RowMemory
from lorakit.engine.sampling import Ending
from lorakit.engine.speculation import Drafts
from lorakit.errors import LorakitError
from lorakit.lora.routing import BASE
from lorakit.models.classifier_form import SequenceHead
from lorakit.models.loaded import writes_text
from lorakit.models.sentence_pooling import Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answering:
    """The answers of a resident model.

    Args:
        tokenizer, ending: of the base.
        max_rows: how many are written at once; None is as many as the memory holds.
        room: the most tokens of a prompt with its answer.
        pooling: how embeddings are made.
        head: the base's own, of a classifier.
        features, prefixes, drafts: as of `Carried.batch`.
        changed: held where the queue is pushed to, and notified when pictures are prepared.

    Attributes:
        queue: requests that wait.
        batch: the rows that are written.
    """

    def __init__(
        self,
        resident: ResidentModel,
        tokenizer: PreTrainedTokenizerBase,
        ending: Ending,
        *,
        max_rows: int | None,
        room: int,
        pooling: Pooling,
        head: SequenceHead | None,
        features: PictureFeatures | None,
        prefixes: PrefixCache | None,
        drafts: Drafts | None,
        changed: Condition,
    ) -> None:
        self._resident, self._base, self._bank = resident, resident.base, resident.model
        self._tokenizer, self._ending, self._changed = tokenizer, ending, changed
        self._memory = RowMemory(self._base, self._bank.routing, resident.carried)
        self.fits, self.room = max_rows is None, room
        self.max_rows: int = max_rows or max(FEW_ROWS, self._memory.rows(room))
        self.features = features
        self._kept: dict[str, Any] = {
            "features": features,
            "prefixes": prefixes,
            "drafts": drafts,
        }
        self.batch = self._new_batch()
        self._joined = JoinedAdapters(self._bank, min(self.max_rows, FEW_ROWS))
        typed = not writes_text(self._base) and "token_type_ids" in tokenizer.model_input_names
        pad, routing = resident.pad_token_id, self._bank.routing
        self.pooler = Pooler(self._base, routing, pooling, head, pad, typed, self.bring)
        self.queue: FairQueue[Asked] = FairQueue()
        self._preparing = Preparing(features, lambda asked: self.queue.push_first(asked), changed)

    def _new_batch(self) -> Batch:
        return self._resident.answers(self.max_rows, self.room, **self._kept)

    def fit(self, longest: int) -> None:
        """Makes room for as many rows of so many tokens as the memory holds.

        Raises:
            LorakitError: answers are being written.
        """
        if self.batch.rows:
            raise LorakitError("rows cannot be made longer while answers are written")
        self.room, self.max_rows = longest, self._memory.rows(longest)
        self.batch = self._new_batch()

    def waiting(self) -> int:
        """How many requests wait for room, or for their pictures to be decoded."""
        return len(self.queue) + len(self._preparing)

    def under_way(self) -> bool:
        """Whether an answer is being written, or a request waits."""
        return bool(self.queue or self._preparing or self.batch.rows)

    def idle(self) -> bool:
        """Whether no answer is being written, and none can be begun."""
        return not (self.batch.rows or (self.queue and self._has_room()))

    def advance(self) -> None:
        """Lets requests join, and writes a token of each row."""
        self._let_go()
        self._admit()
        if self.batch.rows:
            self._step()

    def _step(self) -> None:
        rows = list(self.batch.rows)
        try:
            self.batch.step()
        except BaseException as error:
            # The batch ends rows that fail by themselves: this is beyond any one of them.
            for row in rows:
                row.fail(f"the model failed while answering: {reason(error)}")
            self.batch = self._new_batch()

    def _let_go(self) -> None:
        """Ends requests that were cancelled while they waited, so that they take no room there."""
        with self._changed:
            left = {t for t, _, _ in self.queue.items() if t.cancelled.is_set()}
            if left:
                self.queue.keep(lambda waiting: waiting[0] not in left)
        for ticket in left:
            ticket.put(AnswerPiece(finish_reason="cancelled"))

    def _admit(self) -> None:
        """Lets waiting requests join, in their order, and scores those of reward models."""
        pooled: list[Asked] = []
        self._joined.begin_step()
        for _ in range(self.max_rows):
            if not (self.queue and self._has_room()):
                break
            with self._changed:
                ticket, version, loaded = asked = self.queue.pop()
            if self._preparing.takes(asked, BASE if version is None else version.key):
                continue
            try:
                if self.batch.rows and not self._brings_on(version, loaded):
                    with self._changed:
                        self.queue.push_first(asked)
                    break
                if self.pooler.takes(ticket, loaded):
                    pooled.append(asked)
                    continue
                self.bring(version, loaded)
                head = None if loaded is None else loaded.head
                if version is not None and head is not None:
                    ticket.put(scored(self._base, self._bank.routing, ticket, version, head))
                else:
                    self.batch.add(self.row(ticket, version))
            except BaseException as error:
                ticket.put(AnswerPiece(finish_reason="error", error=reason(error)))
        self.pooler.answer(pooled)

    def _has_room(self) -> bool:
        """Whether another request may join, beside those whose pictures are being decoded."""
        taken = len(self.batch.rows) + len(self._preparing)
        return taken < self.max_rows and self.batch.has_room()

    def row(self, ticket: Ticket, version: Version | None) -> AnswerRow:
        """A request's row, which is in no batch yet."""
        if version is None:
            return AnswerRow(ticket, BASE, self._tokenizer, self._ending, self._base.device)
        return AnswerRow(ticket, version.key, version.tokenizer, version.ending, self._base.device)

    def bring(
        self, version: Version | None, loaded: Loaded | None, needed: Collection[str] = ()
    ) -> None:
        """Has an adapter in the bank, with those `needed` and those of answers under way."""
        if version is not None and loaded is not None:
            in_use = {row.adapter for row in self.batch.rows} | set(needed)
            self._joined.bring(version.key, loaded, in_use)

    def _brings_on(self, version: Version | None, loaded: Loaded | None) -> bool:
        """Goes on with `bring` beside answers, which are to have their next tokens soon.

        Returns: whether the adapter is in the bank.
        """
        if version is None or loaded is None:
            return True
        in_use = {row.adapter for row in self.batch.rows}
        return self._joined.bring_on(version.key, loaded, in_use)

    def close(self) -> None:
        """Ends all answers and requests, once no more are pushed."""
        with self._changed:
            left = [*self.queue.items(), *self._preparing.close()]
            self.queue.keep(lambda waiting: False)
        for row in self.batch.rows:
            row.finish("cancelled")
        for ticket, _, _ in left:
            ticket.put(AnswerPiece(finish_reason="cancelled"))
