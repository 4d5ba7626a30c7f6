"""The answers to one request: a ticket of the engine's for each prompt and choice.

A `Desk` hands them in as long as there is room. Whatever ends a request early (a client that left,
the time limit, the server's end) ends in `close` or `cut` of its `OpenAnswers`, which frees rows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial

from lorakit.data.picture_rows import RowPictures
from lorakit.engine.engine import Engine
from lorakit.engine.grammar import GrammarError
from lorakit.engine.requests import AnswerPiece, ChosenToken, Ticket
from lorakit.server.adapters import adapter_named
from lorakit.server.errors import ApiError, bad_field
from lorakit.server.fair_turns import Turns
from lorakit.server.keys import Caller
from lorakit.server.options import Limits
from lorakit.server.payloads import Pooled
from lorakit.server.prometheus import Metrics
from lorakit.server.replies import FinishReason, Usage
from lorakit.server.sampling_fields import SamplingFields

_RETRY_AFTER = 1
_Numbered = tuple[int, AnswerPiece | None]  # None: the answers were cut


@dataclass
class Answer:
    """One answer, whole."""

    text: str = ""
    logprobs: list[ChosenToken] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    scores: tuple[float, ...] = ()
    embedding: tuple[float, ...] | None = None


class OpenAnswers:
    """The answers to one request while they are written.

    Attributes:
        prompt_tokens: of all prompts; one that gets several answers counts once.
    """

    def __init__(
        self, desk: Desk, tickets: list[Ticket], prompt_tokens: int, deadline: float
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self._desk, self._tickets = desk, tickets
        self._counts = [0] * len(tickets)
        self._seen = [time.perf_counter()] * len(tickets)
        self._queue: asyncio.Queue[_Numbered] = asyncio.Queue()
        self._cut: ApiError | None = None
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_at(deadline, self.cut, desk.late())

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def usage(self) -> Usage:
        """The counts so far."""
        written = sum(self._counts)
        cached: dict[tuple[int, ...], int] = {}  # answers to one prompt have it from the first
        for ticket in self._tickets:
            found = cached.get(ticket.prompt, ticket.cached_tokens)
            cached[ticket.prompt] = min(found, ticket.cached_tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }

    async def pieces(self) -> AsyncGenerator[tuple[int, AnswerPiece]]:
        """Pieces with the number of their answer, as they come.

        Raises:
            ApiError: 500, an answer failed; 503, the engine has stopped, or an answer was cut that
                cannot end so.
        """
        queue = self._queue
        pumps = [asyncio.create_task(_pump(*item, queue)) for item in enumerate(self._tickets)]
        try:
            left = len(pumps)
            while left:
                number, piece = await queue.get()
                if piece is None:
                    self._check_cut()
                    continue
                left -= piece.finish_reason is not None
                yield number, self._noted(number, piece)
        finally:
            for task in pumps:
                task.cancel()

    async def whole(self) -> list[Answer]:
        """All answers, when they have ended.

        Raises:
            ApiError: as `pieces`.
        """
        answers = [Answer() for _ in self._tickets]
        texts: list[list[str]] = [[] for _ in self._tickets]
        async with aclosing(self.pieces()) as pieces:
            async for number, piece in pieces:
                texts[number].append(piece.text)
                answers[number].logprobs += piece.logprobs
                answers[number].scores = piece.scores
                answers[number].embedding = piece.embedding
                answers[number].finish_reason = finish_reason(piece) or "stop"
        for answer, parts in zip(answers, texts, strict=True):
            answer.text = "".join(parts)
        return answers

    def cut(self, reason: ApiError) -> None:
        """Ends the answers where they are; those without a token yet fail with `reason`."""
        self._cut = self._cut or reason
        for ticket in self._tickets:
            ticket.cancel()
        self._queue.put_nowait((-1, None))

    def close(self) -> None:
        """Frees the rows that are still taken. Nobody listens any more."""
        self._deadline.cancel()
        for ticket in self._tickets:
            ticket.cancel()
        self._desk.forget(self)

    def _noted(self, number: int, piece: AnswerPiece) -> AnswerPiece:
        now, metrics = time.perf_counter(), self._desk.metrics
        new = piece.new_tokens - self._counts[number]
        if new > 0:
            waited = now - self._seen[number]
            if self._counts[number] == 0:
                metrics.to_first_token.observe(waited)
            else:
                metrics.between_tokens.observe(waited / new)
            metrics.generated_tokens.inc(new)
            self._counts[number], self._seen[number] = piece.new_tokens, now
        if piece.finish_reason == "error" and piece.refused:
            raise bad_field(f"the answer cannot go on: {piece.error}", code="invalid_value")
        if piece.finish_reason == "error":
            raise ApiError(500, f"the answer failed: {piece.error}", code="answer_failed")
        if piece.finish_reason == "cancelled":
            if self._cut is None:
                raise ApiError(503, "the engine has stopped", code="shutdown")
            return replace(piece, finish_reason="length")
        return piece

    def _check_cut(self) -> None:
        """Raises why the answers were cut, unless what they have can pass for shorter answers."""
        if self._cut is not None and (self._cut.code != "timeout" or 0 in self._counts):
            raise self._cut


async def _pump(number: int, ticket: Ticket, queue: asyncio.Queue[_Numbered]) -> None:
    async for piece in ticket.pieces():
        queue.put_nowait((number, piece))


class Desk:
    """Where requests are handed in, and all that are under way.

    Attributes:
        draining: whether the server ends and takes nothing new.
        inside: how many requests are under way, from their head to the end of the reply.
        body_bytes: how much the bodies of these take.
        busy: those of them that count against the limit.
        find: makes a model of the training service available by its name, if there is a service.
    """

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics) -> None:
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self.draining = False
        self.inside = self.busy = self.body_bytes = 0
        self.find: Callable[[str, Caller], Awaitable[None]] | None = None
        self._stopped: ApiError | None = None
        self._open: set[OpenAnswers] = set()
        self._rows = 0
        self._grammars = Turns("lorakit-grammars")

    async def adapter(self, model: str, caller: Caller) -> str | None:
        """The adapter that a request means by `model`; None for the base.

        Raises:
            ApiError: 404, it is neither, or another's.
        """
        if self.find is not None:
            await self.find(model, caller)
        return adapter_named(self.engine, model, caller)

    def deadline(self) -> float:
        """When a request that comes now must have ended, on the event loop's clock."""
        return asyncio.get_running_loop().time() + self.limits.request_seconds

    def late(self) -> ApiError:
        """What a request is told that has no answer at its deadline."""
        return ApiError(
            503,
            f"no row became free within {self.limits.request_seconds:g} s: ask again later",
            code="timeout",
            retry_after=_RETRY_AFTER,
        )

    def require_room(self, rows: int) -> None:
        """Refuses so many answers if they cannot be taken now.

        Raises:
            ApiError: 400, so many never can; 429, too many are under way.
        """
        room = self.engine.max_rows + self.limits.waiting
        if rows > room:
            raise bad_field(f"this asks for {rows} answers at once; at most {room} are taken", "n")
        if self._rows + rows > room:
            raise ApiError(
                429,
                f"{self._rows} answers are under way and {room} are taken at most: ask again later",
                code="rate_limit_exceeded",
                retry_after=_RETRY_AFTER,
            )

    async def hand_in(
        self,
        prompts: Sequence[Sequence[int]],
        adapter: str | None,
        asked: SamplingFields | Pooled,
        deadline: float,
        pictures: RowPictures | None = None,
        owner: str = "",
        types: Sequence[Sequence[int]] = (),
    ) -> OpenAnswers:
        """Hands `asked.choices` requests a prompt to the engine.

        Args:
            deadline: of `deadline()`, when the request came.
            pictures: those in the prompt, which is the only one then.
            owner: whose it is.
            types: of each prompt's tokens, where a pair's texts are told apart.

        Raises:
            ApiError: 400 when a prompt does not fit the context or the model does not do what is
                asked, 429 when too much waits.
            UnknownModelError: the adapter was unloaded meanwhile.
            InputError: the engine refuses one.
        """
        self.require_kind(adapter, asked)
        if isinstance(asked, SamplingFields):
            self._check_tokens(asked)
            await self._compile(adapter, asked, owner)
        limits = [self._token_limit(prompt, asked) for prompt in prompts]
        rows = len(prompts) * asked.choices
        self.require_room(rows)

        def submit() -> list[Ticket]:
            tickets: list[Ticket] = []
            try:
                for at, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
                    own = types[at] if types else ()
                    for choice in range(asked.choices):
                        sampling = asked.sampling(limit, choice)
                        submit = self.engine.submit
                        tickets.append(submit(prompt, adapter, sampling, pictures, owner, own))
            except BaseException:
                for ticket in tickets:
                    ticket.cancel()
                raise
            return tickets

        self._rows += rows
        try:
            # An adapter that is not in memory is read when it is asked for, and the grammar of one
            # that was replaced meanwhile is compiled again: either takes a while.
            at_once = adapter is None or self.engine.pool.holds(adapter)
            if isinstance(asked, SamplingFields) and (form := asked.form()) is not None:
                at_once = at_once and self.engine.grammars.is_compiled(form[1], adapter)
            tickets = submit() if at_once else await asyncio.to_thread(submit)
        except BaseException:
            self._rows -= rows
            raise
        tokens = sum(map(len, prompts))
        self.metrics.prompt_tokens.inc(tokens)
        answers = OpenAnswers(self, tickets, tokens, deadline)
        self._open.add(answers)
        if self._stopped is not None:  # meanwhile
            answers.cut(self._stopped)
        return answers

    def forget(self, answers: OpenAnswers) -> None:
        """These are no longer under way."""
        if answers in self._open:
            self._open.remove(answers)
            self._rows -= len(answers)

    def stop(self) -> None:
        """Cuts off what is under way, and what still comes: the server ends."""
        self._stopped = ApiError(503, "the server ends before this answer", code="shutdown")
        for answers in list(self._open):
            answers.cut(self._stopped)

    def require_kind(self, adapter: str | None, asked: SamplingFields | Pooled) -> None:
        """Refuses what a model does not give with this adapter, and says what it gives."""
        wants = asked.wants if isinstance(asked, Pooled) else "text"
        gives = self.engine.outputs(adapter)
        # Whoever has hidden states gives embeddings; a classifier's own are made for its head.
        embeds = self.engine.base_outputs.kind in ("text", "embedding")
        if wants == gives.kind or (wants == "embedding" and embeds):
            return
        if wants == "labels" and gives.labels:  # one label is one too
            return
        says = {
            "embedding": f"gives embeddings and no {wants}: ask it at /v1/embeddings, /v1/score or "
            "/v1/rerank",
            "scores": "is a reward model: ask it at /pooling, /v1/score or /v1/rerank",
            "labels": "is a classifier: ask it at /classify",
            "text": f"writes text and gives no {wants}",
        }[gives.kind]
        if gives.kind == "scores" and gives.pairs:
            says = "is a cross-encoder: ask it at /v1/score, /v1/rerank or /classify"
        raise bad_field(f"{asked.model} {says}", "model")

    def embeds_only(self, adapter: str | None) -> bool:
        """Whether an adapter, or the base, gives embeddings and nothing else."""
        return self.engine.outputs(adapter).kind == "embedding"

    def _check_tokens(self, asked: SamplingFields) -> None:
        """Refuses tokens that the model does not have."""
        size = self.engine.vocabulary
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            for token in getattr(asked, name) or ():
                if int(token) >= size:
                    raise bad_field(f"{name}: {token} is no token; there are {size}", name)

    async def _compile(self, adapter: str | None, asked: SamplingFields, owner: str) -> None:
        """Compiles what an answer must look like, in turn with others: nobody else waits.

        Raises:
            ApiError: 400, it cannot be, within limits of time and size.
        """
        if (form := asked.form()) is None:
            return
        field, grammar = form
        if self.engine.grammars.is_compiled(grammar, adapter):
            return
        work = partial(self.engine.grammars.form, grammar, adapter)
        try:
            await self._grammars.run(work, len(grammar.text), owner)
        except GrammarError as error:
            raise bad_field(f"{field}: {error}", field, code="invalid_value") from error

    def _token_limit(self, prompt: Sequence[int], asked: SamplingFields | Pooled) -> int:
        """How many tokens an answer to `prompt` may have.

        Raises:
            ApiError: 400, more than the context holds were asked for.
        """
        if isinstance(asked, Pooled):
            return 1
        context, wanted, field = self.engine.context_length, asked.token_limit, asked.limit_field
        left = context - len(prompt)
        if field is not None and wanted is not None and wanted > left:
            raise bad_field(
                f"{field} is {wanted}, and the model's context is {context} tokens, of which the "
                f"prompt takes {len(prompt)}: ask for at most {left}, or leave {field} out",
                field,
                code="context_length_exceeded",
            )
        return min(wanted or left, left)


def finish_reason(piece: AnswerPiece) -> FinishReason | None:
    """Why an answer ended, in OpenAI's words; None as long as it has not."""
    if piece.finish_reason is None:
        return None
    return "stop" if piece.finish_reason == "stop" else "length"
