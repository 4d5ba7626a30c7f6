"""From what a request says to the tokens that the model reads.

That takes a while for a long prompt, so a thread does it, prompt by prompt and in turn
(`fair_turns.py`): the event loop goes on meanwhile, and a tokenizer is used by one at a time here.
Before that, its template is rendered in another process, in turn with others of that template: one
that takes its time holds up nobody else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from lorakit.data.answer_form import answer_form
from lorakit.data.bounded_templates import TemplateTimeoutError, isolated_templates
from lorakit.data.conversations import Message
from lorakit.data.masking import TokenizedRow
from lorakit.data.samples import Sample
from lorakit.data.tool_calls import ToolCalls, tool_calls_of
from lorakit.engine.bounded_tokens import TooManyTokensError, tokens_within
from lorakit.engine.call_layout import CallLayout, call_layout
from lorakit.engine.engine import Engine
from lorakit.engine.pair_tokens import Cut, Encoded, Side, encoded
from lorakit.engine.picture_prompt import prompt_row
from lorakit.engine.scoring import scored_tokens
from lorakit.engine.shown import NotShownError, shown_text
from lorakit.errors import InputError, LorakitError
from lorakit.models.picture_reader import reader_of, why_unread
from lorakit.server.errors import ApiError, bad_field, in_words
from lorakit.server.fair_turns import Turns
from lorakit.server.images import Images, broken, places_of, without_pictures
from lorakit.server.payloads import ChatRequest
from lorakit.server.sampling_fields import Cutting, Truncated
from lorakit.server.tool_choice import wanted_form

_Reading = tuple[ToolCalls, CallLayout | None]
Made = TypeVar("Made")


class Prompts:
    """Prompts for one engine."""

    def __init__(self, engine: Engine, images: Images) -> None:
        self._engine, self._images = engine, images
        self._turns = Turns("lorakit-prompts")
        self._of_templates: dict[str, Turns] = {}
        self._reads: WeakKeyDictionary[Any, dict[tuple[str, bool], _Reading]]
        self._reads = WeakKeyDictionary()

    async def of_chat(
        self, adapter: str | None, asked: ChatRequest, client: str, characters: int
    ) -> tuple[TokenizedRow, ToolCalls]:
        """The conversation in the template of the adapter, up to where the answer begins.

        What the answer must look like by the request's tools is set in `asked`.

        Args:
            client: who asks, for a fair order.
            characters: about how long the conversation is, with its pictures.

        Returns: the prompt, and how its answers are read.

        Raises:
            InputError: the template refuses it.
            ApiError: 400, the template takes too long for it, it leaves no room in the context
                for an answer, or it has a picture that the model cannot be shown.
        """
        tokenizer = self._engine.tokenizer_of(adapter)
        messages, pixels = [message.for_template() for message in asked.messages], 0
        if places := places_of(messages):
            if reader_of(tokenizer) is None:
                why = why_unread(tokenizer)
                raise places[0].error(f"pictures cannot be read: {why}", "unsupported_value")
            characters -= sum(len(place.url) for place in places)
            messages, pixels = await self._images.taken(messages, client)

        def written() -> tuple[str, ToolCalls]:
            shown = without_pictures(messages)
            text = shown_text(
                shown,
                tokenizer,
                asked.shown_tools(),
                asked.chat_template_kwargs,
                add_generation_prompt=asked.add_generation_prompt is not False,
                continue_final_message=bool(asked.continue_final_message),
            )
            return text, self._read_by(tokenizer, asked, text)

        template = str(tokenizer.chat_template)
        turns = self._of_templates.setdefault(template, Turns("lorakit-template"))
        try:
            text, reads = await turns.run(written, characters, client)
        except TemplateTimeoutError as error:
            raise bad_field(str(error), "messages") from error
        except NotShownError as error:
            raise bad_field(str(error), in_words(error.place), "unsupported_value") from error
        finally:
            if turns.idle:
                self._of_templates.pop(template, None)
        if places:
            row = await self._with_pictures(text, messages, tokenizer, pixels, client)
            return row, reads
        work = partial(tokens_within, text, tokenizer, self._read_at_most(asked))
        tokens = await self._in_turn(work, len(text), client, "messages")
        return TokenizedRow(self._cut(tokens, asked, "messages"), [], ""), reads

    def _read_by(self, tokenizer: Any, asked: ChatRequest, prompt: str) -> ToolCalls:
        """How answers to a prompt are read; what they must look like is set in `asked`."""
        key = str(tokenizer.chat_template), bool(asked.shown_tools())
        known = self._reads.setdefault(tokenizer, {})
        if key not in known:
            with isolated_templates():
                known[key] = _reading(tokenizer, with_tools=key[1])
        reads, layout = known[key]
        answers = reads.answers
        marks = (mark for mark in answers.reasoning if prompt.rstrip().endswith(mark[0]))
        opened = next((closing for _, closing in marks), "")
        special = any(answers.special.search("".join(mark)) for mark in answers.reasoning[:1])
        if asked.shown_tools() or special:
            asked.keep_special_tokens()
        asked.take_form(wanted_form(asked, layout and replace(layout, opened=opened), opened))
        return replace(reads, answers=replace(answers, opened=opened))

    async def _with_pictures(
        self, text: str, messages: Sequence[Message], tokenizer: Any, pixels: int, client: str
    ) -> TokenizedRow:
        work = partial(prompt_row, text, messages, tokenizer, self._limit)
        try:
            row: TokenizedRow = await self._images.in_turn(work, pixels, client)
        except TooManyTokensError as error:
            raise self._too_long(error, "messages") from error
        except InputError as error:
            found = partial(broken, messages, error)
            raise await self._images.in_turn(found, pixels, client) from error
        return row

    async def of_texts(
        self,
        adapter: str | None,
        prompts: Sequence[str | list[int]],
        client: str,
        field: str = "prompt",
        special: bool = True,
        cut: Truncated | None = None,
    ) -> list[list[int]]:
        """Each prompt's tokens.

        Args:
            field: where they stand in the request.
            special: whether texts get the special tokens that the tokenizer adds.
            cut: how a prompt that is too long is shortened; None refuses it.

        Raises:
            ApiError: 400, a token id is none of the model's, or a prompt leaves no room in the
                context for an answer.
        """
        tokenizer = self._engine.tokenizer_of(adapter)
        size, most, made = len(tokenizer), self._read_at_most(cut), []
        for prompt in prompts:
            ends: list[int] = []
            if isinstance(prompt, str):
                if self._engine.pooling.lower_case:
                    prompt = prompt.lower()
                work = partial(tokens_within, prompt, tokenizer, most, add_special_tokens=special)
                prompt = await self._in_turn(work, len(prompt), client, field)
                ends = _closing(prompt, tokenizer) if special else []
            prompt = self._cut(prompt, cut, field, ends)
            if (highest := max(prompt, default=0)) >= size:
                raise bad_field(f"{field}: {highest} is not a token id; there are {size}", field)
            made.append(prompt)
        return made

    def _read_at_most(self, cut: Truncated | None) -> int:
        """How many tokens of a text are made before it is refused."""
        shortened = cut is not None and cut.truncate_prompt_tokens is not None
        return sys.maxsize // 16 if shortened else self._limit

    def _cut(
        self,
        tokens: list[int],
        cut: Truncated | None,
        field: str,
        ends: Sequence[int] = (),
    ) -> list[int]:
        """The last tokens, as many as `truncate_prompt_tokens` says; an embedding model's first.

        Args:
            ends: special tokens behind the text, which stay where the first are kept.

        Raises:
            ApiError: 400, there are more than the context has room for.
        """
        if cut is not None and (kept := cut.truncate_prompt_tokens) is not None:
            if kept < 0:
                kept = min(self._limit, self._engine.context_length - cut.asked_for)
            kept = max(kept, 1)
            if self._engine.writes:
                tokens = tokens[-kept:]
            elif len(tokens) > kept:
                tokens = [*tokens[: max(0, kept - len(ends))], *ends][:kept]
        if len(tokens) > self._limit:
            raise self._too_long(TooManyTokensError(len(tokens), self._limit, True), field)
        return tokens

    async def of_classified(
        self,
        adapter: str | None,
        given: Sequence[tuple[str, ...] | list[int]],
        client: str,
        field: str,
        cut: Cutting,
        each: tuple[int | None, ...] = (),
    ) -> list[Encoded]:
        """The tokens of texts, of pairs of texts, and of lists of tokens.

        A causal model reads the last token, so that the beginning of a long text is cut off; of
        others it is the end that the tokenizer cuts off.

        Args:
            field: where they stand in the request.
            each: the most tokens of each text of a pair, alone.

        Raises:
            ApiError: 400, as `of_texts`.
            InputError: a text cannot be read, or there is no room for it.
        """
        tokenizer, made = self._engine.tokenizer_of(adapter), []
        whole = cut.truncate_prompt_tokens
        side: Side | None = cut.truncation_side or ("left" if self._engine.writes else None)
        how = Cut(self._limit if whole == -1 else whole, each, side)
        for one in given:
            if isinstance(one, list):
                if how.whole is not None and cut.truncation_side is not None:
                    left = cut.truncation_side == "left"
                    one = one[-how.whole :] if left else one[: how.whole]
                [tokens] = await self.of_texts(adapter, [one], client, field, cut=cut)
                made.append(Encoded(tokens))
                continue
            texts = [text.lower() for text in one] if self._engine.pooling.lower_case else one
            work = partial(encoded, texts, tokenizer, self._limit, how)
            made.append(await self._in_turn(work, sum(map(len, texts)), client, field, cuts=True))
        return made

    async def of_scored(
        self,
        adapter: str | None,
        given: Sequence[str | list[int] | list[dict[str, Any]]],
        client: str,
    ) -> list[list[int]]:
        """The tokens of texts, tokens and conversations, as they are in training.

        Raises:
            InputError: the template refuses a conversation.
            ApiError: 400, the template takes too long for it, a token id is none of the model's,
                or there are more tokens than the context has.
        """
        tokenizer, made = self._engine.tokenizer_of(adapter), []
        for one in given:
            if one and isinstance(one[0], int):
                made += await self.of_texts(adapter, [one], client, "input")  # type: ignore[list-item]
                continue
            if isinstance(one, str):
                await self.of_texts(
                    adapter, [one], client, "input"
                )  # not too long to be tokenized again
                sample, turns = Sample((), one, "input"), self._turns
            else:
                sample = Sample(tuple(one), None, "messages")  # type: ignore[arg-type]
                template = str(tokenizer.chat_template)
                turns = self._of_templates.setdefault(template, Turns("lorakit-template"))
            work = partial(scored_tokens, sample, tokenizer, self._engine.context_length)
            try:
                made.append(await turns.run(work, len(str(one)), client))
            except TemplateTimeoutError as error:
                raise bad_field(str(error), sample.where) from error
            except TooManyTokensError as error:
                raise self._too_long(error, sample.where) from error
            finally:
                if turns is not self._turns and turns.idle:
                    self._of_templates.pop(str(tokenizer.chat_template), None)
        return made

    @property
    def _limit(self) -> int:
        return self._engine.longest_prompt

    async def _in_turn(
        self,
        work: Callable[[], Made],
        characters: int,
        client: str,
        param: str,
        cuts: bool = False,
    ) -> Made:
        try:
            return await self._turns.run(work, characters, client)
        except TooManyTokensError as error:
            raise self._too_long(error, param, cuts) from error

    def _too_long(self, error: TooManyTokensError, param: str, cuts: bool = False) -> ApiError:
        amount = f"{error.tokens}" if error.counted else f"more than {error.tokens}"
        return bad_field(
            f"the model's context is {self._engine.context_length} tokens, and the prompt alone "
            f"has {amount}: shorten the prompt{', or give truncate_prompt_tokens' * cuts}",
            param,
            code="context_length_exceeded",
        )


def _closing(tokens: Sequence[int], tokenizer: Any) -> list[int]:
    """The special tokens that stand behind a text."""
    special = set(tokenizer.all_special_ids)
    at = len(tokens)
    while at > 1 and tokens[at - 1] in special:
        at -= 1
    return list(tokens[at:])


def _reading(tokenizer: Any, *, with_tools: bool) -> _Reading:
    """How a template's answers are read, and how its calls are written.

    One that fails on calls still serves conversations, and none of its answers has a call.
    """
    if with_tools:
        try:
            reads = tool_calls_of(tokenizer)
            return reads, call_layout(tokenizer, reads)
        except LorakitError:
            pass
    return ToolCalls(None, answer_form(tokenizer)), None
